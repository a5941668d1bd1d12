"""How fast are pictures of 256 px encoded and decoded, and how near is that to what convolutions alone allow?

    python benchmarks/tokenizer.py [--profile] [--no-compile] [--pictures N] [--out [FILE]]

Predictions, to be held against what it prints: in bf16 channels_last the encoder of a network of the size of LlamaGen's
VQ-16 (128 channels times 1, 1, 2, 2, 4) reaches at least 75 % of the conv limit, and `vq-encode`, from files on disk to
a finished store, at least 90 % of the speed of the bare encoder. Speed is printed and never fails; the exit code is 1
where a row of the store does not hold the codes of the bare encoder.

The conv limit: every convolution of the network, with its own weight and an input of its own shape, in bf16
channels_last, one after another with nothing between. Contestants take turns, so that they share the weather of the
machine; times are medians of rounds, ratios medians of the ratios within a round. Weights and pixels are random. How to
read the tables: benchmarks/README.md.

Legend: B pictures, C H W picture.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from record import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.backbones.dcae import DCAEDecoder, DCAEEncoder
from vq.backbones.vit import ViTDecoder, ViTEncoder
from vq.backbones.vqgan import VqganDecoder, VqganEncoder
from vq.data import ImageData, ImageFolder, OpenMoji
from vq.images import from_bytes
from vq.quantizers.residual import ResidualQuantizer
from vq.store import CodeStore
from vq.tokenizer import ImageTokenizer

SIDE, BATCH = 256, 16
START = "import vq.drivers, vq.pieces, vq.store.writer"  # what `vq-encode` imports before its first picture
COMPARED = 48  # pictures whose codes are compared between layouts and precisions
OURS, LIMIT = "VQ-16 bf16 nhwc", "VQ-16 convolutions alone"
PREDICTED_SHARE, PREDICTED_COMMAND = 0.75, 0.90
VQ16: dict[str, Any] = {
    "channels": [128, 128, 256, 256, 512],
    "latent_dim": 8,
    "hidden_dim": 256,
    "blocks": 2,
    "attention": [4],
}


@dataclass
class Contestant:
    """A name, and what is timed: tasks by name ("encode", "decode"), each a picture a call."""

    name: str
    tasks: dict[str, Callable[[], Any]]
    gflop: dict[str, float] = field(default_factory=dict)


# --- networks -------------------------------------------------------------------------------------------------


def pairs() -> dict[str, Callable[[], tuple[nn.Module, nn.Module]]]:
    """Networks for 256 px: VQ-16, and ours in sizes that are used for such pictures."""
    conv: dict[str, Any] = {"channels": [128, 256, 512], "latent_dim": 8, "blocks": 2, "patch": 4}
    vit: dict[str, Any] = {"latent_dim": 32, "patch": 8, "width": 512, "layers": 8, "heads": 8}
    dcae: dict[str, Any] = {
        "channels": [128, 256, 512, 512, 1024],
        "latent_dim": 32,
        "patch": 2,
        "attention": 3,
    }
    return {
        "VQ-16": lambda: (VqganEncoder(stem=128, **VQ16), VqganDecoder(**VQ16)),
        "conv f16": lambda: (ConvEncoder(**conv), ConvDecoder(**conv)),
        "vit f8": lambda: (ViTEncoder(**vit), ViTDecoder(**vit)),
        "dcae f32": lambda: (DCAEEncoder(**dcae), DCAEDecoder(**dcae)),
    }


def prepared(module: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    convert: Any = module.eval().to(dtype).to
    return convert(memory_format=layout)


def given(x: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return x.to(dtype).contiguous(memory_format=layout)


def contestant(
    name: str, pair: tuple[nn.Module, nn.Module], dtype: torch.dtype, layout: torch.memory_format
) -> Contestant:
    encoder, decoder = (prepared(part, dtype, layout) for part in pair)
    x_BCHW = given(torch.rand(1, 3, SIDE, SIDE) * 2 - 1, dtype, layout)
    z_BDhw = given(torch.randn_like(encoder(x_BCHW)), dtype, layout)
    tasks = {"encode": lambda: encoder(x_BCHW), "decode": lambda: decoder(z_BDhw)}
    return Contestant(name, tasks, {task: gigaflop(run) for task, run in tasks.items()})


def gigaflop(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def compiled(pair: tuple[nn.Module, nn.Module]) -> Contestant | None:
    """The encoder through torch.compile; None where that does not work on this machine."""
    encoder = prepared(pair[0], torch.bfloat16, torch.channels_last)
    x_BCHW = given(torch.rand(1, 3, SIDE, SIDE) * 2 - 1, torch.bfloat16, torch.channels_last)
    fast: Any = torch.compile(encoder)
    try:
        fast(x_BCHW)
    except Exception as error:  # no compiler, or one that torch does not know: many kinds
        print(f"torch.compile does not work here: {type(error).__name__}", file=sys.stderr)
        return None
    return Contestant("VQ-16 bf16 nhwc compiled", {"encode": lambda: fast(x_BCHW)})


def convolutions_alone(pair: tuple[nn.Module, nn.Module]) -> Contestant:
    """Each convolution of the network on an input of the shape that it sees, in bf16 channels_last."""
    dtype, layout = torch.bfloat16, torch.channels_last
    encoder, decoder = (prepared(part, dtype, layout) for part in pair)
    seen: dict[str, list[tuple[nn.Module, Tensor]]] = {"encode": [], "decode": []}
    inputs: dict[tuple[int, ...], Tensor] = {}

    def note(task: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            shape = tuple(arguments[0].shape)
            inputs.setdefault(shape, given(torch.randn(shape), dtype, layout))
            seen[task].append((module, inputs[shape]))

        return hook

    hooks = [
        module.register_forward_pre_hook(note(task))
        for task, part in (("encode", encoder), ("decode", decoder))
        for module in part.modules()
        if isinstance(module, nn.Conv2d)
    ]
    decoder(encoder(given(torch.zeros(1, 3, SIDE, SIDE), dtype, layout)))
    for each in hooks:
        each.remove()

    def run(task: str) -> None:
        for module, x in seen[task]:
            # The operator itself: what a subclass does around it (padding, enlarging) is not a convolution.
            conv: Any = module
            torch.nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)

    return Contestant(LIMIT, {task: lambda task=task: run(task) for task in seen})


def contestants(with_compile: bool) -> list[Contestant]:
    bf16, fp32 = torch.bfloat16, torch.float32
    nhwc, nchw = torch.channels_last, torch.contiguous_format
    made = pairs()
    found = [
        contestant("VQ-16 fp32 nchw", made["VQ-16"](), fp32, nchw),
        contestant("VQ-16 fp32 nhwc", made["VQ-16"](), fp32, nhwc),
        contestant(OURS, made["VQ-16"](), bf16, nhwc),
        convolutions_alone(made["VQ-16"]()),
        *(
            contestant(f"{name} bf16 nhwc", made[name](), bf16, nhwc)
            for name in ("conv f16", "vit f8", "dcae f32")
        ),
    ]
    return found + [each for each in [compiled(made["VQ-16"]()) if with_compile else None] if each]


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(found: list[Contestant], rounds: int) -> dict[str, dict[str, list[float]]]:
    """name → task → seconds of each round. The order is reversed each round; one call before warms up."""
    times = {each.name: {task: [] for task in each.tasks} for each in found}
    for number in range(rounds + 1):
        for each in found[:: 1 if number % 2 else -1]:
            for task, run in each.tasks.items():
                taken = seconds(run)
                if number:
                    times[each.name][task].append(taken)
    return times


def network_table(found: list[Contestant], times: dict[str, dict[str, list[float]]]) -> Table:
    rows = []
    for each in found:
        for task, taken in times[each.name].items():
            ms, work = 1000 * median(taken), each.gflop.get(task)
            row = [f"{each.name}, {task}", f"{work:.0f}" if work else "", f"{ms:.0f}", f"{1000 / ms:.2f}"]
            row.append(f"{work / median(taken):.0f}" if work else "")
            shares = [limit / own for limit, own in zip(times[LIMIT][task], taken, strict=True)]
            if each.name.startswith("VQ-16") and each.name != LIMIT:
                row += [f"{median(shares):.2f}", f"{min(shares):.2f}-{max(shares):.2f}"]
            rows.append([*row, *[""] * (7 - len(row))])
    return Table("networks", ["", "GFLOP", "ms", "pictures/s", "GFLOP/s", "of limit", "range"], rows)


def profile(found: list[Contestant]) -> str:
    """Where the time of one pass of the encoder goes, by operator."""
    run = next(each for each in found if each.name == OURS).tasks["encode"]
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        for _ in range(3):
            run()
    rows = sorted(watched.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    told = [
        f"{row.key:46}{row.count // 3:5} calls{row.self_cpu_time_total / 3000:9.1f} ms"
        f"{row.self_cpu_time_total / total:8.1%}"
        for row in rows[:10]
    ]
    return "\n".join([f"where the time of '{OURS} encode' goes:", *told])


# --- the command ----------------------------------------------------------------------------------------------


def write_files(folder: Path, count: int) -> None:
    """OpenMoji drawings of 256 px as PNG files."""
    folder.mkdir()

    def write(each: Any) -> None:
        each.load().save(folder / f"{each.id}.png")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, OpenMoji().pictures(SIDE)[:count]))


def make_tokenizer(folder: Path) -> None:
    """VQ-16 at half its width with random weights: its encoder takes a quarter of the time."""
    torch.manual_seed(0)
    sizes = {**VQ16, "channels": [width // 2 for width in VQ16["channels"]], "hidden_dim": 128}
    encoder, decoder = VqganEncoder(stem=64, **sizes), VqganDecoder(**sizes)
    ImageTokenizer(encoder, ResidualQuantizer(8, 4096, 1), decoder, SIDE).save_pretrained(folder)


def command(folder: Path, threads: int) -> float:
    """Seconds that `vq-encode` takes as a process of its own."""
    out = tempfile.mkdtemp(prefix="store", dir=folder)
    words = [f"tokenizer={folder}/tokenizer", "images=folder", f"images.source.path={folder}/files"]
    words += [f"images.size={SIDE}", f"batch_size={BATCH}", f"out={out}/store", "device=cpu"]
    return seconds(lambda: python(["-m", "vq.encode", *words], threads))


def python(words: list[str], threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *words], env=environment, check=True, capture_output=True)


def bare_encoder(folder: Path) -> Callable[..., dict[str, Tensor]]:
    """What only encodes, pictures being in memory: by default as `vq-encode` does it. Gives codes by id."""
    images = ImageData(ImageFolder(folder / "files"), SIDE, holdout=0.0)
    images.setup()

    def run(
        dtype: torch.dtype = torch.float32, layout: Any = torch.contiguous_format, count: int | None = None
    ) -> dict[str, Tensor]:
        model: Any = ImageTokenizer.from_pretrained(folder / "tokenizer")
        model = model.to(memory_format=layout)
        codes = []
        for x in images.train.x_NCHW[:count].split(BATCH):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                codes.append(model.encode(from_bytes(x)))
        return dict(zip(images.train.ids[:count], torch.cat(codes), strict=True))

    return run


def end_to_end(count: int, rounds: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder / "files", count)
        make_tokenizer(folder / "tokenizer")
        run = bare_encoder(folder)
        taken: dict[str, list[float]] = {"command": [], "bare": [], "start": []}
        codes: dict[str, Tensor] = {}
        for number in range(rounds):
            steps: dict[str, Callable[[], float]] = {
                "command": lambda: command(folder, threads),
                "bare": lambda: seconds(lambda: codes.update(run())),
                "start": lambda: seconds(lambda: python(["-c", START], threads)),
            }
            for step in list(steps)[:: -1 if number % 2 else 1]:
                taken[step].append(steps[step]())
        store = CodeStore.open(next(folder.glob("store*/store")))
        return {
            "pictures": count,
            "seconds": taken,
            "rows_equal": sum(torch.equal(row.codes_hwQ, codes[row.id]) for row in store) / len(store),
            "equal_codes": {
                "fp32 nhwc": equal(codes, run(torch.float32, torch.channels_last, COMPARED)),
                "bf16 nhwc": equal(codes, run(torch.bfloat16, torch.channels_last, COMPARED)),
            },
        }


def equal(codes: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Share of codes that are the same."""
    return float(torch.stack([(codes[id_] == others[id_]).float().mean() for id_ in others]).mean())


