"""What protects the server and how it answers: bodies, errors, clients that leave, server-sent events.

Knows HTTP: nothing of models, drawings or pictures.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm.serve.engine import Busy, Stopped
from lm.serve.wire import Refused

Result = TypeVar("Result")

LEFT = 499  # the status of a client that has left, as nginx logs it; nobody reads it


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what the server holds at a time.

    pictures: drawings of one request; also given pictures. prompt: characters of all text. text: ids drawn. megabytes:
    of one body, and eight times that of all bodies together. megapixels: of a given picture. seconds: for a body (one
    more for each 256 KiB of it), and for a client to take some of its answer. head: seconds for the head of a request.
    connections: at a time.
    """

    pictures: int = 16
    prompt: int = 8192
    text: int = 512
    megabytes: int = 16
    megapixels: int = 16
    seconds: float = 30.0
    head: float = 10.0
    connections: int = 900

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 10**6:
                raise ValueError(f"{name}={value}: must lie between 0 and 1000000")


SMALL = 2**16  # bytes of a body that is read however much of others is held: a prompt, and no picture
VALUES = (
    2**16
)  # in the JSON of a body: each costs a hundred times its bytes, and those that are wrong a thousand times
SLOWEST = 2**18  # bytes a second


class Bodies:
    """Around an application: bodies that are too large, too slow, or too many together are refused."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits
        self.most = limits.megabytes * 2**20
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read, values, ended = 0, 0, False
        started = asyncio.get_running_loop().time()

        async def limited() -> Message:
            nonlocal read, values, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout_at(started + self.limits.seconds + read / SLOWEST):
                    message = await receive()
            except TimeoutError:
                raise Refused("The body of the request came too slowly.", status=408) from None
            body = message.get("body", b"")
            read, self.held = read + len(body), self.held + len(body)
            values += body.count(b",")
            ended = not message.get("more_body", False)
            if read > self.most:
                raise self._too_large()
            if values > VALUES:
                raise Refused(f"The body of the request has more than {VALUES} values.", status=413)
            if self.held > 8 * self.most and read > SMALL:
                raise Refused("Too many large requests at a time.", status=429, retry_after=1)
            return message

        try:
            announced = dict(scope["headers"]).get(b"content-length", b"0")
            if announced.isdigit() and int(announced) > self.most:
                await answer_refusal(self._too_large())(scope, receive, send)
                return
            await self.app(scope, limited, send)
        finally:
            self.held -= read

    def _too_large(self) -> Refused:
        return Refused(f"The body of the request exceeds {self.limits.megabytes} MB.", status=413)


def answer_refusal(error: Refused) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body, error.status, headers)


def explain(error: Exception) -> Refused:
    """Any exception, as what the client is told. What it does not know says nothing of our insides."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(f"The server is busy: {error}.", status=429, retry_after=error.seconds)
    if isinstance(error, Stopped):
        return Refused("The server is stopping.", status=503, retry_after=10)
    return Refused(f"The server failed at this request ({type(error).__name__}).", status=500)


class Changes:
    """An event of the server's loop that other threads may set."""

    def __init__(self) -> None:
        self.loop, self.event = asyncio.get_running_loop(), asyncio.Event()

    def __call__(self) -> None:
        with suppress(RuntimeError):  # the loop has been closed
            self.loop.call_soon_threadsafe(self.event.set)

    async def wait(self) -> None:
        await self.event.wait()
        self.event.clear()


async def left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the coroutine gives; it is cancelled, and Refused raised, when the client leaves before."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Refused("The client has left.", status=LEFT)
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


def stream(
    events: AsyncIterator[dict[str, Any]],
    request: Request,
    ended: Callable[[], object],
    last: str | None = None,
) -> StreamingResponse:
    """Events as server-sent ones, `last` behind them. ended: called in any case, also when the client leaves."""

    async def lines() -> AsyncIterator[str]:
        leaving = asyncio.ensure_future(left(request))
        following = None
        try:
            while True:
                following = asyncio.ensure_future(_next(events))
                await asyncio.wait({following, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    return
                event = following.result()
                if event is None:
                    break
                name = f"event: {event['type']}\n" if "type" in event else ""
                yield f"{name}data: {json.dumps(event)}\n\n"
            if last is not None:
                yield f"data: {last}\n\n"
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(explain(error).body)}\n\n"
        finally:
            for task in filter(None, (leaving, following)):
                task.cancel()
            ended()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def _next(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(events, None)
