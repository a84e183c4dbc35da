"""etcd's messages as protobuf, which gRPC carries.

Owns the numbers of their fields, as etcd's rpc.proto and kv.proto have them, and the wire format
(https://protobuf.dev/programming-guides/encoding). Pure: messages in, bytes out. A codec of our own: stubs that
protobuf's compiler makes load beside some releases of its runtime only, and an application may need another one.

A field that is not in here is passed over, so that newer servers may say more. Of a field that comes twice, the last
counts, lists apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from veltrix_mw.stores import etcd_messages as messages

__all__ = ["decode", "encode"]

M = TypeVar("M")

_VARINT: Final = 0
_SIZED: Final = 2
_MASK: Final = (1 << 64) - 1
_SIGN: Final = 1 << 63
_SORT_ORDERS: Final = ("NONE", "ASCEND", "DESCEND")
_TARGETS: Final = ("KEY", "VERSION", "CREATE", "MOD", "VALUE")


class _Kind(Enum):
    """What a field holds. The first four are varints on the wire, the others a length and bytes."""

    WHOLE = auto()  # an int64
    DIGITS = auto()  # an uint64, kept as a string of digits
    FLAG = auto()
    CHOICE = auto()  # one of `of`, by its place there
    BYTES = auto()
    TEXT = auto()
    TEXTS = auto()
    ONE = auto()  # a message `of`
    MANY = auto()


_VARINTS: Final = frozenset({_Kind.WHOLE, _Kind.DIGITS, _Kind.FLAG, _Kind.CHOICE})


class _Field(NamedTuple):
    number: int
    name: str
    kind: _Kind
    of: Any = None

    @property
    def tag(self) -> int:
        return self.number << 3 | (_VARINT if self.kind in _VARINTS else _SIZED)


_HEADER: Final = _Field(1, "header", _Kind.ONE, messages.Header)

_FIELDS: Final[Mapping[type[Any], tuple[_Field, ...]]] = {
    messages.Range: (
        _Field(1, "key", _Kind.BYTES),
        _Field(2, "range_end", _Kind.BYTES),
        _Field(3, "limit", _Kind.WHOLE),
        _Field(4, "revision", _Kind.WHOLE),
        _Field(5, "sort_order", _Kind.CHOICE, _SORT_ORDERS),
        _Field(6, "sort_target", _Kind.CHOICE, _TARGETS),
        _Field(8, "keys_only", _Kind.FLAG),
        _Field(9, "count_only", _Kind.FLAG),
        _Field(10, "min_mod_revision", _Kind.WHOLE),
        _Field(11, "max_mod_revision", _Kind.WHOLE),
    ),
    messages.Put: (
        _Field(1, "key", _Kind.BYTES),
        _Field(2, "value", _Kind.BYTES),
        _Field(3, "lease", _Kind.WHOLE),
    ),
    messages.DeleteRange: (_Field(1, "key", _Kind.BYTES),),
    messages.Operation: (
        _Field(1, "request_range", _Kind.ONE, messages.Range),
        _Field(2, "request_put", _Kind.ONE, messages.Put),
        _Field(3, "request_delete_range", _Kind.ONE, messages.DeleteRange),
    ),
    messages.Compare: (
        _Field(1, "result", _Kind.CHOICE, ("EQUAL", "GREATER")),
        _Field(2, "target", _Kind.CHOICE, ("VERSION", "CREATE", "MOD", "VALUE")),
        _Field(3, "key", _Kind.BYTES),
        _Field(6, "mod_revision", _Kind.WHOLE),
        _Field(7, "value", _Kind.BYTES),
    ),
    messages.Transaction: (
        _Field(1, "compare", _Kind.MANY, messages.Compare),
        _Field(2, "success", _Kind.MANY, messages.Operation),
        _Field(3, "failure", _Kind.MANY, messages.Operation),
    ),
    messages.WatchCreate: (
        _Field(1, "key", _Kind.BYTES),
        _Field(2, "range_end", _Kind.BYTES),
        _Field(3, "start_revision", _Kind.WHOLE),
        _Field(7, "watch_id", _Kind.WHOLE),
        _Field(8, "fragment", _Kind.FLAG),
    ),
    messages.WatchAsked: (_Field(1, "create_request", _Kind.ONE, messages.WatchCreate),),
    messages.Authenticate: (_Field(1, "name", _Kind.TEXT), _Field(2, "password", _Kind.TEXT)),
    messages.LeaseAsked: (_Field(1, "ttl", _Kind.WHOLE),),
    messages.KeepLease: (_Field(1, "lease", _Kind.WHOLE),),
    messages.StatusAsked: (),
    messages.Header: (
        _Field(1, "cluster_id", _Kind.DIGITS),
        _Field(2, "member_id", _Kind.DIGITS),
        _Field(3, "revision", _Kind.WHOLE),
        _Field(4, "raft_term", _Kind.WHOLE),
    ),
    messages.KeyValue: (
        _Field(1, "key", _Kind.BYTES),
        _Field(2, "create_revision", _Kind.WHOLE),
        _Field(3, "mod_revision", _Kind.WHOLE),
        _Field(4, "version", _Kind.WHOLE),
        _Field(5, "value", _Kind.BYTES),
        _Field(6, "lease", _Kind.WHOLE),
    ),
    messages.Ranged: (
        _HEADER,
        _Field(2, "kvs", _Kind.MANY, messages.KeyValue),
        _Field(3, "more", _Kind.FLAG),
        _Field(4, "count", _Kind.WHOLE),
    ),
    messages.Result: (_Field(1, "response_range", _Kind.ONE, messages.Ranged),),
    messages.Transacted: (
        _HEADER,
        _Field(2, "succeeded", _Kind.FLAG),
        _Field(3, "responses", _Kind.MANY, messages.Result),
    ),
    messages.Authenticated: (_HEADER, _Field(2, "token", _Kind.TEXT)),
    messages.LeaseGranted: (_HEADER, _Field(2, "lease", _Kind.WHOLE), _Field(3, "ttl", _Kind.WHOLE)),
    messages.LeaseKept: (_HEADER, _Field(3, "ttl", _Kind.WHOLE)),
    messages.Status: (
        _HEADER,
        _Field(2, "version", _Kind.TEXT),
        _Field(4, "leader", _Kind.DIGITS),
        _Field(8, "errors", _Kind.TEXTS),
    ),
    messages.Event: (
        _Field(1, "type", _Kind.CHOICE, ("PUT", "DELETE")),
        _Field(2, "kv", _Kind.ONE, messages.KeyValue),
    ),
    messages.Watched: (
        _HEADER,
        _Field(2, "watch_id", _Kind.WHOLE),
        _Field(3, "created", _Kind.FLAG),
        _Field(4, "canceled", _Kind.FLAG),
        _Field(5, "compact_revision", _Kind.WHOLE),
        _Field(6, "cancel_reason", _Kind.TEXT),
        _Field(7, "fragment", _Kind.FLAG),
        _Field(11, "events", _Kind.MANY, messages.Event),
    ),
}

_BY_TAG: Final = {kind: {field.tag: field for field in fields} for kind, fields in _FIELDS.items()}

# What a field holds that is not on the wire, where the message itself does not say so.
_ABSENT: Final[Mapping[_Kind, Any]] = {_Kind.BYTES: b"", _Kind.TEXT: ""}
_EMPTY: Final[Mapping[type[Any], dict[str, Any]]] = {
    kind: {
        field.name: field.of[0] if field.kind is _Kind.CHOICE else _ABSENT[field.kind]
        for field in fields
        if field.kind is _Kind.CHOICE or field.name in required
    }
    for kind, fields in _FIELDS.items()
    for required in [{each.name for each in msgspec.structs.fields(kind) if each.required}]
}


def encode(message: messages.Message) -> bytes:
    out = bytearray()
    for field in _FIELDS[type(message)]:
        value = getattr(message, field.name)
        match field.kind:
            case _Kind.ONE:
                if value is not None:
                    _put_sized(out, field.tag, encode(value))
            case _Kind.MANY:
                for each in value:
                    _put_sized(out, field.tag, encode(each))
            case _Kind.TEXTS:
                for each in value:
                    _put_sized(out, field.tag, each.encode())
            case _ if not value:
                pass  # what is empty is left out
            case _Kind.BYTES:
                _put_sized(out, field.tag, value)
            case _Kind.TEXT:
                _put_sized(out, field.tag, value.encode())
            case _Kind.CHOICE:
                if place := field.of.index(value):
                    _put_varint(out, field.tag)
                    _put_varint(out, place)
            case _:
                _put_varint(out, field.tag)
                _put_varint(out, int(value) & _MASK)  # below zero: two's complement
    return bytes(out)


def decode(raw: bytes, kind: type[M]) -> M:
    """The message in `raw`. Raises `ValueError` for what is none, also where its end is missing."""
    try:
        return _read(raw, 0, len(raw), kind)
    except IndexError as exc:
        raise ValueError(f"the message {kind.__name__} is cut off") from exc


def _read(raw: bytes, at: int, end: int, kind: type[M]) -> M:
    # Lengths and tags of one byte are read in here: calls cost more than all else where a list has many keys.
    fields = _BY_TAG[kind]
    found = _EMPTY[kind].copy()
    while at < end:
        tag = raw[at]
        at += 1
        if tag > 0x7F:
            tag, at = _varint(raw, at - 1)
        field = fields.get(tag)
        if field is None:
            at = _past(raw, at, tag)
            continue
        value = raw[at]  # a number, or the length of what follows
        at += 1
        if value > 0x7F:
            value, at = _varint(raw, at - 1)
        _, name, what, of = field
        if what in _VARINTS:
            found[name] = _number(value, what, of)
            continue
        begin, at = at, at + value
        if what is _Kind.BYTES:
            found[name] = raw[begin:at]
        elif what is _Kind.ONE:
            found[name] = _read(raw, begin, at, of)
        elif what is _Kind.MANY:
            found.setdefault(name, []).append(_read(raw, begin, at, of))
        elif what is _Kind.TEXT:
            found[name] = raw[begin:at].decode()
        else:
            found.setdefault(name, []).append(raw[begin:at].decode())
    if at != end:
        raise IndexError  # a part was longer than the whole
    return kind(**found)


def _number(value: int, kind: _Kind, of: Any) -> Any:
    match kind:
        case _Kind.WHOLE:
            return value - (1 << 64) if value & _SIGN else value
        case _Kind.DIGITS:
            return str(value)
        case _Kind.FLAG:
            return bool(value)
        case _:
            if value >= len(of):
                raise ValueError(f"{value} is none of {', '.join(of)}")
            return of[value]


def _past(raw: bytes, at: int, tag: int) -> int:
    """Where a field ends that is passed over, and begins at `at` behind its tag."""
    match tag & 7:
        case _ if tag < 8:
            raise ValueError("a field has the number 0")
        case 0:
            return _varint(raw, at)[1]
        case 1:
            return at + 8
        case 2:
            size, at = _varint(raw, at)
            return at + size
        case 5:
            return at + 4
        case wire:
            raise ValueError(f"a field is of the wire type {wire}, which etcd does not use")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _put_sized(out: bytearray, tag: int, value: bytes) -> None:
    _put_varint(out, tag)
    _put_varint(out, len(value))
    out += value
