"""The writer: checks what is to be written, and hands it to the authority as one revision.

Owns validation before a write, limits, the change record, read-back, history and rollback. Knows no backend and
no view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from veltrix_mw.errors import InvalidValue
from veltrix_mw.keys import check_key
from veltrix_mw.operations import Delete, Operation, Put
from veltrix_mw.protocols import ChangeRecord, Listing, RawOperation, Store
from veltrix_mw.snapshot import Entry, Version
from veltrix_mw.sorted_map import SortedMap
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.validation import Schemas
from veltrix_mw.values import MISSING, Missing, decode, encode

__all__ = ["Writer"]

_TIMEOUT_S: Final = 5.0  # a write that the authority did not acknowledge by then has failed, or its fate is unknown
_MAX_NOTE_BYTES: Final = 4096  # of author and of reason: each follower is sent them with the change


class Writer:
    """Writes to one authority.

    A write is acknowledged by the authority alone, as one revision, or it raises and nothing was written (but
    for `StoreUnavailable`, after which its fate is unknown: read again).
    """

    def __init__(
        self,
        store: Store,
        *,
        schemas: Schemas,
        entries: Callable[[Sequence[str]], SortedMap],
        telemetry: Telemetry,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`entries` gives what the authority has now, as far as it is judged together with these keys."""
        self._store = store
        self._schemas = schemas
        self._entries = entries
        self._telemetry = telemetry
        self._wall_clock = wall_clock

    def write(self, operations: Iterable[Operation], *, author: str = "", reason: str = "") -> int:
        """Apply all operations as one revision; returns it.

        `author` and `reason` are notes of at most 4,096 bytes each. Raises `InvalidKey`, `InvalidValue`, `Conflict`,
        `KeyMissing` (a delete of an absent key), `AuthFailed`, `StoreUnavailable`.
        """
        return self._commit(self._checked(list(operations)), author, reason)

    def read(self, keys: Sequence[str], revision: int | None = None) -> dict[str, Entry]:
        """The present ones of `keys`, straight from the authority: now (linearizable), or as of `revision`.

        Raises `Compacted` when that revision is no longer kept, `InvalidValue` when a stored value is not JSON.
        """
        if isinstance(keys, str):
            raise TypeError(f"read takes a sequence of keys; write read([{keys!r}])")
        if revision is not None:
            _check_revision(revision)
        with self._telemetry.calling():
            found = self._store.read([check_key(key) for key in keys], revision, timeout_s=_TIMEOUT_S)
        return {key: Entry(_decoded(key, raw), mod_revision) for key, (raw, mod_revision) in found.items()}

    def history(self, key: str, *, limit: int = 100) -> tuple[Version, ...]:
        """The kept versions of `key`, newest first, at most `limit` (1 or more)."""
        if limit < 1:
            raise ValueError(f"history takes a limit of 1 or more, not {limit}")  # stores read 0 and -1 differently
        with self._telemetry.calling():
            kept = self._store.history(check_key(key), limit=limit, timeout_s=_TIMEOUT_S)
        return tuple(_version(item.key, item.value, item.revision, item.record) for item in kept)

    def rollback(self, revision: int, *, author: str = "", reason: str = "") -> int:
        """Write a new revision with the keyspace as it was at `revision`; returns the new one.

        Every key it writes is compared and set, so a concurrent write makes it raise `Conflict` and change nothing.
        Where nothing differs, nothing is written and the current revision is returned. Raises `Compacted` when
        `revision` is no longer kept, `InvalidValue` when more changed than fits into one revision, or when what was
        written then is not JSON, or breaks a schema of today: every worker would hold the new revision back.
        """
        _check_revision(revision)
        with self._telemetry.calling():
            then = self._store.list_at(revision, timeout_s=_TIMEOUT_S)
            now = self._store.list(timeout_s=_TIMEOUT_S)
        operations = _difference(then, now)
        if not operations:
            return now.position.revision
        self._check_limits(operations)
        for item in operations:
            if not isinstance(item.value, Missing):
                _decoded(item.key, item.value)  # not all that a store keeps was written by this library
        self._check_schemas(operations)
        return self._commit(operations, author, reason or f"rollback to revision {revision}")

    def _commit(self, operations: Sequence[RawOperation], author: str, reason: str) -> int:
        for name, text in (("author", author), ("reason", reason)):
            _check_note(name, text)
        with self._telemetry.write() as outcome:
            record = ChangeRecord(
                author=author,
                reason=reason,
                time_s=self._wall_clock(),
                traceparent=self._telemetry.traceparent(),
            )
            revision = self._store.commit(operations, record, timeout_s=_TIMEOUT_S)
            outcome.revision = revision
        return revision

    def _checked(self, operations: Sequence[Operation]) -> list[RawOperation]:
        if not operations:
            raise InvalidValue("there is nothing to write: give at least one Put or Delete")
        limit = self._store.info.limits.max_value_bytes
        raw: list[RawOperation] = []
        for operation in operations:
            match operation:
                case Put(key, value, expected):
                    text: bytes | Missing = _encoded(check_key(key), value, limit)
                case Delete(key, expected):
                    text = MISSING
                case _:
                    raise TypeError(f"write takes Put and Delete, not {type(operation).__name__}")
            raw.append(RawOperation(check_key(key), text, _expected(key, expected)))
        seen: set[str] = set()
        for item in raw:
            if item.key in seen:
                raise InvalidValue(f"{item.key!r} is written twice in one revision; keep one of them")
            seen.add(item.key)
        self._check_limits(raw)
        self._check_schemas(raw)
        return raw

    def _check_limits(self, operations: Sequence[RawOperation]) -> None:
        limits = self._store.info.limits
        origin = self._store.info.origin
        if limits.max_operations is not None and len(operations) > limits.max_operations:
            raise InvalidValue(
                f"{len(operations)} operations in one revision; {origin} takes at most {limits.max_operations}: "
                "write them in several revisions"
            )
        if limits.max_transaction_bytes is not None:
            size = sum(
                len(item.key) + (0 if isinstance(item.value, Missing) else len(item.value)) for item in operations
            )
            if size > limits.max_transaction_bytes:
                raise InvalidValue(
                    f"{size} bytes in one revision; {origin} takes at most {limits.max_transaction_bytes}: "
                    "write them in several revisions"
                )

    def _check_schemas(self, operations: Sequence[RawOperation]) -> None:
        touched = self._schemas.touched([item.key for item in operations])
        if not touched:
            return
        # The revision does not exist yet; a number serves, as only values are looked at.
        changes: Mapping[str, tuple[Any, int] | Missing] = {
            item.key: MISSING if isinstance(item.value, Missing) else (_decoded(item.key, item.value), 1)
            for item in operations
        }
        following = self._entries(list(changes)).updated(changes)
        for schema in touched:
            fault = self._schemas.check(schema, following.below)
            if fault is not None:
                raise InvalidValue(f"the write would break the schema of {schema.name!r}: {fault.reason}")


