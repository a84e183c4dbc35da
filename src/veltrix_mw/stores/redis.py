"""The store in Redis: Redis as the authority, for small teams.

Owns what is committed and what of the past can be read. Knows nothing of connections (`redis_link`), of names and
encodings (`redis_layout`), nor of how a keyspace is read at one revision (`redis_reading`).

Each revision is one run of one script, which changes the entries and adds what it did to the stream. An entry of the
stream also says what each key was before: the past is the present with the stream undone, as far as the stream reaches.
"""

from __future__ import annotations

import secrets
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

from veltrix_mw.errors import Compacted, StoreError, StoreUnavailable
from veltrix_mw.keys import outermost
from veltrix_mw.protocols import (
    ChangeRecord,
    Confirmation,
    Limits,
    Listing,
    Position,
    RawOperation,
    RawUnit,
    RawVersion,
    Restored,
    StoreInfo,
)
from veltrix_mw.stores.conditions import check
from veltrix_mw.stores.redis_layout import (
    AUTHORITY,
    COMMIT,
    META_FIELDS,
    RENEW,
    Meta,
    Names,
    StreamEntry,
    encode_record,
    meta_of,
    stored_of,
    stream_id,
)
from veltrix_mw.stores.redis_link import WAIT_TIMEOUT_S, Connection, RedisLink
from veltrix_mw.stores.redis_reading import Page, Reader, RedisWatch, Torn, entries_of
from veltrix_mw.stores.redis_routes import Route, Server
from veltrix_mw.stores.units import MAX_UNIT_KEYS, bounded, too_many_keys
from veltrix_mw.values import MAX_VALUE_BYTES, MISSING, Missing
from veltrix_mw.words import seconds

__all__ = ["RedisStore"]

_MAX_OPERATIONS: Final = 1_000  # four words each in one `XADD`, of the 8,000 that Lua may pass to a command
_MAX_KEYS_AT_ONCE: Final = 5_000  # that units are read of in one call, which holds up all others
_MAX_TRANSACTION_BYTES: Final = 32 * 1024 * 1024  # half of what Redis lets a client have on its way

Stored = tuple[bytes, int]


class _Rules:
    """What an authority makes of what was found.

    An authority that was there before and is gone is never an empty one.
    """

    kind = AUTHORITY

    def __init__(self, names: Names, url: str) -> None:
        self._names = names
        self._url = url
        self.was_there = False

    def nothing(self, *, left: bool) -> StoreError | None:
        if not (left or self.was_there):
            return None
        names = self._names
        return StoreUnavailable(
            f"the keys {names.base}* are gone from {self._url}: flushed, evicted, or it restarted without them. What "
            f"was read before is served on. Restore a backup, or DEL {names.changes} and write everything anew; then "
            "set maxmemory-policy noeviction and appendonly yes"
        )

    def wrong_kind(self) -> StoreError:
        return StoreError(
            f"{self._names.base}* at {self._url} is a mirror, fed from another authority: it cannot be the authority "
            "itself. Give the authority's URL, with this one as mirror=; or choose another namespace"
        )

    def other_history(self, reason: str) -> StoreError:
        return Restored(f"{reason}; list again")

    def ahead(self, position: Position, newest: int) -> StoreError:
        return Restored(f"revision {position.revision} is not in Redis any more, the newest is {newest}; list again")


