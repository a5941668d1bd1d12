"""What all requests that draw have in common: what is refused before any work, and the way to the engine and back.

Models and tokenizers are used in the engine's thread alone. No path from a request is opened, nothing is fetched.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from lm.architecture import most_positions
from lm.decoding import Drawing, Sampling, positions_needed
from lm.pipeline import Pipeline
from lm.sequence import Grid, Image, Text
from lm.serve.engine import Engine, Work
from lm.serve.web import Changes, Limits, unless_left
from lm.serve.wire import Asked, ImageAsked, Refused, read_data_url, refuse_sampling, say_size

Result = TypeVar("Result")


class Desk:
    """One model, for the endpoints. name: what clients call it."""

    def __init__(self, pipeline: Pipeline, engine: Engine, limits: Limits, name: str):
        self.pipeline, self.engine, self.limits, self.name = pipeline, engine, limits, name
        self.form = pipeline.model.form
        self.reading = asyncio.Semaphore(2)  # pictures that are held as pixels

    def check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            shown = name if len(str(name)) <= 60 else f"{str(name)[:60]}…"
            raise Refused(
                f"The model {shown!r} does not exist; this is {self.name!r}.", "model", "model_not_found", 404
            )

    def check_request(self, asked: Asked, text: list[str]) -> None:
        """What can be refused before any work is done."""
        self.check_name(asked.model)
        n = asked.n or 1
        if n > self.limits.pictures:
            raise Refused(
                f"Invalid value for 'n': {_short(n)}; at most {self.limits.pictures}.", "n", "invalid_value"
            )
        if (length := sum(map(len, text))) > self.limits.prompt:
            raise Refused(
                f"The text has {length} characters; at most {self.limits.prompt} are read.",
                "prompt" if isinstance(asked, ImageAsked) else "messages",
                "string_above_max_length",
            )
        try:
            "".join(text).encode()
        except UnicodeEncodeError as error:
            raise Refused(
                "The text is not valid Unicode: half a surrogate pair.", "prompt", "invalid_value"
            ) from error
        self.engine.check_room(n)

    def check_length(self, drawing: Drawing) -> None:
        """Refuse what the model has too few positions for; text ends where they are used up."""
        most, length = most_positions(self.pipeline.model.lm.config), positions_needed(drawing, self.form)
        if length > most:
            raise Refused(
                f"Prompt and pictures take {length} positions, this model has {most}.",
                None,
                "context_length_exceeded",
            )

    def sampling(self, asked: Asked) -> Sampling:
        """How to draw: as the request says, and else as the model was measured."""
        try:
            return self.pipeline.sampling_with(**asked.chosen())
        except ValueError as error:
            refuse_sampling(error)

    def say_grid(self, grid: Grid) -> str:
        """As "WIDTHxHEIGHT" in pixels."""
        return say_size(self.pipeline.sizes[self.form.grids.index(grid)])

    def text(self, text: str) -> Text:
        """In the engine's thread. Names of control tokens stay text."""
        return Text(tuple(self.pipeline.encode_text(text)), given=True)

    async def read_picture(self, url: str, param: str) -> Image:
        """A data URL → codes. Refused with the reason."""
        data = read_data_url(url, param)
        async with self.reading:
            picture = await asyncio.to_thread(self._open_picture, data, param)
            return await self.in_engine(lambda: self.pipeline.encode_image(picture))

    def _open_picture(self, data: bytes, param: str) -> Any:
        try:
            return self.pipeline.read(data, self.limits.megapixels * 10**6)
        except ValueError as error:
            raise Refused(f"The picture cannot be read: {error}.", param, "invalid_image") from error

    async def in_engine(self, function: Callable[[], Result]) -> Result:
        """What the function gives, called between two passes of the engine."""
        return await asyncio.wrap_future(self.engine.call(function))

    async def finished(self, works: list[Work], changes: Changes) -> None:
        """Return when all are done; raise what one of them failed with."""
        while not all(work.done for work in works):
            await changes.wait()
        for work in works:
            self.raise_for(work)

    @staticmethod
    def raise_for(work: Work) -> None:
        if work.error is not None:
            raise work.error

    def image_of(self, work: Work) -> Image:
        """The picture of a drawing that is done and had to be one."""
        self.raise_for(work)
        (image,) = [segment for segment in work.segments or [] if isinstance(segment, Image)]
        return image

    def seed(self, asked: Asked) -> int:
        """That of the request, or a new one."""
        return secrets.randbelow(2**31) if asked.seed is None else asked.seed

    async def attended(
        self, answer: Coroutine[Any, Any, Result], works: list[Work], request: Request
    ) -> Result:
        """The answer; the drawings are stopped if the client leaves, or one of them has failed."""
        try:
            return await unless_left(request, answer)
        finally:
            self.engine.cancel(works)


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**12 else "a number of many digits"