def _encoded(key: str, value: Any, limit: int) -> bytes:
    try:
        return encode(value, max_bytes=limit)
    except InvalidValue as exc:
        raise InvalidValue(f"{key!r}: {exc}") from None


def _decoded(key: str, raw: bytes) -> Any:
    try:
        return decode(raw)
    except InvalidValue as exc:
        raise InvalidValue(f"{key!r}: {exc}") from None


def _expected(key: str, expected: int | None) -> int | None:
    if expected is None or (type(expected) is int and expected >= 0):
        return expected
    raise InvalidValue(f"expected of {key!r} is a mod_revision: a whole number, 0 for 'must be absent'")


def _check_revision(revision: object) -> None:
    # The store says which ones there are; some would take 1.5 for one.
    if type(revision) is not int:
        raise InvalidValue(f"a revision is a whole number, not {type(revision).__name__}")


def _check_note(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidValue(f"the {name} of a change is a str, not {type(text).__name__}")
    if len(text.encode(errors="replace")) > _MAX_NOTE_BYTES:
        raise InvalidValue(
            f"the {name} of a change has at most {_MAX_NOTE_BYTES} bytes; refer to where more is written"
        )
    if text.encode(errors="ignore").decode() != text:
        raise InvalidValue(f"the {name} of a change holds half of a surrogate pair, which no encoding can carry")


def _difference(then: Listing, now: Listing) -> list[RawOperation]:
    """The operations that make `now` into `then`, each compared and set."""
    was = {key: raw for key, raw, _ in then.entries}
    operations = []
    for key, raw, revision in now.entries:
        if key not in was:
            operations.append(RawOperation(key, MISSING, revision))
        elif was[key] != raw:
            operations.append(RawOperation(key, was[key], revision))
    present = {key for key, _, _ in now.entries}
    operations.extend(RawOperation(key, raw, 0) for key, raw in was.items() if key not in present)
    return operations


def _version(key: str, raw: bytes | Missing, revision: int, record: ChangeRecord) -> Version:
    value: Any = MISSING
    invalid = ""
    if not isinstance(raw, Missing):
        try:
            value = decode(raw)
        except InvalidValue as exc:
            invalid = str(exc)
    return Version(
        key,
        value,
        revision,
        author=record.author,
        reason=record.reason,
        time_s=record.time_s,
        deleted=isinstance(raw, Missing),
        invalid=invalid,
    )
