"""Command `lm-serve`: a bundle → a page to draw with, and the endpoints that OpenAI's clients know.

    lm-serve model=runs/lm/model                     # http://127.0.0.1:8000
    curl 127.0.0.1:8000/v1/images/generations -H "Content-Type: application/json" -d '{"prompt": "a red apple"}'

Needs the extra `serve`. On loopback unless `host` says otherwise; there is no login, so put one in front of it before
others can reach it.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from vqlm.command import command
from vqlm.errors import ConfigError

if TYPE_CHECKING:
    import vqlm.hardware

LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


def serve(
    model: str,
    host: str,
    port: int,
    name: str | None,
    device: vqlm.hardware.Device,
    branches: int,
    accepted: int,
    pictures: int,
    prompt: int,
    text: int,
    megabytes: int,
    megapixels: int,
) -> None:
    """Serve one model until it is stopped."""
    try:
        from lm.serve.app import Server
        from lm.serve.connections import web_server
        from lm.serve.web import Limits
    except ImportError as error:
        raise ConfigError(f'{error.name} is missing: pip install "vqlm[serve]"') from error
    # not above: torch and transformers take seconds, which `--help` and a mistyped key do not wait for
    from lm.pipeline import Pipeline
    from lm.serve.engine import Engine

    listening = listen(host, port)
    try:
        limits = Limits(pictures, prompt, text, megabytes, megapixels)
        pipeline = Pipeline.from_pretrained(model, device)
        engine = Engine(pipeline.model, branches, accepted)
    except ValueError as error:
        listening.close()
        raise ConfigError(str(error)) from error
    # A web page elsewhere could give its own name our address: on loopback only our own names are answered.
    hosts = LOOPBACK if host in ("127.0.0.1", "localhost", "::1") else ["*"]
    app = Server(pipeline, engine, limits, name or Path(model).resolve().name, hosts).app
    print(f"{model} on {address(listening)}   to stop: Ctrl+C", flush=True)
    web_server(app, limits).run([listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ConfigError where that is not possible. Port 0: any that is free."""
    if not 0 <= port < 65536:
        raise ConfigError(f"port={port}: from 0 (any that is free) to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"host={host} port={port}: cannot listen there ({error.strerror})") from error


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


main = command("lm_serve", serve)
