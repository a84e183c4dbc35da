"""The link to a Redis: connections, deadlines, and what its errors mean.

Owns sockets (also across a fork), authentication, TLS and the translation of errors; the only module that knows the
driver. Which server it is that a call goes to is the route's to say. Knows nothing of revisions, nor of what a reply
means.

Of redis-py the protocol is used, not the client: its client retries ten times by itself, and has a timeout for each
read where a call needs one for the whole.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import SystemRandom
from typing import Any, Final, TypeVar
from weakref import WeakSet

import redis
from redis import exceptions as errors
from redis.connection import Connection as _DriverConnection

from veltrix_mw.errors import AuthFailed, StoreError, StoreNotFound, StoreUnavailable
from veltrix_mw.events import Events
from veltrix_mw.forking import STORES, around_forks
from veltrix_mw.protocols import CertificateFault, NotLetIn, NotPermitted, Silent
from veltrix_mw.settings import Host, plain_scheme, shown
from veltrix_mw.stores.dialing import NameTimeout, dial
from veltrix_mw.stores.redis_layout import Names, NotOurs, Script
from veltrix_mw.stores.redis_routes import Guided, Question, Route, Server, Word
from veltrix_mw.stores.tls import Tls, Verdict, send_all, verdict_of
from veltrix_mw.telemetry import store_call
from veltrix_mw.words import seconds

__all__ = ["WAIT_TIMEOUT_S", "Command", "Connection", "RedisLink"]

Command = Sequence["str | bytes | int"]

WAIT_TIMEOUT_S: Final = 1.0  # that a write waits for its replicas, where it is told of none other

_MAX_IDLE: Final = 4  # connections kept for the next call: a follower and a few writers at once
_FORK_WAIT_S: Final = 1.0  # the locks are held for microseconds
_LATE_S: Final = 0.5  # a server that answers after this may have been stopped meanwhile, and replaced
_FATE: Final = "fate is unknown: read again before you write again"
_MOST_REDIRECTS: Final = 5  # of one call: a slot moves once, and may be on its way meanwhile
_MOVING_FIRST_S: Final = 0.01  # before a node is asked again whose slot is half moved: it has a handful of keys ...
_MOVING_MOST_S: Final = 0.2  # ... and this where it takes longer
_AGAIN_FIRST_S: Final = 0.05  # before a call is made again during a failover, doubled each time, with full jitter
_AGAIN_MOST_S: Final = 0.5
_PATIENCE_S: Final = 1.0  # that a server is given at first where there is time to ask another, and then twice as long
_WHOLE_S: Final = 2.0  # a call that has no more than this is given all of it at once
_WAITING: Final = frozenset({"XREAD", "PIPELINE BLPOP"})  # they wait for what happens: how long says nothing
_READ_BYTES: Final = 256 * 1024  # a listing is megabytes: the driver's own 64 KiB would be four times the calls

_KNOWN_TO_ALL: Final = frozenset({"EXISTS", "HMGET", "SELECT"})  # to every Redis, and to no sentinel

_CODE: Final = re.compile(
    r"\b(OOM|NOPERM|READONLY|MISCONF|WRONGTYPE|NOAUTH|LOADING|MASTERDOWN|BUSY|UNBLOCKED|NOREPLICAS)\b"
)
_REFUSED_COMMAND: Final = re.compile(r"'([A-Za-z|-]+)' command")
_UNKNOWN_COMMAND: Final = re.compile(r"[Uu]nknown (?:Redis )?(?:sub)?command\b[^'`A-Za-z]*['`]?([A-Za-z]*)")


_random: Final = SystemRandom()  # not the module's generator, which an application may have seeded for itself

T = TypeVar("T")


class _Undone(StoreUnavailable):
    """The server did nothing of what it was sent: it may be sent again, a write too."""


class _Socket:
    """A socket each of whose waits ends by a deadline, or when nothing came for `patience_s`."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.deadline_s = math.inf
        self.patience_s = math.inf

    def recv(self, size: int) -> bytes:
        self._arm()
        return self.raw.recv(size)

    def recv_into(self, buffer: Any, *args: Any) -> int:
        self._arm()
        return self.raw.recv_into(buffer, *args)

    def sendall(self, data: bytes) -> None:
        self._arm()
        send_all(self.raw, data)

    def settimeout(self, timeout_s: float | None) -> None:
        """The driver's own timeouts are for one read each; the deadline stands."""

    def fileno(self) -> int:
        return self.raw.fileno()

    def getpeername(self) -> Any:
        return self.raw.getpeername()

    def shutdown(self, how: int) -> None:
        # Of the base: that of a TLS socket would take its session from under a thread that reads.
        socket.socket.shutdown(self.raw, how)

    def close(self) -> None:
        self.raw.close()

    def _arm(self) -> None:
        left_s = min(self.deadline_s - time.monotonic(), self.patience_s)
        if left_s <= 0:
            raise TimeoutError
        self.raw.settimeout(None if left_s == math.inf else left_s)


