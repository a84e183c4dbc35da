"""The mirror in Redis: what the relay copies there, and how workers read it.

Owns the rule that only the holder of the lease writes, and only forward. Knows nothing of the authority, nor of when to
fill, append or prove; decodes no value.

Each write is a script that looks first whether the lease is the caller's and the mirror stands where the write begins:
a relay that was stopped and comes back changes nothing, also where Redis lost lease and fencing token.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from veltrix_mw.errors import Compacted, LeaseLost, StoreError, StoreUnavailable
from veltrix_mw.protocols import (
    Batch,
    Filled,
    FoundUnits,
    Lease,
    Limits,
    Listing,
    MirroredUnit,
    MirrorState,
    Position,
    StoreInfo,
)
from veltrix_mw.stores.redis_ages import Ages
from veltrix_mw.stores.redis_layout import (
    APPEND,
    ELECT,
    FILL,
    FILL_UNITS,
    KEEP,
    META_FIELDS,
    MIRROR,
    PROVE,
    RESIGN,
    TAKE,
    Names,
    append_arguments,
    held_as,
    meta_of,
    milliseconds,
    state_of,
)
from veltrix_mw.stores.redis_link import Command, Connection, RedisLink
from veltrix_mw.stores.redis_reading import Reader, RedisWatch, Torn
from veltrix_mw.stores.redis_routes import Route, Server
from veltrix_mw.stores.redis_units import (
    MAX_ANNOUNCED,
    MAX_ANNOUNCED_BYTES,
    MAX_WANTED,
    UNIT_TTL_S,
    WANTED_TTL_S,
    is_current,
    size_of,
    unit_in,
    words_of,
)
from veltrix_mw.values import MAX_VALUE_BYTES

__all__ = ["RedisMirror"]

_CHUNK_BYTES: Final = 1024 * 1024  # what is sent before an answer is read: Redis serves others between two commands
_CHUNK_FIELDS: Final = 1_000
_CHUNK_BATCHES: Final = 256
# A script's keys and arguments.
_Given = tuple[list[str], list[str | bytes]]

_FILLING_TTL_S: Final = 60  # a relay that dies in the middle leaves nothing for longer


class _Rules:
    """What a mirror makes of what was found.

    A mirror proves nothing about the authority's history: whatever it lacks is listed again, never `Restored`.
    """

    kind = MIRROR

    def __init__(self, names: Names, url: str) -> None:
        self._names = names
        self._url = url

    def nothing(self, *, left: bool) -> StoreError | None:  # noqa: ARG002  # an authority needs it
        return StoreUnavailable(
            f"the mirror {self._names.base}* at {self._url} is empty: no relay has filled it yet, or it was flushed or "
            "evicted; a relay fills it again"
        )

    def wrong_kind(self) -> StoreError:
        return StoreError(
            f"{self._names.base}* at {self._url} is an authority, not a mirror, and a relay would destroy it: give the "
            "mirror another db or namespace"
        )

    def other_history(self, reason: str) -> StoreError:
        return Compacted(f"the mirror cannot resume: {reason}; list again")

    def ahead(self, position: Position, newest: int) -> StoreError:
        return StoreUnavailable(
            f"the mirror is behind: it is at revision {newest}, and revision {position.revision} was seen already; try "
            "again"
        )


class RedisMirror:
    """A namespace's mirror in one Redis server: `Mirror` for workers, `MirrorWriter` for its relay.

    It never moves backwards within an incarnation, and readers see each change of it whole. Thread-safe; usable after a
    fork.
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
        keep_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        """Name the server, by its host or by how it is found; nothing is opened. The options are `RedisStore`'s.

        `keep_revisions` and `keep_bytes` are the relay's: what the stream holds at most, but for the newest revision,
        which it always holds. Who is further behind lists.
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
        self._names = Names(namespace)
        self._rules = _Rules(self._names, self._link.url)
        self._reader = Reader(self._link, self._names, self._rules)
        self._ages = Ages()
        self._timeout_s = timeout_s
        self._keep_revisions = keep_revisions
        self._keep_bytes = keep_bytes
        self._info = StoreInfo("redis", self._link.url, namespace, Limits(MAX_VALUE_BYTES))

    @property
    def info(self) -> StoreInfo:
        return self._info

    @property
    def failovers(self) -> int:
        return self._link.failovers

    # --- read

    def state(self, *, timeout_s: float) -> MirrorState:
        names = self._names
        # TIME after the meta: the age is then never less than the true one.
        asked: list[Command] = [("HMGET", names.entries, *META_FIELDS), ("TIME",), ("GET", names.lease)]
        with self._link.session(timeout_s) as connection:
            asked_s = time.monotonic()
            values, now, lease = connection.pipeline(asked)
            return self._aged(self._state(values, now, lease), values, connection, asked_s)

    def list(self, *, timeout_s: float) -> Listing:
        with self._link.session(timeout_s) as connection:
            asked_s = time.monotonic()
            listed = self._reader.list_in(connection)
            meta = listed.meta
            age_s = (
                listed.age_s if meta is None else self._ages.age(connection.host, meta.proved_us, listed.age_s, asked_s)
            )
        lazy = () if meta is None else meta.lazy
        return Listing(listed.position, listed.ascending(), origin="redis", age_s=age_s, lazy=lazy)

    def watch(self, position: Position, *, timeout_s: float, filled: Filled | None = None) -> RedisWatch:
        return self._reader.watch(
            position, timeout_s=timeout_s, patience_s=self._timeout_s / 2, origin="redis", filled=filled
        )

    def find_units(self, names: Sequence[str], *, timeout_s: float) -> FoundUnits:
        layout = self._names
        asked: list[Command] = [("HMGET", layout.entries, *META_FIELDS), ("TIME",), ("GET", layout.lease)]
        units: list[Command] = [("HGETALL", layout.unit(name)) for name in names]
        with self._link.session(timeout_s) as connection:
            asked_s = time.monotonic()
            values, now, lease, *held = connection.pipeline([*asked, *units])
            if connection.was_sent_on:
                # The meta may have been read after the units, which are current to where it stood before them.
                values, now, lease = connection.pipeline(asked)
                held = connection.pipeline(units)
            state = self._aged(self._state(values, now, lease), values, connection, asked_s)
            meta = meta_of(values)
            found = (
                {}
                if meta is None
                else {name: unit_in(name, reply, meta) for name, reply in zip(names, held, strict=True)}
            )
        return FoundUnits(state, {name: unit for name, unit in found.items() if unit is not None})

    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None:
        wanted = self._names.wanted
        with self._link.session(timeout_s) as connection:
            connection.pipeline(
                [
                    ("RPUSH", wanted, *names),
                    ("LTRIM", wanted, -MAX_WANTED, -1),
                    ("PEXPIRE", wanted, milliseconds(WANTED_TTL_S)),
                ]
            )

    def close(self) -> None:
        """End the watches and close every connection. Idempotent; a later call opens anew."""
        self._reader.close()

    # --- the lease

    def elect(self, holder: str, *, ttl_s: float, timeout_s: float) -> tuple[Lease | None, str, float]:
        names = self._names
        with self._link.session(timeout_s) as connection:
            said, *rest = connection.run(
                ELECT, (names.lease, names.token, names.entries), (holder, milliseconds(ttl_s))
            )
        if said == b"held":
            return None, rest[0].partition(b" ")[2].decode(errors="replace"), int(rest[1]) / 1000
        self._check_said(said)
        return Lease(holder, int(rest[0])), holder, ttl_s

    def keep(self, lease: Lease, *, ttl_s: float, timeout_s: float) -> MirrorState:
        names, held = self._names, held_as(lease)
        with self._link.session(timeout_s) as connection:
            said, *rest = connection.run(KEEP, (names.lease, names.entries), (held, milliseconds(ttl_s)))
            self._check_said(said)
            return self._state(rest[0], rest[1], held.encode())

    def resign(self, lease: Lease, *, timeout_s: float) -> None:
        with self._link.session(timeout_s) as connection:
            connection.run(RESIGN, (self._names.lease,), (held_as(lease),))

    # --- written by the relay

    def clock(self, *, timeout_s: float) -> int:
        with self._link.session(timeout_s) as connection:
            return _microseconds(connection.execute("TIME"))

    def revisions(self, *, timeout_s: float) -> tuple[Position, dict[str, int]]:
        state = self.state(timeout_s=timeout_s)
        if not state.position.revision:
            return state.position, {}
        try:
            listed = self._reader.list(timeout_s)
        except Torn:
            return Position("", 0), {}
        return listed.position, {key: revision for key, (_, revision) in listed.entries.items()}

    def fill(self, lease: Lease, listing: Listing, *, digest: int, lazy: Sequence[str], timeout_s: float) -> None:
        names, position = self._names, listing.position
        filling = names.filling(lease.token)
        arguments = (
            held_as(lease),
            lease.token,
            position.incarnation,
            position.revision,
            position.fingerprint,
            len(listing.entries),
            digest,
            " ".join(lazy),
        )
        with self._link.session(timeout_s) as connection:
            try:
                connection.execute("UNLINK", filling)
                for fields in _chunks(listing):
                    connection.pipeline([("HSET", filling, *fields), ("EXPIRE", filling, _FILLING_TTL_S)])
                said, *rest = connection.run(FILL, (filling, names.entries, names.changes, names.lease), arguments)
                self._check_said(said, rest)
            except Exception:
                if connection.is_sound:  # else it goes by itself
                    with contextlib.suppress(Exception):  # what is to be told is why the fill failed
                        connection.execute("UNLINK", filling)
                raise

    def append(
        self, lease: Lease, batches: Sequence[Batch], *, counts: Sequence[tuple[int, int]], timeout_s: float
    ) -> None:
        held, names = held_as(lease), self._names
        made: list[_Given] = []
        for batch, (count, digest) in zip(batches, counts, strict=True):
            units, arguments = append_arguments(
                batch,
                lease=held,
                token=lease.token,
                count=count,
                digest=digest,
                keep_revisions=self._keep_revisions,
                keep_bytes=self._keep_bytes,
            )
            made.append(([names.entries, names.changes, names.lease, *map(names.unit, units)], arguments))
        with self._link.session(timeout_s) as connection:
            for some in _pipelines(made):
                # Each follows the one before: after the first that is refused all others are.
                for said, *rest in connection.run_each(APPEND, some):
                    self._check_said(said, rest)

    def wanted_units(self, *, wait_s: float, timeout_s: float) -> Sequence[str]:
        wanted = self._names.wanted
        with self._link.session(wait_s + timeout_s) as connection:
            # Sent together: what is wanted waits for one round trip, however far away the server is.
            waiting: list[Command] = [("BLPOP", wanted, f"{wait_s:.3f}")] if wait_s > 0 else []  # 0 would wait for ever
            *first, others = connection.pipeline([*waiting, ("EVAL", TAKE.text, 1, wanted)])
        names = [*(name for popped in first if popped is not None for name in popped[1:]), *others]
        return [name.decode(errors="replace") for name in dict.fromkeys(names)]

    def current_units(self, names: Sequence[str], *, timeout_s: float) -> Collection[str]:
        layout = self._names
        asked: list[Command] = [("HMGET", layout.entries, "#units")]
        units: list[Command] = [("HMGET", layout.unit(name), "#unit") for name in names]
        with self._link.session(timeout_s) as connection:
            (meta,), *held = connection.pipeline([*asked, *units])
        return {name for name, (said,) in zip(names, held, strict=True) if is_current(said, meta or b"")}

    def fill_units(
        self,
        lease: Lease,
        position: Position,
        units: Mapping[str, MirroredUnit],
        names: Sequence[str],
        *,
        timeout_s: float,
    ) -> None:
        layout, held = self._names, held_as(lease)
        ttl_ms = milliseconds(UNIT_TTL_S * random.uniform(0.9, 1.1))  # what was filled at once is not gone at once
        head: list[str | bytes] = [held, str(lease.token), position.incarnation, str(position.revision), str(ttl_ms)]
        with self._link.session(timeout_s) as connection:
            for some, is_last in _parts(units):
                # Many in one announcement, as each wakes every worker: those that were there with the last ones.
                told = [name for name in names if name in some or (is_last and name not in units)]
                arguments = [*head, str(MAX_ANNOUNCED), str(MAX_ANNOUNCED_BYTES), " ".join(told)]
                for unit in some.values():
                    words = words_of(unit)
                    arguments += (str(unit.since), str(len(words)), *words)
                keys = [layout.entries, layout.filled, layout.lease, *map(layout.unit, some)]
                said, *rest = connection.run(FILL_UNITS, keys, arguments)
                self._check_said(said, rest)

    def prove(self, lease: Lease, position: Position, *, asked_at_us: int, timeout_s: float) -> None:
        names = self._names
        arguments = (held_as(lease), position.incarnation, position.revision, position.fingerprint, asked_at_us)
        with self._link.session(timeout_s) as connection:
            said, *rest = connection.run(PROVE, (names.entries, names.lease), arguments)
        self._check_said(said, rest)

    # ---

    def _state(self, values: Sequence[bytes | None], now: Sequence[bytes], lease: bytes | None) -> MirrorState:
        meta = meta_of(values)
        if meta is not None:
            self._reader.check_kind(meta)
        return state_of(meta, _microseconds(now), lease)

    def _aged(
        self, state: MirrorState, values: Sequence[bytes | None], connection: Connection, asked_s: float
    ) -> MirrorState:
        """The state with the age that this process goes by."""
        meta = meta_of(values)
        if meta is None:
            return state
        return replace(state, age_s=self._ages.age(connection.host, meta.proved_us, state.age_s, asked_s))

    def _check_said(self, said: bytes, rest: Sequence[Any] = ()) -> None:
        """Raise unless a script did what it was to do."""
        match said:
            case b"ok":
                return
            case b"lost":
                raise LeaseLost(
                    f"the relay's lease {self._names.lease} is another's, or ran out; stop writing the mirror"
                )
            case b"elsewhere":
                raise Compacted("the mirror does not stand where the relay thinks it does; fill it")
            case b"backwards":
                raise Compacted(
                    f"the mirror is at revision {int(rest[0])} already, which is newer than the listing; list again"
                )
            case b"torn":
                raise StoreUnavailable(
                    "what was prepared for the mirror is not whole any more (evicted?); fill it again"
                )
            case b"kind":
                raise self._rules.wrong_kind()
            case _:
                raise self._link.not_ours(f"{self._names.entries} or {self._names.changes}, without our meta,")


def _parts(units: Mapping[str, MirroredUnit]) -> Iterator[tuple[dict[str, MirroredUnit], bool]]:
    """What one script fills, about a megabyte: Redis serves nobody else meanwhile; and whether it is the last part.

    At least one part.
    """
    some: dict[str, MirroredUnit] = {}
    size = 0
    for name, unit in units.items():
        if some and size >= _CHUNK_BYTES:
            yield some, False
            some, size = {}, 0
        some[name] = unit
        size += size_of(name, unit)
    yield some, True


def _microseconds(time_reply: Sequence[bytes]) -> int:
    return int(time_reply[0]) * 1_000_000 + int(time_reply[1])


def _chunks(listing: Listing) -> Iterator[list[str | bytes]]:
    """The entries as fields and values of the hash, about a megabyte at a time."""
    fields: list[str | bytes] = []
    size = 0
    for key, value, revision in listing.entries:
        fields += [key, b"%d %b" % (revision, value)]
        size += len(value)
        if size >= _CHUNK_BYTES or len(fields) >= 2 * _CHUNK_FIELDS:
            yield fields
            fields, size = [], 0
    if fields:
        yield fields


def _pipelines(made: Sequence[_Given]) -> Iterator[list[_Given]]:
    """What goes to the server before an answer is read: about a megabyte."""
    some: list[_Given] = []
    size = 0
    for keys, arguments in made:
        some.append((keys, arguments))
        size += sum(len(word) for word in arguments)
        if size >= _CHUNK_BYTES or len(some) >= _CHUNK_BATCHES:
            yield some
            some, size = [], 0
    if some:
        yield some