def command_tables(result: dict[str, Any]) -> list[Table]:
    count, taken = result["pictures"], {step: median(times) for step, times in result["seconds"].items()}
    rows = [
        [label, f"{value:.1f}", f"{count / value:.2f}", f"{taken['bare'] / value:.2f}"]
        for label, value in (
            ("bare encoder, fp32 nchw, pictures in memory", taken["bare"]),
            ("vq-encode without its start", taken["command"] - taken["start"]),
            ("vq-encode, the whole process", taken["command"]),
        )
    ]
    rows.append(["start: python and imports", f"{taken['start']:.1f}", "", ""])
    speed = Table(f"vq-encode, {count} pictures", ["", "seconds", "pictures/s", "of bare"], rows)
    shares = [[f"{name} against fp32 nchw", f"{share:.4%}"] for name, share in result["equal_codes"].items()]
    stored = ["rows of the store against the bare encoder's", f"{result['rows_equal']:.2%}"]
    return [speed, Table("equal codes", ["", "equal"], [stored, *shares])]


# --- all of it ------------------------------------------------------------------------------------------------


def verdict(times: dict[str, dict[str, list[float]]] | None, result: dict[str, Any] | None) -> Iterator[str]:
    if times:
        share = median(a / b for a, b in zip(times[LIMIT]["encode"], times[OURS]["encode"], strict=True))
        yield told("encoder in bf16 nhwc, of the conv limit", PREDICTED_SHARE, share)
    if result:
        taken = {step: median(each) for step, each in result["seconds"].items()}
        share = taken["bare"] / (taken["command"] - taken["start"])
        yield told("vq-encode after its start, of the bare encoder", PREDICTED_COMMAND, share)


