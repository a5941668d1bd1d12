"""`lm-serve`: OpenAI's own client against a running server, bad input, clients that leave, faults, the page."""

import base64
import http.client
import io
import json
import shutil
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import pytest
from PIL import Image
from tiny import make_model, make_tokenizer

from lm.decoding import Drawing, Sampling, draw_all
from lm.pipeline import Pipeline, seeds
from lm.sequence import Image as Codes
from lm.sequence import Text
from lm.serve import LOOPBACK, address, listen
from lm.serve.app import Server
from lm.serve.connections import web_server
from lm.serve.engine import Busy, Engine, Progress, Stopped, rows_done
from lm.serve.web import Limits
from vqlm.errors import ConfigError

LIMITS = Limits(pictures=8, prompt=2000, text=64, megabytes=1, megapixels=1, seconds=2.0)


class Running:
    """A server over a tiny model, in a thread."""

    def __init__(self, branches=16, accepted=64, **model):
        lm, tokenizer = make_model(**model)
        self.pipe = Pipeline(lm, tokenizer, make_tokenizer(), Sampling(temperature=1.0))
        self.engine = Engine(lm, branches, accepted)
        app = Server(self.pipe, self.engine, LIMITS, "tiny", LOOPBACK).app
        self.socket = listen("127.0.0.1", 0)
        self.url = address(self.socket)
        self.server = web_server(app, LIMITS, "critical")
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path, body, headers=None, raw=None):
        """Status and JSON of a plain request."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        data = json.dumps(body).encode() if raw is None else raw
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text), dict(answer.getheaders())

    def settle(self, seconds=10):
        """Wait until nothing is under way."""
        end = time.monotonic() + seconds
        while self.engine.count and time.monotonic() < end:
            time.sleep(0.01)
        assert self.engine.count == 0

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def running():
    server = Running(grid=(4, 4))
    yield server
    server.close()


@pytest.fixture
def slow(running, monkeypatch):
    """Each pass takes a while, so that clients can leave in the middle."""
    from lm.decoding import Decoder

    step = Decoder.step
    running.pause = 0.02
    monkeypatch.setattr(Decoder, "step", lambda self: (time.sleep(running.pause), step(self))[1])
    return running


def picture_of(item):
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def data_url(picture=None):
    file = io.BytesIO()
    (picture or Image.new("RGB", (40, 30), "red")).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask_about(url, text=None):
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


# --- OpenAI's client ------------------------------------------------------------------------------------------------


def test_models_and_health(running):
    (model,) = running.client.models.list().data
    assert model.id == "tiny" and model.sizes == ["32x32"] and model.depth == 2
    assert running.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        running.client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        running.client.images.generate(prompt="a", model="dall-e-3")


def test_pictures_are_those_of_the_pipeline(running):
    made = running.client.images.generate(
        prompt="a red circle", model="tiny", n=3, size="32x32", response_format="b64_json",
        extra_body={"seed": 5, "guidance": 2.0, "temperature": 0.7},
    )  # fmt: skip
    expected = running.pipe.generate("a red circle", n=3, seed=5, guidance=2.0, temperature=0.7)
    assert [picture_of(item).tobytes() for item in made.data] == [each.tobytes() for each in expected]
    assert made.seed == 5 and made.size == "32x32" and made.usage.total_tokens > 0
    codes = running.pipe.draw_codes("a red circle", 1, running.pipe.sampling_with(2.0, 0.7), 5)
    assert made.data[0].codes == codes[0].codes_hwQ.tolist()


def test_without_a_seed_pictures_differ_and_the_seed_is_told(running):
    first, second = (running.client.images.generate(prompt="a") for _ in range(2))
    assert first.seed != second.seed
    again = running.client.images.generate(prompt="a", extra_body={"seed": first.seed})
    assert again.data[0].b64_json == first.data[0].b64_json != second.data[0].b64_json


def test_pictures_appear_row_by_row(running):
    events = list(
        running.client.images.generate(
            prompt="a", n=2, stream=True, partial_images=3, extra_body={"seed": 1, "guidance": 2.0}
        )
    )
    whole = running.pipe.generate("a", n=2, seed=1, guidance=2.0)
    for number in (0, 1):
        mine = [event for event in events if event.number == number]
        *partial, last = mine
        assert (
            last.type == "image_generation.completed"
            and picture_of(last).tobytes() == whole[number].tobytes()
        )
        assert all(event.type == "image_generation.partial_image" for event in partial)
        assert [event.rows for event in partial] == sorted(event.rows for event in partial)
        for event in partial:
            assert event.codes == last.codes[: event.rows]
            assert picture_of(event).size == (32, 8 * event.rows)
    assert len(events) > 2  # some partial ones came


def test_chat_tells_what_a_picture_shows(running):
    picture = Image.new("RGB", (40, 30), "red")
    expected = running.pipe.caption(picture, limit=12)
    options = {"model": "tiny", "max_tokens": 12, "modalities": ["text"]}
    told = running.client.chat.completions.create(messages=ask_about(data_url(picture)), **options)
    assert told.choices[0].message.content == expected and told.object == "chat.completion"
    assert told.usage.completion_tokens <= 12 and told.choices[0].finish_reason in ("length", "stop")
    chunks = list(
        running.client.chat.completions.create(
            messages=ask_about(data_url(picture)),
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == expected and sum(map(bool, deltas)) > 1
    assert (
        chunks[-1].usage == told.usage
        and chunks[-2].choices[0].finish_reason == told.choices[0].finish_reason
    )


def test_chat_answers_with_pictures(running):
    messages = [{"role": "system", "content": "draw"}, {"role": "user", "content": "a red circle"}]
    options = {"model": "tiny", "messages": messages, "seed": 3, "extra_body": {"max_images": 2}}
    made = running.client.chat.completions.create(modalities=["image"], **options)
    urls = [part["image_url"]["url"] for part in made.choices[0].message.content]
    expected = running.pipe.complete(["draw", "a red circle"], limit=0, max_images=2, min_images=2, seed=3)
    assert [running.pipe.read(base64.b64decode(url.partition(",")[2])).tobytes() for url in urls] == [
        each.tobytes() for each in expected
    ]
    chunks = running.client.chat.completions.create(modalities=["image"], stream=True, **options)
    streamed = [part for chunk in chunks for part in getattr(chunk.choices[0].delta, "images", None) or []]
    assert [part["image_url"]["url"] for part in streamed] == urls


def test_text_and_pictures_interleaved_stream_as_they_come_whole(running, monkeypatch):
    from lm.decoding import Decoder

    legal, specials = Decoder._legal, list(running.pipe.model.form.vocabulary.specials)

    def few(self, row):  # so that pictures are begun now and then
        mask_V = legal(self, row)
        kept_V = mask_V.new_zeros(len(mask_V))
        kept_V[[*range(65, 73), *specials]] = True
        return mask_V & kept_V

    monkeypatch.setattr(Decoder, "_legal", few)
    seen = set()
    for seed in range(4):
        options = {
            "model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": seed, "temperature": 3.0,
            "max_tokens": 12, "extra_body": {"max_images": 2},
        }  # fmt: skip
        whole = running.client.chat.completions.create(**options).choices[0].message.content
        parts = [{"type": "text", "text": whole}] if isinstance(whole, str) else whole
        streamed = []
        for chunk in running.client.chat.completions.create(stream=True, **options):
            delta = chunk.choices[0].delta
            if delta.content:
                if not (streamed and isinstance(streamed[-1], str)):
                    streamed.append("")
                streamed[-1] += delta.content
            streamed += getattr(delta, "images", None) or []
        kinds = [part["type"] for part in parts if part.get("text") != ""]
        assert [part if isinstance(part, str) else part["image_url"]["url"] for part in streamed] == [
            part.get("text") or part["image_url"]["url"] for part in parts if part.get("text") != ""
        ]
        seen.add(tuple(kinds))
    assert any("text" in kinds and "image_url" in kinds for kinds in seen)


def test_redrawn_cells_change_and_the_others_stay(running):
    status, shown, _ = running.post("/v1/images/encode", {"image": data_url()})
    codes, cells = shown["codes"], [[1, 2], [3, 3]]
    assert (
        status == 200
        and codes == running.pipe.encode_image(Image.new("RGB", (40, 30), "red")).codes_hwQ.tolist()
    )
    _, made, _ = running.post(
        "/v1/images/redraw", {"codes": codes, "cells": cells, "seed": 2, "n": 8, "temperature": 2.0}
    )
    found = [item["codes"] for item in made["data"]]
    for new in found:
        assert all(
            new[row][column] == codes[row][column]
            for row in range(4)
            for column in range(4)
            if [row, column] not in cells
        )
    assert len({str([new[1][2], new[3][3]]) for new in found}) > 1


# --- what is refused ------------------------------------------------------------------------------------------------


def bomb():
    """A PNG of 20,000 x 20,000 black pixels in some kilobytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(2501) * 20000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


