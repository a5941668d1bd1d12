"""uvicorn's HTTP/1.1 with an end to every wait: nobody holds a connection, or keeps others from having one.

uvicorn waits without end for the head of a request (500 clients that send a letter now and then hold 500 connections),
and for a client to take its answer; after an answer it reads on for as long as a body is sent. Here each has its time,
and where all connections are in use a new one takes the place of the one that has been silent longest. Knows sockets
and HTTP's states: nothing of paths, bodies or models.
"""

from __future__ import annotations

import asyncio
import resource
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lm.serve.web import Limits

REST = 5.0  # seconds, and 2**22 bytes, for what is left of a body that has been answered already
FILES = 4096  # connections are files: the soft limit of a process is often 1024, and those waiting to be let in count


def web_server(app: Any, limits: Limits, log_level: str = "warning") -> uvicorn.Server:
    """What runs an application on a listening socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES:  # negative: no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard) if hard >= 0 else FILES, hard))
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits),  # pyright: ignore[reportArgumentType]
        ws="none",
        log_level=log_level,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    return uvicorn.Server(config)


class Connection(H11Protocol):
    """One client's connection. What is waited for, and so for how long, is read from HTTP's states after each event."""

    def __init__(self, limits: Limits, **given: Any):
        super().__init__(**given)
        self.limits = limits
        self.since = 0.0  # when the state that is waited in began
        self.awaited: str | None = None
        self.rest = 2**22
        self.waiting: asyncio.TimerHandle | None = None
        self.taking: asyncio.TimerHandle | None = None

    # --- what comes --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()
        if self.awaited == "rest":  # closed at once, the connection could take the answer with it
            self.rest -= len(data)
            if self.rest < 0:
                self.transport.pause_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self.waiting, self.taking)):
            timer.cancel()

    def _watch(self) -> None:
        state, answered = self.conn.their_state, self.cycle is not None and self.cycle.response_complete
        awaited = "head" if state is h11.IDLE else "rest" if state is h11.SEND_BODY and answered else None
        if awaited == self.awaited:
            return
        self.awaited, self.since = awaited, self.loop.time()
        if self.waiting is not None:
            self.waiting.cancel()
        if awaited is not None:
            self.waiting = self.loop.call_later(
                self.limits.head if awaited == "head" else REST, self._end, 408
            )

    def _make_room(self) -> None:
        """Close the connection that has said nothing for longest, or else has sent no whole body; or else this one."""
        waiting = [each for each in self.connections if isinstance(each, Connection) and each is not self]
        silent = [each for each in waiting if each.conn.their_state in (h11.IDLE, h11.SEND_BODY)]
        first = min(
            silent, key=lambda each: (each.conn.their_state is h11.SEND_BODY, each.since), default=self
        )
        first._end(503)

    def _end(self, status: int) -> None:
        """Close; a client that finds no room, or is in the middle of a head, is told so."""
        self.connections.discard(self)
        new = self.awaited is None
        if self.conn.our_state is h11.IDLE and (new or self.conn.trailing_data[0]):
            head = [("Content-Length", "0"), ("Connection", "close"), ("Retry-After", "1")]
            self.transport.write(self.conn.send(h11.Response(status_code=status, headers=head)) or b"")
        self.transport.close()

    # --- what is sent ------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_again(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.taking is not None:
            self.taking.cancel()

    def _look_again(self, before: int) -> None:
        """The client has to take some of its answer within each span of time."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self.taking = self.loop.call_later(self.limits.seconds, self._look_again, left)
