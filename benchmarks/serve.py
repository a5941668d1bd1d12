"""What does `lm-serve` do under load: how long do clients wait, some of them leaving, and what stays in memory?

    python benchmarks/serve.py                       # a model with random weights
    python benchmarks/serve.py --model runs/lm/model

One process holds the server and the clients, so on few cores the clients' own work is in the numbers too.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import record
import torch
import uvicorn
from record import Table

from lm.pipeline import Pipeline
from lm.serve import address, listen
from lm.serve.app import Server
from lm.serve.engine import Engine
from lm.serve.web import Limits

COLUMNS = [
    "",
    "served",
    "pictures/s",
    "p50 s",
    "p95 s",
    "429",
    "other answers",
    "tensors, bytes",
    "resident, MB",
]
PATH = "/v1/images/generations"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a bundle; without one, random weights and 8 x 8 cells of 2 codes")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--leave", type=int, default=200)
    parser.add_argument("--branches", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=2.0)
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    pipe = Pipeline.from_pretrained(asked.model) if asked.model else random_pipeline()
    engine = Engine(pipe.model, asked.branches, accepted=asked.requests)
    listening = listen("127.0.0.1", 0)
    app = Server(pipe, engine, Limits(), "model").app
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    url = address(listening).removeprefix("http://")
    about = record.machine(torch.get_num_threads(), "transformers", "uvicorn", device=str(pipe.device))
    print(f"{record.told(about)}, {asked.branches} branches", flush=True)
    try:
        alone = [draw(url, 1000 + number, asked.guidance)[1] for number in range(5)]
        settle(engine)
        before = tensors(), resident()
        loads = {"all stay": 0, f"{asked.leave} leave": asked.leave}
        rows = [load(url, asked, name, leave, engine, before) for name, leave in loads.items()]
        status, _ = draw(url, 1, asked.guidance)
    finally:
        server.should_exit = True
        thread.join()
    made = Table(f"{asked.requests} requests at a time", COLUMNS, rows)
    found = f"{rows[0][2]} pictures a second for {asked.requests} clients at once, "
    found += f"{statistics.median(alone):.2f} s for one alone; afterwards "
    found += f"{'alive' if status == 200 else f'status {status}'}, {engine.count} drawings left"
    print(f"\n{made}\n\n{found}")
    record.keep(asked.out, __doc__, about, found, [made])


def load(
    url: str, asked: argparse.Namespace, name: str, leave: int, engine: Engine, before: tuple[int, float]
) -> list[str]:
    """A row of the table. before: bytes of tensors, MB resident."""
    every = asked.requests // leave if leave else 0
    started = time.monotonic()

    def one(number: int) -> tuple[int, float]:
        if every and number % every == 0 and number // every < leave:
            return leave_early(url, number, asked.guidance)
        return draw(url, number, asked.guidance)

    with ThreadPoolExecutor(asked.requests) as pool:
        answers = list(pool.map(one, range(asked.requests)))
    seconds = time.monotonic() - started
    served = sorted(wait for status, wait in answers if status == 200)
    busy = sum(status == 429 for status, _ in answers)
    other = [status for status, _ in answers if status not in (0, 200, 429)]
    p50, p95 = (served[int(len(served) * share)] for share in (0.5, 0.95))
    settle(engine)
    after = [f"{tensors() - before[0]:+,}", f"{resident() - before[1]:+.0f}"]
    served_s = [f"{len(served)} in {seconds:.1f} s", f"{len(served) / seconds:.1f}"]
    return [
        name,
        *served_s,
        f"{p50:.2f}",
        f"{p95:.2f}",
        str(busy),
        ", ".join(map(str, other)) or "none",
        *after,
    ]


def connect(url: str, number: int, guidance: float) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(url, timeout=600)
    body = json.dumps({"prompt": "a red apple", "seed": number, "guidance": guidance})
    connection.request("POST", PATH, body, {"Content-Type": "application/json"})
    return connection


def draw(url: str, number: int, guidance: float) -> tuple[int, float]:
    """Status, seconds."""
    started = time.monotonic()
    connection = connect(url, number, guidance)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, time.monotonic() - started


def leave_early(url: str, number: int, guidance: float) -> tuple[int, float]:
    connection = connect(url, number, guidance)
    time.sleep(0.05 + number % 20 / 20)
    if connection.sock is not None:
        connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    return 0, 0.0


def settle(engine: Engine) -> None:
    while engine.count:
        time.sleep(0.05)
    time.sleep(0.5)


def tensors() -> int:
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)


def resident() -> float:
    """MB, where the system tells."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


def random_pipeline() -> Pipeline:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny import make_model, make_tokenizer

    model, tokenizer = make_model(grid=(8, 8))
    return Pipeline(model, tokenizer, make_tokenizer())


if __name__ == "__main__":
    main()
