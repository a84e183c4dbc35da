"""How the documentation is built: `make docs`."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed_version
from typing import Any

# The API reference imports the Django adapter, and Django wants settings before that.
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "django.conf.global_settings")

project = "veltrix-mw"
author = "The veltrix-mw maintainers"
copyright = "the veltrix-mw maintainers"
version = release = installed_version("veltrix-mw")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "literal"  # in the reStructuredText of api.md, as in docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_default_options = {"exclude-members": "__init__,__new__"}
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 90
add_module_names = False

html_theme = "furo"
html_title = f"veltrix-mw {release}"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_copy_source = False
html_show_sphinx = False

# Docstrings write `code` as Markdown does. reStructuredText wants two backticks, and no letter right after them.
_CODE = re.compile(r"(?<![`:\w])`([^`]+)`(?!`)(?=(\w)?)")


def _mark_code(_app: Any, _what: str, _name: str, _subject: Any, _options: Any, lines: list[str]) -> None:
    lines[:] = [_CODE.sub(lambda found: f"``{found[1]}``" + ("\\ " if found[2] else ""), line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _mark_code)
