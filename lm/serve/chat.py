"""The endpoint that goes on from text and pictures, with text, pictures or both, whole or as they come."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lm.decoding import Drawing
from lm.pipeline import seeds
from lm.sequence import Segment, Text
from lm.serve.desk import Desk
from lm.serve.engine import Work
from lm.serve.web import Changes, stream, unless_left
from lm.serve.wire import ChatAsked, Refused, to_data_url


class Chat:
    def __init__(self, desk: Desk):
        self.desk, self.form = desk, desk.form

    async def chat(self, asked: ChatAsked, request: Request) -> Response:
        """Go on from text and pictures, with text, pictures or both."""
        parts = asked.parts()
        self.desk.check_request(asked, [part for part in parts if isinstance(part, str)])
        limit, images, due = self._wanted(asked)
        sampling = self.desk.sampling(asked)
        if not images and asked.temperature is None:
            sampling = replace(
                sampling, temperature=0.0
            )  # words of a picture: the likeliest, as `Pipeline.caption`
        if sum(not isinstance(part, str) for part in parts) > self.desk.limits.pictures:
            raise Refused(f"At most {self.desk.limits.pictures} pictures may be given.", "messages")
        segments = await unless_left(request, self._read_parts(parts))
        prompt = self.form.lay(segments, end=False)
        contexts = ((),) if images else ()
        drawings = [
            Drawing(prompt, sampling, seed, limit, images, due, contexts)
            for seed in seeds(self.desk.seed(asked), asked.n or 1)
        ]
        self.desk.check_length(drawings[0])
        changes = Changes()
        works = self.desk.engine.submit(drawings, changes, watched=bool(asked.stream))
        common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.desk.name}
        if asked.stream:
            told = bool(asked.stream_options and asked.stream_options.include_usage)
            return stream(
                self._chat_events(works, changes, common, told),
                request,
                lambda: self.desk.engine.cancel(works),
                "[DONE]",
            )
        return JSONResponse(
            await self.desk.attended(self._whole_chat(works, changes, common), works, request)
        )

    def _wanted(self, asked: ChatAsked) -> tuple[int, int, int]:
        """The most ids of text, the most pictures, the least pictures."""
        kinds = asked.modalities or ["text", "image"]
        most = 1 if asked.max_images is None else asked.max_images
        if most > self.desk.limits.pictures:
            raise Refused(
                f"max_images={most}: at most {self.desk.limits.pictures}.", "max_images", "invalid_value"
            )
        if "image" in kinds and "text" not in kinds and not most:
            raise Refused("Pictures alone, and none of them: set max_images.", "max_images", "invalid_value")
        limit = asked.max_completion_tokens or asked.max_tokens or min(64, self.desk.limits.text)
        if limit > self.desk.limits.text:
            raise Refused(
                f"max_tokens={limit}: at most {self.desk.limits.text}.", "max_tokens", "invalid_value"
            )
        images = most if "image" in kinds else 0
        return (limit, images, 0) if "text" in kinds else (0, images, images)

    async def _read_parts(self, parts: list[Any]) -> list[Segment]:
        """Pictures one after another, so that few are held as pixels; text in the engine's thread."""
        segments: list[Segment] = []
        for number, part in enumerate(parts):
            if not isinstance(part, str):
                image = await self.desk.read_picture(part.url, f"messages.{number}.image_url")
                segments.append(replace(image, given=True))
            elif part.strip():
                segments.append(await self.desk.in_engine(lambda part=part: self.desk.text(part)))
        return segments

    async def _whole_chat(
        self, works: list[Work], changes: Changes, common: dict[str, Any]
    ) -> dict[str, Any]:
        await self.desk.finished(works, changes)
        choices = []
        for index, work in enumerate(works):
            parts = [await self._part(segment) for segment in work.segments or []]
            told = "".join(part["text"] for part in parts if part["type"] == "text")
            content = parts if any(part["type"] != "text" for part in parts) else told
            message = {"role": "assistant", "content": content, "refusal": None}
            choices.append(
                {"index": index, "message": message, "finish_reason": self._reason(work), "logprobs": None}
            )
        return {**common, "object": "chat.completion", "choices": choices, "usage": self._usage(works)}

    async def _part(self, segment: Segment) -> dict[str, Any]:
        shown = await self.desk.in_engine(lambda: self.desk.pipeline.show_segment(segment))
        if isinstance(shown, str):
            return {"type": "text", "text": shown}
        return {"type": "image_url", "image_url": {"url": await asyncio.to_thread(to_data_url, shown)}}

    async def _chat_events(
        self, works: list[Work], changes: Changes, common: dict[str, Any], told: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """Chunks with what is new of each choice: text in `content`, a picture in `images`."""
        common = {**common, "object": "chat.completion.chunk"}

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {
                **common,
                "choices": [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}],
            }

        said = [Said() for _ in works]
        open_ones = set(range(len(works)))
        for index in sorted(open_ones):
            yield chunk(index, {"role": "assistant", "content": ""})
        while open_ones:
            await changes.wait()
            for index in sorted(open_ones):
                work = works[index]
                done = work.done
                self.desk.raise_for(work)
                segments = list(work.segments or work.progress.segments)
                if not done and work.progress.text:
                    segments.append(Text(work.progress.text))
                while (new := said[index].next(segments)) is not None:
                    segment, closed = new
                    part = await self._part(segment)
                    if part["type"] == "text":
                        delta = said[index].delta(part["text"], closed or done)
                        if delta:
                            yield chunk(index, {"content": delta})
                        if not said[index].advance(closed or done):
                            break
                    else:
                        said[index].advance(True)
                        yield chunk(index, {"images": [part]})
                if done:
                    open_ones.remove(index)
                    yield chunk(index, {}, self._reason(work))
        if told:
            yield {**common, "choices": [], "usage": self._usage(works)}

    def _reason(self, work: Work) -> str:
        drawn = sum(len(segment.ids) for segment in work.segments or [] if isinstance(segment, Text))
        return "length" if drawn and drawn >= work.drawing.text else "stop"

    def _usage(self, works: list[Work]) -> dict[str, Any]:
        drawn = 0
        for work in works:
            for segment in work.segments or []:
                drawn += len(segment.ids) if isinstance(segment, Text) else len(self.form.plan(segment.grid))
        read = len(works[0].drawing.prompt)
        return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


class Said:
    """How much of a choice a stream has sent: whole segments, and some of the text that follows them."""

    def __init__(self) -> None:
        self.segments, self.text = 0, ""

    def next(self, segments: list[Segment]) -> tuple[Segment, bool] | None:
        """What comes next, and whether it is closed: something stands behind it."""
        if self.segments >= len(segments):
            return None
        return segments[self.segments], self.segments + 1 < len(segments)

    def delta(self, text: str, closed: bool) -> str:
        """What is new of the text that is being written. A letter whose bytes are not all there waits."""
        if (not closed and text.endswith("\ufffd")) or not text.startswith(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new

    def advance(self, closed: bool) -> bool:
        if closed:
            self.segments, self.text = self.segments + 1, ""
        return closed
