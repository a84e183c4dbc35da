"""The members of an etcd cluster: each call goes to one that serves it, whatever transport carries it there.

Owns which member is used and failover, user and token, deadlines, and what etcd's own errors mean. Knows nothing of
namespaces, keys or positions, and nothing of how a message travels: a `Transport` makes one call to one member, and
opens one stream of watches there.

Every call is made to a member that has a leader (`hasleader`): one that is cut off says so at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from random import SystemRandom
from typing import Final, Protocol, TypeVar

from veltrix_mw.errors import AuthFailed, Compacted, InvalidValue, Overloaded, StoreError, StoreUnavailable
from veltrix_mw.events import Events
from veltrix_mw.protocols import CertificateFault, Leaderless, NotLetIn, NotPermitted, Silent, TooMuch
from veltrix_mw.settings import Host, shown
from veltrix_mw.stores.etcd_clusters import Clusters
from veltrix_mw.stores.etcd_messages import (
    AUTHENTICATE,
    STATUS,
    Answer,
    Authenticate,
    Header,
    Message,
    Method,
    StatusAsked,
    WatchCreate,
    Watched,
)
from veltrix_mw.stores.etcd_stream import outside_forks
from veltrix_mw.telemetry import store_call

__all__ = [
    "ATTEMPT_S",
    "AnswerTooLarge",
    "CertificateRefused",
    "CompactedAt",
    "Failed",
    "FutureRevision",
    "Late",
    "Members",
    "Refused",
    "Stream",
    "Transport",
    "WatchStream",
]

ATTEMPT_S: Final = 1.0
"""A member that takes longer to begin an answer is left; each round gives it twice the time."""

_ID_S: Final = 0.3  # that a member is given to say which cluster it is of
_PREFERRED_AFTER_S: Final = 60.0  # how long after a failover the member of first choice is tried again, at least
_PAUSE_FIRST_S: Final = 0.05  # between rounds over all members, doubled each time, with full jitter
_PAUSE_MOST_S: Final = 0.5

_events = Events(tier="etcd")

_random: Final = SystemRandom()  # not the module's generator, which an application may have seeded for itself

T = TypeVar("T")
A = TypeVar("A", bound=Answer)


class FutureRevision(ValueError):
    """The revision asked for does not exist yet."""


class CompactedAt(Compacted):
    """A watch would begin before `revision`, the oldest that is kept."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"etcd keeps no history before revision {revision}; list again")
        self.revision = revision


class AnswerTooLarge(TooMuch):
    """The answer is longer than the client takes that was handed in. Ask for less at a time."""

    def __init__(self) -> None:
        super().__init__(
            "etcd's answer is longer than the etcd client that was handed in takes; make it with "
            "grpc_options=[('grpc.max_receive_message_length', -1)]"
        )


# What a transport raises


