"""The web application: OpenAI's endpoints for pictures and chat, two of our own beside them, and the page.

app = Server(pipeline, engine).app      # a FastAPI application; `lm-serve` runs it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lm.pipeline import Pipeline
from lm.serve.chat import Chat
from lm.serve.desk import Desk
from lm.serve.engine import Busy, Engine, Stopped
from lm.serve.pictures import Pictures
from lm.serve.web import Bodies, Limits, answer_refusal, explain
from lm.serve.wire import ChatAsked, ImageAsked, RedrawAsked, Refused, refusal, say_size

PAGE = Path(__file__).with_name("page.html")
# The page's own script and styles, pictures that it has made, its own server: nothing else.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """`app`, over one pipeline. name: what clients call the model. hosts: names that it may be addressed by."""

    def __init__(
        self,
        pipeline: Pipeline,
        engine: Engine,
        limits: Limits | None = None,
        name: str = "model",
        hosts: list[str] | None = None,
    ):
        self.desk = Desk(pipeline, engine, limits or Limits(), name)
        self.pictures, self.talk = Pictures(self.desk), Chat(self.desk)
        self.started = int(time.time())
        self.page = PAGE.read_text(encoding="utf-8")
        self.app = self._routes(hosts or ["*"])

    def _routes(self, hosts: list[str]) -> FastAPI:
        app = FastAPI(title="vqlm", docs_url=None, redoc_url=None, lifespan=self._life)
        app.add_middleware(Bodies, limits=self.desk.limits)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
        app.get("/", include_in_schema=False)(self.show_page)
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name}")(self.model)
        app.post("/v1/images/generations", response_model=None)(self.pictures.generations)
        app.post("/v1/images/redraw", response_model=None)(self.pictures.redraw)
        app.post("/v1/images/encode", response_model=None)(self.pictures.encode)
        app.post("/v1/chat/completions", response_model=None)(self.talk.chat)

        @app.exception_handler(RequestValidationError)
        async def invalid(request: Request, error: RequestValidationError) -> Response:
            known = [name for each in (ImageAsked, ChatAsked, RedrawAsked) for name in each.model_fields]
            return answer_refusal(refusal(list(error.errors()), known))

        @app.exception_handler(HTTPException)
        async def unknown(request: Request, error: HTTPException) -> Response:
            if isinstance(error.__cause__, Refused):  # raised while the body was read
                return answer_refusal(error.__cause__)
            path = request.url.path if error.status_code in (404, 405) else ""
            return answer_refusal(Refused(f"{error.detail} {path}".strip(), status=error.status_code))

        for kind in (Refused, Busy, Stopped):

            @app.exception_handler(kind)
            async def refused(request: Request, error: Exception) -> Response:
                return answer_refusal(explain(error))

        @app.exception_handler(Exception)
        async def failed(request: Request, error: Exception) -> Response:
            return answer_refusal(explain(error))

        return app

    @asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.desk.engine.close)

    # --- what the server says of itself ------------------------------------------------------------------------------

    async def show_page(self) -> HTMLResponse:
        return HTMLResponse(
            self.page, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        )

    async def health(self) -> dict[str, Any]:
        """status: ok while the engine's thread lives."""
        if not self.desk.engine.alive:
            raise Stopped
        return {"status": "ok", "under_way": self.desk.engine.under_way, "accepted": self.desk.engine.count}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._about()]}

    async def model(self, name: str) -> dict[str, Any]:
        self.desk.check_name(name)
        return self._about()

    def _about(self) -> dict[str, Any]:
        sampling, vocabulary = self.desk.pipeline.sampling, self.desk.form.vocabulary
        return {
            "id": self.desk.name,
            "object": "model",
            "created": self.started,
            "owned_by": "vqlm",
            "sizes": [say_size(size) for size in self.desk.pipeline.sizes],
            "grids": [list(grid) for grid in self.desk.form.grids],
            "codebook_size": vocabulary.codebook_size,
            "depth": vocabulary.depth,
            "guidance": sampling.guidance,
            "temperature": sampling.temperature,
            "most_pictures": self.desk.limits.pictures,
            "longest_prompt": self.desk.limits.prompt,
        }