DRAW, CHAT = "/v1/images/generations", "/v1/chat/completions"
PIXEL = "data:image/png;base64,"


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (DRAW, {"prompt": "x" * 10**6}, "prompt", "1000000 characters; at most 2000"),
        (DRAW, {"prompt": "a", "n": 10**6}, "n", "at most 8"),
        (DRAW, {"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        (DRAW, {"prompt": "a", "n": "3"}, "n", "valid integer"),
        (DRAW, {"prompt": "a", "n": True}, "n", "valid integer"),
        (DRAW, {"prompt": ["a"]}, "prompt", "valid string"),
        (DRAW, {"prompt": "a", "\ud800": "a"}, None, "\\ud800"),
        (DRAW, {"prompt": "\ud800"}, "prompt", "half a surrogate pair"),
        (DRAW, {}, "prompt", "Missing required parameter"),
        (DRAW, {"prompt": "a", "size": "1024x1024"}, "size", "32x32"),
        (DRAW, {"prompt": "a", "guidanse": 3}, "guidanse", "did you mean 'guidance'"),
        (DRAW, {"prompt": "a", "guidance": float("inf")}, "guidance", "finite"),
        (DRAW, {"prompt": "a", "temperature": -1.0}, "temperature", "greater than or equal to 0"),
        (DRAW, {"prompt": "a", "top_p": float("nan")}, "top_p", "nan"),
        (DRAW, {"prompt": "a", "seed": 2**64}, "seed", "less than"),
        (DRAW, {"prompt": "a", "response_format": "url"}, "response_format", "b64_json"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": ask_about("http://127.0.0.1/x.png")}, "messages.0.image_url", "nothing is fetched"),
        (CHAT, {"messages": ask_about("file:///etc/passwd")}, "messages.0.image_url", "nothing is fetched"),
        (CHAT, {"messages": ask_about(PIXEL + "AAA")}, "messages.0.image_url", "not valid base64"),
        (CHAT, {"messages": ask_about(PIXEL + "AAAA")}, "messages.0.image_url", "not-an-image"),
        (CHAT, {"messages": ask_about(PIXEL + base64.b64encode(bomb()).decode())}, None, "too-many-pixels"),
        (CHAT, {"messages": ask_about(data_url(Image.new("RGB", (8, 8))))[:1] * 9}, "messages", "At most 8 pict"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, None, "audio"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 2001}]}, "messages", "2001 characters"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 10**9}, "max_tokens", "at most 64"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_images": 99}, "max_images", "at most 8"),
        ("/v1/images/redraw", {"codes": [[[0, 0]]], "cells": []}, "codes", "(4, 4) cells of 2"),
        ("/v1/images/redraw", {"codes": [[[99, 0]] * 4] * 4, "cells": []}, "codes", "below 16"),
        ("/v1/images/redraw", {"codes": [[[0, 0]] * 4] * 4, "cells": [[4, 0]]}, "cells", "no cell [4, 0]"),
        ("/v1/images/redraw", {"codes": [[[0]], [[0], [0]]], "cells": []}, "codes", "equally long"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(running, path, body, param, said):
    status, answer, _ = running.post(path, body)
    assert status == 400, answer
    error = answer["error"]
    assert said in error["message"] and len(error["message"]) < 400
    assert param is None or error["param"] == param
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_what_outgrows_the_model_is_refused(running, monkeypatch):
    monkeypatch.setattr(running.pipe.model.lm.config, "max_position_embeddings", 40)
    for path, body in (
        (DRAW, {"prompt": "a" * 40}),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a" * 60}], "max_tokens": 9, "modalities": ["text"]},
        ),
    ):
        status, answer, _ = running.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert running.post(DRAW, {"prompt": "a" * 9})[0] == 200


