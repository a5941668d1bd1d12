"""Endpoints that answer with pictures: of a prompt, of a picture some of whose cells are drawn anew, and codes.

A stream tells of pictures under way as OpenAI's does, each partial one up to the end of a row.

Legend: h w grid of cells, Q depth.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lm.decoding import Drawing, Sampling
from lm.pipeline import seeds
from lm.sequence import NONE, Grid, Image, Segment
from lm.serve.desk import Desk
from lm.serve.engine import Work, rows_done
from lm.serve.web import Changes, stream, unless_left
from lm.serve.wire import Asked, ImageAsked, PictureAsked, RedrawAsked, Refused, read_size, to_base64


class Pictures:
    def __init__(self, desk: Desk):
        self.desk, self.form = desk, desk.form

    async def generations(self, asked: ImageAsked, request: Request) -> Response:
        """Pictures of a prompt."""
        asked.check()
        self.desk.check_request(asked, [asked.prompt])
        grid = self.desk.pipeline.grid_of(read_size(asked.size, self.desk.pipeline.sizes))
        sampling = self.desk.sampling(asked)
        drawings = await self.desk.in_engine(lambda: self._drawings(asked.prompt, grid, sampling, asked))
        return await self._draw_pictures(asked, drawings, grid, request)

    async def redraw(self, asked: RedrawAsked, request: Request) -> Response:
        """Some cells of a picture drawn anew; the others keep their codes."""
        asked.check()
        self.desk.check_request(asked, [asked.prompt])
        kept_hwQ = self._kept(asked)
        grid, sampling = (kept_hwQ.shape[0], kept_hwQ.shape[1]), self.desk.sampling(asked)
        drawings = await self.desk.in_engine(
            lambda: self._drawings(asked.prompt, grid, sampling, asked, kept_hwQ)
        )
        return await self._draw_pictures(asked, drawings, grid, request)

    async def encode(self, asked: PictureAsked, request: Request) -> dict[str, Any]:
        """A picture → its codes, and what they show."""
        image = await unless_left(request, self.desk.read_picture(asked.image, "image"))
        return {**await self._show_picture(image), "size": self.desk.say_grid(image.grid)}

    def _drawings(
        self,
        prompt: str,
        grid: Grid,
        sampling: Sampling,
        asked: Asked,
        kept_hwQ: torch.Tensor | None = None,
    ) -> list[Drawing]:
        """One for each picture that is asked for, in the engine's thread."""
        segments: list[Segment] = [self.desk.text(prompt)] if prompt.strip() else []
        start = self.form.image_prompt(segments, grid)
        asked.seed = self.desk.seed(asked)
        drawings = [
            Drawing(start, sampling, seed, images=1, contexts=((),), kept=kept_hwQ)
            for seed in seeds(asked.seed, asked.n or 1)
        ]
        self.desk.check_length(drawings[0])
        return drawings

    async def _draw_pictures(
        self, asked: ImageAsked, drawings: list[Drawing], grid: Grid, request: Request
    ) -> Response:
        changes = Changes()
        works = self.desk.engine.submit(drawings, changes, watched=bool(asked.partial_images))
        common = {"created": int(time.time()), "seed": asked.seed, "size": self.desk.say_grid(grid)}
        if asked.stream:
            events = self._picture_events(works, changes, asked.partial_images or 0, common)
            return stream(events, request, lambda: self.desk.engine.cancel(works))
        return JSONResponse(
            await self.desk.attended(self._all_pictures(works, changes, common), works, request)
        )

    async def _all_pictures(
        self, works: list[Work], changes: Changes, common: dict[str, Any]
    ) -> dict[str, Any]:
        await self.desk.finished(works, changes)
        data = [await self._show_picture(self.desk.image_of(work)) for work in works]
        read = sum(len(work.drawing.prompt) for work in works)
        drawn = sum(len(self.form.plan(self.desk.image_of(work).grid)) for work in works)
        details = {"text_tokens": read, "image_tokens": 0}
        usage = {"input_tokens": read, "output_tokens": drawn, "total_tokens": read + drawn}
        return {
            **common,
            "output_format": "png",
            "data": data,
            "usage": {**usage, "input_tokens_details": details},
        }

    async def _picture_events(
        self, works: list[Work], changes: Changes, partial: int, common: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """OpenAI's events of pictures under way, `number` saying which of the n it is; partial ones end at a row."""
        shown, open_ones = [0] * len(works), set(range(len(works)))
        while open_ones:
            await changes.wait()
            for number in sorted(open_ones):
                work = works[number]
                about = {**common, "created_at": common["created"], "number": number, "output_format": "png"}
                about |= {"background": "opaque", "quality": "auto"}
                if work.done:
                    open_ones.remove(number)
                    made = await self._show_picture(self.desk.image_of(work))
                    usage = {
                        "input_tokens": len(work.drawing.prompt),
                        "output_tokens": len(self.form.plan(self.desk.image_of(work).grid)),
                    }
                    yield {"type": "image_generation.completed", **about, **made, "usage": usage}
                elif work.progress.cells:
                    codes_hwQ, rows = rows_done(self.form, work.progress)
                    step = rows * (partial + 1) // len(codes_hwQ)
                    if step > shown[number]:
                        shown[number] = step
                        made = await self._show_picture(Image(codes_hwQ), rows)
                        yield {
                            "type": "image_generation.partial_image",
                            **about,
                            **made,
                            "rows": rows,
                            "partial_image_index": step - 1,
                        }

    async def _show_picture(self, image: Image, rows: int | None = None) -> dict[str, Any]:
        """Pixels and codes; rows: of cells, the first ones alone."""
        (picture,) = await self.desk.in_engine(
            lambda: self.desk.pipeline.show(self.desk.pipeline.decode([image]))
        )
        codes_hwQ = image.codes_hwQ if rows is None else image.codes_hwQ[:rows]
        if rows is not None:
            picture = picture.crop((0, 0, picture.width, picture.height * rows // image.grid[0]))
        b64_json = await asyncio.to_thread(to_base64, picture)
        return {"b64_json": b64_json, "codes": codes_hwQ.tolist()}

    def _kept(self, asked: RedrawAsked) -> torch.Tensor:
        """(h,w,Q) codes of the request, NONE where its cells are to be drawn."""
        vocabulary = self.form.vocabulary
        try:
            codes_hwQ = torch.tensor(asked.codes, dtype=torch.int64)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise Refused(
                "Rows of codes must be equally long, and codes small.", "codes", "invalid_value"
            ) from error
        h, w = tuple(codes_hwQ.shape[:2]) if codes_hwQ.ndim == 3 else (0, 0)
        if (h, w) not in self.form.grids or codes_hwQ.shape[2] != vocabulary.depth:
            raise Refused(
                f"Codes of the shape {tuple(codes_hwQ.shape)}: this model's pictures have "
                f"{' or '.join(map(str, self.form.grids))} cells of {vocabulary.depth} codes.",
                "codes",
                "invalid_value",
            )
        if int(codes_hwQ.max()) >= vocabulary.codebook_size:
            raise Refused(f"Codes lie below {vocabulary.codebook_size}.", "codes", "invalid_value")
        for row, column in asked.cells:
            if not (0 <= row < h and 0 <= column < w):
                raise Refused(
                    f"There is no cell {[row, column]} in {h} by {w} cells.", "cells", "invalid_value"
                )
            codes_hwQ[row, column] = NONE
        return codes_hwQ
