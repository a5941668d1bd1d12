"""Guidance on a trained model: plain (CFG) against projected (APG), scale by scale, in colours and in captions.

    python benchmarks/guidance.py --model runs/demo/model --store runs/demo/store

APG (Sadat et al. 2024, arXiv 2410.02416) leaves out the part of guidance's step that is parallel to the conditional
prediction, which in diffusion models is what oversaturates. Here the prediction is a row of logits over the codes of a
depth, centred (`lm.logits.guide_projected`). Whether the cure carries over is the question.

Predictions, to be held against the table: at high scales plain guidance draws pictures of more contrast and saturation
than the set has and follows captions worse; projected guidance stays near the set's statistics, and follows captions
at least as well.

Each cell draws the same captions with the same seeds. Contrast: standard deviation of luminance inside a picture.
Saturation: mean of max - min over red, green, blue. Both as ratios to the set's own captioned pictures. Distinct: share
of drawings that are not equal to the drawing of another caption. Near: captioned picture among the ten nearest.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lm.data import open_store, read_pairs
from lm.metrics import Gallery, drawing, spread
from lm.pipeline import Pipeline, sheet
from vqlm.files import write_json

LUMINANCE = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
WAYS = {
    "cfg": {"parallel": 1.0, "norm": 0.0},
    "apg": {"parallel": 0.0, "norm": 0.0},
    "apg, bounded": {"parallel": 0.0, "norm": 5.0},
}
SHOWN = 8  # captions on the sheet


def statistics(pictures: list[Tensor]) -> dict[str, float]:
    """Contrast and saturation of pictures (3,H,W) in [-1,1], averaged."""
    contrast = [float(((x + 1) / 2 * LUMINANCE).sum(0).std()) for x in pictures]
    saturation = [float((x.amax(0) - x.amin(0)).mean() / 2) for x in pictures]
    return {"contrast": sum(contrast) / len(pictures), "saturation": sum(saturation) / len(pictures)}


def distinct(pictures: list[Tensor]) -> float:
    return len({x.numpy().tobytes() for x in pictures}) / len(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plain against projected guidance on a trained model.")
    parser.add_argument("--model", type=Path, required=True, help="a bundle")
    parser.add_argument("--store", type=Path, required=True, help="the store that it was trained on")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 1.5, 2, 3, 5, 7.5, 10, 15])
    parser.add_argument("--captions", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)

    pipeline = Pipeline.from_pretrained(asked.model)
    store = open_store(asked.store, pipeline.form)
    store.check(pipeline.images)
    pairs = read_pairs(store, "train", pipeline.encode_text)
    gallery = Gallery.of(pipeline, [pairs])
    own = [pipeline.decode([pairs.image(i)])[0] for i in spread(len(pairs), asked.captions)]
    target = statistics(own)
    print(f"the set's own: contrast {target['contrast']:.3f}, saturation {target['saturation']:.3f}")
    print(f"{'':14}{'scale':>6}{'contrast':>10}{'saturation':>12}{'near':>8}{'distinct':>10}")
    rows, shown, captions = [], [], []
    for scale in asked.scales:
        for name, way in WAYS.items():
            if scale == 1 and name != "cfg":
                continue  # all ways are the same without guidance
            pipeline.sampling = replace(
                pipeline.sampling, guidance=scale, temperature=asked.temperature, **way
            )
            found, drawn, chosen = drawing(pipeline, gallery, pairs, {}, asked.seed, asked.captions)
            ratio = {key: value / target[key] for key, value in statistics(drawn).items()}
            row = {"way": name, "scale": scale, **ratio, "near": found["among_ten_nearest"]}
            rows.append({**row, "distinct": distinct(drawn)})
            print(
                f"{name:14}{scale:6g}{ratio['contrast']:10.2f}{ratio['saturation']:12.2f}"
                f"{row['near']:8.1%}{rows[-1]['distinct']:10.1%}",
                flush=True,
            )
            for n in spread(len(drawn), SHOWN):
                shown.append(drawn[n])
                captions.append(f"{pairs.texts[chosen[n]]}: {name} {scale:g}")
    write_json(asked.out / "guidance.json", {"target": target, "rows": rows, "captions": asked.captions})
    sheet(pipeline.show(torch.stack(shown)), captions, SHOWN).save(asked.out / "guidance.png")
    print(f"table and pictures: {asked.out}")


if __name__ == "__main__":
    main()
