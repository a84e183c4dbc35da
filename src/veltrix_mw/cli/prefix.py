"""The prefix that a person names: a key, or all below one.

Owns the argument PREFIX of the verbs that take one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import click

from veltrix_mw import InvalidKey

__all__ = ["Prefix", "prefix_argument"]


@dataclass(frozen=True, slots=True)
class Prefix:
    """`a/` is all below `a`; `a` is that and the key `a` itself; empty is everything."""

    text: str = ""

    def holds(self, key: str) -> bool:
        """Whether `key` is meant."""
        if not self.text:
            return True
        below = self.text if self.text.endswith("/") else f"{self.text}/"
        return key == self.text or key.startswith(below)

    @property
    def phrase(self) -> str:
        """` below 'a/'`, for a sentence; empty for everything."""
        return f" below {self.text!r}" if self.text else ""


def _taken(_context: click.Context, _parameter: click.Parameter, text: str) -> Prefix:
    if text and not text.startswith("/") and re.fullmatch(r"[A-Za-z0-9._~:@/-]+", text):
        return Prefix(text)
    if text:
        raise InvalidKey(f"{text!r} is no prefix: write segments of [A-Za-z0-9._~:@-] joined by '/', as in checkout/")
    return Prefix()


prefix_argument: Final[Callable[[Callable[..., Any]], Callable[..., Any]]] = click.argument(
    "prefix", default="", callback=_taken
)
