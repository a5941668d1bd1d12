"""lm: language models over text and image tokens. Knows token ids; pictures only through `vq`.

`from lm import Pipeline` loads torch and transformers; `import lm` alone does not.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str):
    if name == "Pipeline":
        from lm.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'lm' has no attribute {name!r}")
