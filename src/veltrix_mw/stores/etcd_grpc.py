"""etcd over gRPC: one call to one member, or one stream of watches there.

Owns the channels, what gRPC's own failures mean, and that none of its threads is there when the process forks: a child
would wait for them for ever. Knows nothing of which member is chosen or who the user is (`etcd_members`).

A channel is made for one call at a time, or one stream, and only once its member was dialled and answered in HTTP/2:
so names are resolved, addresses tried and faults told as for the gateway. gRPC's own words for them change with its
releases, and its resolver knows no deadline.
"""

from __future__ import annotations

import contextlib
import math
import os
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import grpc

from veltrix_mw.background import BackgroundThread
from veltrix_mw.forking import STORES, around_forks
from veltrix_mw.settings import Host, shown
from veltrix_mw.stores.etcd_dialing import HTTP_2, Dialer, no_etcd
from veltrix_mw.stores.etcd_members import ATTEMPT_S, AnswerTooLarge, Failed, Late, Refused
from veltrix_mw.stores.etcd_messages import Answer, Message, Method, WatchAsked, WatchCreate, Watched
from veltrix_mw.stores.etcd_pool import Pool
from veltrix_mw.stores.etcd_protobuf import decode, encode
from veltrix_mw.stores.etcd_stream import NotHttp
from veltrix_mw.stores.tls import Tls

__all__ = ["Grpc", "GrpcStream", "Lent", "ask", "meaning"]

with contextlib.suppress(ImportError):
    import_module("grpc._channel")  # the first channel would import it in the follower's thread, maybe during a fork

_WATCH: Final = "/etcdserverpb.Watch/Watch"
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, 3.4: what a client begins with, then its settings
_NO_SETTINGS: Final = b"\0\0\0\4\0\0\0\0\0"
_SETTINGS: Final = 4  # the kind of a frame, its fourth byte; what a server begins with
_LATE_FOR_S: Final = 60.0  # how long, after an answer that was late, it is seen whether the next ones begin
_MAX_WAITING_BYTES: Final = 16 * 1024 * 1024  # of a stream that its reader does not keep up with; etcd then waits

_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_receive_message_length", -1),  # 4 MiB by default: fragments and pages may be larger
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, not another's that may be half open
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # which member is asked again, and whether, is not gRPC's to decide
    ("grpc.service_config_disable_resolution", 1),
)
# A watch is silent for hours. With the time alone, dropped packets are noticed after 40 s, a stopped server after 80;
# with all four after 8. etcd takes pings oftener than every 5 s for an attack. A call has its deadline.
_WATCH_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    # No pings amid data, to measure the way: on a slow one they are answered after it, and then too late.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
)

A = TypeVar("A", bound=Answer)
Metadata = tuple[tuple[str, str], ...]


class Grpc:
    """The transport over gRPC.

    Thread-safe; usable after a fork. Opens nothing before the first call.
    """

    def __init__(self, tls: Tls | None = None) -> None:
        self._tls = tls
        self._dialer = Dialer(tls)
        self.pool = Pool[_Channel]()
        self._late_at_s: dict[Host, float] = {}

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
        body = encode(request)
        if time.monotonic() - self._late_at_s.get(host, -math.inf) > _LATE_FOR_S:
            by_s = begun_by_s  # it answers at once, whole: to see that an answer begins costs several times as much
        while True:
            epoch = self.pool.epoch
            used = self.pool.borrow(host)
            channel = used or self._opened(host, min(begun_by_s, time.monotonic() + ATTEMPT_S))
            try:
                raw = ask(channel.lent, method.name, body, _metadata(token), begun_by_s=begun_by_s, by_s=by_s)
            except grpc.RpcError as exc:
                failure = meaning(exc, host)
                if isinstance(failure, Refused):
                    self.pool.give_back(host, channel, epoch)
                else:
                    channel.close()
                    if by_s == begun_by_s and isinstance(failure, Failed) and failure.is_late:
                        self._late_at_s[host] = time.monotonic()
                    if used and not once and exc.code() is grpc.StatusCode.UNAVAILABLE:
                        continue  # closed by the other side at the same moment: no sign that the member failed
                raise failure from exc
            except BaseException:
                channel.close()
                raise
            self.pool.give_back(host, channel, epoch)
            try:
                return decode(raw, method.answer)
            except ValueError as exc:
                raise no_etcd(host) from exc

    def watch(self, host: Host, creates: Sequence[WatchCreate], *, token: str, by_s: float) -> GrpcStream:
        channel = self._opened(host, min(by_s, time.monotonic() + ATTEMPT_S), _WATCH_OPTIONS)
        try:
            return GrpcStream(channel, creates, _metadata(token), host)
        except BaseException:
            channel.close()
            raise

    def drop(self, host: Host | None = None) -> None:
        self.pool.drop(host)
        if host is None and not _open:
            _await_rest(_CLOSED_S)

    # --- opening

    def _opened(self, host: Host, by_s: float, more: Sequence[tuple[str, Any]] = ()) -> _Channel:
        address, port = self._greeted(host, by_s)
        target = f"ipv6:[{address}]:{port}" if ":" in address else f"ipv4:{address}:{port}"
        if self._tls is None:
            options = [*_OPTIONS, *more, ("grpc.default_authority", shown(host))]
            return _Channel(grpc.insecure_channel(target, options))
        options = [*_OPTIONS, *more, ("grpc.ssl_target_name_override", host[0])]
        return _Channel(grpc.secure_channel(target, _credentials(self._tls), options))

    def _greeted(self, host: Host, by_s: float) -> tuple[str, int]:
        """The address of the member's at which HTTP/2 is spoken. Raises what is wrong where there is none."""
        connection = self._dialer.connect(host, by_s, protocol=HTTP_2)
        begin = b""
        try:
            connection.send(_PREFACE + _NO_SETTINGS, by_s)
            while len(begin) < len(_NO_SETTINGS) and (piece := connection.receive(by_s)):
                begin += piece
            if len(begin) < len(_NO_SETTINGS) or begin[3] != _SETTINGS:
                raise NotHttp("what came is no HTTP/2", begin)
            return connection.address
        except (OSError, NotHttp) as exc:
            failed = self._dialer.failure(exc, host, by_s)
            failed.may_have_run = False
            raise failed from exc
        finally:
            connection.close()