def test_bodies_that_are_no_json_or_too_large(running):
    for raw in (b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"n": 1' + b"0" * 5000 + b"}"):
        status, answer, _ = running.post(DRAW, None, raw=raw)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error", raw[:20]
    status, answer, _ = running.post(DRAW, None, raw=b"{" + b" " * 2**20 + b"}")
    assert status == 413 and "exceeds 1 MB" in answer["error"]["message"]

    def pieces():
        for _ in range(64):
            yield b" " * 2**15

    with suppress(BrokenPipeError, ConnectionResetError):  # the server may close before all has been sent
        assert running.post(DRAW, None, raw=pieces())[0] == 413  # in pieces, no length announced
    with pytest.raises(openai.NotFoundError):
        running.client.embeddings.create(input="a", model="tiny")
    assert running.client.images.generate(prompt="still here").data


def test_other_names_of_the_host_are_refused(running):
    """A page elsewhere that gave its own name our address could otherwise use the server through a browser."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"))
    connection.request("GET", "/v1/models", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 400


def test_control_tokens_in_a_prompt_stay_text(running):
    prompt = "<|image_start|><|image_3|> <|end|> a"
    made = running.client.images.generate(prompt=prompt, extra_body={"seed": 1})
    (expected,) = running.pipe.generate(prompt, seed=1)
    assert picture_of(made.data[0]).tobytes() == expected.tobytes()
    ids = running.pipe.encode_text(prompt)
    assert set(ids).isdisjoint(running.pipe.model.form.vocabulary.specials) and len(ids) > 10


def test_a_full_server_says_when_to_come_back(slow):
    with ThreadPoolExecutor(12) as pool:
        bodies = [{"prompt": "a", "n": 8}] * 12
        answers = list(pool.map(lambda body: slow.post(DRAW, body), bodies))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 8
    for status, answer, headers in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1 and answer["error"]["type"] == "rate_limit_error"
    slow.settle()


# --- many clients ---------------------------------------------------------------------------------------------------


def leave(server, body, after):
    """Send a request and close the connection."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request("POST", DRAW, json.dumps(body).encode(), {"Content-Type": "application/json"})
    time.sleep(after)
    connection.sock.close()


def test_clients_that_leave_take_their_drawings_along(slow):
    import gc

    import torch

    def tensors():
        gc.collect()
        found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return sum(
            each.nbytes for each in found if each.layout is torch.strided
        )  # packed weights have no size

    slow.client.images.generate(prompt="warm", extra_body={"guidance": 2.0})
    slow.settle()
    before, slow.pause = tensors(), 0.4
    for _ in range(5):
        with ThreadPoolExecutor(40) as pool:
            for number in range(40):
                body = {
                    "prompt": "a",
                    "n": 2,
                    "guidance": 2.0,
                    "stream": number % 2 == 0,
                    "partial_images": None,
                }
                pool.submit(leave, slow, body, 0.05)
        slow.settle(8.0)  # either half of them, drawn to the end, would take twice as long
    assert not slow.engine.decoder.rows and not slow.engine.decoder.branches
    assert tensors() <= before + 2**16
    assert slow.client.images.generate(prompt="still here").data


def test_a_hundred_clients_at_a_time_are_served(running, capsys):
    expected = {seed: running.pipe.generate("a", seed=seed, guidance=2.0)[0].tobytes() for seed in range(4)}
    patient = running.client.with_options(max_retries=20)

    def one(number):
        if number % 5 == 4:
            leave(running, {"prompt": "b", "n": 4}, 0.01)
            return None
        started = time.monotonic()
        made = patient.images.generate(
            prompt="a", extra_body={"seed": number % 4, "guidance": 2.0, "temperature": 1.0}
        )
        assert picture_of(made.data[0]).tobytes() == expected[number % 4]
        return time.monotonic() - started

    with ThreadPoolExecutor(100) as pool:
        times = sorted(filter(None, pool.map(one, range(100))))
    with capsys.disabled():
        print(f"  80 of 100 stayed: p50 {times[40]:.2f} s, p95 {times[76]:.2f} s", end=" ")
    assert len(times) == 80 and times[-1] < 30
    running.settle()


# --- the engine -----------------------------------------------------------------------------------------------------


class Waiter:
    def __init__(self, engine, drawings, watched=False):
        self.event = threading.Event()
        self.works = engine.submit(drawings, self.event.set, watched)

    def wait(self):
        while not all(work.done for work in self.works):
            assert self.event.wait(20)
            self.event.clear()
        return [work.error or work.segments for work in self.works]


def drawings(model, count, guidance=2.0):
    start = model.form.image_prompt([Text((5, 6))], model.form.grids[0])
    return [Drawing(start, Sampling(guidance), seed, images=1, contexts=((),)) for seed in seeds(0, count)]


@pytest.fixture
def engine():
    model, _ = make_model()
    made = Engine(model, branches=12, accepted=40)
    yield made
    made.close()


def test_drawings_join_those_under_way_and_stay_the_same(engine):
    wanted = drawings(engine.model, 20)
    waiters = []
    for drawing in wanted:
        waiters.append(Waiter(engine, [drawing]))
        time.sleep(0.002)
    assert [waiter.wait()[0] for waiter in waiters] == draw_all(engine.model, wanted)


def test_one_bad_drawing_fails_alone(engine, monkeypatch):
    """Whatever it is in a pass that fails, the others of the pass are drawn as if it had not been there."""
    wanted, bad = drawings(engine.model, 9), 4
    clean, advance = draw_all(engine.model, wanted), type(engine.decoder)._advance

    def break_at(self, rows, ids):
        if any(row.drawing.seed == wanted[bad].seed and len(row.cells) == 2 for row in rows):
            raise RuntimeError("no memory")
        return advance(self, rows, ids)

    monkeypatch.setattr(type(engine.decoder), "_advance", break_at)
    found = Waiter(engine, wanted, watched=True).wait()
    assert isinstance(found.pop(bad), RuntimeError)
    clean.pop(bad)
    assert found == clean and engine.alive and not engine.count


def test_a_cancelled_drawing_leaves_the_others_as_they_are(engine, monkeypatch):
    step = type(engine.decoder).step
    monkeypatch.setattr(type(engine.decoder), "step", lambda self: (time.sleep(0.02), step(self))[1])
    wanted = drawings(engine.model, 6)
    waiter = Waiter(engine, wanted, watched=True)
    while not waiter.works[0].progress.cells:
        time.sleep(0.001)
    engine.cancel([waiter.works[0], waiter.works[3]])
    found = waiter.wait()
    assert isinstance(found.pop(3), Stopped) and isinstance(found.pop(0), Stopped)
    monkeypatch.undo()
    assert found == [
        each for number, each in enumerate(draw_all(engine.model, wanted)) if number not in (0, 3)
    ]


def test_a_drawing_that_cannot_begin_fails_alone(engine, monkeypatch):
    wanted = drawings(engine.model, 3)
    wanted[1] = Drawing(engine.model.form.lay([]))  # fine
    wanted[2] = Drawing(wanted[0].prompt)  # has opened a picture and wants none
    reserve = type(engine.decoder.cache).reserve
    found = Waiter(engine, wanted).wait()
    assert (
        isinstance(found[1], ValueError) and isinstance(found[2], ValueError) and isinstance(found[0], list)
    )

    def no_memory(self, rows, positions):
        raise MemoryError

    monkeypatch.setattr(type(engine.decoder.cache), "reserve", no_memory)
    assert all(isinstance(each, MemoryError) for each in Waiter(engine, wanted[:1]).wait())
    assert not engine.decoder.rows and not engine.decoder.branches
    monkeypatch.setattr(type(engine.decoder.cache), "reserve", reserve)
    assert Waiter(engine, wanted[:1]).wait() == draw_all(engine.model, wanted[:1])


def test_requests_take_turns(engine):
    order = []
    many = drawings(engine.model, 30)
    first = Waiter(engine, many)
    second = engine.submit(many[:1], lambda: order.append(sum(work.done for work in first.works)))
    first.wait()
    assert second[0].done and order[0] < 25


def test_calls_and_their_errors(engine):
    assert engine.call(threading.current_thread).result(5).name == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(5)
    with pytest.raises(Busy, match="at most 40"):
        engine.submit(drawings(engine.model, 41), print)
    waiter = Waiter(engine, drawings(engine.model, 40))
    engine.close()
    assert any(isinstance(each, Stopped) for each in waiter.wait())
    with pytest.raises(Stopped):
        engine.submit(drawings(engine.model, 1), print)


@pytest.mark.parametrize("layout", ["flat", "stacked", "delayed"])
@pytest.mark.parametrize("row_ends", [False, True])
def test_rows_of_a_picture_under_way(layout, row_ends):
    import torch
    from tiny import make_format

    if row_ends and layout == "delayed":
        pytest.skip("there is no such format")
    form, _ = make_format(layout, (3, 4), row_ends=row_ends)
    codes_hwQ = torch.randint(1, 15, (3, 4, 2))
    cells = form.place_kept(codes_hwQ, (3, 4))
    found = []
    for read in range(len(cells) + 1):
        progress = Progress(cells=tuple(cells[:read]), grid=(3, 4))
        so_far, rows = rows_done(form, progress)
        assert torch.equal(so_far[:rows], codes_hwQ[:rows]) and so_far.shape == codes_hwQ.shape
        found.append(rows)
    assert found == sorted(found) and set(found) == {0, 1, 2, 3}
    assert isinstance(Codes(so_far), Codes)


def test_a_port_that_is_taken_is_a_wrong_configuration(running):
    with pytest.raises(ConfigError, match="cannot listen"):
        listen("127.0.0.1", int(running.url.rpartition(":")[2]))


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(running):
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda told: page.faults.append(told.text) if told.type == "error" else None)
        page.on(
            "request", lambda asked: page.faults.append(asked.url) if outside(asked.url, running) else None
        )
        page.goto(running.url)
        yield page
        browser.close()