class Failed(Exception):
    """One member did not serve; another may. `may_have_run`: the request could have been carried out all the same."""

    kind: type[StoreError] = StoreUnavailable  # what it is where all members fail so

    def __init__(self, why: str, *, may_have_run: bool = True, in_vain: bool = False, is_late: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.may_have_run = may_have_run
        self.in_vain = in_vain  # asking it again soon would not help
        self.is_late = is_late


class CertificateRefused(Failed):
    """The member does not take this client's certificate."""

    kind = CertificateFault


class Late(Failed):
    """The member did not answer in time."""

    kind = Silent

    def __init__(self, host: Host) -> None:
        super().__init__(f"etcd at {shown(host)} did not answer in time", is_late=True)


class _WithoutLeader(Failed):
    kind = Leaderless


class _Foreign(Failed):
    """The member is of another cluster."""

    kind = StoreError


class Refused(Exception):
    """etcd answered that it does not do this; the text is its own."""


class _TokenRefused(Exception):
    """The member does not take the token: it ran out, or users were changed, or there was none."""


class _AuthOff(Exception):
    """A user was given, and etcd has none."""


class Stream(Protocol):
    """One member's stream of watches. Used by one thread, but for `interrupt`."""

    def receive(self, by_s: float) -> list[Watched]:
        """The next messages, none where none came by then, or it was dropped; looks at least once.

        Raises `Refused`, `Failed`, or `EOFError` at the end, however it ended.
        """
        ...

    def is_amid(self, now_s: float) -> bool:
        """Whether a message is on its way, and pieces of it keep coming."""
        ...

    @property
    def is_dropped(self) -> bool:
        """Whether this process let go of it, as of what no fork may find open."""
        ...

    def interrupt(self) -> None:
        """End a `receive` in another thread."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """The way to a member. Thread-safe; usable after a fork. Raises `Failed`, `Refused`, and `AuthFailed`."""

    def call(
        self,
        host: Host,
        method: Method[A],
        request: Message,
        *,
        token: str,
        begun_by_s: float,
        by_s: float,
        once: bool,
    ) -> A:
        """One call, whose answer begins by `begun_by_s` and ends by `by_s`; with `once`, it is sent once at most."""
        ...

    def watch(self, host: Host, creates: Sequence[WatchCreate], *, token: str, by_s: float) -> Stream:
        """One stream that asks for all of these."""
        ...

    def drop(self, host: Host | None = None) -> None:
        """Close what is kept open for the next call to a member, or to any."""
        ...


class _Here:
    """What belongs to one process: the token, and which member is used.

    `lock` protects all of it.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        # Each process an order of its own, so that members share the load and one's failure does not move all to one.
        self.order = sorted(hosts, key=lambda host: hashlib.blake2b(f"{host}{self.pid}".encode()).digest())
        self.used = self.order[0]
        self.return_at_s = 0.0
        self.failovers = 0  # times that another member served than the one before
        self._last: Host | None = None
        self.failed_at_s: dict[Host, float] = {}
        self.clusters = Clusters(tuple(hosts))
        self.token = ""
        self.is_open = False  # etcd asks nobody who it is: it has no authentication enabled

    def round(self, now_s: float) -> list[Host]:
        """Every member once: the one in use first, or the preferred one when it is time to look at it again."""
        with self.lock:
            first = self.used
            if first != self.order[0] and now_s >= self.return_at_s:
                first = self.order[0]
                self.return_at_s = now_s + _PREFERRED_AFTER_S * _random.uniform(1, 2)
            start = self.order.index(first)
            return self.order[start:] + self.order[:start]

    def served(self, host: Host, now_s: float) -> None:
        with self.lock:
            if self._last not in (None, host):
                self.failovers += 1
            self._last = host
            if self.used != host:
                self.used = host
                self.return_at_s = now_s + _PREFERRED_AFTER_S * _random.uniform(1, 2)

    def failed(self, host: Host, now_s: float) -> None:
        with self.lock:
            self.failed_at_s[host] = now_s
            if self.used == host and len(self.order) > 1:
                self.used = self.order[(self.order.index(host) + 1) % len(self.order)]
                self.return_at_s = now_s + _PREFERRED_AFTER_S * _random.uniform(1, 2)


class WatchStream:
    """An open stream of watches, all of them created.

    Used by one thread, but for `interrupt`.
    """

    def __init__(self, stream: Stream, host: Host, members: Members) -> None:
        self._stream = stream
        self._members = members
        self._early: list[Watched] = []  # came before the last one was created
        self.host = host
        self.opened_at_s = time.monotonic()
        self.header = Header()

    def receive(self, by_s: float) -> list[Watched]:
        """The next messages, none where none came by then.

        Raises `Compacted`, `AuthFailed`, or `StoreUnavailable` at the stream's end, however it ended.
        """
        early, self._early = self._early, []
        if early:
            return early
        try:
            return self._received(by_s)
        except (EOFError, Failed) as exc:
            # Also where it ended in good order: etcd 3.4 ends so when the member lost its leader.
            raise StoreUnavailable(f"etcd at {shown(self.host)} ended the watch; watch again") from exc
        except _TokenRefused as exc:
            raise StoreUnavailable(f"etcd at {shown(self.host)} no longer takes the token; watch again") from exc

    def await_created(self, number: int, by_s: float) -> None:
        created = 0
        messages: list[Watched] = []
        while created < number:
            came = self._received(by_s)
            if not came:
                raise Late(self.host)
            for message in came:
                if message.created:
                    created += 1
                    self.header = message.header
                else:
                    messages.append(message)
        self._early = messages

    def _received(self, by_s: float) -> list[Watched]:
        try:
            messages = self._stream.receive(by_s)
        except Refused as exc:
            raise self._members._meaning(str(exc), self.host) from exc
        for message in messages:
            self._check(message)
        return messages

    def _check(self, message: Watched) -> None:
        # Before anything else: a watch that is refused is said to be created, too.
        if not message.canceled:
            return
        if message.compact_revision:
            raise CompactedAt(message.compact_revision)
        if not message.cancel_reason:
            raise Failed(f"etcd at {shown(self.host)} canceled the watch")
        raise self._members._meaning(message.cancel_reason.rpartition("desc = ")[2], self.host)

    @property
    def is_left(self) -> bool:
        """Whether nothing more may come: this process let go of it, or its member failed a call since, and it may be
        half open.
        """
        failed_at_s = self._members._here().failed_at_s.get(self.host, 0.0)
        return self._stream.is_dropped or failed_at_s > self.opened_at_s

    def is_amid(self, now_s: float) -> bool:
        """Whether a message is on its way, and pieces of it keep coming."""
        return bool(self._early) or self._stream.is_amid(now_s)

    def interrupt(self) -> None:
        """End a `receive` in another thread."""
        self._stream.interrupt()

    def close(self) -> None:
        self._stream.close()


class Members:
    """Calls to an etcd cluster.

    A call ends by its deadline, goes to the next member when one fails, and is never carried out twice where it says
    `once`. Thread-safe; usable after a fork. Opens nothing before the first call.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        transport: Transport,
        *,
        user: str | None = None,
        password: str | None = None,
        timeout_s: float = 2.0,
        namespace: str = "",
        remedy: str = "grant it",
        login: str = "give user and password: etcd://USER:PASSWORD@...",
    ) -> None:
        """`timeout_s` is how long members are tried in turn while none answers, also where a call has longer.

        `namespace` is what calls are told under. `remedy` says what to do where a permission is missing, `login` where
        a user is.
        """
        self._hosts = tuple(dict.fromkeys((host, port) for host, port in hosts))
        self._transport = transport
        self._user = user
        self._password = password
        self._timeout_s = timeout_s
        self._namespace = namespace
        self._remedy = remedy
        self._login = login
        self._process = _Here(self._hosts)
        self._served = threading.local()

    # --- the seam

    @property
    def served_in_s(self) -> float | None:
        """How long the member took that served this thread's last call; those tried in vain before it do not count."""
        return getattr(self._served, "in_s", None)

    @property
    def failovers(self) -> int:
        """Times so far that another member served than the one before."""
        return self._here().failovers

    @property
    def is_open(self) -> bool:
        """Whether etcd checked neither user nor password, as its authentication is off; known once a call was made."""
        return self._here().is_open

    def call(self, method: Method[A], request: Message, *, deadline_s: float, once: bool = False) -> A:
        """Ask `request` of a member. `once`: it must not be carried out twice, and its caller reads again if unsure.

        Raises `Compacted`, `FutureRevision`, `InvalidValue` (too large), `AuthFailed`, `Overloaded`, and
        `StoreUnavailable` when no member served.
        """

        def attempt(here: _Here, host: Host, begun_by_s: float) -> A:
            by_s = max(begun_by_s, deadline_s)
            if once and here.clusters.is_doubtful(host):
                self._meet(here, host, begun_by_s)
            begun_s = time.monotonic()
            with store_call("etcd", method.operation, self._namespace, host):
                answer = self._transport.call(
                    host,
                    method,
                    request,
                    token=here.token,
                    begun_by_s=by_s if once else begun_by_s,
                    by_s=by_s,
                    once=once,
                )
            self._served.in_s = time.monotonic() - begun_s
            if once:  # it is done, wherever that is
                here.clusters.is_in_question(host, answer.header.cluster_id)
            else:
                self._belong(here, host, answer.header.cluster_id, begun_by_s)
            return answer

        return self._on_some_member(attempt, deadline_s, once=once)

    def watch(self, creates: Sequence[WatchCreate], *, deadline_s: float) -> WatchStream:
        """One stream with all of these watches; its first messages tell what began too early. Raises as `call`."""

        def attempt(here: _Here, host: Host, begun_by_s: float) -> WatchStream:
            stream = WatchStream(self._transport.watch(host, creates, token=here.token, by_s=begun_by_s), host, self)
            try:
                stream.await_created(len(creates), begun_by_s)
                self._belong(here, host, stream.header.cluster_id, begun_by_s)
            except EOFError as exc:
                stream.close()
                raise Failed(f"etcd at {shown(host)} ended the connection") from exc
            except BaseException:
                stream.close()
                raise
            return stream

        stream = self._on_some_member(attempt, deadline_s, once=False)
        self._meet_others(self._here(), deadline_s)
        return stream

    def close(self) -> None:
        """Close every connection that is not in use. Idempotent; a later call opens anew."""
        self._transport.drop()

    # --- members

    def _here(self) -> _Here:
        here = self._process
        if here.pid != os.getpid():
            # A child, and one that no hook told so: what it inherited is not its own.
            here = _Here(self._hosts)
            self._process = here
        return here

    def _on_some_member(self, attempt: Callable[[_Here, Host, float], T], deadline_s: float, *, once: bool) -> T:
        """Try the members in turn until one serves; at least each once if time allows."""
        started_s = time.monotonic()
        give_up_s = min(deadline_s, started_s + self._timeout_s)
        failures: dict[Host, Failed] = {}
        patience_s, pause_s = ATTEMPT_S, _PAUSE_FIRST_S
        with outside_forks(deadline_s):
            here = self._here()
            while True:
                for host in here.round(time.monotonic()):
                    begun_by_s = min(give_up_s, time.monotonic() + patience_s)
                    try:
                        answer = self._as_user(here, host, attempt, begun_by_s)
                    except Failed as failed:
                        here.failed(host, time.monotonic())
                        self._transport.drop(host)
                        if host not in failures or not failed.is_late:
                            failures[host] = failed  # what a last, short attempt misses says less
                        if once and failed.may_have_run:
                            raise StoreUnavailable(
                                f"{failed.why}; the write's fate is unknown: read again, then write again if need be"
                            ) from failed
                    else:
                        here.served(host, time.monotonic())
                        return answer
                    if time.monotonic() >= give_up_s:
                        raise self._unavailable(failures)
                if all(failed.in_vain for failed in failures.values()):
                    raise self._unavailable(failures)
                pause = _random.uniform(0, min(pause_s, max(0.0, give_up_s - time.monotonic())))
                threading.Event().wait(pause)
                pause_s, patience_s = min(2 * pause_s, _PAUSE_MOST_S), 2 * patience_s

    # --- clusters

    def _id_of(self, here: _Here, host: Host, by_s: float) -> str:
        """The id of the cluster that a member is of; '' where it knows no such question. Raises `Failed`."""
        try:
            answer = self._transport.call(
                host, STATUS, StatusAsked(), token=here.token, begun_by_s=by_s, by_s=by_s, once=False
            )
        except (Refused, StoreError):
            return ""
        except Failed as failed:
            failed.may_have_run = False
            raise
        return answer.header.cluster_id

    def _ids_of(self, here: _Here, hosts: Sequence[Host], by_s: float) -> dict[Host, str]:
        """The ids of those that say it in time."""
        said = {}
        for host in hosts:
            with contextlib.suppress(Failed):
                said[host] = self._id_of(here, host, min(by_s, time.monotonic() + _ID_S))
        return {host: cluster_id for host, cluster_id in said.items() if cluster_id}

    def _meet(self, here: _Here, host: Host, by_s: float) -> None:
        """Have a member say which cluster it is of, before it is told to write. Raises `Failed`."""
        cluster_id = self._id_of(here, host, by_s)
        if cluster_id:
            self._belong(here, host, cluster_id, by_s)

    def _meet_others(self, here: _Here, by_s: float) -> None:
        """Have those say it that were not used yet, so that a worker that has no failover tells of it as well."""
        for host in here.clusters.unknown:
            with outside_forks(by_s):
                with contextlib.suppress(Failed):
                    self._meet(here, host, min(by_s, time.monotonic() + _ID_S))
                self._transport.drop(host)

    def _belong(self, here: _Here, host: Host, cluster_id: str, by_s: float) -> None:
        """Raise `Failed` where a member is of another cluster than the one in use, and that was not restored."""
        clusters = here.clusters
        if clusters.is_in_question(host, cluster_id):
            said = self._ids_of(here, clusters.others(host), by_s)
            if clusters.is_foreign(host, cluster_id, said):
                what = clusters.told(host)
                if clusters.turned(host, is_foreign=True):
                    _events.tell("veltrix.member_foreign", logging.ERROR, once=True, host=shown(host), reason=what)
                raise _Foreign(what, may_have_run=False)
        if clusters.turned(host, is_foreign=False):
            _events.tell_end("veltrix.member_belongs", host=shown(host))

    def _unavailable(self, failures: dict[Host, Failed]) -> StoreError:
        reasons = list(dict.fromkeys(failed.why for failed in failures.values()))
        text = reasons[0] if len(reasons) == 1 else f"no member of etcd served: {'; '.join(reasons)}"
        kinds = {failed.kind for failed in failures.values()}
        return (kinds.pop() if len(kinds) == 1 else StoreUnavailable)(text)

    # --- users

    def _as_user(self, here: _Here, host: Host, attempt: Callable[[_Here, Host, float], T], begun_by_s: float) -> T:
        """Attempt it; once more with a new token where the one there was is refused."""
        if self._user and not here.token and not here.is_open:
            self._authenticate(here, host, begun_by_s)
        token = here.token
        try:
            return self._attempted(here, host, attempt, begun_by_s)
        except _TokenRefused:
            if not self._user:
                raise NotLetIn(f"etcd at {shown(host)} asks for a user; {self._login}") from None
        with here.lock:
            if here.token == token:
                here.token = ""
        self._authenticate(here, host, begun_by_s)
        try:
            return self._attempted(here, host, attempt, begun_by_s)
        except _TokenRefused as exc:
            raise Failed(f"etcd at {shown(host)} does not take the token that it gave", may_have_run=False) from exc

    def _attempted(self, here: _Here, host: Host, attempt: Callable[[_Here, Host, float], T], begun_by_s: float) -> T:
        try:
            return attempt(here, host, begun_by_s)
        except Refused as exc:
            raise self._meaning(str(exc), host) from exc

    def _authenticate(self, here: _Here, host: Host, by_s: float) -> None:
        request = Authenticate(self._user or "", self._password or "")
        try:
            answer = self._transport.call(host, AUTHENTICATE, request, token="", begun_by_s=by_s, by_s=by_s, once=False)
        except Refused as exc:
            self._not_authenticated(here, host, exc)
            return
        except Failed as failed:
            failed.may_have_run = False
            raise
        with here.lock:
            here.token, here.is_open = answer.token, False
        _events.tell_end("veltrix.user_checked", host=shown(host))

    def _not_authenticated(self, here: _Here, host: Host, refused: Refused) -> None:
        """Return where no user is needed; raise what is to be done otherwise."""
        meaning = self._meaning(str(refused), host)
        if isinstance(meaning, _AuthOff):
            # No user is needed, and none is used until one is asked for.
            with here.lock:
                is_known, here.is_open = here.is_open, True
            if not is_known:
                _events.tell(
                    "veltrix.user_unused",
                    logging.WARNING,
                    f"etcd at {shown(host)} has authentication off and checked neither user nor password; turn it on "
                    "(etcdctl auth enable), or leave user and password out",
                    once=True,
                    host=shown(host),
                )
            return
        if isinstance(meaning, _TokenRefused):
            # "revision of auth store is old": users are being changed at this moment.
            raise Failed(f"etcd at {shown(host)} is changing its users", may_have_run=False) from refused
        raise meaning from refused

    # --- what etcd says

    def _meaning(self, message: str, host: Host) -> Exception:
        """What an error of etcd's own means, by its text: the gateway's codes are too few."""
        where = shown(host)
        short = message.removeprefix("etcdserver: ")
        if any(
            text in message for text in ("invalid auth token", "revision of auth store is old", "user name is empty")
        ):
            return _TokenRefused(short)
        if "authentication is not enabled" in message:
            return _AuthOff(short)
        if "authentication failed" in message:
            return NotLetIn(f"etcd at {where} refused user {self._user!r} with this password; check both")
        if "permission denied" in message:
            who = f"user {self._user!r}" if self._user else "this client"
            return NotPermitted(f"etcd at {where} does not permit this to {who}; {self._remedy}")
        if "CommonName" in message:
            return AuthFailed(
                f"etcd at {where} takes no client certificate with a common name through its gateway while it has "
                "users; use one without and user and password, or ?transport=grpc"
            )
        if "has been compacted" in message:
            return Compacted("etcd no longer keeps the history asked for; list again")
        if "future revision" in message:
            return FutureRevision("there is no such revision yet")
        if "request is too large" in message or "too many operations" in message:
            return InvalidValue(f"etcd at {where} refused the write ({short}); write it in several revisions")
        if "database space exceeded" in message:
            return StoreUnavailable(
                f"etcd at {where} takes no writes, its space is used up; compact, then: etcdctl defrag; "
                "etcdctl alarm disarm; or raise --quota-backend-bytes"
            )
        if "too many requests" in message:
            return Overloaded(f"etcd at {where} has too many requests waiting; try again later")
        if "no leader" in message:
            return _WithoutLeader(f"etcd at {where} said: {short}", may_have_run=False)
        return Failed(f"etcd at {where} said: {short}")