def _metadata(token: str) -> Metadata:
    asked = (("hasleader", "true"),)
    return (*asked, ("token", token)) if token else asked


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    # Anew for each channel, as for each connection: files that were replaced are taken. The dialer has just used them.
    cert = Path(tls.cert).read_bytes() if tls.cert else None
    key = Path(tls.key or tls.cert).read_bytes() if tls.cert else None
    roots = Path(tls.ca).read_bytes() if tls.ca else _system_authorities()
    return grpc.ssl_channel_credentials(roots, key, cert)


def _system_authorities() -> bytes:
    """Whom the system trusts: gRPC would go by a list of its own."""
    paths = ssl.get_default_verify_paths()
    files = [Path(paths.cafile)] if paths.cafile else []
    if paths.capath:
        files += sorted(path for path in Path(paths.capath).iterdir() if path.suffix[1:].isdigit())
    found = []
    for path in files:
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return b"\n".join(found)


def meaning(exc: grpc.RpcError, host: Host) -> Exception:
    """What a call's failure means."""
    code, said = exc.code(), exc.details() or ""
    where = shown(host)
    if "etcdserver" in said:
        return Refused(said)
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return Late(host)
        case grpc.StatusCode.UNKNOWN if "context deadline exceeded" in said or "context canceled" in said:
            return Late(host)  # etcd saw the deadline before we did
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in said:
            # etcd's own words begin so.
            return Refused("request is too large") if said.startswith("grpc: ") else AnswerTooLarge()
        case grpc.StatusCode.UNAVAILABLE if "failed to connect" in said:
            return Failed(f"nothing answers at {where}; is etcd running there?", may_have_run=False)
        case grpc.StatusCode.UNAVAILABLE:
            return Failed(f"etcd at {where} ended the connection")
        case grpc.StatusCode.UNIMPLEMENTED:
            return no_etcd(host)
        case _:
            return Failed(f"etcd at {where} failed the call ({code.name})")


def ask(channel: grpc.Channel, name: str, body: bytes, metadata: Metadata, *, begun_by_s: float, by_s: float) -> bytes:
    """One call, whose answer begins by `begun_by_s` and ends by `by_s`. Raises `grpc.RpcError`."""
    now_s = time.monotonic()
    timeout_s = max(0.001, by_s - now_s)
    if begun_by_s >= by_s:
        asked: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(name)
        return asked(body, timeout=timeout_s, metadata=metadata)
    # A stream's head can be waited for, and comes as soon as the answer begins, however long that is.
    streamed: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(name)
    answering: Any = streamed(body, timeout=timeout_s, metadata=metadata)  # what its type says, interceptors need not
    if not isinstance(answering, grpc.Call):
        # An interceptor's generator, as OpenTelemetry's is: it tells of no head, and cannot be given up. So the answer
        # has all its time, and a late one is told that much later. It is read to its end, not asked for again by
        # another kind of call: it may be a write, and under way.
        return b"".join(answering)
    pieces: Any = answering
    giving_up = threading.Timer(max(0.001, begun_by_s - now_s), answering.cancel)
    giving_up.daemon = True
    giving_up.start()
    try:
        answering.initial_metadata()
    finally:
        giving_up.cancel()
    return b"".join(pieces)


