"""C.26 to C.29: `lm-serve` under requests for files, requests for too much, clients that leave, and control tokens.

At full count the server is the command in a process of its own, with the limits that it ships with; at the small count
it is the same application in a thread, with limits of a second, and nothing is said of its memory. All clients are on
loopback, and each of their loops ends.
"""

import asyncio
import base64
import contextlib
import functools
import gc
import http.server
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from urllib.parse import quote

import numpy as np
import pytest
import torch
from faults.clients import Client, memory
from faults.report import FULL
from PIL import Image
from tiny import make_model, make_tokenizer

from lm.data import read_pairs
from lm.decoding import Decoder, Drawing
from lm.pipeline import Pipeline
from lm.processor import VqlmProcessor
from lm.serve import LOOPBACK, address, listen
from lm.serve.app import Server
from lm.serve.connections import web_server
from lm.serve.engine import Engine
from lm.serve.web import VALUES, Limits
from lm.vocab import extend, text_to_ids, train_text_tokenizer
from vq.store import CodeStore, Loaded, Record, write_store

DRAW, CHAT, REDRAW, ENCODE = (
    f"/v1/{name}" for name in ("images/generations", "chat/completions", "images/redraw", "images/encode")
)
LARGE = 16 if FULL else 8  # cells of a side of pictures that take a while
NORMAL = {"prompt": "a red circle", "size": "32x32", "seed": 1}
LONG = {"prompt": "a red circle", "size": f"{8 * LARGE}x{8 * LARGE}", "n": 2, "seed": 1, "guidance": 2.0}
LIMITS = Limits() if FULL else Limits(head=0.5, seconds=1.0)


def make_pipeline(**model):
    lm, tokenizer = make_model(**model)
    return Pipeline(lm, tokenizer, make_tokenizer())


class Threaded:
    """A server in a thread of this process."""

    def __init__(self, pipeline, limits=LIMITS):
        self.pid, self.engine = os.getpid(), Engine(pipeline.model)
        listening = listen("127.0.0.1", 0)
        self.url = address(listening)
        app = Server(pipeline, self.engine, limits, "model", LOOPBACK).app
        self.server = web_server(app, limits, "critical")
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)


