"""Faults: how an exception that nobody expected is told in a log, and what is cut from texts that others wrote.

Owns the words alone. Whose code raised is not known here, so neither what it says nor a line of its source is told:
either may hold a value.
"""

from __future__ import annotations

import re
import traceback
from typing import Final

__all__ = ["told", "without_credentials"]

_FRAMES: Final = 20  # the innermost: a recursion would fill the log


def told(exc: BaseException) -> str:
    """The exception's type and where it came through, outermost first, with the types of what caused it.

    Neither messages nor source lines.
    """
    parts: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = exc
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        frames = [
            f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
            for frame, line in traceback.walk_tb(cause.__traceback__)
        ]
        parts.append(" > ".join([type(cause).__qualname__, *frames[-_FRAMES:]]))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return " caused by ".join(parts)


# Greedy, so that an unquoted `@`, `/` or `:` in a password goes with it. What messages show as an example stays.
_LOGIN: Final = re.compile(r"(?<=://)(?!USER:PASSWORD@)\S*@")
_PASSWORD: Final = re.compile(r"(?i)\b((?:\w+_)?(?:password|passwd|pwd|secret)=)[^\s&'\";,)]+")


def without_credentials(text: str) -> str:
    """The text without the users and passwords of the URLs in it, whoever wrote it."""
    if "://" in text:
        text = _LOGIN.sub("", text)
    return _PASSWORD.sub(r"\1***", text) if "=" in text else text