class Lent(Protocol):
    """A channel for one stream, until it is closed."""

    lent: grpc.Channel
    is_dropped: bool

    def close(self) -> None: ...


class _Channel:
    """One channel to one address, for one call at a time, or one stream.

    Never used in another process than the one that made it.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        global _has_opened
        _has_opened = True
        self.lent = channel
        self._pid = os.getpid()
        self.is_closed = False
        self.is_dropped = False  # closed for a fork, under whoever uses it
        _open.add(self)

    def is_at_rest(self) -> bool:
        return not self.is_closed

    def close(self) -> None:
        """Idempotent. What runs on it ends."""
        self.is_closed = True
        _open.discard(self)
        if self._pid == os.getpid():
            self.lent.close()
        else:
            _inherited.append(self)


class GrpcStream:
    """A stream of watches, read by a thread of its own, as gRPC's iterators know no deadline.

    Of one that an interceptor made a generator, which cannot be cancelled, the thread ends with its channel, with the
    next message, or after `most_s`.
    """

    def __init__(
        self,
        channel: Lent,
        creates: Sequence[WatchCreate],
        metadata: Metadata,
        host: Host,
        *,
        most_s: float | None = None,
    ) -> None:
        self._channel = channel
        self._host = host
        streamed: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.lent.stream_stream(_WATCH)
        asked = iter([encode(WatchAsked(create)) for create in creates])
        self._call: Any = streamed(asked, timeout=most_s, metadata=metadata)
        # Protects the three below; notified when one of them changes.
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._end: Exception | None = None
        self._is_closed = False
        reader = BackgroundThread(target=self._read, name="veltrix-etcd-watch")
        reader.start()

    def _read(self) -> None:
        end: Exception = EOFError("the stream has ended")
        try:
            for raw in self._call:
                with self._changed:
                    self._waiting.append(raw)
                    self._changed.notify_all()
                    while sum(map(len, self._waiting)) > _MAX_WAITING_BYTES and not self._is_closed:
                        self._changed.wait()
                    if self._is_closed:
                        break
        except grpc.RpcError as exc:
            end = meaning(exc, self._host)
        except Exception as exc:  # noqa: BLE001  # whoever receives is told, whatever it is
            end = EOFError(f"the stream broke off ({type(exc).__name__})")
        self._ended(end)

    def _ended(self, end: Exception) -> None:
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()

    def receive(self, by_s: float) -> list[Watched]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end, max(0.0, by_s - time.monotonic()))
            came = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            if not came and self._end is not None and not self.is_dropped:
                raise self._end
        try:
            return [decode(raw, Watched) for raw in came]
        except ValueError as exc:
            raise EOFError("a message of the watch is none") from exc

    def is_amid(self, now_s: float) -> bool:  # noqa: ARG002
        return bool(self._waiting)  # messages come whole: of one on its way nothing is seen

    @property
    def is_dropped(self) -> bool:
        return self._channel.is_dropped

    def interrupt(self) -> None:
        if isinstance(self._call, grpc.Call):
            self._call.cancel()
        else:
            self._ended(EOFError("the stream was interrupted"))

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self.interrupt()
        self._channel.close()


# Forks

_REST_S: Final = 2.0  # it takes milliseconds, on a machine that has time
_CLOSED_S: Final = 0.5  # the longest that closing takes for the sake of forks that run no hooks
_ITS_THREADS: Final = ("event_engine", "grpc_global_tim", "lifeguard", "grpc_", "resolver-exec", "default-exec")

# Every channel that is open in this process. Single additions and removals, which the interpreter makes whole.
_open: set[_Channel] = set()

# Whether there ever was one.
_has_opened = False

# What a fork left here of the parent's: gRPC must not even destroy it.
_inherited: list[_Channel] = []


# Whether another part of the process has channels, too: then gRPC's threads are there to stay, forks or not.
_is_shared = False


def _await_rest(timeout_s: float) -> None:
    """Wait until gRPC has ended its threads, which it does after the last channel."""
    global _is_shared
    if _is_shared:
        _is_shared = _has_threads()
        return
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while _has_threads():
        if time.monotonic() >= deadline_s:
            _is_shared = timeout_s >= _REST_S
            return
        pause.wait(0.001)


def _has_threads() -> bool:
    """Whether this process has threads of gRPC's own, where the system tells."""
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith(_ITS_THREADS):
                return True
    return False


def _before_fork() -> None:
    # The calls have ended: `etcd_stream` holds off new ones. Watches have not; they are opened anew, in silence.
    for channel in tuple(_open):
        channel.is_dropped = True
        channel.close()
    if _has_opened:
        _await_rest(_REST_S)  # also after one that was closed a moment ago


def _after_fork_in_child() -> None:
    _inherited.extend(_open)
    _open.clear()


around_forks(STORES, before=_before_fork, after_in_parent=lambda: None, after_in_child=_after_fork_in_child)