class _Wire(_DriverConnection):
    """The driver's connection over a socket of ours."""

    def __init__(self, sock: _Socket, **options: Any) -> None:
        self._given = sock
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> Any:
        return self._given


class _Channel:
    """One socket to one server, and the driver's protocol over it."""

    def __init__(self, host: Host, sock: _Socket, wire: _Wire) -> None:
        self.host = host
        self.sock = sock
        self._wire: Any = wire  # what types-redis says of it is of an older driver
        self.owes = False  # whether something was sent, in part at least, that was not answered yet

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to several commands, sent together; refusals are among them."""
        self.owes = True
        self._wire.send_packed_command(self._wire.pack_commands(commands), check_health=False)
        replies = [self._reply() for _ in commands]
        self.owes = False
        return replies

    def _reply(self) -> Any:
        try:
            return self._wire.read_response()
        except errors.ResponseError as exc:
            return exc

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class _Onward:
    """How a call is sent on to another server."""

    dial: Callable[[Host, float], _Channel]
    moved: Callable[[Host], None]


class Connection:
    """One open connection to the server.

    Used by one thread at a time, but for `shut_down`, which may come from another and ends what waits on it. In a
    cluster it goes where the namespace's slot has moved to: what a node refuses with MOVED or ASK it has not done, so
    that is sent on.
    """

    def __init__(self, channel: _Channel, *, namespace: str, onward: _Onward | None = None) -> None:
        """`namespace` is what calls are told under."""
        self._channel = channel
        self._namespace = namespace
        self._onward = onward
        self._aside: _Channel | None = None  # to where the slot is on its way
        self._last = channel  # what was exchanged last
        self.pid = os.getpid()
        self.is_sound = True  # no reply is outstanding
        self.was_sent_on = False  # whether of what was sent last some was answered later, by another node

    @property
    def host(self) -> Host:
        """Where it goes."""
        return self._channel.host

    @property
    def owes(self) -> bool:
        """Whether what was sent last may have been done, and was not answered."""
        return self._last.owes

    def end_by(self, deadline_s: float, *, patience_s: float = math.inf) -> None:
        """Let what follows wait until `deadline_s`, and never longer than `patience_s` for the next bytes."""
        for channel in self._channels:
            channel.sock.deadline_s = deadline_s
            channel.sock.patience_s = patience_s

    def execute(self, *command: str | bytes | int) -> Any:
        """The reply to one command."""
        return self.pipeline([command])[0]

    def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to several commands, sent together; raises the first error among them, once all were read."""
        name = _operation(commands)
        if name in _WAITING:
            return self._exchanged(commands)
        with store_call("redis", name, self._namespace, self.host, size=len(commands)):
            return self._exchanged(commands)

    def attempt(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to several commands, sent together; refusals are among them."""
        self.is_sound = self.was_sent_on = False
        self._last = self._channel
        replies = self._channel.exchange(commands)
        if self._onward is not None:
            self._send_on(self._onward, commands, replies)
        self.is_sound = True
        return replies

    def _exchanged(self, commands: Sequence[Command]) -> list[Any]:
        replies = self.attempt(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> list[Any]:
        """What the script returns; its text is sent only where the server does not know it yet."""
        words = (len(keys), *keys, *arguments)
        try:
            reply: list[Any] = self.execute("EVALSHA", script.sha, *words)
        except errors.NoScriptError:
            reply = self.execute("EVAL", script.text, *words)
        return reply

    def run_each(
        self, script: Script, given: Sequence[tuple[Sequence[str], Sequence[str | bytes | int]]]
    ) -> list[list[Any]]:
        """What the script returns for each of these keys and arguments, all sent together."""
        commands: list[Command] = [
            ("EVALSHA" if at else "EVAL", script.sha if at else script.text, len(keys), *keys, *arguments)
            for at, (keys, arguments) in enumerate(given)
        ]
        return self.pipeline(commands)

    def try_writing(self, stream: str, index: str = "") -> None:
        """Raise what a write to `stream` and `index` by a script would meet; changes nothing, be they there or not.

        Redis looks at permission, role, disk and memory before it refuses an entry whose id is 0-0.
        """
        with contextlib.suppress(errors.NoScriptError):
            self.execute("EVALSHA", "0" * 40, 0)
        try:
            self.execute("XADD", stream, "0-0", "never", "written")
        except errors.ResponseError as exc:
            if "must be greater than 0-0" not in str(exc):
                raise
        if index:
            self.execute("ZADD", index, "XX", 0, "#never")

    def replicated(self, replicas: int, timeout_s: float) -> int:
        """How many replicas have what was sent last, waiting until `replicas` do or the time is over."""
        self.is_sound = False
        (reply,) = self._last.exchange([("WAIT", replicas, max(1, round(timeout_s * 1000)))])
        self.is_sound = True
        if isinstance(reply, Exception):
            raise reply
        return int(reply)

    def _send_on(self, onward: _Onward, commands: Sequence[Command], replies: list[Any]) -> None:
        """Replace refusals that name another node by what that answers, and wait while the slot is half moved."""
        redirects, pause_s = 0, _MOVING_FIRST_S
        while redirects < _MOST_REDIRECTS:
            halved = [at for at, reply in enumerate(replies) if isinstance(reply, errors.TryAgainError)]
            refused = [at for at, reply in enumerate(replies) if isinstance(reply, errors.AskError)]
            if halved:
                if not self._paused(pause_s):
                    return
                pause_s = min(2 * pause_s, _MOVING_MOST_S)
                self._last = self._channel
                answers = self._channel.exchange([commands[at] for at in halved])
                for at, answer in zip(halved, answers, strict=True):
                    replies[at] = answer
                continue
            if not refused:
                return
            redirects += 1
            self.was_sent_on = True
            told = next(
                (replies[at] for at in refused if isinstance(replies[at], errors.MovedError)), replies[refused[0]]
            )
            again = [commands[at] for at in refused]
            host = (self.host[0] if told.host in {"", "?"} else told.host), told.port
            if isinstance(told, errors.MovedError):
                self._go(onward, host)
                answers = self._channel.exchange(again)
            else:
                answers = self._ask(onward, host, again)
            for at, answer in zip(refused, answers, strict=True):
                replies[at] = answer

    def _paused(self, pause_s: float) -> bool:
        """Wait for some time up to `pause_s`; False, and at once, where the call is over by then."""
        if time.monotonic() + pause_s >= self._channel.sock.deadline_s:
            return False
        threading.Event().wait(_random.uniform(pause_s / 2, pause_s))
        return True

    def _go(self, onward: _Onward, host: Host) -> None:
        """The slot has another owner: go there from here on."""
        onward.moved(host)
        left, self._channel = self._channel, self._dialed(onward, host)
        self._last = self._channel
        left.sock.close()

    def _ask(self, onward: _Onward, host: Host, commands: Sequence[Command]) -> list[Any]:
        """The slot is on its way, and what was asked for has left, or is not there yet: ask where it is going."""
        aside = self._aside
        if aside is None or aside.host != host:
            if aside is not None:
                aside.sock.close()
            self._aside = aside = self._dialed(onward, host)
        self._last = aside
        replies = aside.exchange([each for command in commands for each in (("ASKING",), command)])
        refused = next((reply for reply in replies[::2] if isinstance(reply, Exception)), None)
        if refused is not None:
            raise refused  # it may not ask: what the command met says less
        return replies[1::2]

    def _dialed(self, onward: _Onward, host: Host) -> _Channel:
        old = self._channel.sock
        channel = onward.dial(host, old.deadline_s)
        channel.sock.deadline_s, channel.sock.patience_s = old.deadline_s, old.patience_s
        return channel

    @property
    def _channels(self) -> Sequence[_Channel]:
        return (self._channel,) if self._aside is None else (self._channel, self._aside)

    def is_usable(self) -> bool:
        """Whether it can take another command: nothing is outstanding, and the server did not close it."""
        if not self.is_sound or self.pid != os.getpid():
            return False
        number = self._channel.sock.fileno()
        if number < 0:  # the driver closed it
            return False
        poll = select.poll()
        poll.register(number, select.POLLIN)
        return not poll.poll(0)

    def shut_down(self) -> None:
        """End it, from any thread: who waits on it raises."""
        if self.pid == os.getpid():
            for channel in self._channels:
                channel.shut_down()

    def close(self) -> None:
        self.shut_down()
        self.abandon()

    def abandon(self) -> None:
        """Close this process's hold of a parent's socket; the parent's connection stays up."""
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.sock.close()


def _operation(commands: Sequence[Command]) -> str:
    """What the commands are called, as the convention for databases has it: `HMGET`, `PIPELINE HMGET`, `PIPELINE`."""
    names = [str(command[0]) for command in commands]
    if len(names) == 1:
        return names[0]
    if "BLPOP" in names:
        return "PIPELINE BLPOP"
    return f"PIPELINE {names[0]}" if len(set(names)) == 1 else "PIPELINE"


class RedisLink:
    """The connections of this process to one server, the one that the route says.

    Thread-safe. No connection crosses a fork: a child closes its hold of the parent's and opens its own.
    """

    def __init__(
        self,
        route: Route,
        *,
        db: int,
        namespace: str,
        tls: bool,
        user: str | None,
        password: str | None,
        ca: str | None,
        cert: str | None,
        key: str | None,
        is_guide: bool = False,
        parameters: str = "",
    ) -> None:
        """Name the server; nothing is opened. `is_guide`: it is asked where another one is, and for no key.

        `parameters` is what those of the URL begin with that name user and password, where its login is none of theirs.
        """
        self._route = route
        self._db = db
        self._names = Names(namespace)
        self._namespace = namespace
        self.failovers = 0  # times that calls went to another server than before
        self._has_answered = False  # whether it ever spoke Redis with us: then a hint at its port would mislead
        self._tls = Tls(ca, cert, key) if tls else None
        self._user = user
        self._password = password
        self._url = route.url("rediss" if tls else "redis", db)
        self._is_guide = is_guide
        self._parameters = parameters
        self._onward = _Onward(self._connected, self._moved) if route.follows else None
        self._guides: dict[Host, RedisLink] = {}  # to those who say where the server is
        self._events = Events(namespace=namespace, tier="redis")
        self._begin_anew()
        with _links_lock:
            _links.add(self)

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        # Protects the attributes below.
        self.lock = threading.Lock()
        self._idle: list[Connection] = []
        self._opened: set[Connection] = set()
        self._epoch = 0
        self._current: Host | None = None  # where calls go
        self._told = False, False  # whether the log says that the guides fail, and that they contradict each other
        self._route.begin_anew()

    @property
    def url(self) -> str:
        """The URL, and the server that it led to where it does not name that."""
        at = self._route.at if isinstance(self._route, Guided) else None
        return self._url if at is None else f"{self._url} ({shown(at)})"

    def abandon(self) -> None:
        """Begin anew in a child."""
        opened = tuple(self._opened)
        self._begin_anew()
        for connection in opened:
            connection.abandon()

    def close(self) -> None:
        """Close every connection that is not in use; the others are closed when their calls end."""
        self._own()
        with self.lock:
            self._epoch += 1
            idle, self._idle = self._idle, []
        for connection in idle:
            self.shut(connection)
        for guide in tuple(self._guides.values()):
            guide.close()

    @contextlib.contextmanager
    def session(
        self, timeout_s: float, *, writes: bool = False, newest: bool = False, patience_s: float = math.inf
    ) -> Iterator[Connection]:
        """A connection for one call, which ends by `timeout_s`; the driver's errors come out as the store's.

        `writes`: the caller acknowledges what it writes there. `newest`: what it reads is to be what was written last.
        `patience_s` is how long the server may take to begin an answer.
        """
        begun_s = time.monotonic()
        deadline_s = begun_s + timeout_s
        word = Word.REQUIRED if writes else Word.RECENT if newest else Word.KNOWN
        with self.translating(min(timeout_s, patience_s)):
            connection, epoch = self._borrow(deadline_s, word, patience_s)
            try:
                connection.end_by(deadline_s, patience_s=patience_s)
                yield connection
                self.check_late(connection, begun_s, deadline_s, writes=writes)
                self._has_answered = True
                self._route.trust()
            finally:
                self._give_back(connection, epoch)

    def call(
        self, timeout_s: float, what: Callable[[Connection], T], *, writes: bool = False, newest: bool = False
    ) -> T:
        """What `what` returns for a connection, by `timeout_s`; as `session`, and again while a failover is under way.

        A write is made again only where the server says that it did nothing of it.
        """
        deadline_s = time.monotonic() + timeout_s
        goes_on = isinstance(self._route, Guided)
        patience_s = _PATIENCE_S if goes_on and not writes and timeout_s > _WHOLE_S else math.inf
        pause_s = _AGAIN_FIRST_S
        while True:
            own: StoreError | None = None
            left_s = deadline_s - time.monotonic()
            try:
                with self.session(left_s, writes=writes, newest=newest, patience_s=patience_s) as connection:
                    try:
                        return what(connection)
                    except StoreError as exc:
                        own = exc
                        raise
            except StoreUnavailable as exc:
                again = isinstance(exc, _Undone) or not (writes or exc is own or isinstance(exc, StoreNotFound))
                if not (goes_on and again) or time.monotonic() + pause_s >= deadline_s:
                    raise
            threading.Event().wait(_random.uniform(0, pause_s))
            pause_s, patience_s = min(2 * pause_s, _AGAIN_MOST_S), 2 * patience_s

    def open(self, deadline_s: float) -> Connection:
        """A connection of the caller's own, who shuts it with `shut`. To be called inside `translating`."""
        self._own()
        begun_s = time.monotonic()
        connection = self._opened_to(self.look(deadline_s), deadline_s)
        try:
            self.check_late(connection, begun_s, deadline_s)
        except BaseException:
            self.shut(connection)
            raise
        self._route.trust()
        return connection

    def look(self, deadline_s: float, word: Word = Word.KNOWN) -> Host:
        """The server that calls go to. Who waits for another one, as that was until now, is broken off.

        Asks whoever knows, by `deadline_s`, if nobody was asked for a while.
        """
        try:
            found = self._route.find(self.ask, deadline_s, word)
        finally:
            self._tell_of_guides()
        if found != self._current:
            with self.lock:
                self._go_to(found)
                left = [connection for connection in self._opened if connection.host != found]
            for connection in left:
                connection.shut_down()
        return found

    def _tell_of_guides(self) -> None:
        """Log once that the guides fail, or do not belong together, and once that it is over."""
        route = self._route
        if not isinstance(route, Guided):
            return
        fault, apart = route.fault, route.apart
        if not (fault or apart or any(self._told)):
            return
        with self.lock:
            was, self._told = self._told, (bool(fault), bool(apart))
        if fault and not was[0]:
            self._events.tell("veltrix.guides_failed", logging.WARNING, once=True, reason=fault)
        elif was[0] and not fault:
            self._events.tell_end("veltrix.guides_answer")
        if apart and not was[1]:
            self._events.tell("veltrix.guides_disagree", logging.ERROR, once=True, reason=f"{apart}. {route.one_set}")
        elif was[1] and not apart:
            self._events.tell_end("veltrix.guides_agree")

    def check_late(self, connection: Connection, due_s: float, deadline_s: float, *, writes: bool = False) -> None:
        """Raise where an answer came long after it was due, and the server was replaced meanwhile.

        One that was stopped and is resumed does not know, and goes on with what it was sent: what it says is of no
        worth, also that it has written something. So a write needs a guide that says, by `deadline_s`, that it was not.
        """
        asked_s = time.monotonic()
        route = self._route
        if not isinstance(route, Guided) or asked_s - due_s <= _LATE_S:
            return
        route.ask_again()
        self.look(min(deadline_s, asked_s + _LATE_S), Word.RECENT)
        fate = f"it may be lost, and its {_FATE}"
        if connection.host != self._current:
            if writes:
                raise StoreUnavailable(f"{self.url} took over while another server made the write: {fate}")
            raise StoreUnavailable(
                f"{self.url} took over while another server was asked, whose answer does not count; try again"
            )
        if writes and route.believed_s < asked_s:
            raise StoreUnavailable(
                f"{self.url} answered a write late, and nobody says in time that it was not replaced meanwhile: {fate}"
            )

    def _opened_to(self, server: Host, deadline_s: float) -> Connection:
        channel = self._connected(server, deadline_s)
        connection = Connection(channel, namespace=self._namespace, onward=self._onward)
        try:
            if self._password is None and not self._is_guide:
                # A server that asks for a password hangs up on commands of more than ten words, and says nothing.
                connection.execute("EXISTS", self._names.entries)
            if self._route.asks_for_role and connection.execute("ROLE")[0] != b"master":
                self._route.doubt()
                raise StoreUnavailable(f"{self.url} is to be the primary, and is a replica yet or again; try again")
        except BaseException:
            connection.close()
            raise
        self._has_answered = self._has_answered or not self._is_guide  # a guide was asked nothing yet
        with self.lock:
            self._opened.add(connection)
        return connection

    def _connected(self, host: Host, deadline_s: float) -> _Channel:
        sock = _Socket(self._dial(host, deadline_s))
        sock.deadline_s = deadline_s
        try:
            wire = _Wire(
                sock,
                host=host[0],
                port=host[1],
                db=self._db,
                username=self._user,
                password=self._password,
                protocol=2,  # every server speaks it, and it knows no messages that were not asked for
                socket_read_size=_READ_BYTES,
                # An ACL may refuse a connection that introduces itself, and each such refusal is logged.
                **({"driver_info": None} if hasattr(redis, "DriverInfo") else {"lib_name": None, "lib_version": None}),
            )
            wire.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            sock.close()
            raise
        return _Channel(host, sock, wire)

    def _moved(self, host: Host) -> None:
        """The server named another one: who waits for the first is told so as well, and need not be broken off."""
        self._route.moved(host)
        with self.lock:
            self._go_to(host)

    def _go_to(self, host: Host) -> None:
        """Needs the lock."""
        if self._current is not None and self._current != host:
            self.failovers += 1
        self._current = host

    def ask(self, host: Host, questions: Sequence[Question], deadline_s: float) -> list[Any]:
        """What a guide of the route's answers."""
        route, epoch = self._route, self._epoch
        assert isinstance(route, Guided)
        guide = self._guides.get(host)
        if guide is None:
            user, password = (self._user, self._password) if route.login is None else route.login
            files = self._tls or Tls()
            guide = RedisLink(
                Server(*host, called=route.called(host)), db=0, namespace=self._namespace, tls=self._tls is not None,
                user=user, password=password, ca=files.ca, cert=files.cert, key=files.key, is_guide=True,
                parameters="" if route.login is None else "sentinel_",
            )  # fmt: skip
            guide = self._guides.setdefault(host, guide)
        try:
            with guide.session(deadline_s - time.monotonic()) as connection:
                return connection.pipeline(questions)
        finally:
            if self._epoch != epoch:  # this one was closed meanwhile, and nobody would close what was opened since
                guide.close()

    def shut(self, connection: Connection) -> None:
        """Close a connection that was opened here."""
        with self.lock:
            self._opened.discard(connection)
        connection.close()

    @contextlib.contextmanager
    def translating(self, timeout_s: float) -> Iterator[None]:
        """Let the driver's errors, and what the layout does not know, come out as the store's."""
        try:
            yield
        except NotOurs as exc:
            raise self.not_ours(exc.what) from exc
        except (errors.RedisError, OSError, ssl.SSLError) as exc:
            # From None: a server quotes what it was sent, values included.
            quotes = isinstance(exc, errors.ResponseError)
            told = self._translated(exc, timeout_s)
            if isinstance(told, StoreUnavailable):
                self._route.doubt()
            raise told from (None if quotes else exc)

    @contextlib.contextmanager
    def writing(self, connection: Connection, timeout_s: float) -> Iterator[None]:
        """Send a write, and nothing else: one whose answer is lost raises that its fate is unknown."""
        try:
            with self.translating(timeout_s):
                yield
        except StoreError as exc:
            if not connection.owes:
                raise
            why = str(exc).removesuffix("; try again")
            raise StoreUnavailable(f"{why}; the write's {_FATE}") from exc

    def lacking(self, reply: Any) -> str:
        """What the user lacks, as `NotPermitted` has it, where that is why a reply is an error; '' where it is not.

        Raises `StoreError` where the server does not know the command: nobody may run it.
        """
        if not isinstance(reply, errors.ResponseError):
            return ""
        told = self._refused(reply)
        if isinstance(told, NotPermitted):
            return told.lacking
        if _UNKNOWN_COMMAND.search(str(reply)):
            raise told from None
        return ""

    def not_ours(self, what: str) -> StoreError:
        return StoreError(
            f"{self.url} holds something in the namespace {self._namespace!r} that is not this library's: {what} "
            f"is none of ours; nothing was touched. Choose another namespace, or another db "
            f"(redis-cli: HGETALL {self._names.entries})"
        )

    # ---

    def _own(self) -> None:
        if self._pid != os.getpid():
            self.abandon()  # a server that forks in C runs no hook

    def _borrow(self, deadline_s: float, word: Word, patience_s: float) -> tuple[Connection, int]:
        self._own()
        with self.lock:
            epoch = self._epoch
        server = self.look(deadline_s, word)
        while True:
            with self.lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._opened_to(server, min(deadline_s, time.monotonic() + patience_s)), epoch
            if connection.host == server and connection.is_usable():
                return connection, epoch
            self.shut(connection)

    def _give_back(self, connection: Connection, epoch: int) -> None:
        with self.lock:
            if connection.is_sound and epoch == self._epoch and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        self.shut(connection)

    def _dial(self, host: Host, deadline_s: float) -> socket.socket:
        context = self._tls.context() if self._tls else None
        finish = None if context is None else lambda raw: self._secured(context, raw, host[0])
        return dial(*host, deadline_s, finish=finish)

    def _secured(self, context: ssl.SSLContext, raw: socket.socket, name: str) -> socket.socket:
        try:
            return context.wrap_socket(raw, server_hostname=name)
        except TimeoutError as exc:
            raise StoreUnavailable(
                f"{self.url} did not answer the TLS handshake in time: is it up? If its port is one without TLS, "
                f"write {plain_scheme(self._scheme)}://"
            ) from exc

    # --- what an error means

    @property
    def _scheme(self) -> str:
        """The URL's; of a guide, which errors call otherwise, the one of a server like it."""
        scheme, found, _ = self.url.partition("://")
        return scheme if found else "rediss" if self._tls else "redis"

    @property
    def _replacing(self) -> str:
        """What else a server that is away may mean, where another one takes its place by itself."""
        return "; a failover may be under way" if isinstance(self._route, Guided) else ""

    @property
    def _host(self) -> str:
        return (self._route.at or ("", 0))[0]

    def _translated(self, error: Exception, timeout_s: float) -> StoreError:
        if isinstance(error, errors.ResponseError):
            return self._refused(error)
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLError):
                return self._tls_failed(cause)
        return self._unreachable(error, timeout_s)

    def _unreachable(self, error: Exception, timeout_s: float) -> StoreError:
        url, text = self.url, str(error)
        if isinstance(error, errors.AuthenticationError):
            return self._not_let_in(text)
        if isinstance(error, errors.BusyLoadingError):
            return StoreUnavailable(f"{url} is still loading its data; try again")
        if isinstance(error, NameTimeout):
            return StoreUnavailable(
                f"the name {self._host} of {url} was not resolved within {seconds(timeout_s)}; check this machine's DNS"
            )
        if isinstance(error, (errors.TimeoutError, TimeoutError)):
            return Silent(
                f"{url} did not answer within {seconds(timeout_s)}; is it up, and reachable from here?{self._replacing}"
            )
        if isinstance(error, errors.InvalidResponse):
            what = "speaks HTTP, and is" if "HTTP/1." in text else "is"
            return StoreError(f"what answers at {url} {what} not a Redis server: check host and port")
        if isinstance(error, socket.gaierror):
            return StoreUnavailable(f"the name {self._host} of {url} cannot be resolved: {error.strerror}")
        if isinstance(error, ConnectionRefusedError):
            return StoreUnavailable(f"{url} refuses connections: no server listens there{self._replacing}")
        if "max number of clients" in text:
            return StoreUnavailable(f"{url} has as many clients as it may: raise maxclients")
        reset = isinstance(error, (ConnectionResetError, BrokenPipeError)) or "Connection closed by server" in text
        if reset or "Connection reset" in text or "while writing to socket" in text:
            secure = self._scheme.replace("redis", "rediss", 1)
            hint = f" (a TLS port does so too: write {secure}:// if it is one; so does etcd's: check the port)"
            if self._tls:
                asks = (
                    "" if self._tls.cert else "one that asks for a client certificate does so too: give cert and key; "
                )
                hint = f" ({asks}a port without TLS, such as etcd's, does so too: check the port)"
            if self._has_answered:
                hint = self._replacing
            return StoreUnavailable(f"{url} closed the connection{hint}; try again")
        if isinstance(error, OSError):
            return StoreUnavailable(f"{url} cannot be reached: {error.strerror or type(error).__name__}")
        return StoreUnavailable(f"the connection to {url} failed: {type(error).__name__}")

    def _not_let_in(self, text: str) -> NotLetIn:
        apart = self._parameters
        here = f"?{apart}user= and ?{apart}password=" if apart else "user and password"
        if "without any password configured" in text or "no password is set" in text:
            leave = f"?{apart}password=" if apart else "the password"
            return NotLetIn(f"{self.url} has no password for the default user: leave {leave} out, or name a user")
        if self._password is None:
            own = ", which are not the primary's" if apart else ""
            return NotLetIn(f"{self.url} asks for a password: give {here}{own}")
        who = f"user {self._user!r}" if self._user else "the default user"
        either = here.replace(" and ", " or ")
        return NotLetIn(f"{self.url} refused {who} with that password: correct {either}, or enable the user")

    def _refused(self, error: Exception) -> StoreError:
        url, text = self.url, str(error)
        # redis-py takes the code off the text, and older servers put that of a script's command within it.
        code = str(getattr(error, "status_code", None) or "")
        found = _CODE.search(f"{code} {text}")
        code = found[1] if found else code
        if isinstance(error, errors.AuthenticationError) or code == "NOAUTH":
            return self._not_let_in(text)
        in_script = "executing the script can't" in text or "ACL failure in script" in text  # Redis, Valkey
        if isinstance(error, errors.NoPermissionError) or code == "NOPERM" or in_script:
            return self._not_permitted(text)
        if code == "OOM" or "used memory > 'maxmemory'" in text:
            return StoreUnavailable(f"{url} is out of memory: raise maxmemory, or remove what else is in there")
        if isinstance(error, errors.ReadOnlyError) or code == "READONLY":
            return StoreUnavailable(
                f"{url} is a replica and takes no writes: name the primary, or wait for its failover"
            )
        if code in {"UNBLOCKED", "NOSCRIPT"}:
            return StoreUnavailable(f"{url} was replaced in the middle of a call; try again")
        if isinstance(error, errors.MasterDownError) or code == "MASTERDOWN":
            return StoreUnavailable(
                f"{url} is a replica that lost its primary, and serves nothing meanwhile; try again"
            )
        if code == "NOREPLICAS":
            return StoreUnavailable(
                f"{url} takes no writes, as fewer replicas are connected than its min-replicas-to-write: start "
                "replicas, or lower it"
            )
        if code == "MISCONF":
            return StoreUnavailable(
                f"{url} takes no writes because it cannot save to its disk: free the disk, see its log"
            )
        if code in {"LOADING", "BUSY"}:
            return StoreUnavailable(f"{url} is busy ({code}); try again")
        if code == "WRONGTYPE":
            return self.not_ours(f"one of the keys {self._names.base}*, of another type,")
        return self._misused(url, text, code)

    def _misused(self, url: str, text: str, code: str) -> StoreError:
        unknown = _UNKNOWN_COMMAND.search(text)
        if unknown is not None:
            name = unknown[1].upper() or "a command"
            if self._is_guide and name == "SENTINEL":
                at = shown(self._route.at) if self._route.at else "it"
                return StoreError(
                    f"{at} is a Redis server, not a sentinel: name the sentinels in the URL, or write redis://"
                )
            if name in _KNOWN_TO_ALL and not self._is_guide:
                return StoreError(
                    f"{url} does not know {name}, so a sentinel answers there, which holds no keys: write "
                    f"{self._scheme.partition('+')[0]}+sentinel://{shown(self._route.at or ('HOST', 26379))}/NAME/0 "
                    "(NAME by redis-cli: SENTINEL MASTERS), or name the primary's port"
                )
            return StoreError(
                f"{url} does not know {name}: streams need Redis 5 or newer, and the commands of docs/redis-layout.md "
                "must not be renamed or disabled"
            )
        if "DB index" in text or "invalid DB" in text:
            return StoreError(f"{url} has no db {self._db}: choose one below its setting `databases` (16 by default)")
        if self._route.follows and code in {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"}:
            why = {
                "TRYAGAIN": "its slot is being moved, and only some of its keys have left",
                "CLUSTERDOWN": "the cluster is down, or elects a primary",
            }
            return _Undone(f"{url} does not serve this now: {why.get(code, 'its slot moves on and on')}; try again")
        if "cluster support disabled" in text:
            return StoreError(f"{url} is no node of a Redis Cluster: write redis://")
        if "No such master with that name" in text:
            return StoreError(
                f"{url} knows no primary of that name: correct it in the URL (redis-cli: SENTINEL MASTERS)"
            )
        if "SELECT is not allowed" in text or code in {"MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN"}:
            return StoreError(
                f"{url} is a node of a Redis Cluster, which {self._url.partition(':')[0]}:// does not follow: write redis+cluster://"
            )
        if code == "DENIED" or text.startswith("DENIED"):
            return AuthFailed(
                f"{url} is in protected mode and lets in its own host alone: give it a password, or bind it"
            )
        return StoreError(f"{url} refused a command ({code or 'ERR'}); its log and `redis-cli MONITOR` may say more")

    def _not_permitted(self, text: str) -> NotPermitted:
        named = _REFUSED_COMMAND.search(text)
        base = self._names.base
        if named is not None:
            lacking = f"+{named[1].lower()}"
        elif "key" in text:
            lacking = f"a key pattern: %R~{base}* to read, ~{base}* to write"
        else:
            lacking = "a command that a script calls; see the list"
        who = f"user {self._user!r}" if self._user else "the default user"
        return NotPermitted(
            f"the ACL of {who} at {self.url} lacks {lacking}. docs/redis-layout.md lists what workers, relay and "
            "writers need (redis-cli: ACL SETUSER)",
            lacking=lacking,
        )

    def _tls_failed(self, error: ssl.SSLError) -> StoreError:
        url, ca = self.url, (self._tls and self._tls.ca) or "the system's authorities"
        if isinstance(error, ssl.SSLCertVerificationError):
            match verdict_of(error):
                case Verdict.SERVER_EXPIRED:
                    return StoreError(f"the certificate of {url} has expired: renew it on the server")
                case Verdict.SERVER_NOT_YET_VALID:
                    return StoreError(f"the certificate of {url} is not valid yet: check the clocks of both machines")
                case Verdict.SERVER_OF_OTHER_NAME:
                    return StoreError(f"the certificate of {url} is for another host: {error.verify_message}")
            return StoreError(
                f"the certificate of {url} is not signed by {ca} ({error.verify_message}): name its CA with ca=FILE"
            )
        reason = (getattr(error, "reason", None) or "").upper()
        match verdict_of(error):
            case Verdict.CERTIFICATE_WANTED:
                return CertificateFault(f"{url} asks for a client certificate: give cert=FILE and key=FILE")
            case Verdict.CERTIFICATE_REFUSED:
                return CertificateFault(
                    f"{url} refused our client certificate ({reason.lower()}): give one that its CA signed"
                )
            case Verdict.NOT_TLS:
                plain = plain_scheme(self._scheme)
                return StoreError(f"{url} does not speak TLS: write {plain}://, or name its TLS port")
        # The end of the connection may come before its reset, and has more than one name.
        is_closed = not self._has_answered and (not reason or "EOF" in reason)
        hint = " (a port without TLS, such as etcd's, does so too: check the port)" if is_closed else ""
        return StoreUnavailable(f"the TLS connection to {url} failed ({reason.lower() or 'closed'}){hint}; try again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: redis-py wraps the socket's errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# Protects the registry below.
_links_lock = threading.Lock()
_links: WeakSet[RedisLink] = WeakSet()

# What a fork must find at rest: a child has none of the threads that could finish what they began.
_held_for_fork: list[threading.Lock] = []


def _before_fork() -> None:
    if _links_lock.acquire(timeout=_FORK_WAIT_S):
        _held_for_fork.append(_links_lock)
        for link in tuple(_links):
            lock = link.lock
            if lock.acquire(timeout=_FORK_WAIT_S):
                _held_for_fork.append(lock)


def _after_fork_in_parent() -> None:
    while _held_for_fork:
        _held_for_fork.pop().release()


def _after_fork_in_child() -> None:
    global _links_lock
    _held_for_fork.clear()
    _links_lock = threading.Lock()
    for link in tuple(_links):
        link.abandon()


around_forks(STORES, before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
