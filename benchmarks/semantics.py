"""Do codes mean more when the tokenizer is trained against captions, and what does that cost in PSNR?

    python benchmarks/semantics.py [--seeds 3] [--text-encoder DIR] [--out [FILE]]

The claim under test, of VILA-U's author: a contrastive loss is not essential, captioning works better.

One tokenizer each without a semantic loss, with `contrastive` and with `captioning` is trained by `vq-train` itself:
same pictures, batches and seed. Then the question is put to held-out concepts: given a picture's quantized latents,
which of all their captions is its own, and the other way round?
    probe   a small text-image contrast (`vq.scorer.Aligner`), fitted afterwards on the frozen latents of the training
            pictures: the same size, batches and seeds for every tokenizer. It says what can be read from the codes.
    own     the scorer that the run itself left. It says how well the loss carries over.
Recall@k, median rank, and chance beside them. One picture stands for a concept, so that no caption is there twice.

A finished cell is not run again; remove its folder, or name another --folder, to repeat it. Speed is no part of this.

Legend: N held-out pictures, one for each concept; M training pictures; D latent width, h w grid.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import record
import torch
from record import Table
from torch import Tensor

from vq.data import ImageData, OpenMoji, PictureSet
from vq.images import from_bytes
from vq.losses.semantic import caption_names, contrastive_loss
from vq.scorer import Aligner, Captioner, Scorer, quantized_latent
from vq.shapes import Shapes
from vq.text import WordEncoder
from vq.tokenizer import ImageTokenizer
from vqlm.batches import Order

HOLDOUT = 0.2  # more than the default 0.05: a recall over 97 concepts would be known to 5 points only
SPLIT = 1  # images.seed; the weights in conf/loss were chosen on split 0
TERMS = {
    "none": "[squared]",
    "contrastive": "[squared,contrastive]",
    "captioning": "[squared,captioning]",
}
PRETRAINED = "pretrained text"
PROBE = {"width": 128, "batches": 300, "batch_size": 256, "rate": 1e-3, "decay": 0.1, "scale": 1 / 0.07}
PROBE_SEEDS = 3
PRIOR = 64  # training pictures over which a caption's own likelihood is taken
CPU = torch.device("cpu")


# --- training ---------------------------------------------------------------------------------------------------


def arguments(name: str, asked: argparse.Namespace, seed: int) -> list[str]:
    """What `vq-train` is told, but for `out`."""
    given = [f"seed={seed}", f"images.holdout={HOLDOUT}", f"images.seed={SPLIT}"]
    given += [f"learner.budget.batches={asked.batches}", "learner.budget.minutes=0"]
    given += ["vq_size=smoke", "images=shapes"] if asked.smoke else []
    if name == PRETRAINED:
        path = asked.text_encoder.resolve()
        return [
            *given,
            "loss=[squared,contrastive_pretrained]",
            f"learner.losses.contrastive.text.path={path}",
        ]
    return [*given, f"loss={TERMS[name]}"]


def train(told: list[str], out: Path) -> None:
    """`vq-train` in a process of its own; a run that was cut short goes on."""
    print(f"\n=== vq-train {' '.join(told)} out={out}", flush=True)
    # huge pages for large buffers: about 1.1 times faster training on a CPU, and nothing elsewhere
    environment = {"THP_MEM_ALLOC_ENABLE": "1", **os.environ}
    subprocess.run([sys.executable, "-m", "vq.train", *told, f"out={out}"], check=True, env=environment)


def pictures(smoke: bool) -> tuple[PictureSet, PictureSet]:
    """Training pictures, and of each held-out concept the first."""
    images = ImageData(Shapes(), size=16, holdout=HOLDOUT, seed=SPLIT) if smoke else None
    images = images or ImageData(OpenMoji(), size=32, holdout=HOLDOUT, seed=SPLIT)
    images.setup()
    first = {concept: place for place, concept in reversed(list(enumerate(images.heldout.concepts)))}
    return images.train, images.heldout.select(sorted(first.values()))


# --- retrieval --------------------------------------------------------------------------------------------------


def retrieval(scores_NN: Tensor) -> dict[str, Any]:
    """Scores of N pictures (rows) with their N captions (columns), own on the diagonal → both directions."""
    return {"caption_of_picture": hits(scores_NN), "picture_of_caption": hits(scores_NN.T)}


def hits(scores_NN: Tensor) -> dict[str, float]:
    """Recall@k and median rank of each row's own column. Ties count half: a constant scorer gets chance."""
    own_N1 = scores_NN.diagonal()[:, None]
    better_N, equal_N = (scores_NN > own_N1).sum(1), (scores_NN == own_N1).sum(1) - 1
    rank_N = 1 + better_N + equal_N / 2
    recalls = {f"recall@{k}": float((rank_N <= k).double().mean()) for k in (1, 5, 10)}
    return {**recalls, "median_rank": float(rank_N.double().quantile(0.5))}


