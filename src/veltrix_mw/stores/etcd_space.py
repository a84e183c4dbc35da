"""A namespace's keys in etcd: which of etcd's keys are entries, which is bookkeeping, and what marks a revision.

Owns the layout and the fingerprints. Pure: knows neither requests nor answers beyond their key-value pairs.

::

    <namespace>/<key>                      an entry: JSON text (`prefix` stands in place of `<namespace>/`)
    .veltrix/<namespace>/incarnation       the label
    .veltrix/<namespace>/change            the record of the newest write of ours, overwritten in each
    .veltrix/<namespace>/lease:<name>      a lease that is held: `<token> <holder>`, for as long as its lease of etcd's
    .veltrix/<namespace>/token:<name>      the last fencing token of that lease

A lease's name is one segment, so that none of these is another namespace's: a namespace may have slashes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import msgspec

from veltrix_mw.keys import is_key, outermost
from veltrix_mw.protocols import ChangeRecord
from veltrix_mw.stores.etcd_messages import KeyValue, prefix_end

__all__ = ["Change", "Space", "agrees", "foreign_mark", "is_derived", "lease_key", "token_key"]

_FOREIGN: Final = "x:"  # the mark of a revision that someone else wrote: what it put ...
_OURS: Final = "r:"  # ... and of our own: the random mark in its record
_MAX_HASHES: Final = 8


class _Record(msgspec.Struct, frozen=True):
    """The record as it is stored."""

    mark: str = ""
    author: str = ""
    reason: str = ""
    time_s: float = 0.0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A record with the revision that it is of, and the fingerprint that it gives it."""

    revision: int
    fingerprint: str
    record: ChangeRecord

    @classmethod
    def of(cls, stored: KeyValue) -> Change:
        try:
            said = msgspec.json.decode(stored.value, type=_Record)
        except ValueError:
            said = _Record()
        # One that is not ours to read is as good a mark as any.
        mark = said.mark or hashlib.blake2b(stored.value, digest_size=8).hexdigest()
        record = ChangeRecord(said.author, said.reason, said.time_s, said.traceparent)
        return cls(stored.mod_revision, _OURS + mark, record)

    @staticmethod
    def written(record: ChangeRecord) -> bytes:
        """The record as a write stores it, with a mark of its own."""
        mark = secrets.token_hex(8)
        return msgspec.json.encode(_Record(mark, record.author, record.reason, record.time_s, record.traceparent))


class Space:
    """The names of one namespace in etcd, and back."""

    def __init__(self, namespace: str, *, prefix: str | None, lazy: Sequence[str], is_text: bool) -> None:
        self.prefix = (f"{namespace}/" if prefix is None else prefix).encode()
        self.end = prefix_end(self.prefix)
        self.label = f".veltrix/{namespace}/incarnation".encode()
        self.change = f".veltrix/{namespace}/change".encode()
        self.lazy = outermost(lazy)
        self._is_text = is_text
        edges = [self.prefix]
        for each in self.lazy:
            begin = self.prefix + each.encode()
            edges += [begin, prefix_end(begin)]
        edges.append(self.end)
        self.eager_spans = tuple(zip(edges[0::2], edges[1::2], strict=True))
        self.lazy_spans = tuple(zip(edges[1:-1:2], edges[2:-1:2], strict=True))

    def name(self, key: str) -> bytes:
        return self.prefix + key.encode()

    def key(self, name: bytes) -> str | None:
        """The key that etcd's `name` is the entry of; None where it is no entry, by its shape."""
        try:
            key = name[len(self.prefix) :].decode("ascii")
        except UnicodeDecodeError:
            return None
        return key if is_key(key) else None

    def unit_spans(self, name: str) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
        """Where the unit of that name lies: the key itself, and what hangs below it."""
        begin = self.name(name)
        return (begin, b""), (begin + b"/", begin + b"0")

    def is_lazy(self, key: str) -> bool:
        return key.startswith(self.lazy)

    def value(self, stored: bytes) -> bytes:
        """What is handed on of a stored value."""
        return _as_json(stored) if self._is_text else stored


def lease_key(namespace: str, name: str) -> bytes:
    """Where the lease of that name is."""
    return f".veltrix/{namespace}/lease:{name}".encode()


def token_key(namespace: str, name: str) -> bytes:
    """The last fencing token of the lease of that name."""
    return f".veltrix/{namespace}/token:{name}".encode()


def foreign_mark(put: Iterable[tuple[bytes, bytes]]) -> str:
    """The mark of a revision by what it put: (name, value) of each, in any order."""
    hashes = sorted(hashlib.blake2b(name + b"\0" + value, digest_size=6).hexdigest() for name, value in put)
    return _FOREIGN + ",".join(hashes[:_MAX_HASHES])


def agrees(seen: str, known: str) -> bool:
    """Whether what is still to be `seen` of a revision may be what is left of the one `known`.

    Later writes and deletions take away from what a revision put; nothing adds to it.
    """
    if not (seen.startswith(_FOREIGN) and known.startswith(_FOREIGN)):
        return seen == known
    kept = [each for each in known.removeprefix(_FOREIGN).split(",") if each]
    left = [each for each in seen.removeprefix(_FOREIGN).split(",") if each]
    # With as many as are kept at most, there may be more, all of them larger.
    return all(each in kept or (len(kept) == _MAX_HASHES and each > kept[-1]) for each in left)


def is_derived(label: str) -> bool:
    """Whether a label is not stored: the namespace has none, or nothing at all."""
    return not label or label.endswith("?")


def _no_json(name: str) -> NoReturn:
    raise ValueError(name)


_parse: Final = json.JSONDecoder(parse_constant=_no_json).decode


def _as_json(stored: bytes) -> bytes:
    """JSON text as it is; any other text as a JSON string. What is no text at all is left as it is."""
    try:
        text: Any = stored.decode()
    except UnicodeDecodeError:
        return stored
    try:
        _parse(text)
    except RecursionError:
        return stored  # JSON, if too deep to be taken
    except ValueError:
        return json.dumps(text, ensure_ascii=False).encode()
    return stored