class RedisStore:
    """A namespace in one Redis server, which orders its writes.

    An acknowledged write is as safe as the server's own persistence makes it. Thread-safe; usable after a fork.
    """

    def __init__(
        self,
        where: str | Route,
        port: int = 6379,
        *,
        db: int = 0,
        namespace: str = "default",
        tls: bool = False,
        user: str | None = None,
        password: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        timeout_s: float = 2.0,
        keep_revisions: int = 10_000,
        lazy: Sequence[str] = (),
        wait_replicas: int = 0,
        wait_timeout_s: float = WAIT_TIMEOUT_S,
    ) -> None:
        """Name the server, by its host or by how it is found; nothing is opened.

        `ca`, `cert` and `key` are PEM files; without `ca` the system's authorities are trusted. `timeout_s` is how long
        a watch waits for a server that does not answer. `keep_revisions` bounds the stream. `lazy` are the prefixes
        that are left out wherever the namespace is listed, watched or counted. A write is acknowledged once
        `wait_replicas` replicas have it, or fails after `wait_timeout_s`.
        """
        self._link = RedisLink(
            Server(where, port) if isinstance(where, str) else where,
            db=db,
            namespace=namespace,
            tls=tls,
            user=user,
            password=password,
            ca=ca,
            cert=cert,
            key=key,
        )
        self._names = names = Names(namespace)
        self._written = names.entries, names.changes, names.keys
        self._rules = _Rules(self._names, self._link.url)
        self._reader = Reader(self._link, self._names, self._rules)
        self._timeout_s = timeout_s
        self._keep_revisions = keep_revisions
        self._lazy = outermost(lazy)
        self._wait_replicas = wait_replicas
        self._wait_timeout_s = wait_timeout_s
        limits = Limits(MAX_VALUE_BYTES, _MAX_OPERATIONS, _MAX_TRANSACTION_BYTES)
        url = f"{self._link.url}?wait_replicas={wait_replicas}" if wait_replicas else self._link.url
        self._info = StoreInfo("redis", url, namespace, limits, self._lazy)
        # How many eager entries there were at a position; replaced whole, so it needs no lock.
        self._eager: tuple[Position, int] | None = None

    @property
    def info(self) -> StoreInfo:
        return self._info

    @property
    def failovers(self) -> int:
        return self._link.failovers

    # --- followed

    def list(self, *, timeout_s: float) -> Listing:
        listed = self._reader.list(timeout_s, newest=True)
        entries = listed.ascending(self._lazy)
        if listed.meta is not None:
            self._rules.was_there = True
            self._eager = listed.position, len(entries)
        return Listing(listed.position, entries)

    def watch(self, position: Position, *, timeout_s: float) -> RedisWatch:
        return self._reader.watch(position, timeout_s=timeout_s, patience_s=self._timeout_s / 2, lazy=self._lazy)

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        # What is confirmed is to be the newest there is: not what a primary says that was replaced.
        with self._link.session(timeout_s, newest=True) as connection:
            meta = self._reader.check(connection, position)
            if meta is None:
                return Confirmation("", 0, 0)
            self._rules.was_there = True
            count = self._count_eager(connection, meta) if self._lazy else meta.count
        return Confirmation(meta.position.incarnation, meta.revision, count)

    # --- written

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        if not operations:
            raise ValueError("a transaction needs at least one operation")
        arguments: list[str | bytes] = [
            secrets.token_hex(8),
            secrets.token_hex(8),
            encode_record(record),
            str(self._keep_revisions),
        ]
        for operation in operations:
            gone = isinstance(operation.value, Missing)
            expected = "" if operation.expected is None else str(operation.expected)
            arguments += [operation.key, "-" if gone else "+", operation.value or b"", expected]
        ends_s = time.monotonic() + timeout_s

        def write(connection: Connection) -> int:
            if self._wait_replicas:
                connection.execute("WAIT", 0, 1)  # whoever may not wait is told so before anything is written
            with self._link.writing(connection, timeout_s):
                said, *rest = connection.run(COMMIT, self._written, arguments)
            if said == b"conflict":
                operation, now = operations[int(rest[0])], rest[1]
                value, revision = stored_of(operation.key.encode(), now) if now else (b"", 0)
                check(operation, revision, lambda: value)
                raise AssertionError(f"the script refused what holds: {operation.key}")
            self._check_said(said, rest)
            if self._wait_replicas:
                self._await_replicas(connection, int(rest[0]), ends_s, timeout_s)
            return int(rest[0])

        revision = self._link.call(timeout_s, write, writes=True)
        self._rules.was_there = True
        return revision

    def _await_replicas(self, connection: Connection, revision: int, ends_s: float, timeout_s: float) -> None:
        """Raise `StoreUnavailable` unless enough replicas are known to have what was written."""
        wanted = self._wait_replicas
        # Half of what is left is for the answer: Redis looks whether the time is over now and then, not at once.
        granted_s = min(self._wait_timeout_s, max(0.001, (ends_s - time.monotonic()) / 2))
        written = f"revision {revision} was written at {self._link.url}"
        fate = "it is seen, and a failover may lose it; read again before you write again"
        try:
            with self._link.translating(timeout_s):
                found = connection.replicated(wanted, granted_s)
        except StoreError as exc:
            raise StoreUnavailable(
                f"{written}, and whether replicas have it could not be asked: {fate} ({exc})"
            ) from exc
        if found < wanted:
            raise StoreUnavailable(
                f"{written}, and only {found} of {wanted} replicas confirmed it within {seconds(granted_s)}: {fate}"
            )

    def read(self, keys: Sequence[str], revision: int | None, *, timeout_s: float) -> dict[str, Stored]:
        def look_up(connection: Connection) -> dict[str, Stored]:
            meta, found = self._read_now(connection, keys)
            if revision is not None:
                _check_exists(revision, meta)
                self._undo(connection, found, meta, revision)
            return found

        found = self._link.call(timeout_s, look_up, newest=True)
        return {key: found[key] for key in keys if key in found}

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        with self._link.session(timeout_s, writes=True) as connection:
            keys = self._names.entries, self._names.changes
            said, *rest = connection.run(RENEW, keys, (known, secrets.token_hex(8)))
        self._check_said(said, rest)
        self._rules.was_there = True
        renewed: str = rest[0].decode()
        return renewed

    # --- remembered

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        """The kept versions of one key, newest first.

        Of what a key was before the stream begins only the last version is known, without its record.
        """
        return self._link.call(timeout_s, lambda connection: self._versions(connection, key, limit))

    def _versions(self, connection: Connection, key: str, limit: int) -> Sequence[RawVersion]:
        versions: list[RawVersion] = []
        meta, found = self._read_now(connection, [key])
        now, below = found.get(key), 0 if meta is None else meta.revision
        while len(versions) < limit:
            if now is None:
                entry = self._deletion_of(connection, key, below)
                if entry is None:
                    break
                versions.append(RawVersion(key, MISSING, entry.position.revision, entry.record))
            else:
                value, revision = now
                entry = self._entry_at(connection, revision)
                if entry is None or key not in entry.before:
                    versions.append(RawVersion(key, value, revision, ChangeRecord()))
                    break
                versions.append(RawVersion(key, value, revision, entry.record))
            now, below = entry.before[key], entry.position.revision - 1
        return versions

    def list_at(self, revision: int, *, timeout_s: float) -> Listing:
        def read(connection: Connection) -> Listing:
            listed = self._reader.list_in(connection)
            _check_exists(revision, listed.meta)
            position = self._undo(connection, listed.entries, listed.meta, revision)
            return Listing(position, listed.ascending(self._lazy))

        return self._link.call(timeout_s, read)

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        if not position.revision:
            return {name: RawUnit(()) for name in names}
        return self._link.call(timeout_s, lambda connection: self._units(connection, names, position))

    def _units(self, connection: Connection, names: Sequence[str], position: Position) -> dict[str, RawUnit]:
        read: dict[str, RawUnit] = {}
        part: dict[str, Sequence[bytes]] = {}
        for name, below in self._keys_below(connection, names, position).items():
            if len(below) > MAX_UNIT_KEYS:
                read[name] = too_many_keys(name)
                continue
            if sum(map(len, part.values())) + len(below) > _MAX_KEYS_AT_ONCE:
                read |= self._read_part(connection, part, position)
                part = {}
            part[name] = below
        return read | self._read_part(connection, part, position)

    def close(self) -> None:
        """End the watches and close every connection. Idempotent; a later call opens anew."""
        self._reader.close()

    # ---

    def _check_said(self, said: bytes, rest: Sequence[bytes]) -> None:
        """Raise unless a script did what it was to do."""
        names = self._names
        match said:
            case b"ok":
                return
            case b"kind":
                raise self._rules.wrong_kind()
            case b"index":
                raise self._link.not_ours(f"{names.keys}, which is no sorted set,")
            case b"gone":
                fault = self._rules.nothing(left=True)
                assert fault is not None
                raise fault
            case b"ahead":
                raise StoreError(
                    f"{names.changes} at {self._link.url} is ahead of {names.entries}, so one of them is of another "
                    "time; restore both from one backup"
                )
            case _:
                what = f"field {rest[0].decode(errors='backslashreplace')[:80]!r}" if rest else "a key without our meta"
                raise self._link.not_ours(f"{names.entries}, {what},")

    def _read_now(self, connection: Connection, keys: Sequence[str]) -> tuple[Meta | None, dict[str, Stored]]:
        """The meta and the present ones of `keys`, of one moment: they are fields of one hash."""
        while True:
            values: list[bytes | None] = connection.execute("HMGET", self._names.entries, *META_FIELDS, *keys)
            meta = meta_of(values[: len(META_FIELDS)])
            if meta is not None:
                break
            if self._reader.is_nothing(connection):
                return None, {}
        self._reader.check_kind(meta)
        self._rules.was_there = True
        found = zip(keys, values[len(META_FIELDS) :], strict=True)
        return meta, {key: stored_of(key.encode(), raw) for key, raw in found if raw is not None}

    def _keys_below(
        self, connection: Connection, names: Sequence[str], position: Position
    ) -> dict[str, Sequence[bytes]]:
        """The keys below each unit's name, as they are now; one more than there may be where there are more.

        Raises where `position` is not of this history, as far as that can be told now.
        """
        index = self._names.keys
        # "0" is what follows "/".
        ranges = [("ZRANGEBYLEX", index, f"[{name}/", f"({name}0", "LIMIT", 0, MAX_UNIT_KEYS + 1) for name in names]
        meta, (indexed, *below) = self._reader.meta_and(connection, [("EXISTS", index), *ranges])
        if meta is None:
            self._reader.check_never_written(position)
            return dict.fromkeys(names, ())
        self._reader.judge_newest(meta, position)
        if meta.count and not indexed:
            raise StoreUnavailable(
                f"the key {index} is gone from {self._link.url}, evicted for example, so lazy units cannot be found; "
                "the next write makes it anew. Set maxmemory-policy noeviction"
            )
        self._rules.was_there = True
        return dict(zip(names, below, strict=True))

    def _read_part(
        self, connection: Connection, part: Mapping[str, Sequence[bytes]], position: Position
    ) -> dict[str, RawUnit]:
        """Units as of `position`, of which these are the keys now: others that they had, the stream tells."""
        if not part:
            return {}
        asked = [key for name, below in part.items() for key in (name, *(each.decode("ascii") for each in below))]
        meta, found = self._read_now(connection, asked)
        if meta is None or meta.position.incarnation != position.incarnation:
            raise self._rules.other_history("another history came in between")
        at = self._undo(connection, found, meta, position.revision)
        if position.fingerprint not in {"", at.fingerprint}:
            raise self._rules.other_history(f"revision {position.revision} is not the one that was followed")
        keys = sorted(found)
        read = {}
        for name in part:
            first, last = bisect_left(keys, f"{name}/"), bisect_left(keys, f"{name}0")
            own = [name] if name in found else []
            read[name] = bounded(name, ((key, *found[key]) for key in (*own, *keys[first:last])))
        return read

    def _undo(self, connection: Connection, entries: dict[str, Stored], meta: Meta | None, revision: int) -> Position:
        """Turn what `entries` are at `meta` into what they were at `revision`; returns the position there.

        Of a part of the keyspace, keys that were not in it at `meta` come in as well; who read a part picks from it.
        """
        if meta is None:
            return Position("", 0)
        if revision == meta.revision:
            return meta.position
        at, page = meta.position, Page()
        while at.revision > revision:
            start, end = stream_id(max(1, revision)), stream_id(at.revision)
            found = entries_of(connection.execute("XREVRANGE", self._names.changes, end, start, "COUNT", page.count))
            page.saw(found)
            for entry in found:
                if entry.position.revision != at.revision or entry.relist:
                    raise self._compacted(revision)
                if at.revision == revision:
                    break
                for key, before in entry.before.items():
                    if before is None:
                        entries.pop(key, None)
                    else:
                        entries[key] = before
                at = Position(meta.position.incarnation, entry.previous, entry.previous_mark)
            if not found:
                raise self._compacted(revision)
        if at.revision != revision or (revision and self._entry_at(connection, revision) is None):
            raise self._compacted(revision)
        return at

    @staticmethod
    def _compacted(revision: int) -> Compacted:
        return Compacted(f"revision {revision} is no longer kept in the stream; ask for a newer one")

    def _entry_at(self, connection: Connection, revision: int) -> StreamEntry | None:
        at = stream_id(revision)
        found = entries_of(connection.execute("XRANGE", self._names.changes, at, at))
        return found[0] if found else None

    def _deletion_of(self, connection: Connection, key: str, below: int) -> StreamEntry | None:
        """The newest entry, at `below` or before, that deleted `key`."""
        page = Page()
        while below > 0:
            found = entries_of(
                connection.execute("XREVRANGE", self._names.changes, stream_id(below), "-", "COUNT", page.count)
            )
            page.saw(found)
            for entry in found:
                if entry.before.get(key) is not None:
                    return entry
            if not found:
                return None
            below = found[-1].previous
        return None

    def _count_eager(self, connection: Connection, meta: Meta) -> int:
        """How many eager entries there are at `meta`: those counted last, and what the stream says of each since."""
        known = self._eager
        if known is not None and known[0].incarnation == meta.position.incarnation:
            count = known[1]
            try:
                for entry in self._reader.stream(connection, known[0], meta.position):
                    for change in entry.changes:
                        if not change.key.startswith(self._lazy):
                            was_there = entry.before.get(change.key) is not None
                            count += (change.value is not MISSING) - was_there
            except Torn:
                pass  # trimmed, or another history: count anew
            else:
                self._eager = meta.position, count
                return count
        listed = self._reader.list_in(connection)
        if listed.position != meta.position:
            raise Torn("it was written to while it was counted; try again")
        count = len(listed.ascending(self._lazy))
        self._eager = meta.position, count
        return count


def _check_exists(revision: int, meta: Meta | None) -> None:
    newest = 0 if meta is None else meta.revision
    if not 0 <= revision <= newest:
        raise ValueError(f"there is no revision {revision}; the newest is {newest}")