def latents(tokenizer: ImageTokenizer, chosen: PictureSet) -> Tensor:
    return torch.cat([quantized_latent(tokenizer, from_bytes(x)) for x in chosen.x_NCHW.split(64)])


def probe(z_MDhw: Tensor, captions: list[str], z_NDhw: Tensor, asked: list[str], seed: int) -> Tensor:
    """Scores (N,N) of held-out pictures and captions, by a contrast fitted on M training pairs.

    Latents are brought to mean 0 and deviation 1 per channel first: tokenizers differ in their scale.
    """
    torch.manual_seed(seed)
    mean_D, deviation_D = z_MDhw.mean((0, 2, 3)), z_MDhw.std((0, 2, 3)).clamp(min=1e-6)

    def standard(z: Tensor) -> Tensor:
        return (z - mean_D[:, None, None]) / deviation_D[:, None, None]

    z_MDhw, total = standard(z_MDhw), PROBE["batches"]
    aligner = Aligner(z_MDhw.shape[1], WordEncoder(PROBE["width"]), PROBE["width"])
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=PROBE["rate"], weight_decay=PROBE["decay"])
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 + math.cos(math.pi * n / total)) / 2)
    order, scale = Order(len(captions), PROBE["batch_size"], seed), torch.tensor(PROBE["scale"])
    for n in range(total):
        rows = order.indices(n).tolist()
        told = [captions[row] for row in rows]
        u, t = aligner.pictures(z_MDhw[rows]), aligner.captions(told, CPU)
        optimizer.zero_grad()
        contrastive_loss(u, t, caption_names(told), scale).backward()
        optimizer.step()
        falling.step()
    with torch.no_grad():
        return aligner.eval().score(standard(z_NDhw), asked)


def own_scores(scorer: Scorer, z_MDhw: Tensor, z_NDhw: Tensor, asked: list[str]) -> dict[str, Any]:
    """Retrieval by the scorer that the run left."""
    judge = scorer.judge
    with torch.no_grad():
        scores_NN = judge.score(z_NDhw, asked)
        if not isinstance(judge, Captioner):
            return retrieval(scores_NN)
        some = torch.linspace(0, len(z_MDhw) - 1, PRIOR).long()
        prior_N = judge.score(z_MDhw[some], asked).logsumexp(0) - math.log(PRIOR)
    # among captions, log p(caption | picture) − log p(caption), or short and frequent ones always win
    found = {"caption_of_picture": hits(scores_NN - prior_N), "picture_of_caption": hits(scores_NN.T)}
    nats = {"own": -scores_NN.diagonal(), "another": -scores_NN.diagonal(1)}
    return {**found, "nats_a_caption": {name: float(each.mean()) for name, each in nats.items()}}


def measure(out: Path, train_set: PictureSet, asked_set: PictureSet) -> dict[str, Any]:
    """Everything that is asked of one run."""
    tokenizer = ImageTokenizer.from_pretrained(out / "tokenizer")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    z_MDhw, z_NDhw = latents(tokenizer, train_set), latents(tokenizer, asked_set)
    captions, asked = train_set.captions, asked_set.captions
    probes = [retrieval(probe(z_MDhw, captions, z_NDhw, asked, seed)) for seed in range(PROBE_SEEDS)]
    found: dict[str, Any] = {
        "psnr": metrics["heldout"]["psnr"],
        "perplexity": metrics["heldout"]["perplexity"],
    }
    found |= {"minutes": metrics["run"]["minutes"], "batches": metrics["run"]["batches"], "probes": probes}
    for folder in sorted((out / "scorer").glob("*")):
        found["own"] = own_scores(Scorer.from_pretrained(folder, tokenizer), z_MDhw, z_NDhw, asked)
    return found


