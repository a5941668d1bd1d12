"""One thread that owns the model: drawings come in at any time and are decoded together.

    engine = Engine(model)
    (work,) = engine.submit([drawing], changed)     # `changed` is called, in the engine's thread, as it goes on
    work.done, work.segments, work.error

A drawing joins the rows that are under way as soon as there is room (continuous batching, Orca, OSDI 2022). Requests
take turns, so that one for many pictures does not hold up the others. Whatever else needs the model or its
tokenizers (`call`) is done between two passes, in the same thread. Knows drawings and rows: nothing of HTTP, strings
or pixels.

Legend: L positions of a picture, W columns, h w grid of cells, Q depth.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lm.decoding import Decoder, Drawing, Row
from lm.model import MultimodalLM
from lm.sequence import Grid, Segment, SequenceFormat

Result = TypeVar("Result")


class Busy(Exception):
    """There are as many drawings as the engine accepts. seconds: after which it is worth asking again."""

    def __init__(self, accepted: int, limit: int, seconds: int):
        super().__init__(f"{accepted} drawings are under way or waiting, at most {limit} are accepted")
        self.seconds = seconds


class Stopped(Exception):
    """The engine was closed before the drawing was finished."""


@dataclass(frozen=True)
class Progress:
    """How far a drawing is: finished segments, then the text (ids) or the picture (positions) that is being drawn."""

    segments: tuple[Segment, ...] = ()
    text: tuple[int, ...] = ()
    cells: tuple[Tensor, ...] = ()  # W ids each
    grid: Grid = (0, 0)

    @property
    def reach(self) -> tuple[int, int]:
        """Larger as it goes on."""
        return len(self.segments), len(self.text) + len(self.cells)


@dataclass(eq=False)
class Work:
    """A drawing on its way. Its fields are written by the engine's thread and may be read by any."""

    drawing: Drawing
    changed: Callable[[], object]  # called after each change
    watched: bool  # `progress` is kept, and `changed` called, while it is under way
    progress: Progress = Progress()
    segments: list[Segment] | None = None  # when it is finished
    error: Exception | None = None  # when it failed
    row: Row | None = None  # while it is under way
    begun: float = 0.0  # when that was

    @property
    def done(self) -> bool:
        return self.segments is not None or self.error is not None

    @property
    def branches(self) -> int:
        """Rows of the cache that it takes, at most."""
        return 1 + len(self.drawing.contexts)


