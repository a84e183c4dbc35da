"""JSON text: what a person or a file hands in, and what is shown.

Owns the strict parsing that the library asks of values (a member named twice, NaN: refused, never guessed) and the
writing that is safe on a terminal.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Final, NoReturn

from veltrix_mw import InvalidValue

__all__ = ["NotJson", "compact", "parsed", "plain", "pretty", "same"]

# DEL and the C1 controls (one of them begins terminal sequences), line separators, and what turns text around.
_UNSAFE: Final = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_UNSAFE_IN_TEXT: Final = re.compile(f"[\x00-\x1f]|{_UNSAFE.pattern}")


class NotJson(InvalidValue):
    """The text is not JSON at all; as when a string lacks its quotes."""


def parsed(text: str | bytes, *, of: str) -> Any:
    """The value of a JSON text. Raises `InvalidValue` that calls it `of` and holds no part of it."""
    value, fault = _parsed(text, of)
    if fault is not None:
        raise fault
    return value


def _parsed(text: str | bytes, of: str) -> tuple[Any, InvalidValue | None]:
    # The parser's errors carry the whole text: ours are raised after they are gone.
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_object, parse_constant=_constant), None
    except InvalidValue as exc:
        return None, InvalidValue(f"{of} {exc}")
    except UnicodeDecodeError as exc:
        return None, InvalidValue(f"{of} is not UTF-8 (byte {exc.start})")
    except json.JSONDecodeError as exc:
        return None, NotJson(f"{of} is not JSON ({exc.msg}, line {exc.lineno} column {exc.colno})")
    except RecursionError:
        return None, InvalidValue(f"{of} is nested too deeply")
    except ValueError:
        return None, InvalidValue(f"{of} has a number with too many digits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise InvalidValue("has an object that names the same member twice; keep one of them")
    return made


def _constant(name: str) -> NoReturn:
    raise InvalidValue(f"holds {name}, which is not JSON; write null or a string")


def compact(value: Any) -> str:
    """A value as JSON on one line."""
    return _safe(json.dumps(value, ensure_ascii=_ascii_only(), separators=(",", ":")))


def pretty(value: Any) -> str:
    """A value as JSON for a reader, two spaces a level."""
    return _safe(json.dumps(value, ensure_ascii=_ascii_only(), indent=2))


def plain(text: str) -> str:
    """Text that others wrote, on one line, with nothing in it that a terminal obeys."""
    return _UNSAFE_IN_TEXT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON; to Python 1, 1.0 and true are equal."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _safe(text: str) -> str:
    """Escapes mean the same in JSON, and all that is unsafe stands inside of strings."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _ascii_only() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