def cell(
    name: str, asked: argparse.Namespace, seed: int, sets: tuple[PictureSet, PictureSet]
) -> dict[str, Any]:
    """One run, trained and measured; read from its folder if that was done before."""
    out = asked.folder / f"{name.replace(' ', '-')}-{seed}"
    told = arguments(name, asked, seed)
    done, settings = out / "semantics.json", {"vq-train": told, "probe": PROBE, "probe_seeds": PROBE_SEEDS}
    if done.is_file():
        kept = json.loads(done.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["found"]
        print(f"{done} was made with other settings: measured again", file=sys.stderr)
    train(told, out)
    found = measure(out, *sets)
    done.write_text(json.dumps({"settings": settings, "found": found}, indent=2) + "\n", encoding="utf-8")
    return found


# --- the table --------------------------------------------------------------------------------------------------


def table(cells: dict[str, list[dict[str, Any]]], count: int) -> Table:
    """Means over seeds, and over the probe's seeds."""
    chance = {f"recall@{k}": k / count for k in (1, 5, 10)} | {"median_rank": (count + 1) / 2}
    rows = [["chance", "", *numbers([chance]), *numbers([chance])]]
    for name, runs in cells.items():
        readers = {"probe": [probe for run in runs for probe in run["probes"]]}
        if "own" in runs[0]:
            readers["own"] = [run["own"] for run in runs]
        psnr = f"{mean(run['psnr'] for run in runs):.2f}"
        for reader, found in readers.items():
            ways = [
                numbers([each[way] for each in found]) for way in ("caption_of_picture", "picture_of_caption")
            ]
            rows.append([f"{name}, read by {reader}", psnr, *ways[0], *ways[1]])
    error = 100 * math.sqrt(0.1 * 0.9 / count)
    title = f"{count} held-out concepts: the standard error of a recall of 10 % is {error:.1f} points"
    ways = [
        f"{what} {short}" for short in ("by picture", "by caption") for what in ("R@1", "R@5", "R@10", "rank")
    ]
    return Table(title, ["loss", "PSNR", *ways], rows)


def likelihoods(cells: dict[str, list[dict[str, Any]]]) -> list[Table]:
    """What a run's own scorer gives captions, where it gives them a likelihood."""
    rows = []
    for name, runs in cells.items():
        told = [run["own"]["nats_a_caption"] for run in runs if "nats_a_caption" in run.get("own", {})]
        if told:
            rows.append([name, *(f"{mean(each[key] for each in told):.2f}" for key in ("own", "another"))])
    columns = ["nats a held-out caption", "beside its picture", "beside another"]
    return [Table("", columns, rows)] if rows else []


def verdict(cells: dict[str, list[dict[str, Any]]]) -> str:
    """The claim, by the probe: recall@10, over both ways."""
    ways = ("caption_of_picture", "picture_of_caption")
    found = {
        name: mean(probe[way]["recall@10"] for run in runs for probe in run["probes"] for way in ways)
        for name, runs in cells.items()
    }
    holds = found["captioning"] > found["contrastive"]
    said = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
    verdict = "it holds" if holds else "it does NOT"
    return f"claimed: captioning above contrastive; recall@10 by the probe: {said}: {verdict}"


def numbers(found: list[dict[str, float]]) -> list[str]:
    recalls = [f"{mean(each[f'recall@{k}'] for each in found):.1%}" for k in (1, 5, 10)]
    return [*recalls, f"{mean(each['median_rank'] for each in found):.1f}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Retrieval from codes, and PSNR, of tokenizers that met captions."
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (default 1)")
    parser.add_argument("--batches", type=int, default=900, help="of 64 pictures, of each run (default 900)")
    parser.add_argument("--folder", type=Path, default=Path("runs/semantics"), help="where the runs are kept")
    parser.add_argument(
        "--text-encoder", type=Path, help="also contrast with this transformers folder, frozen"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a toy set and a toy tokenizer: does the road hold?"
    )
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    if min(asked.seeds, asked.batches) < 1:
        parser.error("--seeds and --batches: at least 1")
    about = record.machine(torch.get_num_threads(), "transformers")
    sets = pictures(asked.smoke)
    print(f"{len(sets[0])} training pictures, {len(sets[1])} held-out concepts, one picture each", flush=True)
    names = [*TERMS, *([PRETRAINED] if asked.text_encoder else [])]
    cells = {name: [cell(name, asked, seed, sets) for seed in range(asked.seeds)] for name in names}
    made, found = [table(cells, len(sets[1])), *likelihoods(cells)], verdict(cells)
    print("", *made, found, sep="\n\n", flush=True)
    record.keep(asked.out, __doc__, about, found, made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
