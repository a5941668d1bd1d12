"""Settings of the site. `make docs` builds it into build/docs, and a warning is an error there.

Pages are Markdown (MyST) and can be read without being built; what is made at build time is in `extension.py`.
"""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "vqlm"
release = importlib.metadata.version("vqlm")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "extension"]

html_theme = "furo"
html_title = "vqlm"
html_copy_source = False

# `[text](page.md#heading)` leads to a heading by the name that code hosts give it.
myst_heading_anchors = 3

# Members as they stand in the file, with the types of their signatures; a class without its parents' members.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
autodoc_inherit_docstrings = False  # of other projects, in their own markup
napoleon_numpy_docstring = False
