"""The probe of etcd: what may be wrong between this machine and a namespace there, one check after the other.

Owns what is asked for the sake of a diagnosis. Writes nothing: whether it might is asked by transactions whose
condition cannot hold, so etcd looks at the permissions, and changes neither a key nor its revision.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Final

from veltrix_mw.errors import AuthFailed, StoreError, StoreUnavailable
from veltrix_mw.findings import Said, Step, fail, not_made, ok, warn
from veltrix_mw.protocols import Leaderless, NotLetIn, NotPermitted, Silent
from veltrix_mw.settings import Host, StoreUrl, shown
from veltrix_mw.stores.etcd_dialing import Dialer
from veltrix_mw.stores.etcd_members import Members
from veltrix_mw.stores.etcd_messages import (
    RANGE,
    STATUS,
    TRANSACT,
    Compare,
    Operation,
    Range,
    Ranged,
    Status,
    StatusAsked,
    Transaction,
    prefix_end,
)
from veltrix_mw.stores.etcd_space import Space
from veltrix_mw.stores.etcd_transports import TransportName, make_transport
from veltrix_mw.stores.network_probe import Fault, NetworkProbe, ask_each, judged
from veltrix_mw.stores.pace import clock_said, paced
from veltrix_mw.stores.tls import Tls
from veltrix_mw.words import counted, named_there

__all__ = ["EtcdProbe", "known_faults"]

# From etcd's own change logs: which version mended what concerns a follower.
_MENDED: Final[tuple[tuple[tuple[int, int, int], str], ...]] = (
    ((3, 4, 34), "its watches may lose changes around a compaction"),
    ((3, 5, 3), "its members may come to hold different data"),
    ((3, 5, 8), "its watches may go back in time when a member catches up from a snapshot"),
    ((3, 5, 16), "its watches may lose changes around a compaction"),
)
_OLDEST: Final = (3, 4, 0)  # whose gateway answers at /v3
_MOST_KEPT: Final = 1_000  # keys of bookkeeping that are looked through for namespaces
_NEWEST_KEYS: Final = 20  # looked through for one that is an entry


class EtcdProbe:
    """Looks at a namespace in etcd."""

    def __init__(self, url: StoreUrl, *, timeout_s: float) -> None:
        options: dict[str, Any] = dict(url.options)
        self._namespace = url.namespace
        self._space = Space(
            url.namespace, prefix=options.get("prefix"), lazy=(), is_text=options.get("values") == "text"
        )
        self._user = url.user
        self._password = url.password
        self._tls = Tls(options.get("ca"), options.get("cert"), options.get("key")) if url.tls else None
        self._transport: TransportName = options.get("transport", "gateway")
        self._timeout_s = timeout_s
        self._network = NetworkProbe(url.hosts, tls=self._tls, plain="etcd")
        self._named = len(url.hosts)
        self._statuses: dict[Host, Status] = {}
        self._opened: list[Members] = []
        self._as_user: Members | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return (
            *self._network.steps,
            Step("service", self._service, needs=("tls",)),
            Step("quorum", self._quorum, needs=("service",)),
            Step("authentication", self._authentication, needs=("quorum",)),
            Step("read", self._read, needs=("authentication",)),
            Step("bookkeeping", self._bookkeeping, needs=("authentication",)),
            Step("write", self._write, needs=("authentication",)),
            Step("version", self._version, needs=("service",)),
            Step("clock", self._clock, needs=("service",)),
            Step("round trip", self._round_trip, needs=("authentication",)),
        )

    def close(self) -> None:
        for members in self._opened:
            members.close()

    # --- who answers

    def _service(self, by_s: float) -> Said:
        results = ask_each(self._network.reached, lambda host: self._status(host, by_s), by_s)
        for host, result in results.items():
            if isinstance(result, Status):
                self._statuses[host] = result
        way = "over gRPC" if self._transport == "grpc" else "through its gateway"
        told = {
            host: result if isinstance(result, Fault) else f"{shown(host)} answers {way}"
            for host, result in results.items()
        }
        self._network.reached, said = judged(told, join=", ")
        return self._apart() or said

    def _apart(self) -> Said | None:
        """Members of several clusters, which would each be read and written in turn."""
        clusters: dict[str, list[str]] = {}
        for host, status in self._statuses.items():
            if status.header.cluster_id:
                clusters.setdefault(status.header.cluster_id, []).append(shown(host))
        if len(clusters) < 2:
            return None
        told = "; ".join(f"{', '.join(hosts)} of cluster {int(name):x}" for name, hosts in clusters.items())
        return fail(
            f"these are members of {len(clusters)} different clusters ({told}): name the members of one alone; "
            "etcdctl member list says which they are"
        )

    def _status(self, host: Host, by_s: float) -> Status:
        members = self._members([host], as_user=False)
        try:
            return members.call(STATUS, StatusAsked(), deadline_s=by_s)
        except (NotLetIn, NotPermitted):
            return Status(leader="?")  # it answers, and has users: what it says of itself is not for everybody
        except Leaderless:
            return Status()
        except Silent as exc:
            raise Fault(f"{exc}; it takes connections: is the process stopped, or its machine overloaded?") from exc
        except StoreError as exc:
            raise Fault(str(exc)) from exc

    def _quorum(self, by_s: float) -> Said:
        answering = len(self._statuses)
        leaderless = [host for host, each in self._statuses.items() if each.leader in {"", "0"}]
        without = ", ".join(map(shown, leaderless))
        remedy = (
            f"{answering} of the {self._named} members named in the URL answer, and more than half of the cluster's "
            "must be up and see each other: start the others, and look at their network"
        )
        if len(leaderless) == answering:
            return fail(f"no member has a leader, so nothing is read or written: {remedy}")
        self._network.reached = [host for host in self._network.reached if host not in leaderless]
        try:
            members = self._members(self._network.reached, as_user=False)
            self._range(members, Range(self._space.label, count_only=True), by_s)
        except AuthFailed:
            pass  # whom it serves is the next question: this one was answered by a majority
        except StoreUnavailable as exc:
            return fail(f"a read that a majority must confirm was not answered ({exc}): {remedy}")
        if without:
            return warn(f"a majority answers, but {without} has no leader: look at its network to the others")
        return ok("a majority of the members answers")

    def _authentication(self, by_s: float) -> Said:
        with suppress(NotPermitted):  # a matter of permissions: it was let in
            self._range(self._as_given(), Range(self._space.label, count_only=True), by_s)
        if self._user is None:
            return ok("no user is given, and none is asked for")
        if self._as_given().is_open:
            return warn(
                f"user {self._user!r} was not checked, as etcd's authentication is off: turn it on (etcdctl auth "
                "enable), or leave user and password out"
            )
        return ok(f"as user {self._user!r}")

    # --- what it may do

    def _read(self, by_s: float) -> Said:
        space = self._space
        prefix = space.prefix.decode("utf-8", "backslashreplace")
        newest = Range(
            space.prefix, space.end, limit=_NEWEST_KEYS, sort_order="DESCEND", sort_target="MOD", keys_only=True
        )
        try:
            found = self._range(self._as_given(), newest, by_s)
        except NotPermitted:
            return fail(f"{self._who} may not read {prefix!r}: {self._grant('read', prefix)}")
        if not found.count:
            return warn(
                f"nothing lies below {prefix!r}: nothing was written yet, or the URL names another namespace"
                f"{named_there(self._namespaces(by_s))}"
            )
        # Keys of another shape are not followed.
        newest_at = next((each.mod_revision for each in found.kvs if space.key(each.key) is not None), 0)
        return ok(f"{counted(found.count, 'key')} below {prefix!r}, the newest of revision {newest_at}")

    def _namespaces(self, by_s: float) -> set[str]:
        """Those that were written to, as far as this user may look."""
        kept = b".veltrix/"
        try:
            found = self._range(self._as_given(), Range(kept, prefix_end(kept), limit=_MOST_KEPT, keys_only=True), by_s)
        except StoreError:
            return set()  # it is a hint and no more
        names = (each.key.removeprefix(kept).rpartition(b"/") for each in found.kvs)
        return {name.decode("utf-8", "replace") for name, _, last in names if last == b"incarnation"}

    def _bookkeeping(self, by_s: float) -> Said:
        space = self._space
        asked = Transaction([Operation.range(Range(space.label)), Operation.range(Range(space.change))])
        try:
            answer = self._as_given().call(TRANSACT, asked, deadline_s=by_s)
        except NotPermitted:
            return fail(
                f"{self._who} may not read {self._bookkept!r}, where a follower finds incarnation and record: "
                f"{self._grant('read', self._bookkept)}"
            )
        label, _ = answer.ranges
        if not label.kvs:
            return ok(f"{self._bookkept!r} can be read; it has no incarnation yet, the first write makes it")
        return ok(f"incarnation {label.kvs[0].value.decode('utf-8', 'replace')}")

    def _write(self, by_s: float) -> Said:
        space = self._space
        prefix = space.prefix.decode("utf-8", "backslashreplace")
        barred = []
        for name, told in (
            (space.prefix + b"veltrix-doctor", prefix),
            (space.change, space.change.decode()),
            (space.label, space.label.decode()),
        ):
            never = Transaction([Operation.put(name, b"0")], [Compare.at(name, -1)])
            try:
                self._as_given().call(TRANSACT, never, deadline_s=by_s)
            except NotPermitted:
                barred.append(told)
        if not barred:
            return ok("this is permitted (asked by transactions that cannot hold: nothing was written)")
        if prefix not in barred:
            return fail(
                f"{self._who} may write {prefix!r} and not {', '.join(map(repr, barred))}, where each write leaves its "
                f"record, so none is made: {self._grant('readwrite', self._bookkept)}"
            )
        who = (
            "a worker" if space.label.decode() in barred else "a relay, which replaces the incarnation after a restore"
        )
        return warn(
            f"{self._who} may not write {', '.join(map(repr, barred))}: right for {who}. To write, "
            f"{self._grant('readwrite', prefix)}, and {self._bookkept!r} likewise"
        )

    # --- how it is

    def _version(self, _by_s: float) -> Said:
        versions = {host: each.version for host, each in self._statuses.items() if each.version}
        alarms = sorted(
            {error for each in self._statuses.values() for error in each.errors if "alarm" in error.lower()}
        )
        if not versions:
            return not_made("no member told its version")
        told = ", ".join(sorted(set(versions.values())))
        if any(_parsed(each) < _OLDEST for each in versions.values()):
            return fail(f"etcd {told} is too old for /v3 of the gateway: take 3.5 or 3.6 with the newest patch")
        remedies = []
        if alarms:
            remedies.append(f"it reports {', '.join(alarms)}: mend that, then etcdctl alarm disarm")
        faults = dict.fromkeys(fault for each in versions.values() for fault in known_faults(each))
        if faults:
            remedies.append(
                f"{' and '.join(faults)}. This library notices lost changes and lists again, but take 3.5 or 3.6 with "
                "the newest patch"
            )
        return warn(f"etcd {told}: {'; '.join(remedies)}") if remedies else ok(f"etcd {told}")

    def _clock(self, by_s: float) -> Said:
        """By the Date of an answer, which has whole seconds."""
        results = ask_each(self._network.reached, lambda host: self._ahead_s(host, by_s), by_s)
        ahead = {host: result for host, result in results.items() if not isinstance(result, Fault)}
        if not ahead:
            return not_made("; ".join(dict.fromkeys(str(result) for result in results.values())))
        host, worst_s = max(ahead.items(), key=lambda item: abs(item[1]))
        return clock_said(shown(host), worst_s, exact_to_s=1.0)

    def _ahead_s(self, host: Host, by_s: float) -> float:
        sent_s = time.time()
        answered = Dialer(self._tls).page(host, "/version", deadline_s=by_s)
        received_s = time.time()
        try:
            dated = "" if answered is None else answered[0].headers.get("date", "")
            dated_s = parsedate_to_datetime(dated).timestamp()
        except ValueError as exc:
            raise Fault(f"{shown(host)} did not tell its time") from exc
        # The date was cut to whole seconds: it was at some moment of that second.
        if dated_s > received_s:
            return dated_s - received_s
        return min(0.0, dated_s + 1 - sent_s)

    def _round_trip(self, by_s: float) -> Said:
        def ask() -> None:
            with suppress(NotPermitted):  # that takes its time too
                self._range(self._as_given(), Range(self._space.label, count_only=True), by_s)

        return paced(ask, "a read that a majority confirms")

    # ---

    @property
    def _who(self) -> str:
        return "this client, which gives no user," if self._user is None else f"user {self._user!r}"

    @property
    def _bookkept(self) -> str:
        return f".veltrix/{self._namespace}/"

    @staticmethod
    def _grant(access: str, prefix: str) -> str:
        return f"etcdctl role grant-permission ROLE --prefix=true {access} '{prefix}'"

    def _members(self, hosts: Sequence[Host], *, as_user: bool) -> Members:
        members = Members(
            hosts,
            make_transport(self._transport, self._tls),
            user=self._user if as_user else None,
            password=self._password if as_user else None,
            timeout_s=self._timeout_s,
        )
        self._opened.append(members)
        return members

    def _as_given(self) -> Members:
        """The members that answer, as the user: with one token for all checks."""
        if self._as_user is None:
            self._as_user = self._members(self._network.reached, as_user=True)
        return self._as_user

    @staticmethod
    def _range(members: Members, asked: Range, by_s: float) -> Ranged:
        return members.call(RANGE, asked, deadline_s=by_s)


def known_faults(version: str) -> tuple[str, ...]:
    """What is known to be wrong, for a follower, with etcd of that version; nothing for one that cannot be read."""
    number = _parsed(version)
    return tuple(fault for mended, fault in _MENDED if mended[:2] == number[:2] and number < mended)


def _parsed(version: str) -> tuple[int, int, int]:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)
