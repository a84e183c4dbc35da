"""Faults: how an exception that nobody expected is told in a log.

Owns the words alone. Whose code raised is not known here, so neither what it says nor a line of its source is told:
either may hold a value.
"""

from __future__ import annotations

import traceback
from typing import Final

__all__ = ["told"]

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