class Engine:
    """branches: rows of the cache that are decoded together (a drawing with guidance takes two).

    accepted: drawings that may be under way or waiting; beyond, `submit` raises Busy. A drawing that fails in a pass
    with others is found by decoding halves of them again, each by its own seed as before; the others do not notice.
    """

    def __init__(self, model: MultimodalLM, branches: int = 64, accepted: int = 256):
        if branches < 1 or accepted < 1:
            raise ValueError(f"branches={branches}, accepted={accepted}: each must be at least 1")
        self.model, self.limit, self.accepted = model, branches, accepted
        self.decoder = Decoder(model)
        self.count = 0  # drawings accepted and not finished
        self._news = threading.Condition()
        self._closing = False
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting: deque[deque[Work]] = deque()  # one for each request
        self._cancelled: list[Work] = []
        self._suspects: list[list[Work]] = []  # failed together: groups to be decoded by themselves
        self._by_themselves = False  # those under way are a group of suspects
        self._rows: list[Work] = []  # under way, in the decoder's order
        self._pass_seconds, self._drawing_seconds = 0.0, 1.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- from any thread ---------------------------------------------------------------------------------------------

    def submit(
        self, drawings: list[Drawing], changed: Callable[[], object], watched: bool = False
    ) -> list[Work]:
        """Accept a request's drawings. Busy if there are too many already; Stopped if the engine was closed."""
        works = [Work(drawing, changed, watched) for drawing in drawings]
        with self._news:
            self.check_room(len(works))
            self.count += len(works)
            self._waiting.append(deque(works))
            self._news.notify()
        return works

    def check_room(self, drawings: int) -> None:
        """Raise what `submit` would raise now."""
        if self._closing:
            raise Stopped("the engine has been closed")
        if self.count + drawings > self.accepted:
            raise Busy(self.count, self.accepted, max(1, round(self._drawing_seconds)))

    def cancel(self, works: list[Work]) -> None:
        """Stop drawings that nobody waits for. Those that are finished stay so."""
        with self._news:
            self._cancelled += [work for work in works if not work.done]
            self._news.notify()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run something in the engine's thread, between two passes: it may use the model and its tokenizers."""
        future: Future[Result] = Future()
        with self._news:
            if self._closing:
                raise Stopped("the engine has been closed")
            self._calls.append((function, future))
            self._news.notify()
        return future

    @property
    def under_way(self) -> int:
        """Drawings that are being decoded."""
        return len(self._rows)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """End the thread; what is not finished fails with Stopped."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    # --- in the engine's thread --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._closing or self._calls or self._cancelled or self._waiting or self._busy):
                    self._news.wait()
                if self._closing:
                    break
            try:
                self._turn()
            except Exception as error:  # a fault of ours: those under way fail, the engine goes on
                self._fail(error.with_traceback(None))
        self._end()

    def _turn(self) -> None:
        self._answer()
        self._drop()
        self._admit()
        if self._rows:
            self._pass()
        if not self._rows and self.decoder.cache.room != (0, 0):
            self.decoder = Decoder(self.model)  # the cache never shrinks: an idle engine gives it back

    def _fail(self, error: Exception) -> None:
        failed, self._rows = self._rows, []
        self.decoder = Decoder(self.model)
        for work in failed:
            self._finish(work, error=error)

    @property
    def _busy(self) -> bool:
        return bool(self._rows or self._suspects)

    def _answer(self) -> None:
        """Calls, for as long as a pass takes: neither they nor the drawings wait for more than the other's share."""
        started = time.monotonic()
        while self._calls:
            function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            if (self._busy or self._waiting) and time.monotonic() - started > self._pass_seconds:
                break

    def _drop(self) -> None:
        with self._news:
            dropped, self._cancelled = [work for work in self._cancelled if not work.done], []
            for group in [*self._waiting, *self._suspects]:
                for work in [each for each in group if each in dropped]:
                    group.remove(work)
            self._waiting = deque(group for group in self._waiting if group)
            self._suspects = [group for group in self._suspects if group]
        for work in dropped:
            if work.row is not None:
                self.decoder.remove(work.row)
                self._rows.remove(work)
            self._finish(work, error=Stopped("nobody waits for it"))

    def _admit(self) -> None:
        """Begin what there is room for; after a failure, one group of suspects by itself."""
        if self._by_themselves and self._rows:
            return
        self._by_themselves = bool(self._suspects)
        if self._suspects:
            if not self._rows:
                for work in self._suspects.pop():
                    self._begin(work)
            return
        while (work := self._next()) is not None:
            self._begin(work)

    def _next(self) -> Work | None:
        """The next drawing of the request whose turn it is, if there is room."""
        with self._news:
            if not self._waiting:
                return None
            used = len(self.decoder.branches)
            if used and used + self._waiting[0][0].branches > self.limit:
                return None
            group = self._waiting.popleft()
            work = group.popleft()
            if group:
                self._waiting.append(group)
            return work

    def _begin(self, work: Work) -> None:
        try:
            work.row = self.decoder.add(work.drawing)
        except Exception as error:
            for row in self.decoder.rows[len(self._rows) :]:  # it may have got in before it failed
                self.decoder.remove(row)
            self._finish(work, error=error.with_traceback(None))
        else:
            work.begun = time.monotonic()
            self._rows.append(work)

    def _pass(self) -> None:
        started = time.monotonic()
        try:
            finished = self.decoder.step()
        except Exception as error:
            failure = error.with_traceback(None)  # its frames hold the decoder
        else:
            self._pass_seconds = time.monotonic() - started
            self._report(finished)
            return
        failed, self._rows = self._rows, []
        for work in failed:
            work.row = None
        self.decoder = Decoder(self.model)
        half = len(failed) // 2
        if half:
            self._suspects += [failed[:half], failed[half:]]
        else:
            self._finish(failed[0], error=failure)

    def _report(self, finished: list[Row]) -> None:
        ended = {id(row) for row in finished}
        for work in list(self._rows):
            row = work.row
            assert row is not None
            if id(row) in ended:
                self._rows.remove(work)
                self._drawing_seconds = time.monotonic() - work.begun
                self._finish(work, segments=row.segments)
            elif work.watched:
                cells = tuple(row.cells) if row.state >= 0 else ()
                progress = Progress(tuple(row.segments), tuple(row.text), cells, row.grid)
                if (
                    progress.reach > work.progress.reach
                ):  # drawn again after a failure, it lags behind for a while
                    work.progress = progress
                    self._tell(work)

    def _finish(
        self, work: Work, segments: list[Segment] | None = None, error: Exception | None = None
    ) -> None:
        work.row, work.segments, work.error = None, segments, error
        with self._news:
            self.count -= 1
        self._tell(work)

    def _tell(self, work: Work) -> None:
        with suppress(Exception):  # whoever asked may be gone, the others are not
            work.changed()

    def _end(self) -> None:
        left = [work for group in [*self._waiting, *self._suspects] for work in group]
        for work in [*self._rows, *left]:
            self._finish(work, error=Stopped("the engine has been closed"))
        for _, future in self._calls:
            future.cancel()
        self._rows, self._waiting, self._suspects = [], deque(), []
        self._calls.clear()


def rows_done(form: SequenceFormat, progress: Progress) -> tuple[Tensor, int]:
    """Codes (h,w,Q) of a picture under way, and how many of its rows are complete; the others repeat the last one.

    Which codes are there already depends on the layout: those that stay as they are whatever is put behind them.
    """
    read = len(progress.cells)
    last = form.vocabulary.codebook_size - 1

    def filled(code: int) -> Tensor:
        ids_LW = form.place_kept(torch.full((*progress.grid, form.vocabulary.depth), code), progress.grid)
        if read:
            known_LW = torch.stack(progress.cells)[: len(ids_LW)]
            ids_LW[: len(known_LW)] = known_LW
        return form.read_image(ids_LW, progress.grid).codes_hwQ

    codes_hwQ, other_hwQ = filled(0), filled(last)
    complete_h = (codes_hwQ == other_hwQ).all(-1).all(-1)
    rows = int(complete_h.long().cumprod(0).sum()) if last else 0
    codes_hwQ[rows:] = codes_hwQ[max(rows - 1, 0)]
    return codes_hwQ, rows
