"""The probe of Redis: what may be wrong between this machine and a namespace there, as an authority or a mirror.

Owns what is asked for the sake of a diagnosis. Writes nothing: whether it might is asked by an entry that Redis refuses
for its id, after it looked at permission, role, disk and memory.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Literal

from veltrix_mw.errors import StoreError, StoreUnavailable
from veltrix_mw.findings import Said, State, Step, fail, not_made, ok, warn
from veltrix_mw.protocols import MirrorState, NotLetIn, NotPermitted, Position, Silent
from veltrix_mw.settings import StoreUrl, plain_scheme, shown
from veltrix_mw.stores.network_probe import NetworkProbe, speaks_http
from veltrix_mw.stores.pace import clock_said, paced
from veltrix_mw.stores.redis_guides import GuidesProbe
from veltrix_mw.stores.redis_info import info_of, memory_said, persistence_said, version_said
from veltrix_mw.stores.redis_layout import AUTHORITY, META_FIELDS, MIRROR, Meta, Names, meta_of, state_of
from veltrix_mw.stores.redis_link import WAIT_TIMEOUT_S, Connection, RedisLink
from veltrix_mw.stores.redis_rights import (
    Lacking,
    Trial,
    asking_units,
    lacking_of,
    pushing,
    reading,
    reading_units,
    relaying,
    relaying_units,
    writing,
)
from veltrix_mw.stores.redis_routes import Guided, route_of
from veltrix_mw.stores.tiers import STALE_AFTER_S
from veltrix_mw.stores.tls import Tls
from veltrix_mw.words import ago, counted, named_there

__all__ = ["RedisProbe", "Role"]

Role = Literal["authority", "mirror"]

_MOST_PAGES: Final = 10  # of the keyspace that are looked through for other namespaces
_MOST_DATABASES: Final = 16  # looked through for a namespace that is not where it was looked for


class RedisProbe:
    """Looks at a namespace in Redis. `position` is where it stands, once it was read."""

    def __init__(self, url: StoreUrl, *, role: Role, lazy: Sequence[str] = (), timeout_s: float) -> None:
        options: dict[str, Any] = dict(url.options)
        self._url = url
        self._role = role
        self._lazy = tuple(lazy)
        self._names = Names(url.namespace)
        self._route = route_of(url)
        self._timeout_s = timeout_s
        self._files = (options.get("ca"), options.get("cert"), options.get("key"))
        self._tls = Tls(*self._files) if url.tls else None
        self._network = NetworkProbe(url.hosts, tls=self._tls, plain=plain_scheme(url.scheme))
        self._wait_replicas = int(options.get("wait_replicas", 0))
        self._wait_timeout_s = float(options.get("wait_timeout_s", WAIT_TIMEOUT_S))
        self._opened: dict[int, RedisLink] = {}
        self._guides: GuidesProbe | None = None
        self._not_let_in: NotLetIn | None = None
        self._meta: Meta | None = None
        self._first: Sequence[Any] = ()  # the stream's oldest entry, in a list of one or none
        self._now_us = 0
        self._lease: bytes | None = None
        self._may_write: bool | None = None  # None: that was not to be found out
        self.position: Position | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        bookkeeping = (Step("bookkeeping", self._bookkeeping, needs=("read",)),) if self._role == "mirror" else ()
        persistence = (Step("persistence", self._persistence, needs=("database",)),) if self._role != "mirror" else ()
        of_mirror = (
            Step("freshness", self._freshness, needs=("read",)),
            Step("coverage", self._coverage, needs=("read",)),
            Step("relay", self._relay, needs=("bookkeeping",)),
        )
        return (
            *self._network.steps,
            Step("service", self._service, needs=("tls",)),
            Step("authentication", self._authentication, needs=("service",)),
            Step("database", self._database, needs=("authentication",)),
            *((Step("failover", self._failover, needs=("database",)),) if isinstance(self._route, Guided) else ()),
            Step("read", self._read, needs=("database",)),
            *bookkeeping,
            Step("write", self._write, needs=("database",)),
            *((Step("lazy", self._units, needs=("read",)),) if self._lazy else ()),
            Step("version", self._version, needs=("database",)),
            Step("memory", self._memory, needs=("database",)),
            *persistence,
            Step("clock", self._clock, needs=("database",)),
            Step("round trip", self._round_trip, needs=("database",)),
            Step("stream", self._stream, needs=("read",)),
            *(of_mirror if self._role == "mirror" else ()),
        )

    def look_again(self, by_s: float) -> None:
        """Read the position anew."""
        with self._session(by_s) as connection:
            self._take(connection)

    def close(self) -> None:
        for link in self._opened.values():
            link.close()

    # --- who answers

    def _service(self, by_s: float) -> Said:
        formed = self._formed(by_s)
        if formed is not None and formed.state is State.FAIL:
            return formed
        try:
            with self._session(by_s, db=0) as connection:
                connection.execute("PING")
                if self._route.follows:
                    connection.execute("EXISTS", self._names.entries)  # a cluster that is down answers all else
        except NotPermitted:
            if self._route.at is None:
                raise  # it answers to somebody else: those who are to name it did not
        except NotLetIn as exc:
            self._not_let_in = exc
        except Silent:
            return fail(
                f"{self._where} takes connections and answers nothing within {self._timeout_s:g} s: is the process "
                "stopped, or its machine overloaded?"
            )
        except StoreUnavailable:
            said = self._unserved(by_s)
            if said is None:
                raise
            return said
        told = f"Redis answers at {self._where}{self._route.chosen}"
        return ok(told) if formed is None else warn(f"{told}; {formed.text}")

    def _unserved(self, by_s: float) -> Said | None:
        """Why the server does not serve, where its error cannot know; None where it says all."""
        if self._guides is not None:
            uncovered = self._guides.uncovered()
            return fail(uncovered) if uncovered else None
        host = self._url.hosts[0]
        if not speaks_http(host, self._tls, by_s):
            return None
        scheme = "etcds" if self._url.tls else "etcd"
        return fail(
            f"what answers at {shown(host)} speaks HTTP, and is no Redis: correct host and port; or is it etcd, which "
            f"{scheme}:// is for?"
        )

    def _formed(self, by_s: float) -> Said | None:
        """What is wrong with the sentinels or nodes, if any are named."""
        if not isinstance(self._route, Guided):
            return None
        self._guides = GuidesProbe(self._url, self._route, self._link(0))
        now_s = time.monotonic()
        return self._guides.look(self._network.reached, now_s + (by_s - now_s) / 2)

    def _failover(self, by_s: float) -> Said:
        """Whether another server could take over."""
        with self._session(by_s) as connection:
            role, setting = connection.attempt([("ROLE",), ("CONFIG", "GET", "min-replicas-to-write")])
        # Few may ask for a setting, and in a cluster a user may not ask for the role: then nothing is known of it.
        replicas = len(role[2]) if isinstance(role, list) and role[0] == b"master" else 0
        wanted = int(setting[1]) if isinstance(setting, list) and len(setting) == 2 else 0
        said = None if self._guides is None else self._guides.failover(replicas, wanted)
        return not_made("none of those that name the server said what they know") if said is None else said

    def _authentication(self, _by_s: float) -> Said:
        if self._not_let_in is not None:
            raise self._not_let_in
        if self._url.password is None:
            return ok("no password is given, and none is asked for")
        return ok(f"as {self._who}")

    def _database(self, by_s: float) -> Said:
        try:
            with self._session(by_s):
                pass
        except NotPermitted as exc:
            if exc.lacking == "+role":
                raise  # behind sentinels each connection begins with it
            if exc.lacking == "+select":
                return fail(f"{exc}; db {self._url.db} needs it, db 0 does not")
        return ok(f"db {self._url.db}")

    # --- what it may do

    def _read(self, by_s: float) -> Said:
        names = self._names
        with self._session(by_s) as connection:
            lacking = self._lacking(connection, reading(names, follows=self._route.follows))
            if lacking:
                keys = (
                    ""
                    if all(map(_is_command, lacking.words))
                    else f" (%R~{names.base}* to read; in Redis 6 ~{names.base}*)"
                )
                return fail(f"{self._who} may not follow{keys}: {lacking.remedy(self._url.user)}")
            self._take(connection)
            is_there = bool(connection.execute("EXISTS", names.entries))
            connection.execute(
                "HSCAN", names.entries, 0, "COUNT", 1
            )  # each of these says so where a key is none of ours
            self._first = connection.execute("XRANGE", names.changes, "-", "+", "COUNT", 1)
            connection.execute("XREAD", "COUNT", 1, "STREAMS", names.changes, "0")
        meta = self._meta
        if meta is None and is_there:
            return fail(f"{names.entries} is not this library's: choose another namespace, or another db")
        if meta is None:
            return self._nothing(by_s)
        if meta.kind != (MIRROR if self._role == "mirror" else AUTHORITY):
            if self._role == "mirror":
                return fail(
                    f"{names.base}* is an authority, not a mirror, and a relay would destroy it: give the mirror "
                    "another db or namespace"
                )
            return fail(
                f"{names.base}* is a mirror, fed from another authority: give that one's URL, and this as --mirror"
            )
        return ok(f"{counted(meta.count, 'key')} in {names.base}*, at revision {meta.revision}")

    def _nothing(self, by_s: float) -> Said:
        elsewhere = self._elsewhere(by_s)
        found = f"db {self._url.db} holds nothing of the namespace {self._url.namespace!r}"
        if elsewhere:
            found += f", and db {', '.join(map(str, elsewhere))} does: correct the number in the URL"
        elif self._role == "mirror":
            return ok(f"{found}; what fills it is told at relay")
        else:
            found += ": nothing was written yet, or the URL names another db or namespace"
            found += named_there(self._namespaces(by_s))
        return warn(found)

    def _namespaces(self, by_s: float) -> set[str]:
        """Those that the first keys of the database show, as far as this user may look."""
        names, at = set[str](), b"0"
        try:
            with self._session(by_s) as connection:
                for _ in range(_MOST_PAGES):
                    at, page = connection.execute("SCAN", at, "MATCH", "veltrix:{*}:entries", "COUNT", 1_000)
                    names |= {key.decode("utf-8", "replace")[len("veltrix:{") : -len("}:entries")] for key in page}
                    if at == b"0":
                        break
        except StoreError:
            pass  # it is a hint and no more
        return names

    def _elsewhere(self, by_s: float) -> list[int]:
        """The databases that hold the namespace, as far as this user may look."""
        found = []
        try:
            with self._session(by_s) as connection:
                told = self._info(connection, "keyspace")
            others = [int(name[2:]) for name in told if re.fullmatch(r"db\d{1,5}", name)]
            for number in [each for each in others if each != self._url.db][:_MOST_DATABASES]:
                with self._session(by_s, db=number) as connection:
                    if connection.execute("EXISTS", self._names.entries):
                        found.append(number)
        except StoreError:
            pass  # it may not, or not in time: it is a hint and no more
        return found

    def _bookkeeping(self, by_s: float) -> Said:
        with self._session(by_s) as connection:
            self._lease = connection.execute("GET", self._names.lease)
        return ok(f"{self._names.lease} can be read")

    def _write(self, by_s: float) -> Said:
        names, is_mirror = self._names, self._role == "mirror"
        role = "relay" if is_mirror else "writer"
        with self._session(by_s) as connection:
            lacking = self._lacking(connection, relaying(names) if is_mirror else writing(names))
            if not lacking:
                connection.try_writing(names.changes, "" if is_mirror else names.keys)
        self._may_write = not lacking
        if lacking.is_partial:
            return fail(
                f"{self._who} may do a part of what a {role} does, and not all, so each write fails or is done by "
                f"half: {lacking.remedy(self._url.user)}"
            )
        if lacking:
            return warn(
                f"{self._who} may not write: right for a worker, not for a {role}, which needs: "
                f"{lacking.remedy(self._url.user)}"
            )
        if self._wait_replicas and not is_mirror:
            return self._wait(by_s)
        return ok(f"all that a {role} runs is permitted (asked in words that Redis refuses: nothing was written)")

    def _wait(self, by_s: float) -> Said:
        """Whether writes are acknowledged, where replicas must have them."""
        wanted = self._wait_replicas
        granted_s = min(self._wait_timeout_s, max(0.001, (by_s - time.monotonic()) / 2))
        try:
            with self._session(by_s) as connection:
                found = connection.replicated(wanted, granted_s)
        except NotPermitted as exc:
            return fail(f"{self._who} may write and not wait for replicas, so each write is told as failed: {exc}")
        if found < wanted:
            return fail(
                f"{found} of the {counted(wanted, 'replica')} that ?wait_replicas= asks for answer: each write is made "
                "and then told as failed; bring replicas up, or lower it"
            )
        return ok(f"this is permitted, and {counted(found, 'replica')} confirm what is written (nothing was)")

    def _units(self, by_s: float) -> Said:
        """Whether lazy units can be had from here."""
        names, of_mirror = self._names, self._role == "mirror"
        with self._session(by_s) as connection:
            lacking = self._lacking(connection, reading_units(names, of_mirror=of_mirror))
            asking = self._lacking_push(connection, asking_units(names)) if of_mirror else Lacking()
            filling = (
                self._lacking_push(connection, relaying_units(names)) if of_mirror and self._may_write else Lacking()
            )
            indexed = of_mirror or lacking or connection.execute("EXISTS", names.keys)
        if lacking and not of_mirror:
            remedy = lacking.remedy(self._url.user)
            if self._may_write:
                return warn(f"{self._who} may not read lazy units: right for a writer, not for a worker: {remedy}")
            return fail(f"{self._who} may not read lazy units: {remedy}")
        if not indexed and self._meta is not None and self._meta.count:
            return fail(
                f"the key {names.keys} is gone, deleted or evicted, so lazy units cannot be found: the next write "
                "makes it anew; set maxmemory-policy noeviction"
            )
        if filling:
            return warn(
                f"as a relay, {self._who} cannot fill lazy units, so workers read them from the authority: "
                f"{filling.remedy(self._url.user)}"
            )
        if lacking or asking:
            both = Lacking(tuple(dict.fromkeys((*lacking.words, *asking.words))))
            verb = "read lazy units here" if lacking else "ask the relay for lazy units"
            return warn(
                f"{self._who} may not {verb}, so each worker reads them from the authority: "
                f"{both.remedy(self._url.user)}"
            )
        if of_mirror:
            return ok("units can be read, and the relay be asked for them")
        return ok("units can be found and read")

    # --- how it is

    def _version(self, by_s: float) -> Said:
        told = self._section("server", by_s)
        return told if isinstance(told, Said) else version_said(told, scheme=self._url.scheme)

    def _memory(self, by_s: float) -> Said:
        told = self._section("memory", by_s)
        # Of a mirror lazy units alone have an end, and they come again.
        return told if isinstance(told, Said) else memory_said(told, spares_ours=self._role == "mirror")

    def _persistence(self, by_s: float) -> Said:
        told = self._section("persistence", by_s)
        return told if isinstance(told, Said) else persistence_said(told)

    def _clock(self, by_s: float) -> Said:
        with self._session(by_s) as connection:
            sent_s = time.time()
            seconds, microseconds = connection.execute("TIME")
            received_s = time.time()
        ahead_s = int(seconds) + int(microseconds) / 1e6 - (sent_s + received_s) / 2
        return clock_said(self._where, ahead_s, exact_to_s=max(0.001, (received_s - sent_s) / 2))

    def _round_trip(self, by_s: float) -> Said:
        with self._session(by_s) as connection:
            return paced(lambda: connection.execute("TIME"), "a command")

    def _stream(self, by_s: float) -> Said:
        changes, meta, first = self._names.changes, self._meta, self._first
        if meta is None:
            return not_made("there is none yet")
        try:
            with self._session(by_s) as connection:
                length = counted(connection.execute("XLEN", changes), "change")
        except NotPermitted:  # workers need no XLEN
            length = "its length is not for this user to know"
        if not first:
            if not meta.revision:
                return ok("empty, as the namespace is at revision 0")
            return warn(
                f"{changes} is gone, so a worker that lost its connection lists everything: was it deleted or evicted?"
            )
        oldest = first[0][0].partition(b"-")[0].decode()
        return ok(f"{length}, from revision {oldest} to {meta.revision}: a worker that was away since can resume")

    # --- a mirror

    def _state(self) -> MirrorState:
        return state_of(self._meta, self._now_us, self._lease)

    def _freshness(self, _by_s: float) -> Said:
        state = self._state()
        if not state.position.incarnation:
            return warn("it is empty, so workers follow the authority: a relay fills it")
        if math.isinf(state.age_s):
            return warn("its relay has never asked the authority since it was filled, so workers follow the authority")
        if state.age_s > STALE_AFTER_S:
            return warn(
                f"stale: its relay last asked the authority {ago(state.age_s)}, so workers follow the authority: "
                "look at the relay and its log"
            )
        return ok(f"its relay asked the authority {ago(state.age_s)}")

    def _coverage(self, _by_s: float) -> Said:
        meta = self._meta
        if meta is None:
            return not_made("it is empty")
        left_out = sorted(set(meta.lazy) - set(self._lazy))
        if left_out:
            return warn(
                f"it leaves out {', '.join(left_out)}, so a worker that reads this eagerly follows the authority: give "
                "all workers and the relay the same lazy=, and say it here with --lazy"
            )
        more = sorted(set(self._lazy) - set(meta.lazy))
        if more:
            return warn(
                f"it holds {', '.join(more)} itself, and its relay fills no lazy units of that, so workers read them "
                "from the authority: give all workers and the relay the same lazy="
            )
        return ok(f"it leaves out {', '.join(meta.lazy)}, as all do" if meta.lazy else "it holds every prefix")

    def _relay(self, _by_s: float) -> Said:
        holder = self._state().relay
        if holder:
            return ok(f"{holder} feeds it")
        may = {True: " (this user may write it)", False: " (this user may not write it)", None: ""}[self._may_write]
        return warn(
            f"none: nobody holds the lease{may}. Run `veltrix relay` with credentials that may, or let such workers "
            "stand for election (relay='auto')"
        )

    # ---

    @property
    def _where(self) -> str:
        return self._url.redacted if self._route.at is None else shown(self._route.at)

    @property
    def _who(self) -> str:
        return f"user {self._url.user!r}" if self._url.user else "the default user"

    def _lacking(self, connection: Connection, trials: Sequence[Trial]) -> Lacking:
        link = self._link(self._url.db)
        replies = connection.attempt([trial.words for trial in trials])
        return lacking_of(trials, [link.lacking(reply) for reply in replies])

    def _lacking_push(self, connection: Connection, trials: Sequence[Trial]) -> Lacking:
        """Of these and of a push to the queue of wanted units."""
        link = self._link(self._url.db)
        first, then = pushing(self._url.namespace, self._names)
        (reply,) = connection.attempt([first.words])
        lacks = link.lacking(reply)
        (reply,) = connection.attempt([then(bool(lacks) and not _is_command(lacks)).words])
        found = self._lacking(connection, trials)
        # Without a command named it is a script's, which tells no name, or the key beside.
        told = link.lacking(reply)
        is_barred = told == "+rpush" or told.startswith("a command that a script")
        return Lacking(("+rpush", *found.words)) if is_barred else found

    def _take(self, connection: Connection) -> None:
        values, now = connection.pipeline([("HMGET", self._names.entries, *META_FIELDS), ("TIME",)])
        self._meta = meta_of(values)
        self._now_us = int(now[0]) * 1_000_000 + int(now[1])
        self.position = Position("", 0) if self._meta is None else self._meta.position

    def _link(self, db: int) -> RedisLink:
        if db not in self._opened:
            ca, cert, key = self._files
            self._opened[db] = RedisLink(
                self._route, db=db, namespace=self._url.namespace, tls=self._url.tls,
                user=self._url.user, password=self._url.password, ca=ca, cert=cert, key=key,
            )  # fmt: skip
        return self._opened[db]

    def _session(self, by_s: float, *, db: int | None = None) -> AbstractContextManager[Connection]:
        # In tenths: what was too long is quoted.
        left_s = max(0.1, round(by_s - time.monotonic(), 1))
        return self._link(self._url.db if db is None else db).session(left_s)

    def _section(self, name: str, by_s: float) -> Mapping[str, str] | Said:
        """A section of INFO; why not, where this user may not ask."""
        try:
            with self._session(by_s) as connection:
                return self._info(connection, name)
        except NotPermitted:
            return not_made(f"{self._who} may not ask; as one who may: redis-cli INFO {name}")

    @staticmethod
    def _info(connection: Connection, section: str) -> dict[str, str]:
        return info_of(connection.execute("INFO", section))


def _is_command(word: str) -> bool:
    """Whether what is lacking is a command, and no key."""
    return word.startswith("+")
