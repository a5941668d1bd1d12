"""What a request may say, and how it is told that it may not: the JSON of OpenAI's API, checked.

Types are strict (a number in quotes is refused) and unknown fields are refused, as OpenAI does. Fields that OpenAI does
not have (guidance, top_k, max_images …) go through `extra_body` of its client. Knows JSON: nothing of models or HTTP.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Annotated, Any, Literal, NoReturn

from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict, Field

from lm.decoding import Sampling
from vqlm.errors import nearest

LARGEST_SEED = 2**63 - 1
PICTURE = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


class Refused(Exception):
    """A request that cannot be served. param: the field at fault; code: OpenAI's short word for the reason, if any."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code = message, param, code
        self.status, self.retry_after = status, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The answer, in the shape of OpenAI's errors."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        param = None if self.param is None else _printable(self.param)
        return {
            "error": {"message": _printable(self.message), "type": kind, "param": param, "code": self.code}
        }


def _printable(text: str) -> str:
    """Half a surrogate pair, which JSON can hold, cannot be sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def refusal(errors: list[Any], known: list[str] | None = None) -> Refused:
    """pydantic's list of errors → the one that says most, in OpenAI's words."""
    first = max(errors, key=lambda error: len(error["loc"]))  # of a union: what the nearest member found
    at = [str(part) for part in first["loc"] if part not in ("body", "str") and "[" not in str(part)]
    param = ".".join(at) or None
    if first["type"] in ("json_invalid", "model_attributes_type", "missing") and not at:
        return Refused(
            "The body of the request must be a JSON object, sent as application/json.", None, "invalid_json"
        )
    if first["type"] == "json_invalid":
        return Refused("The body of the request is not valid JSON.", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        hint = nearest(at[-1], known or [])
        return Refused(f"Unknown parameter: {param!r}{hint}.", param, "unknown_parameter")
    if first["type"] == "missing":
        return Refused(f"Missing required parameter: {param!r}.", param, "missing_required_parameter")
    value = repr(first.get("input"))
    value = value if len(value) <= 60 else value[:57] + "…"
    said = f"Invalid value for {param!r}: {first['msg']} (found {value})."
    return Refused(said, param, "invalid_type" if first["type"].endswith("_type") else "invalid_value")


Seed = Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)]
Number = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class Asked(BaseModel):
    """What every request that draws may say. None: as the model was measured; seed None: another one each time."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None
    guidance: Number | None = None
    temperature: Number | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    user: str | None = None  # said to OpenAI for its own purposes, and of no effect here

    def chosen(self) -> dict[str, Any]:
        """How to draw, as far as the request says."""
        names = ("guidance", "temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class ImageAsked(Asked):
    """`POST /v1/images/generations`. size: "WIDTHxHEIGHT" or "auto". partial_images: of each picture, in a stream."""

    prompt: str
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=4096)] | None = None

    def check(self) -> None:
        if self.response_format == "url":
            raise Refused("Pictures are sent as b64_json; none is stored.", "response_format")
        if self.output_format not in (None, "png"):
            raise Refused("Pictures are sent as png.", "output_format")
        if self.partial_images and not self.stream:
            raise Refused("partial_images come in a stream: set stream.", "partial_images")


# Of a long list one wrong member is told: a report of each would take far more memory than the request.
Cells = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Codes = Annotated[list[Annotated[list[Cells], Field(fail_fast=True)]], Field(fail_fast=True)]


class RedrawAsked(ImageAsked):
    """`POST /v1/images/redraw`: a picture as codes (h,w,Q), and the cells [row, column] to be drawn anew."""

    prompt: str = ""
    codes: Codes
    cells: Annotated[list[Annotated[list[int], Field(min_length=2, max_length=2)]], Field(fail_fast=True)]


class PictureAsked(BaseModel):
    """`POST /v1/images/encode`: a picture as a data URL."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, fail_fast=True)]
    name: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class ChatAsked(Asked):
    """`POST /v1/chat/completions`. modalities: what the answer may hold; ["image"] is max_images pictures."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, fail_fast=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_images: Annotated[int, Field(ge=0)] | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None  # of no effect here
    store: bool | None = None  # neither

    def parts(self) -> list[str | ImageUrl]:
        """Text and pictures of all messages, in their order. The models have no notion of turns."""
        found: list[str | ImageUrl] = []
        for message in self.messages:
            parts = [message.content] if isinstance(message.content, str) else message.content
            for part in parts:
                if isinstance(part, str):
                    found.append(part)
                else:
                    found.append(part.text if isinstance(part, TextPart) else part.image_url)
        return found


# --- values -----------------------------------------------------------------------------------------------------------


def read_data_url(url: str, param: str) -> bytes:
    """The bytes of a picture that is part of the request. Nothing is ever fetched or opened."""
    head = PICTURE.match(url)
    if head is None:
        shown = repr(url if len(url) <= 40 else url[:40] + "…")
        raise Refused(
            f"Pictures are given as data:image/…;base64,… URLs; {shown} is none, and nothing is fetched.",
            param,
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"The picture is not valid base64: {error}.", param, "invalid_base64") from error


def to_png(picture: PILImage.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def to_base64(picture: PILImage.Image) -> str:
    """A picture as base64 of a PNG file."""
    return base64.b64encode(to_png(picture)).decode()


def to_data_url(picture: PILImage.Image) -> str:
    return f"data:image/png;base64,{to_base64(picture)}"


def read_size(size: str | None, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """ "WIDTHxHEIGHT" → (height, width), one of `sizes`; "auto" or None: the first."""
    if size in (None, "auto"):
        return sizes[0]
    known = [f"{width}x{height}" for height, width in sizes]
    if size not in known:
        shown = size if len(size) <= 20 else size[:20] + "…"
        raise Refused(
            f"Invalid size {shown!r}: this model draws {', '.join(known)}.", "size", "invalid_value"
        )
    return sizes[known.index(size)]


def say_size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def refuse_sampling(error: ValueError) -> NoReturn:
    """`Sampling` names the parameter first."""
    name = str(error).partition("=")[0]
    raise Refused(str(error), name if hasattr(Sampling, name) else None, "invalid_value") from error
