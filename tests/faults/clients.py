"""Clients on plain sockets, well-behaved and other ones: what they send is written out, what comes back is bytes.

Knows HTTP as text: nothing of the server's code.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Answer:
    """status 0: the connection ended without one. sent: bytes of the body that the server took."""

    status: int = 0
    body: bytes = b""
    seconds: float = 0.0
    sent: int = 0

    @property
    def json(self):
        return json.loads(self.body)


class Client:
    """Of one server. Each request is a connection of its own."""

    def __init__(self, url):
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port

    def head(self, path, length, method="POST", close=True):
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
        ]
        lines.append("Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}")
        lines += ["Connection: close"] if close else []
        return "\r\n".join([*lines, "", ""]).encode()

    async def connect(self):
        return await asyncio.open_connection(self.host, self.port)

    async def say(self, raw, patience=60.0):
        """Bytes as they are → what comes back until the server closes."""
        started = time.monotonic()
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            return replied(await asyncio.wait_for(everything(reader), patience), started)
        finally:
            writer.close()

    async def ask(self, path, body, method="POST"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.say(self.head(path, len(data), method) + data)

    async def pour(self, path, size, announced):
        """A body of so many bytes, for as long as the server takes them or has not answered."""
        started, sent, piece = time.monotonic(), 0, b" " * 2**16
        reader, writer = await self.connect()
        answer = asyncio.ensure_future(everything(reader))
        writer.write(self.head(path, size if announced else None, close=False))
        try:
            while sent < size and not answer.done():
                writer.write(piece if announced else b"10000\r\n" + piece + b"\r\n")
                await asyncio.wait_for(writer.drain(), 60)
                sent += len(piece)
        except ConnectionError:
            pass
        found = replied(await answer, started)
        writer.close()
        found.sent = sent
        return found

    async def leave(self, path, body, after):
        """Ask, and go before the answer."""
        data = json.dumps(body).encode()
        _, writer = await self.connect()
        writer.write(self.head(path, len(data)) + data)
        await asyncio.sleep(after)
        writer.transport.abort()

    async def trickle(self, start, letter, pause, patience):
        """`start`, then a letter at a time → what the server says, and when; status -1: nothing, for that long."""
        started = time.monotonic()
        reader, writer = await self.connect()
        answer = asyncio.ensure_future(reader.read(2**16))
        writer.write(start)
        while not answer.done() and time.monotonic() - started < patience:
            await asyncio.wait({answer}, timeout=pause)
            if not answer.done():
                writer.write(letter)
        writer.transport.abort()
        return replied(await answer, started) if answer.done() else Answer(-1)


async def everything(reader):
    """All bytes until the connection ends, however it does."""
    found = b""
    try:
        while piece := await reader.read(2**16):
            found += piece
    except ConnectionError:
        pass
    return found


def replied(raw, started):
    seconds = time.monotonic() - started
    head, _, body = raw.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Answer(int(words[1]) if len(words) > 2 else 0, body, seconds)


def memory(pid, name="VmRSS"):
    """MB of a process; VmHWM: the most that it had."""
    with open(f"/proc/{pid}/status") as file:
        (kilobytes,) = [line.split()[1] for line in file if line.startswith(name)]
    return int(kilobytes) / 1024
