"""Templates: `veltrix`, a mapping of the current view.

Owns how a template sees config. It does not touch `app.jinja_env` before a template is rendered: making the
environment fixes settings that the app may still change (`TEMPLATES_AUTO_RELOAD`).
"""

from __future__ import annotations

from typing import Any, Final

from flask import Flask, current_app
from jinja2 import StrictUndefined, TemplateRuntimeError

from flask_veltrix.current import config
from veltrix_mw import HeldBack

__all__ = ["add_to_templates"]


class _HeldBackInTemplate(HeldBack, TemplateRuntimeError):
    """`HeldBack`, as Jinja raises it where the value would be used."""


class _TemplateConfig:
    """`config` as templates read it: a missing key is undefined, one that is held back raises when it is used.

    Jinja takes any LookupError of a subscript for "undefined"; a key that is held back must not look absent.
    """

    __slots__ = ()

    def __getitem__(self, key: str) -> Any:
        try:
            return config[key]
        except HeldBack as exc:
            return StrictUndefined(hint=str(exc), name=key, exc=_HeldBackInTemplate)

    def __contains__(self, key: object) -> bool:
        return key in config

    def __getattr__(self, name: str) -> Any:
        return getattr(config, name)

    def __iter__(self) -> Any:
        return iter(config)

    def __len__(self) -> int:
        return len(config)


_VELTRIX: Final = _TemplateConfig()


def add_to_templates(app: Flask) -> None:
    """Make `veltrix` known to the app's templates, also to those imported without a context."""
    app.context_processor(_provide)


def _provide() -> dict[str, Any]:
    # Macros imported without context see the environment's globals alone.
    current_app.jinja_env.globals.setdefault("veltrix", _VELTRIX)
    return {"veltrix": _VELTRIX}
