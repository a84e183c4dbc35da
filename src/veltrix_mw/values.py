"""Values: strict JSON in, frozen Python values out, and back.

Owns what a value may be and its limits; knows nothing of keys, stores or schemas. No message of an error
raised here holds any part of a value, and none carries another error that does: the parser's own errors hold
the whole text, so ours are raised after they are gone.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, Final, Literal, NoReturn, Self

from veltrix_mw.errors import InvalidValue

__all__ = ["MAX_DEPTH", "MAX_VALUE_BYTES", "MISSING", "FrozenDict", "Missing", "decode", "encode", "freeze"]

MAX_VALUE_BYTES: Final = 1024 * 1024
"""The largest JSON text of one value, in bytes: etcd's own limit for a request is 1.5 MiB."""

MAX_DEPTH: Final = 64
"""How many objects and arrays may stand in one another. Far above any settings file; far below the parser's
recursion limit."""


class Missing(Enum):
    """The type of `MISSING`: there is no value here (`None` is a value, JSON's null)."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> Literal[False]:
        return False


MISSING: Final = Missing.MISSING


def _refuse(_self: object, *_: object, **__: object) -> NoReturn:
    raise TypeError("config values are frozen; copy first, for example with dict(value)")


class FrozenDict(dict[str, Any]):
    """A JSON object that cannot be changed; a `dict` to `json.dumps`, `isinstance` and `==`."""

    __slots__ = ()

    __setitem__ = _refuse
    __delitem__ = _refuse
    __ior__ = _refuse
    clear = _refuse  # pyright: ignore[reportAssignmentType]
    pop = _refuse
    popitem = _refuse  # pyright: ignore[reportAssignmentType]
    setdefault = _refuse
    update = _refuse

    # Filled here: `dict.__init__`, called again, would change it.
    def __new__(cls, *items: Any, **members: Any) -> Self:
        made = dict.__new__(cls)
        dict.update(made, *items, **members)
        return made

    def __init__(self, *items: Any, **members: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (FrozenDict, (dict(self),))


def _frozen_list(items: list[Any]) -> tuple[Any, ...]:
    return tuple(_frozen_list(item) if type(item) is list else item for item in items)


def _object(pairs: list[tuple[str, Any]]) -> FrozenDict:
    # Not `FrozenDict(pairs)`: two calls into C are half its price, and a value may hold many objects.
    made = dict.__new__(FrozenDict)
    dict.update(made, [(key, _frozen_list(item) if type(item) is list else item) for key, item in pairs])
    if len(made) != len(pairs):
        raise InvalidValue("an object in the value names the same member twice; keep one of them")
    return made


def _constant(name: str) -> NoReturn:
    raise InvalidValue(f"{name} is not JSON; write null or a string")


def _float(text: str) -> float:
    number = float(text)
    if number in {float("inf"), float("-inf")}:
        raise InvalidValue("a number in the value is too large for a 64-bit float")
    return number


_decode_text = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float).decode
_encode_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _depth(value: Any) -> int:
    """How many objects and arrays a decoded value nests; iterative, so that no input can exhaust the stack."""
    depth, holders = 0, [value] if isinstance(value, (dict, tuple)) else []
    while holders:
        depth += 1
        holders = [
            item
            for holder in holders
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, (dict, tuple))
        ]
    return depth


_TOO_DEEP: Final = f"the value nests deeper than {MAX_DEPTH} levels"
_HALF_A_PAIR: Final = "the value holds half of a surrogate pair, which no encoding can carry"
_BYTE_ORDER_MARK: Final = "\ufeff"


def decode(raw: bytes, *, max_bytes: int = MAX_VALUE_BYTES) -> Any:
    """Decode one JSON text, strictly, into a frozen value.

    Objects become `FrozenDict`, arrays tuples. Raises `InvalidValue` (fix the value) for what is not JSON by
    RFC 8259 (NaN and Infinity among it), for a member named twice, more than `max_bytes` bytes, more than
    `MAX_DEPTH` levels, a number beyond a 64-bit float or of more than 4,300 digits, or a lone surrogate.
    """
    if len(raw) > max_bytes:
        raise InvalidValue(f"the value has {len(raw)} bytes; at most {max_bytes} are allowed")
    value, fault = _parsed(raw)
    if fault:
        raise InvalidValue(fault)
    return value


def _parsed(raw: bytes) -> tuple[Any, str]:
    """The value of a JSON text, or what is wrong with it."""
    text = ""
    try:
        text = raw.decode()
        value = _decode_text(text)
        if type(value) is list:
            value = _frozen_list(value)
        if b"\\u" in raw:
            _encode_text(value).encode()
    except InvalidValue as exc:
        return None, str(exc)
    except UnicodeDecodeError as exc:
        return None, f"the value is not UTF-8 (byte {exc.start})"
    except UnicodeEncodeError:
        return None, _HALF_A_PAIR
    except json.JSONDecodeError as exc:
        if text.startswith(_BYTE_ORDER_MARK):
            return None, "the value begins with a byte order mark; save it as UTF-8 without one"
        return None, (
            f"the value is not JSON ({exc.msg}, line {exc.lineno} column {exc.colno}); a string needs its quotes, "
            'for example "blue"'
        )
    except RecursionError:
        return None, _TOO_DEEP
    except ValueError:
        return None, "a number in the value has too many digits"
    # A value can only be too deep if it has that many brackets: most values skip the walk.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        return None, _TOO_DEEP
    return value, ""


def _check_members(value: Any, max_bytes: int) -> None:
    """Refuse what cannot be JSON before it is written out.

    Level by level and counted, as each member costs a byte or more: a list that holds itself twice, or a few
    lists that share one another, would else be walked for ever and written out into all memory.
    """
    level, depth, least_bytes = [value], 0, 0
    while level:
        members: list[Any] = []
        for item in level:
            if not isinstance(item, (dict, list, tuple)):
                least_bytes += len(item) if isinstance(item, str) else 1
            elif depth == MAX_DEPTH:
                raise InvalidValue(f"{_TOO_DEEP}, or holds itself")
            elif isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise InvalidValue(f"an object's member names are str, not {type(key).__name__}")
                    least_bytes += len(key)
                members.extend(item.values())
            else:
                members.extend(item)
            if least_bytes + len(members) > max_bytes:
                raise InvalidValue(f"the value has more than {max_bytes} bytes, which is the most that is allowed")
        level = members
        depth += 1


def encode(value: Any, *, max_bytes: int = MAX_VALUE_BYTES) -> bytes:
    """Encode a value as compact JSON in UTF-8.

    Takes None, bool, int, float, str, and lists, tuples and dicts of them with str keys. Raises
    `InvalidValue` (fix the value) for anything that `decode` would not give back.
    """
    _check_members(value, max_bytes)
    raw, fault = _written(value)
    if fault:
        raise InvalidValue(fault)
    if len(raw) > max_bytes:
        raise InvalidValue(f"the value has {len(raw)} bytes; at most {max_bytes} are allowed")
    return raw


def _written(value: Any) -> tuple[bytes, str]:
    """The JSON text of a value, or what is wrong with it."""
    try:
        return _encode_text(value).encode(), ""
    except UnicodeEncodeError:
        return b"", _HALF_A_PAIR
    except TypeError as exc:
        return b"", f"the value is not JSON: {exc}"
    except ValueError:
        return b"", "the value holds NaN, an infinity or a number with too many digits"


def freeze(value: Any) -> Any:
    """Return what a value looks like after a trip through a store: frozen, JSON's types only.

    Raises `InvalidValue` like `encode`.
    """
    if value is None or type(value) in {bool, int, str}:
        encode(value)
        return value
    return decode(encode(value))