def outside(url, running):
    return not url.startswith((running.url, "data:", "blob:"))


def test_the_page_draws_describes_shows_codes_and_redraws(page, running, tmp_path):
    from playwright.sync_api import expect

    pictures = page.locator("#pictures img")
    page.get_by_label("Prompt").fill("a red circle")
    page.locator("#n").fill("2")
    page.get_by_label("Seed").fill("7")
    page.locator("#guidance").fill("2")
    page.locator("#temperature").fill("1")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("status")).to_contain_text("2 of 2 drawn", timeout=20_000)
    expect(pictures).to_have_count(2)
    expect(pictures.first).to_have_attribute("alt", "a red circle · seed 7")
    expected = running.pipe.draw_codes("a red circle", 2, running.pipe.sampling_with(2.0, 1.0), 7)
    drawn = page.evaluate("pictures.map((each) => each.codes)")
    assert drawn == [each.codes_hwQ.tolist() for each in expected]

    expect(page.locator("#maps canvas")).to_have_count(2)
    page.get_by_role("button", name="Describe").click()
    expect(page.locator("#caption")).not_to_be_empty(timeout=20_000)

    cells = page.locator("#cells")
    box = cells.bounding_box()
    cells.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.9})
    cells.press("Space")  # the keyboard's cursor begins at the first cell
    assert page.evaluate("[...marked].sort()") == ["0,0", "3,3"]
    page.locator("#n").fill("1")
    page.get_by_role("button", name="Redraw cells").click()
    expect(pictures).to_have_count(3, timeout=20_000)
    expect(page.get_by_role("status")).to_contain_text("1 of 1 drawn", timeout=20_000)
    old = page.evaluate("chosen.codes")
    new = page.evaluate("pictures[0].codes")
    assert [new[y][x] == old[y][x] for y in range(4) for x in range(4)][1:-1] == [True] * 14

    Image.new("RGB", (50, 40), "blue").save(tmp_path / "blue.png")
    page.set_input_files("#file", tmp_path / "blue.png")
    expect(pictures).to_have_count(4, timeout=20_000)
    expect(pictures.first).to_have_attribute("alt", "blue.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
    assert page.faults == []

    (tmp_path / "no.png").write_bytes(b"not a picture")
    page.set_input_files("#file", tmp_path / "no.png")
    expect(page.get_by_role("status")).to_contain_text("not-an-image", timeout=20_000)


def test_a_drawing_can_be_stopped_from_the_page(page, slow):
    from playwright.sync_api import expect

    page.locator("#n").fill("8")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#pictures img")).to_have_count(8, timeout=20_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    slow.settle(5)
    assert page.faults == []
