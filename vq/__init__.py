"""vq: image tokenizers. Knows pixels, latents and codes; nothing of language models.

`from vq import ImageTokenizer` loads torch; `import vq` alone does not.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vq.tokenizer import ImageTokenizer

__all__ = ["ImageTokenizer"]


def __getattr__(name: str):
    if name == "ImageTokenizer":
        from vq.tokenizer import ImageTokenizer

        return ImageTokenizer
    raise AttributeError(f"module 'vq' has no attribute {name!r}")