class Command:
    """`lm-serve` in a process, with 256 files to begin with."""

    def __init__(self, folder):
        command = ["-m", "lm.serve", f"model={folder / 'model'}", "port=0"]
        shell = ["bash", "-c", 'ulimit -S -n 256; exec "$@"', "bash", sys.executable, *command]
        self.process = subprocess.Popen(
            shell, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.pid = self.process.pid
        self.url = self.process.stdout.readline().split(" on ")[1].split()[0]

    def close(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the server runs: a secret, and a link to it in a folder `outputs`."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text(SECRET)
    (folder / "outputs").mkdir()
    (folder / "outputs/link.txt").symlink_to(folder / "secret.txt")
    return folder


SECRET = "canary-7d1f"


@pytest.fixture(scope="module")
def served(folder):
    pipeline = make_pipeline(grid=(4, 4), more_grids=((LARGE, LARGE),))
    with contextlib.chdir(folder):
        if FULL:
            pipeline.save_pretrained(folder / "model")
        server = Command(folder) if FULL else Threaded(pipeline)
        yield server
        server.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served.url)


def told(statuses):
    """0: the client was still sending when the connection was closed, and has not read why."""
    found = sorted(Counter(statuses).items())
    return ", ".join(f"{count:,} × {status or 'closed while sending'}" for status, count in found)


# --- C.26 -------------------------------------------------------------------------------------------------------------


def targets(folder):
    """Paths that a careless server would open: every spelling of the way up before every file worth having."""
    places = ("/", "/outputs/", "/static/", "/file=", "/gradio_api/file=", "/v1/models/", "/v1/images/")
    up = ("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "%252e%252e%252f", "..%5c", "....//", "..;/", "..%c0%af")
    secret = str(folder / "secret.txt")
    files = ("etc/passwd", secret[1:], secret[1:] + "%00.png", "proc/self/environ")
    climbing = [place + way * 12 + file for place in places for way in up for file in files]
    plain = [
        place + file for place in places for file in (*files, "secret.txt", "outputs/link.txt", "link.txt")
    ]
    absolute = [place + "/" + file for place in places for file in files]
    sources = [
        "/lm/serve/app.py",
        "/page.html",
        "/openapi.json/..",
        "/model/config.json",
        "/.git/config",
        "/%00",
    ]
    return [*climbing, *plain, *absolute, *sources, f"file://{secret}", f"http://localhost{secret}"]


def addresses(folder, port):
    """What a careless server would fetch or open in a picture's place."""
    secret = folder / "secret.txt"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:{port}/x"/></svg>'
    encoded = base64.b64encode(svg.encode()).decode()
    return [
        *(f"{kind}://127.0.0.1:{port}/x.png" for kind in ("http", "https", "ftp", "gopher", "HTTP", "ws")),
        f"http://localhost:{port}/x", f"http://2130706433:{port}/x", f"//127.0.0.1:{port}/x", f" http://127.0.0.1:{port}/",
        f"http://169.254.169.254@127.0.0.1:{port}/", f"data:image/png;base64,http://127.0.0.1:{port}/x",
        f"data:image/svg+xml;base64,{encoded}", f"data:image/svg+xml,{quote(svg)}", "jar:file:///x!/y",
        f"file://{secret}", f"file:{secret}", str(secret), "secret.txt", "outputs/link.txt", "../secret.txt",
        f"data:image/png;base64,{base64.b64encode(str(secret).encode()).decode()}", "\\\\127.0.0.1\\x", "", "\0",
        f"data:text/plain;base64,{base64.b64encode(b'x').decode()}", "data:image/png;base64,../../etc/passwd",
    ]  # fmt: skip


def showing(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def leaked(answer):
    return SECRET.encode() in answer.body or b"root:" in answer.body


@pytest.fixture
def careless(folder):
    """Python's own file server, in the same folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Client(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_no_path_of_a_request_is_opened_and_no_address_fetched(client, folder, careless, count, figure):
    async def run():
        fetched = []
        trap = await asyncio.start_server(
            lambda _, writer: (fetched.append(1), writer.close()), "127.0.0.1", 0
        )
        port = trap.sockets[0].getsockname()[1]
        step = count(7, 1)  # 7 divides none of the lists: each kind is met
        paths = targets(folder)[::step]
        raw = [
            client.head(path, 0, method)
            for path in paths
            for method in count(["GET"], ["GET", "POST", "HEAD"])
        ]
        asked = [await client.say(each) for each in raw]
        for url in addresses(folder, port):
            asked.append(await client.ask(ENCODE, {"image": url}))
            asked.append(await client.ask(CHAT, showing(url)))
        for name in ("../secret.txt", str(folder / "secret.txt"), "a\0"):
            asked.append(await client.ask(DRAW, {**NORMAL, "model": name}))
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example"):
            head = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            asked.append(await client.say(head.encode()))
        trap.close()
        theirs = [await careless.say(careless.head(path, 0, "GET")) for path in paths]
        return asked, len(fetched), sum(map(leaked, theirs)), len(theirs)

    asked, fetched, theirs, of = asyncio.run(run())
    leaks = sum(map(leaked, asked))
    statuses = [answer.status for answer in asked]
    assert leaks == fetched == 0 and all(400 <= status < 500 for status in statuses), Counter(statuses)
    assert theirs or not FULL  # what is asked for can be had where a server opens paths
    figure(
        "C.26",
        "paths, links and addresses in requests to the server",
        "no path of a request is opened, nothing is fetched, other names of the host are refused",
        f"{leaks} leaks of {len(asked):,} (all 4xx), {fetched} addresses fetched",
        {"http.server, same folder": f"{theirs} leaks of {of:,}"},
    )


# --- C.27 -------------------------------------------------------------------------------------------------------------


def p95(seconds):
    return statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0]


async def normal(client, count):
    """Seconds of a normal request, one after another."""
    answers = [await client.ask(DRAW, NORMAL) for _ in range(count)]
    assert [answer.status for answer in answers] == [200] * count, answers[0].body[:200]
    return [answer.seconds for answer in answers]


async def besides(client, count, abuse, clients):
    """Normal requests while so many clients repeat an abuse → their seconds, and the answers to the abuse."""
    ended, answers = asyncio.Event(), []

    async def again():
        while not ended.is_set():
            answers.append(await abuse())
            if not FULL:
                break  # in the server's own process more would take the time that it needs to answer

    busy = [asyncio.ensure_future(again()) for _ in range(clients)]
    await asyncio.sleep(0)
    try:
        seconds = await normal(client, count)
    finally:
        ended.set()
        await asyncio.gather(*busy)
    return seconds, answers


@functools.cache
def many_values():
    return b'{"prompt": "a", "cells": [], "codes": [[[' + b'"",' * (5 * 2**20) + b"0]]]}"


@functools.cache
def many_fields():
    return b'{"prompt": "a", ' + b", ".join(b'"%x": 0' % n for n in range(10**6)) + b"}"


TOO_MUCH = {
    "a prompt of 1e6 characters": lambda client: client.ask(DRAW, {"prompt": "x" * 10**6}),
    "n=1e6": lambda client: client.ask(DRAW, {**NORMAL, "n": 10**6}),
    "size=100000x100000": lambda client: client.ask(DRAW, {**NORMAL, "size": "100000x100000"}),
    "1 GB announced": lambda client: client.pour(DRAW, 10**9, True),
    "1 GB in pieces": lambda client: client.pour(DRAW, 10**9, False),
    "15 MB of 5,000,000 values": lambda client: client.ask(REDRAW, many_values()),
    "12 MB of 1,000,000 fields": lambda client: client.ask(DRAW, many_fields()),
}


def test_too_much_is_refused_while_others_are_served(served, client, count, figure):
    async def run():
        await normal(client, 2)
        before, alone = memory(served.pid, "VmHWM"), await normal(client, count(3, 100))
        found = {}
        for name, abuse in TOO_MUCH.items():
            found[name] = await besides(client, count(1, 15), functools.partial(abuse, client), count(1, 4))
        return alone, found, memory(served.pid, "VmHWM") - before

    alone, found, rise = asyncio.run(run())
    all_seconds = []
    for name, (seconds, answers) in found.items():
        assert {answer.status for answer in answers} <= {0, 400, 413}, (name, answers[0])
        assert any(answer.status for answer in answers), name
        assert max(answer.sent for answer in answers) < 64 * 2**20, name
        all_seconds += seconds
    answers = [answer for _, each in found.values() for answer in each]
    assert rise < 500  # MB; without the limit on values, one of those bodies takes 6 GB
    figure(
        "C.27",
        "requests for too much: " + ", ".join(TOO_MUCH),
        "limits on bytes, values, characters, pictures and sizes, before any work; a refused body is not read on",
        f"{told(answer.status for answer in answers)}, p95 {p95([a.seconds for a in answers]):.2f} s; a normal request "
        f"meanwhile: p95 {p95(all_seconds):.2f} s, alone {p95(alone):.2f} s; peak memory +{rise:.0f} MB",
    )


def test_many_at_a_time_are_served_or_told_to_come_back(served, client, count, figure):
    parallel = count(40, 500)

    async def run():
        before = memory(served.pid, "VmHWM")
        answers = await asyncio.gather(*(client.ask(DRAW, {**NORMAL, "n": 2}) for _ in range(parallel)))
        return answers, await normal(client, 3), memory(served.pid, "VmHWM") - before

    answers, after, rise = asyncio.run(run())
    served_ones = [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status == 429]
    assert len(served_ones) + len(refused) == parallel and len(served_ones) >= min(parallel, 100)
    figure(
        "C.27",
        f"{parallel} requests for two pictures at the same moment",
        "as many as `accepted` says are drawn, in turns; the others are told when to come back",
        f"{told(answer.status for answer in answers)}; p95 of those served {p95(served_ones):.1f} s"
        + (f", of those refused {p95(refused):.1f} s" if refused else "")
        + f"; the next request {max(after):.2f} s; peak memory +{rise:.0f} MB",
    )


SLOW = {  # what they begin with, what they go on with, for how long the server waits, what it says then
    "slow heads": (lambda client: client.head(DRAW, 100)[:-4] + b"\r\nX-Slow: ", b"a", LIMITS.head, 408),
    "slow bodies": (lambda client: client.head(DRAW, 10**6) + b'{"prompt": "', b"a", LIMITS.seconds, 408),
    "silent connections": (lambda client: b"", b"", LIMITS.head, 0),
}


@pytest.mark.parametrize("kind", SLOW)
def test_slow_clients_hold_nobody_up(served, client, count, figure, kind):
    start, letter, limit, status = SLOW[kind]
    clients = count(60, 500)

    async def run():
        before = memory(served.pid)
        slow = [
            asyncio.ensure_future(client.trickle(start(client), letter, limit / 5, limit + 10))
            for _ in range(clients)
        ]
        await asyncio.sleep(limit / 4)
        seconds = await normal(client, 1)
        while len(seconds) < count(1, 60):
            more = await normal(client, 1)
            if any(each.done() for each in slow):
                break
            seconds += more  # of those that were answered while all slow clients were there
        return seconds, await asyncio.gather(*slow), memory(served.pid) - before

    seconds, ended, rise = asyncio.run(run())
    last = max(answer.seconds for answer in ended)
    assert {answer.status for answer in ended} == {status} and last < limit + 5
    figure(
        "C.27",
        f"{clients} {kind}" + (", a letter at a time" if letter else ""),
        "each wait for a client has an end: 10 s for a head, 30 s for a body",
        f"a normal request meanwhile: p95 {p95(seconds):.2f} s; all {clients} ended after at most {last:.0f} s "
        f"({'408' if status else 'closed'}); memory {rise:+.0f} MB",
    )


def test_a_new_client_finds_room_among_silent_ones(count, figure):
    """More connections than there is room for: those that say nothing make way, those that are answered stay."""
    room, silent = count(20, 300), count(60, 2000)
    server = Threaded(
        make_pipeline(grid=(4, 4), more_grids=((LARGE, LARGE),)), Limits(connections=room, head=20.0)
    )
    client = Client(server.url)

    async def run():
        drawn = asyncio.ensure_future(client.ask(DRAW, {**LONG, "n": 1}))
        await asyncio.sleep(0.2)
        held = [await client.connect() for _ in range(silent)]
        seconds = await normal(client, count(3, 30))
        open_ones = len(server.server.server_state.connections)
        for _, writer in held:
            writer.transport.abort()
        return seconds, (await drawn).status, open_ones

    seconds, status, open_ones = asyncio.run(run())
    server.close()
    assert status == 200 and open_ones <= room
    figure(
        "C.27",
        f"{silent:,} silent connections where there is room for {room}",
        "the one that has been silent longest makes way for a new one",
        f"normal requests {len(seconds)}/{len(seconds)} served, p95 {p95(seconds):.2f} s; a picture under way is drawn "
        f"to its end; {open_ones} connections open",
    )


def test_an_answer_that_nobody_takes_is_given_up():
    """A client that asks and does not read would hold its answer in memory for as long as it likes."""
    sent, ended = 0, threading.Event()

    async def app(scope, receive, send):
        nonlocal sent
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while sent < 2**28 and server.server_state.connections:
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            sent += 2**20
        ended.set()

    server = web_server(app, Limits(seconds=0.3), "critical")
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()

    async def run():
        client = Client(address(listening))
        _, writer = await asyncio.open_connection(client.host, client.port, limit=1)
        writer.write(client.head("/", 0, "GET"))
        given_up = await asyncio.to_thread(ended.wait, 5)  # while the client is still there
        writer.transport.abort()
        return given_up

    given_up = asyncio.run(run())
    server.should_exit = True
    thread.join(10)
    assert given_up and sent < 2**26


# --- C.28 -------------------------------------------------------------------------------------------------------------


def test_clients_that_leave_give_back_what_they_held(served, client, count, figure):
    leaving, together = count(20, 200), 4

    async def settled():
        for _ in range(2000):
            state = (await client.ask("/health", b"", "GET")).json
            if state["accepted"] == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(state)

    async def wave(number):
        bodies = [{**LONG, "stream": (number + i) % 2 == 0} for i in range(together)]
        await asyncio.gather(*(client.leave(DRAW, body, 0.05 + 0.05 * (number % 3)) for body in bodies))
        started = time.monotonic()
        await settled()
        return time.monotonic() - started

    async def run():
        whole = (await client.ask(DRAW, LONG)).seconds
        first = (await client.ask(DRAW, NORMAL)).json["data"]
        times, held = [], []
        for number in range(leaving // together):
            times.append(await wave(number))
            held.append(memory(served.pid))
        again = (await client.ask(DRAW, NORMAL)).json["data"]
        assert again == first  # the engine goes on, and draws what it drew before
        return whole, times, held

    whole, times, held = asyncio.run(run())
    quarter = len(held) // 4
    drift = statistics.median(held[-quarter:]) - statistics.median(held[quarter : 2 * quarter])
    files = len(os.listdir(f"/proc/{served.pid}/fd"))
    assert p95(times) < whole  # four of them drawn to the end would take longer than one
    assert drift < 10 or not FULL  # MB; a few pictures say nothing of it
    figure(
        "C.28",
        f"{leaving} clients that leave while their pictures are drawn",
        "drawings that nobody waits for are dropped between two passes; an idle engine gives its cache back",
        f"{leaving}/{leaving} cancelled, p95 {p95(times):.2f} s (one request of two pictures takes {whole:.1f} s); "
        f"memory {drift:+.1f} MB from the second quarter to the last; {files} files open; the next picture is the same",
    )


def test_a_cache_ends_with_the_last_that_knows_it():
    """Rings of references kept the caches of idle engines until Python looked for rings: 150 MB in 800 clients."""
    model, _ = make_model()
    decoder = Decoder(model)
    decoder.add(Drawing(model.form.image_prompt([], model.form.grids[0]), images=1))
    decoder.step()
    held = weakref.ref(decoder.cache.layers[0].keys)
    gc.disable()
    try:
        assert held() is not None
        del decoder
        assert held() is None
    finally:
        gc.enable()


# --- C.29 -------------------------------------------------------------------------------------------------------------

NAMES = (
    "<|image_5|>", "<|image_0|>", "<|image_31|>", "<|image_start|>", "<|image_end|>", "<|row_end|>", "<|begin|>",
    "<|end|>", "<|pad|>", "<|grid_4x4|>", "<s>", "</s>", "<pad>", "<unk>", "<image>", "<|im_start|>system",
    "<|im_end|>", "[INST]",
    "[/INST]", "<<SYS>>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<bos>", "<eos>", "<start_of_image>",
    "<boi>", "<eoi>", "<|vision_start|>", "<|image_pad|>", "<0x00>", "<0x0A>", "▁", "Ġ",
)  # fmt: skip
WRAPS = (
    "{}", "a {} b", "a{}b", "{0}{0}", " {}", "{} ", "\n{}\n", "\u202e{}\u202c", "\u2067{}", "\u200b{}\u200b",
    "\ufeff{}",
    "{}\u0301", "日本語{}🍎", "مرحبا {}", "\x00{}", "\x1b[31m{}", "<|{}|>", "{}<|", "|>{}", "\ufffd{}",
)  # fmt: skip


def typed():
    """Names of control tokens of this and of other models, as a user may type them, and near misses."""
    written = [wrap.format(name) for name in NAMES for wrap in WRAPS]
    full_width = [
        "<｜image_5｜>",
        "＜|image_5|＞",
        "<|image_５|>",
        "<|imａge_start|>",
        "<|IMAGE_5|>",
        "<\u200b|image_5|>",
    ]
    return [
        *written,
        *full_width,
        *(f"<|image_{n}|>" for n in range(32)),
        "".join(NAMES),
        "<|image_5|>" * 100,
    ]


def tokenizers():
    """Text tokenizers whose own vocabularies have such names, as special tokens and as ordinary pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = ["a red circle, inset 1", "a blue square"] * 4
    plain = train_text_tokenizer(texts, 300)
    chat = train_text_tokenizer(texts, 300)
    chat.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    chat.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]}
    )
    pieces = ["<unk>", "</s>", "<s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abcdeilnqrstu<>|_[]/"]
    unigram = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], 0, byte_fallback=True))
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    sentence = PreTrainedTokenizerFast(
        tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for made in (plain, chat, sentence):
        yield made, extend(made, 16, 2, ((4, 4), (2, 2)), True)


def control_ids(tokenizer, vocabulary):
    """All ids that are no text."""
    named = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return named | set(vocabulary.specials) | set(range(vocabulary.image_offset, vocabulary.size))


def surplus(ids, expected, control):
    """How many control ids stand there beyond those that stand in what was expected."""
    found = Counter(token for token in ids if token in control)
    return sum((found - Counter(token for token in expected if token in control)).values())


class Captioned:
    """A picture for each caption."""

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def load(self, start, stop):
        records = [Record(str(i), self.captions[i], str(i), "train") for i in range(start, stop)]
        return Loaded(records, [torch.zeros(3, 16, 16, dtype=torch.uint8)] * (stop - start))


@pytest.fixture(scope="module")
def overheard():
    """A server whose engine keeps the prompts that reach it instead of drawing them."""
    pipeline = make_pipeline(head="linear", layout="flat", grid=(2, 2))
    server = Threaded(pipeline, Limits(connections=100))
    prompts = []
    server.engine.submit = lambda drawings, *_, **__: prompts.append(drawings[0].prompt) or 1 / 0
    yield pipeline, server, prompts
    server.close()


def through_http(overheard, texts):
    """(ids of the prompt, ids of the same request for "a") for each request that was not refused."""
    _, server, prompts = overheard
    codes = np.zeros((2, 2, 2), int).tolist()
    client, picture = Client(server.url), {"codes": codes, "cells": [[0, 0]]}

    def requests(text):
        yield DRAW, {"prompt": text}
        yield CHAT, {"messages": [{"role": "user", "content": text}]}
        yield (
            CHAT,
            {
                "messages": [{"role": "system", "content": [{"type": "text", "text": text}]}],
                "modalities": ["text"],
            },
        )
        yield REDRAW, {"prompt": text, **picture}

    async def run():
        found, plain = [], []
        for path, body in requests("a"):
            await client.ask(path, body)
            plain.append(prompts.pop().ids_TW[:, 0].tolist())
        for text in texts:
            for (path, body), expected in zip(requests(text), plain, strict=True):
                status = (await client.ask(path, body)).status
                assert (status == 500 and prompts) or status == 400  # it got to the engine, or was refused
                if prompts:
                    found.append((prompts.pop().ids_TW[:, 0].tolist(), expected))
        return found

    return asyncio.run(run())


def test_what_a_user_types_stays_text(overheard, tmp_path, count, figure):
    texts = typed()
    some = texts[:: count(37, 3)]
    pipeline = overheard[0]
    control = control_ids(pipeline.tokenizer, pipeline.model.form.vocabulary)
    injected, tried = Counter(), Counter()

    def tell(door, ids, expected=(), control=control):
        tried[door] += 1
        injected[door] += surplus(ids, expected, control) > 0

    for ids, expected in through_http(overheard, some):
        tell("HTTP", ids, expected)
    for text in texts:
        for part in pipeline.segments(["a", text]):
            tell("Pipeline", part.ids)
    pipeline.save_pretrained(tmp_path / "model")
    processor = VqlmProcessor.from_pretrained(tmp_path / "model")
    for text in texts[:: count(9, 1)]:
        made, plain = (processor.lay([[each]])["input_ids"][0] for each in (text, "a"))
        tell("processor", made, plain)
    write_store(
        tmp_path / "store", pipeline.images, Captioned(texts), source={"name": "typed"}, progress=False
    )
    pairs = read_pairs(CodeStore.open(tmp_path / "store"), "train", pipeline.encode_text)
    assert len(pairs.captions) == len(texts) and sum(map(bool, pairs.captions)) > 0.9 * len(texts)
    for ids in pairs.captions:
        tell("captions of a store", ids)
    theirs = 0
    for tokenizer, vocabulary in tokenizers():
        others = control_ids(tokenizer, vocabulary)
        for text in texts:
            tell("other text tokenizers", text_to_ids(tokenizer, text), (), others)
            theirs += surplus(tokenizer(text, add_special_tokens=False)["input_ids"], (), others) > 0
    assert not sum(injected.values()), injected
    assert theirs > len(texts)
    figure(
        "C.29",
        "control tokens of this and of other models, typed by a user",
        "names of special tokens are spelt out; prompts are put together from ids, never from strings",
        f"{sum(injected.values())} of {sum(tried.values()):,} prompts with an injected id ("
        + ", ".join(f"{door} {number:,}" for door, number in tried.items())
        + ")",
        {"transformers, tokenizer(text), last": f"{theirs:,} of {3 * len(texts):,} prompts"},
    )


BAD_BYTES = (
    b"\xff\xfe",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xf8\x88\x80\x80\x80",
    b"\x80",
    b"\xe2\x28\xa1",
    b"\xf0\x9f\x8d",
)
SPELT = ("\\ud800", "\\udc00\\ud800", "\\ud83c", "\\uDFFF a")


def test_text_that_is_none_is_refused(client, figure):
    bodies = [b'{"prompt": "a %s b"}' % bad for bad in BAD_BYTES]
    bodies += [b'{"prompt": "%s"}' % bad.encode() for bad in SPELT]
    bodies += [
        json.dumps({"prompt": "a"}).encode("utf-16")[:-1],
        b"\xef\xbb\xbf" + b'{"prompt": \xff}',
        b"\0" * 9,
    ]

    async def run():
        refused = [await client.ask(DRAW, body) for body in bodies]
        kept = [
            await client.ask(DRAW, {**NORMAL, "prompt": text})
            for text in ("\u202eabc\u202c", "مرحبا", "a\0b")
        ]
        return refused, kept

    refused, kept = asyncio.run(run())
    assert [answer.status for answer in refused] == [400] * len(bodies), [
        a.body for a in refused if a.status != 400
    ]
    assert all(answer.json["error"]["message"].isprintable() for answer in refused)
    assert [answer.status for answer in kept] == [200] * len(kept)
    figure(
        "C.29",
        "bytes that are no UTF-8, halves of surrogate pairs, text from right to left",
        "what is no text is refused, what is text is drawn",
        f"{len(refused)}/{len(refused)} refused with 400, {len(kept)}/{len(kept)} drawn",
    )


def test_the_limits_are_at_their_edges(overheard):
    """As many values as are allowed are read, one more is refused; and a body at the limit is not too large."""
    client = Client(overheard[1].url)
    full = b'{"prompt": "a", "codes": [], "cells": [' + b"0," * (VALUES - 2) + b"0]}"
    more = full.replace(b"[0,", b"[0,0,")
    answers = [asyncio.run(client.ask(REDRAW, body)) for body in (full, more)]
    assert [answer.status for answer in answers] == [400, 413]


def test_pictures_of_the_largest_size_are_read(client, tmp_path):
    """What the limits are for gets through: a photograph of many megabytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png", compress_level=1)
    data = (tmp_path / "noise.png").read_bytes()
    answer = asyncio.run(
        client.ask(ENCODE, {"image": "data:image/png;base64," + base64.b64encode(data).decode()})
    )
    assert len(data) > 6 * 2**20 and answer.status == 200