def told(what: str, predicted: float, found: float) -> str:
    holds = "it holds" if found >= predicted else "it does NOT hold in this run"
    return f"{what}: predicted at least {predicted:.0%}, measured {found:.0%}: {holds}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Tokenizer networks and vq-encode against their limits.")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of the networks (default 7)")
    parser.add_argument("--pictures", type=int, default=300, help="files for vq-encode; 0: leave it out")
    parser.add_argument("--command-rounds", type=int, default=1, help="rounds of vq-encode (default 1)")
    parser.add_argument("--no-networks", action="store_true", help="vq-encode alone")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--profile", action="store_true", help="also print where the encoder's time goes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    if min(asked.rounds, asked.command_rounds, asked.threads) < 1:
        parser.error("--rounds, --command-rounds and --threads: at least 1")
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    about = record.machine(asked.threads)
    print(record.told(about), flush=True)
    times, result, tables = None, None, []
    if not asked.no_networks:
        nets = contestants(not asked.no_compile)
        times = measure(nets, asked.rounds)
        tables.append(network_table(nets, times))
        print(f"\n{tables[0]}", flush=True)
        if asked.profile:
            print(f"\n{profile(nets)}", flush=True)
    if asked.pictures:
        result = end_to_end(asked.pictures, asked.command_rounds, asked.threads)
        encoded = command_tables(result)
        tables += encoded
        print("", *encoded, sep="\n\n", flush=True)
    found = list(verdict(times, result))
    print("", *found, sep="\n", flush=True)
    record.keep(asked.out, __doc__, about, "; ".join(found), tables)
    return 0 if result is None or result["rows_equal"] == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
