"""The client: one namespace's configuration in this process, followed, read and written.

Owns the lifecycle (start, fork, close) and puts the parts together; each part knows its own job.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, overload
from weakref import WeakSet

from veltrix_mw.awaiting import awaited, in_thread
from veltrix_mw.current import Pinned
from veltrix_mw.errors import (
    AuthFailed,
    Compacted,
    KeyMissing,
    NeverWritten,
    NotReady,
    RevisionTimeout,
    SettingsError,
    StoreError,
    StoreUnavailable,
)
from veltrix_mw.events import NO_THREAD, Events, told_after
from veltrix_mw.freshness import Freshness, FreshnessRules
from veltrix_mw.instruments import Observed
from veltrix_mw.keys import check_namespace, check_prefix
from veltrix_mw.operations import Delete, Operation, Put
from veltrix_mw.snapshot import Entry, Rejection, Snapshot, Version
from veltrix_mw.status import LazyStatus, Status, unwritten
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.values import FrozenDict
from veltrix_mw.view import View
from veltrix_mw.views import Views
from veltrix_mw.waiters import BEGUN, READY, Waiters

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from veltrix_mw.follower import Follower
    from veltrix_mw.protocols import Mirror, MirrorState, Store
    from veltrix_mw.relay_report import Report
    from veltrix_mw.relay_thread import RelayThread
    from veltrix_mw.replica import Publication
    from veltrix_mw.stores.etcd_adopted import EtcdClient
    from veltrix_mw.subscriptions import Callback

__all__ = ["ConfigClient"]

T = TypeVar("T")

CLOSE_S: Final = 2.0
"""The longest `close` takes: servers give a worker some seconds to go."""

OWN_WRITE_S: Final = 1.0
"""How long the schema check of a write waits for this process's write before: many times what it takes."""

SCHEMA_LIST_S: Final = 5.0
"""The longest that a write waits for the list its schema check needs, where nothing is followed."""

MAX_AGE_S: Final = 15.0
"""Three confirmation intervals: one may be late, one lost."""


class ConfigClient:
    """The configuration of one namespace: follow it, read it, change it.

    Constructing it opens nothing and starts nothing; `start()`, `with`, the first view or the middleware does. Reads
    never do I/O. Works in threads and across forks: each process follows by itself.

    Args:
        url: the authority: `etcd://h1:2379,h2:2379,h3:2379/shop` (`etcds://` with TLS), `redis://h:6379/0?namespace=shop`
            (`rediss://`; also `redis+sentinel://`, `redis+cluster://`), `sqlite:///file.db` (embedded), `memory://` or
            `memory://name` (this process), or a store object, or a client of etcd's that you made and close yourself,
            as `etcd3.client(...)`; default `$VELTRIX_URL`.
        mirror: a Redis that holds a copy of the authority, for workers to follow: `redis://h:6379/0`, or a mirror
            object; default `$VELTRIX_MIRROR_URL`, else none; "" for none whatever that says.
        namespace: the namespace, if the URL does not name it; a client of etcd's never does.
        lazy: prefixes that no worker holds whole, for example `("tenants/",)`; everything else is eager.
        lazy_max_bytes: what lazy units may take of this process's memory; those used again and again are held.
        fetch_timeout_s: seconds that `view.fetch` waits for a lazy unit, where it is not told otherwise.
        layers: prefixes laid over the base for every view, first wins, for example `("env/prod/",)`.
        schemas: prefix (ends with '/') or single key to a dataclass, msgspec.Struct, pydantic model or JSON Schema.
        defaults: the app's own values, under everything.
        last_known_good: a folder for the file that serves a cold start without a store.
        telemetry: `off`, `requests` or `lookups`.
        max_age_s: seconds without a confirmation after which a view counts as stale.
        freshness: what is done, below prefixes, with values that are older than they may be, for example
            `(Freshness("flags/", max_age_s=20, on_stale="fail"),)`; without it they are served, whatever their age.
        start_timeout_s: seconds that the first requests wait for the first list.
        relay: `auto`: this process stands for election as the mirror's relay, if its credentials allow it; `never`.
        instance: this process's name, as status shows it; default `host:pid:` and a random part.
        tracer_provider, meter_provider: OpenTelemetry providers; default the global ones.

    Raises:
        SettingsError: a setting is missing or wrong.
    """

    def __init__(
        self,
        url: str | Store | EtcdClient | None = None,
        *,
        mirror: str | Mirror | None = None,
        namespace: str | None = None,
        lazy: Sequence[str] = (),
        layers: Sequence[str] = (),
        schemas: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        last_known_good: str | os.PathLike[str] | None = None,
        telemetry: str = "requests",
        max_age_s: float = MAX_AGE_S,
        freshness: Sequence[Freshness] = (),
        start_timeout_s: float = 5.0,
        fetch_timeout_s: float = 2.0,
        lazy_max_bytes: int = 64 * 1024 * 1024,
        relay: str = "auto",
        instance: str | None = None,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        # Imported here and not above: `import veltrix_mw` is paid by every process, also those that never follow.
        # What only a start or `status` uses comes now, too: the first request, on its event loop, imports nothing, and
        # a process that forks while a thread imports has children that wait for that module for ever.
        from veltrix_mw import follower, tier_status  # noqa: F401
        from veltrix_mw.disk import LastKnownGood
        from veltrix_mw.subscriptions import Subscriptions
        from veltrix_mw.validation import Schemas
        from veltrix_mw.writer import Writer

        self._authority, self._mirror = _tiers(url, mirror, namespace, _lazy(lazy))
        self._store = _followed(self._authority, self._mirror)
        if relay not in {"auto", "never"}:
            raise SettingsError(f"relay is 'auto' or 'never', not {relay!r}")
        self._stands_for_election = relay == "auto"
        if self._mirror is not None and self._stands_for_election:
            from veltrix_mw import relay_thread  # noqa: F401
        self._named = instance
        info = self._store.info
        self.namespace: str = info.namespace
        self._events = Events(part="client", namespace=info.namespace, tier=info.origin)
        self._telemetry = Telemetry(telemetry, tracer_provider=tracer_provider, meter_provider=meter_provider)
        self._telemetry.load()
        self.start_timeout_s: float = _positive("start_timeout_s", start_timeout_s)
        self.fetch_timeout_s: float = _positive("fetch_timeout_s", fetch_timeout_s)
        if not isinstance(lazy_max_bytes, int) or isinstance(lazy_max_bytes, bool) or lazy_max_bytes <= 0:
            raise SettingsError(f"lazy_max_bytes is a positive whole number of bytes, not {lazy_max_bytes!r}")
        self._lazy_max_bytes = lazy_max_bytes
        try:
            self._views = self._made_views(
                freshness,
                layers=_layers(layers),
                defaults=defaults or {},
                max_age_s=_positive("max_age_s", max_age_s),
                telemetry=self._telemetry,
                lazy=info.lazy,
                trouble=self._trouble,
                ensure_running=self._ensure_running,
            )
        except SettingsError:
            raise
        except ValueError as exc:
            raise SettingsError(f"layers or defaults: {exc}") from exc
        self._schemas = Schemas(schemas or {}, layers=self._views.layers, defaults=self._views.defaults)
        if info.lazy:
            self._read_lazily(info.lazy, schemas or {})
        self._disk = (
            None
            if last_known_good is None
            else LastKnownGood(last_known_good, namespace=info.namespace, origin_url=info.url)
        )
        self._writer = Writer(
            self._authority, schemas=self._schemas, entries=self._current_entries, telemetry=self._telemetry
        )
        self._subscriptions = Subscriptions()
        # Protects that what a follower publishes is taken only while it is this client's follower.
        self._lock = threading.Lock()
        self._pid = 0  # the process that the follower runs in; 0: none
        self._follower: Follower | None = None
        self._relay: RelayThread | None = None
        self._published: Publication | None = None
        self._waiters = Waiters(self._has_reached)
        self._hopeless = False  # whether waiting for the first list is known not to help
        self._give_up_at_s: float | None = None  # when requests stop waiting for the first list
        self._told_not_ready = False
        self._told_unwritten = False
        self._holders = 0
        self._started_by_caller = False
        self._closed = False  # by the caller: only the caller starts it again
        self._caught_up = False  # in uWSGI's master: it lists once and does not follow
        self._last_written = 0  # the newest revision that this process wrote
        self._stats = _Stats(self)
        _clients.add(self)
        _hook_process()

    def _made_views(self, freshness: Sequence[Freshness], **options: Any) -> Views:
        if not freshness:
            return Views(**options)
        from veltrix_mw.fresh_views import FreshViews, least_age_s

        rules = FreshnessRules(freshness, least_s=least_age_s(mirrored=self._mirror is not None))
        return FreshViews(rules, **options) if rules else Views(**options)

    def _read_lazily(self, lazy: tuple[str, ...], schemas: Mapping[str, Any]) -> None:
        """Give the views what they load lazy units with."""
        from veltrix_mw.coalesce.unit_cache import UnitCache
        from veltrix_mw.keys import unit_of
        from veltrix_mw.lazy import LazyUnits, Unit
        from veltrix_mw.stores.mirrored import MirroredStore
        from veltrix_mw.unit_reader import UnitReader
        from veltrix_mw.validation import Schemas

        views = self._views
        # A unit can be judged by itself where a schema asks for no more than lies in one.
        of_units = {name: model for name, model in schemas.items() if unit_of(name, lazy)}
        cache: UnitCache[Unit] = UnitCache(max_bytes=self._lazy_max_bytes)
        views.units = LazyUnits(lazy, Schemas(of_units, defaults=views.defaults), cache)
        views.reader = UnitReader(
            self._authority,
            views.units,
            mirrored=self._store if isinstance(self._store, MirroredStore) else None,
            origin=self._authority.info.origin,
            prefixes=lazy,
            timeout_s=self.fetch_timeout_s,
            telemetry=self._telemetry,
        )

    # Lifecycle

    def start(self) -> None:
        """Begin to follow, in a background thread; returns at once. Idempotent, and again after `close`."""
        self._started_by_caller = True
        self._closed = False
        self._ensure_running()

    def close(self) -> None:
        """Stop following and close every connection; at most 2 s. Views and snapshots stay readable. Idempotent.

        Only `start`, `with`, `wait_ready` or a framework's lifespan starts it again.
        """
        with _process_lock():
            self._closed = True
            self._started_by_caller = False
            running = self._detach()
        self._stop(*running)

    def _detach(self) -> tuple[Follower | None, RelayThread | None]:
        """Let the follower go: from here on nothing that it publishes is taken. Under the process's lock."""
        with self._lock:
            follower, self._follower = self._follower, None
            relay, self._relay = self._relay, None
        inherited = self._pid not in {0, os.getpid()}
        self._pid = 0
        if follower is not None:
            self._stats.reconnects_before += follower.replica.reconnects
        if relay is not None:
            self._stats.filled_before += relay.filled
        return (None, None) if inherited else (follower, relay)

    def _stop(self, follower: Follower | None, relay: RelayThread | None) -> None:
        """What takes time about closing, without the lock."""
        deadline_s = time.monotonic() + CLOSE_S
        if relay is not None:
            relay.stop(0)  # both end at once
        if follower is not None:
            follower.stop(CLOSE_S * 0.6)
        if relay is not None:
            relay.stop(max(0.0, deadline_s - CLOSE_S * 0.4 - time.monotonic()))
        if self._follower is not None:
            return  # somebody has started it again meanwhile
        self._subscriptions.close()
        if self._views.lapses is not None:
            self._views.lapses.stop()
        if self._views.reader is not None:
            self._views.reader.close(timeout_s=max(0.1, deadline_s - time.monotonic()))
        if self._disk is not None and follower is not None:
            self._disk.close(max(0.1, deadline_s - time.monotonic()))
        self._store.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def hold(self) -> Callable[[], None]:
        """Start, and keep running until the function that this returns is called; for frameworks' lifespans.

        When the last holder lets go, the client is closed, unless the caller started it himself.
        """
        with _process_lock():
            self._holders += 1
            self._closed = False
        self._ensure_running()
        released = threading.Event()

        def release() -> None:
            with _process_lock():
                if released.is_set():
                    return
                released.set()
                self._holders -= 1
                if self._holders > 0 or self._started_by_caller:
                    return
                running = self._detach()
            self._stop(*running)

        return release

    def _ensure_running(self) -> None:
        pid = os.getpid()
        if self._is_settled(pid):
            return
        with told_after(), _process_lock():
            if self._is_settled(pid):
                return
            if self._pid not in {0, pid}:
                self._after_fork_in_child()  # a server whose forks run no hooks, as uWSGI's by default
            if self._follower is not None:
                self._events.tell(
                    "veltrix.follower_died",
                    logging.ERROR,
                    "another one begins where it left off",
                    revision=self._views.base.revision,
                )
                _, relay = self._detach()
                if relay is not None:
                    relay.stop(0)
            if _in_uwsgi_master():
                self._catch_up()
            else:
                self._start_follower(pid)

    def _is_settled(self, pid: int) -> bool:
        """Whether there is nothing to start: closed by the caller, or followed in this process."""
        follower = self._follower
        return self._closed or (self._pid == pid and follower is not None and follower.alive)

    def _catch_up(self) -> None:
        """List once, in this thread, and keep nothing open: uWSGI forks without any hook, thread or lock or not."""
        if self._caught_up:
            return
        self._caught_up = True
        self._follower = self._new_follower()
        try:
            self._follower.catch_up()
        finally:
            self._follower = None
            self._store.close()

    def _start_follower(self, pid: int) -> None:
        if not self.ready:  # a new life: requests wait for its first list again
            self._hopeless, self._give_up_at_s, self._told_not_ready = False, None, False
        follower = self._new_follower()
        with self._lock:
            self._follower = follower
        try:
            follower.start()
        except RuntimeError:  # no more threads, or the interpreter is ending: the next request tries again
            with self._lock:
                self._follower = None
            self._events.tell("veltrix.follower_not_started", logging.WARNING, NO_THREAD)
            return
        self._events.tell_end("veltrix.follower_started")
        self._pid = pid
        self._subscriptions.resume()
        if self._views.lapses is not None:
            self._views.lapses.start()
        self._start_relay()

    def _start_relay(self) -> None:
        if self._mirror is None or not self._stands_for_election:
            return
        from veltrix_mw.relay_thread import RelayThread, can_be_fed

        if not can_be_fed(self._mirror):
            return
        relay = RelayThread(self._authority, self._mirror, instance=self.instance, telemetry=self._telemetry)
        try:
            relay.start()
        except RuntimeError:
            self._events.tell("veltrix.relay_not_started", logging.WARNING, NO_THREAD)
            return
        self._events.tell_end("veltrix.relay_started")
        self._relay = relay

    def feed(self, report: Report) -> None:
        """Be the mirror's relay, or stand by, in a background thread until `close`; for `veltrix relay`.

        `report(event, fields)` is called on that thread with each turn of events, which `ReportingRelay` names. Waits
        for servers that are away. Raises `SettingsError` without a mirror that can be written, or where this client
        stands for election already; `AuthFailed` where the authority refuses the credentials.
        """
        from veltrix_mw.follower import CALL_TIMEOUT_S
        from veltrix_mw.protocols import Position
        from veltrix_mw.relay_report import ReportingRelay
        from veltrix_mw.relay_thread import RelayThread, can_be_fed

        if self._mirror is None or not can_be_fed(self._mirror):
            raise SettingsError(
                "a relay feeds a mirror: name it by mirror= or --mirror, as redis://h:6379/0, or set VELTRIX_MIRROR_URL"
            )
        if self._relay is not None:
            raise SettingsError(
                "this client stands for election already; make one with relay='never', and do not start it"
            )
        try:
            # A relay that stands by asks nothing of the authority: without this it would fail when it is needed.
            self._authority.confirm(Position("", 0), timeout_s=CALL_TIMEOUT_S)
        except AuthFailed:
            raise
        except StoreError:
            pass  # it is away, or was written already
        relay = ReportingRelay(report, lazy=self.lazy)
        self._relay = RelayThread(
            self._authority, self._mirror, instance=self.instance, relay=relay, telemetry=self._telemetry
        )
        self._relay.start()

    @property
    def instance(self) -> str:
        """This process's name: as given, else made of host and process id."""
        return self._named or _instance()

    @property
    def lazy(self) -> tuple[str, ...]:
        """The prefixes that are read on demand."""
        return self._authority.info.lazy

    def _new_follower(self) -> Follower:
        from veltrix_mw.follower import Follower
        from veltrix_mw.keyspace import Keyspace
        from veltrix_mw.replica import Replica

        return Follower(
            self._store,
            replica=Replica(Keyspace(self._schemas), origin=self._store.info.origin, max_age_s=self._views.max_age_s),
            publish=self._publish,
            failed=self._failed,
            telemetry=self._telemetry,
            prepare=lambda: self._telemetry.observe(self._stats),
            disk=self._disk,
            resumed=self._published,
        )

    def _after_fork_in_child(self) -> None:
        """The follower's thread stayed in the parent, and so did whoever held a lock."""
        self._lock = threading.Lock()
        self._waiters.after_fork()
        self._views.after_fork()
        if self._follower is not None:
            self._stats.reconnects_before += self._follower.replica.reconnects
        if self._relay is not None:
            self._stats.filled_before += self._relay.filled
        self._follower = None
        self._relay = None
        self._pid = 0

    # Readiness

    @property
    def ready(self) -> bool:
        """Whether a list was had, or a last-known-good loaded."""
        return self._published is not None

    @property
    def begun(self) -> bool:
        """Whether a request need not wait: a list was had, or waiting for one is known not to help.

        With a last-known-good loaded, requests still wait for the store's first answer, good or bad.
        """
        return self._has_reached(BEGUN)

    def wait_ready(self, timeout_s: float = 5.0) -> None:
        """Start, and wait until `ready`. Raises `NotReady`, which says why, after `timeout_s`."""
        self._closed = False
        self._ensure_running()
        with self._waiters.waiting(READY) as waiting:
            try:
                waiting.result(timeout_s)
            except TimeoutError:
                raise self._not_ready(timeout_s) from None

    async def await_ready(self, timeout_s: float = 5.0) -> None:
        """`wait_ready` without blocking the event loop."""
        self._closed = False
        self._ensure_running()
        with self._waiters.waiting(READY) as waiting:
            if not await awaited(waiting, timeout_s):
                raise self._not_ready(timeout_s)

    def _has_reached(self, what: int) -> bool:
        published = self._published
        if what == READY:
            return published is not None
        if what == BEGUN:
            return self._hopeless or (published is not None and published.snapshot.origin != "disk")
        return published is not None and published.snapshot.origin != "disk" and published.snapshot.revision >= what

    def _not_ready(self, timeout_s: float) -> NotReady:
        why = self._trouble()
        return NotReady(f"nothing was listed within {timeout_s:g} s" + (f": {why}" if why else ""))

    def _trouble(self) -> str:
        follower = self._follower
        error = None if follower is None else follower.replica.error
        return "" if error is None else str(error)

    def _failed(self, follower: Follower, error: StoreError) -> None:
        """Called by a follower's thread."""
        # What is to be fixed, or made by a first write, is not mended by letting requests wait.
        passing = isinstance(error, (StoreUnavailable, Compacted)) and not isinstance(error, NeverWritten)
        helped = self._published is not None  # the last-known-good serves, and this was the store's one chance
        if (helped or not passing) and follower is self._follower:
            self._hopeless = True
            self._waiters.wake()

    def _patience_s(self) -> float:
        """How long a request may still wait for the first list: `start_timeout_s` once, for all of them together."""
        self._ensure_running()
        now_s = time.monotonic()
        if self._give_up_at_s is None:
            self._give_up_at_s = now_s + self.start_timeout_s
        return max(0.0, self._give_up_at_s - now_s)

    def wait_start(self) -> None:
        """What a request does before its view: start, wait for the first list, once, and then go on in any case.

        Waits no longer than `start_timeout_s`, and not for what waiting does not mend, such as a missing permission.
        """
        patience_s = self._patience_s()
        if patience_s > 0:
            with self._waiters.waiting(BEGUN) as waiting:
                if not waiting.done():
                    with self._telemetry.awaiting(), contextlib.suppress(TimeoutError):
                        waiting.result(patience_s)
            self._tell_if_not_ready()

    async def await_start(self) -> None:
        """`wait_start` without blocking the event loop."""
        patience_s = self._patience_s()
        if patience_s > 0:
            with self._waiters.waiting(BEGUN) as waiting:
                if not waiting.done():
                    with self._telemetry.awaiting():
                        await awaited(waiting, patience_s)
            self._tell_if_not_ready()

    def _tell_if_not_ready(self) -> None:
        if not self.ready and not self._told_not_ready:
            self._told_not_ready = True
            self._events.tell("veltrix.not_ready", logging.WARNING, once=True, reason=self._trouble())

    # Reading

    @property
    def snapshot(self) -> Snapshot:
        """The newest snapshot; before the first list the last-known-good, or an empty one at revision 0."""
        self._ensure_running()
        return self._views.base._snapshot

    def view(self, layers: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> View:
        """A view pinned to the newest snapshot. Raises `InvalidKey` or `InvalidValue` for what is passed wrongly."""
        if self._pid != os.getpid() or not self._views.made & 15:
            self._ensure_running()
        return self._views.view(layers, overrides)

    def pinned(self, layers: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> Pinned:
        """`with client.pinned() as view:` makes a view the current one, for a task, a script, a thread.

        Waits for the first list like a request does.
        """
        self._ensure_running()
        if not self.begun:
            self.wait_start()
        return Pinned(self.view(layers, overrides))

    def subscribe(self, prefix: str, callback: Callback) -> Callable[[], None]:
        """Call `callback(changes, snapshot)` after changes below `prefix` ("" for all), on a thread of its own.

        `changes` are `Change`s, ascending by key. A slow callback skips states but never a key's last one; what it
        raises is logged. Returns the function that ends the subscription. Raises `InvalidKey`.
        """
        if prefix:
            check_prefix(prefix)
        self._ensure_running()
        return self._subscriptions.add(prefix, callback, self._views.base._snapshot)

    def wait_for(self, revision: int, timeout_s: float = 5.0) -> None:
        """Wait until this process serves `revision` or a later one. Raises `RevisionTimeout` after `timeout_s`."""
        self._ensure_running()
        with self._waiters.waiting(revision) as waiting:
            if not waiting.done():
                with self._views.waiting(), self._telemetry.awaiting(revision):
                    try:
                        waiting.result(timeout_s)
                    except TimeoutError:
                        raise self._revision_timeout(revision, timeout_s) from None

    async def await_for(self, revision: int, timeout_s: float = 5.0) -> None:
        """`wait_for` without blocking the event loop."""
        self._ensure_running()
        with self._waiters.waiting(revision) as waiting:
            if not waiting.done():
                with self._views.waiting(), self._telemetry.awaiting(revision):
                    if not await awaited(waiting, timeout_s):
                        raise self._revision_timeout(revision, timeout_s)

    def _revision_timeout(self, revision: int, timeout_s: float) -> RevisionTimeout:
        why = "the client is closed" if self._closed else self._trouble()
        return RevisionTimeout(
            f"revision {revision} was not applied here within {timeout_s:g} s; this process is at "
            f"{self._views.base.revision}" + (f" ({why})" if why else "")
        )

    def _publish(self, follower: Follower, publication: Publication) -> bool:
        """Called by a follower's thread; whether it was taken."""
        snapshot = publication.snapshot
        with told_after(), self._lock:
            if follower is not self._follower:
                return False  # it was let go while a call of its held it up: what it brings is old
            before = self._views.base._snapshot
            if snapshot.rejected is not before.rejected:
                known = before.rejected
                self._stats.eager_rejections += sum(
                    1 for key, why in snapshot.rejected.items() if known.get(key) != why
                )
            if self._views.reader is not None:
                # Before: a view of the new revision must find no unit that is older.
                self._views.reader.follow(publication)
            self._views.publish(snapshot, publication.changed)
            self._published = publication  # after: a client that says it is ready has a view that is
            self._subscriptions.offer(snapshot, publication.changed)
        self._waiters.wake()
        if self._told_not_ready:
            self._told_not_ready = False
            self._events.tell("veltrix.ready", logging.INFO, revision=snapshot.revision, origin=snapshot.origin)
        if self._views.reader is not None:
            self._views.reader.tell_rejected()
        self._tell_if_unwritten(snapshot)
        return True

    def _tell_if_unwritten(self, snapshot: Snapshot) -> None:
        if self._told_unwritten and snapshot.revision:
            self._events.tell_end("veltrix.written", revision=snapshot.revision)
        # A memory store is always empty at first, and nobody can have named it wrongly.
        if self._told_unwritten or snapshot.origin == "memory" or not _is_unwritten(snapshot):
            return
        self._told_unwritten = True
        reason = unwritten(self._authority.info)
        self._events.tell("veltrix.unwritten", logging.WARNING, once=True, reason=reason)

    # Writing

    def read(self, keys: Sequence[str], revision: int | None = None) -> dict[str, Entry]:
        """The present ones of `keys`, straight from the authority: linearizable now, or as of a past `revision`.

        Raises `StoreUnavailable`, `Compacted`, `InvalidKey`, `InvalidValue` (a stored value is not JSON).
        """
        return self._writer.read(keys, revision)

    def list(self, revision: int | None = None) -> Snapshot:
        """Every entry, straight from the authority, at one revision: linearizable now, or as of a past `revision`.

        Needs no follower and starts none. What does not decode, or breaks a schema, is in the snapshot's `rejected`.
        Raises `StoreUnavailable`, `Compacted`, `InvalidValue` (more than a worker holds), `ValueError` (there is no
        such revision yet).
        """
        from veltrix_mw.follower import LIST_TIMEOUT_S
        from veltrix_mw.keyspace import Keyspace

        sent_at_s = time.monotonic()
        if revision is None:
            listing = self._authority.list(timeout_s=LIST_TIMEOUT_S)
        else:
            listing = self._authority.list_at(revision, timeout_s=LIST_TIMEOUT_S)
        keyspace = Keyspace(self._schemas)
        keyspace.restore(
            listing,
            incarnation=listing.position.incarnation,
            origin=self._store.info.origin,
            proved_at_s=sent_at_s,
        )
        return keyspace.snapshot

    def put(self, key: str, value: Any, *, expected: int | None = None, author: str = "", reason: str = "") -> int:
        """Set a key; returns the revision that did it.

        `expected` is the `mod_revision` that the key must have, 0 for "must be absent". Raises `Conflict`,
        `InvalidKey`, `InvalidValue`, `AuthFailed`, `StoreUnavailable` (its fate is unknown: read again).
        """
        return self._wrote(self._writer.write([Put(key, value, expected)], author=author, reason=reason))

    @overload
    def delete(self, key: str, *, expected: int | None = None, author: str = "", reason: str = "") -> int: ...
    @overload
    def delete(
        self, key: str, *, expected: int | None = None, missing_ok: bool, author: str = "", reason: str = ""
    ) -> int | None: ...
    def delete(
        self,
        key: str,
        *,
        expected: int | None = None,
        missing_ok: bool = False,
        author: str = "",
        reason: str = "",
    ) -> int | None:
        """Remove a key; returns the revision that did it.

        Raises `KeyMissing` when it is absent; with `missing_ok` returns None then. Else raises what `put` does.
        """
        try:
            return self._wrote(self._writer.write([Delete(key, expected)], author=author, reason=reason))
        except KeyMissing:
            if missing_ok:
                return None
            raise

    def write(self, operations: Iterable[Operation], *, author: str = "", reason: str = "") -> int:
        """Apply `Put`s and `Delete`s as one revision, all or none; returns it. Raises what `put` and `delete` do."""
        return self._wrote(self._writer.write(operations, author=author, reason=reason))

    def history(self, key: str, *, limit: int = 100) -> tuple[Version, ...]:
        """The versions of `key` that the authority keeps, newest first, at most `limit`."""
        return self._writer.history(key, limit=limit)

    def rollback(self, revision: int, *, author: str = "", reason: str = "") -> int:
        """Write a new revision with the keyspace as it was at `revision`; returns the new one.

        Raises `Compacted` when `revision` is no longer kept, `Conflict` when someone wrote meanwhile.
        """
        return self._wrote(self._writer.rollback(revision, author=author, reason=reason))

    async def aput(
        self, key: str, value: Any, *, expected: int | None = None, author: str = "", reason: str = ""
    ) -> int:
        """`put` without blocking the event loop."""
        return await in_thread(lambda: self.put(key, value, expected=expected, author=author, reason=reason))

    async def adelete(
        self,
        key: str,
        *,
        expected: int | None = None,
        missing_ok: bool = False,
        author: str = "",
        reason: str = "",
    ) -> int | None:
        """`delete` without blocking the event loop."""
        return await in_thread(
            lambda: self.delete(key, expected=expected, missing_ok=missing_ok, author=author, reason=reason)
        )

    async def awrite(self, operations: Iterable[Operation], *, author: str = "", reason: str = "") -> int:
        """`write` without blocking the event loop."""
        return await in_thread(lambda: self.write(operations, author=author, reason=reason))

    async def aread(self, keys: Sequence[str], revision: int | None = None) -> dict[str, Entry]:
        """`read` without blocking the event loop."""
        return await in_thread(lambda: self.read(keys, revision))

    def _wrote(self, revision: int) -> int:
        self._last_written = revision
        return revision

    def _current_entries(self, keys: Sequence[str]) -> Any:
        """What the authority has now, as far as the writer's schema check of `keys` needs it."""
        written = self._last_written
        if self._follower is not None and not self._has_reached(written):
            # What this process has just written is not here yet; it comes within moments, or the check goes on.
            with self._waiters.waiting(written) as waiting, contextlib.suppress(TimeoutError):
                waiting.result(OWN_WRITE_S)
            self._last_written = 0  # once is enough: after a restore it may never come
        published = self._published
        if published is not None and published.snapshot.origin != "disk" and self._pid == os.getpid():
            entries, position = published.snapshot._entries, published.position
        else:
            from veltrix_mw.keyspace import Keyspace

            keyspace = Keyspace(self._schemas)
            listing = self._authority.list(timeout_s=SCHEMA_LIST_S)
            keyspace.restore(listing, incarnation="", origin="", proved_at_s=0.0)
            entries, position = keyspace.snapshot._entries, listing.position
        units = self._views.units
        if units is not None and (names := units.judged_with(keys)):
            for raw in self._authority.read_units(names, position, timeout_s=self.fetch_timeout_s).values():
                unit = units.past(raw, position.incarnation, position.revision)
                entries = entries.updated({key: (value, revision) for key, value, revision in unit._entries.items()})
        return entries

    # Telling

    def status(self) -> Status:
        """How this process's configuration is. Does no I/O."""
        from veltrix_mw.tier_status import tiers_of

        view = self._views.base
        snapshot = view._snapshot
        follower = self._follower
        running = follower is not None and follower.alive and self._pid == os.getpid()
        replica = None if follower is None else follower.replica
        relay, missing = self._relay_status()
        return Status(
            ready=self.ready,
            revision=snapshot.revision,
            incarnation=snapshot.incarnation,
            origin=snapshot.origin,
            age_s=view.age_s,
            stale=view.stale,
            rejected=self._rejected(snapshot),
            relay=relay,
            tiers=tiers_of(self._store, snapshot, replica, running=running),
            relay_missing=missing,
            unwritten=unwritten(self._authority.info) if self.ready and _is_unwritten(snapshot) else "",
            lazy=self._lazy_status(),
        )

    def _rejected(self, snapshot: Snapshot) -> Mapping[str, Rejection]:
        """What is held back: of the snapshot, and of lazy units as far as they were read."""
        units = self._views.units
        of_units = {} if units is None else units.rejected
        return FrozenDict({**snapshot.rejected, **of_units}) if of_units else snapshot.rejected

    def unwritten(self, timeout_s: float = 2.0) -> str:
        """What to tell where nothing was ever written to the namespace, asked now; empty where something was.

        Raises `StoreError`.
        """
        from veltrix_mw.protocols import Position

        try:
            found = self._authority.confirm(Position("", 0), timeout_s=timeout_s)
        except Compacted:
            return ""  # there is a history, and it does not begin there
        return "" if found.incarnation else unwritten(self._authority.info)

    def mirror_state(self, timeout_s: float = 2.0) -> MirrorState | None:
        """Where the mirror stands, asked now; None without a mirror. Raises `StoreError`."""
        return None if self._mirror is None else self._mirror.state(timeout_s=timeout_s)

    @property
    def ignored(self) -> tuple[int, tuple[str, ...]]:
        """The authority's keys that are none of ours, by their shape, as of the last list: how many, and some."""
        ignored = getattr(self._authority, "ignored", None)
        return (0, ()) if ignored is None else (ignored.count, tuple(ignored.examples))

    def _lazy_status(self) -> LazyStatus | None:
        units, reader = self._views.units, self._views.reader
        if units is None or reader is None:
            return None
        return LazyStatus(
            fetches=dict(reader.fetches),
            units_read=dict(reader.units_read),
            filled=self._stats.filled,
            held=units.held,
            bytes=units.bytes,
            max_bytes=self._lazy_max_bytes,
        )

    def _relay_status(self) -> tuple[str | None, str]:
        """Who feeds the mirror, or why nobody does."""
        from veltrix_mw.stores.mirrored import MirroredStore

        if not isinstance(self._store, MirroredStore):
            return None, ""
        relay = self._relay
        if relay is not None and relay.relay.leads:
            return self.instance, ""
        tiers = self._store.tiers
        state = tiers.mirror  # taken once: the follower's thread replaces it
        holder = "" if state is None else state.relay
        if tiers.fault_kind == "unreachable":
            return None, f"the mirror cannot be asked: {tiers.fault}"
        if holder:
            return holder, ""
        if relay is not None and relay.relay.barred:
            return (
                None,
                f"nobody may write the mirror; run `veltrix relay` with credentials that may ({relay.relay.barred})",
            )
        if relay is None:
            return None, "this process does not stand for election; run `veltrix relay`"
        return None, relay.relay.error or "an election is under way"

    def __repr__(self) -> str:
        info = self._store.info
        return f"<ConfigClient {info.url} namespace={info.namespace}>"

    @property
    def dropped_layers(self) -> int:
        """How many invalid layers of requests were dropped, where `on_invalid_layer` is `ignore`."""
        return self._views.dropped


class _Stats:
    """What the observable instruments read of a client: plain numbers, without I/O."""

    def __init__(self, client: ConfigClient) -> None:
        self._client = client
        self.eager_rejections = 0
        self.reconnects_before = 0  # those of followers that are gone
        self.filled_before = 0  # those of relays that are gone

    @property
    def namespace(self) -> str:
        return self._client.namespace

    @property
    def views(self) -> int:
        return self._client._views.made

    @property
    def rejections(self) -> int:
        units = self._client._views.units
        return self.eager_rejections + (0 if units is None else units.rejections)

    @property
    def dropped_layers(self) -> int:
        return self._client._views.dropped

    @property
    def stale_reads(self) -> int:
        return self._client._views.stale_reads

    @property
    def fetches(self) -> Mapping[str, int]:
        reader = self._client._views.reader
        return {} if reader is None else reader.fetches

    @property
    def reconnects(self) -> int:
        follower = self._client._follower
        return self.reconnects_before + (0 if follower is None else follower.replica.reconnects)

    @property
    def failovers(self) -> int:
        store = self._client._store
        failovers: int = getattr(store, "failovers", 0)  # a `FailsOver`'s
        return failovers

    @property
    def filled(self) -> int:
        """Lazy units that this process filled into the mirror, as its relay, so far."""
        relay = self._client._relay
        return self.filled_before + (0 if relay is None else relay.filled)

    @property
    def lazy_entries(self) -> int | None:
        units = self._client._views.units
        return None if units is None or self._client._closed else units.held

    @property
    def relay_held(self) -> int | None:
        if self._client._mirror is None or self._client._closed:
            return None
        holder, _ = self._client._relay_status()
        return int(holder is not None)

    def observe(self) -> Observed | None:
        if self._client._closed:
            return None
        view = self._client._views.base
        return Observed(view.age_s, view.revision, len(view._snapshot))


def _is_unwritten(snapshot: Snapshot) -> bool:
    """Whether the authority was listed, and had no history."""
    return not snapshot.incarnation and snapshot.origin not in {"disk", "none"}


def _tiers(
    url: str | Store | EtcdClient | None, mirror: str | Mirror | None, namespace: str | None, lazy: tuple[str, ...]
) -> tuple[Store, Mirror | None]:
    """The authority and, if there is one, its mirror. Nothing is opened."""
    from veltrix_mw.protocols import Mirror, Store
    from veltrix_mw.settings import find_mirror_url, find_url, parse_url
    from veltrix_mw.stores.opening import adopt_store, open_mirror, open_store

    if url is None or isinstance(url, str):
        authority = open_store(parse_url(find_url(url), namespace=namespace), lazy=lazy)
        mirror = find_mirror_url(None) if mirror is None else mirror
    elif isinstance(url, Store):
        authority = url
        if namespace is not None and namespace != url.info.namespace:
            raise SettingsError(f"the store's namespace is {url.info.namespace!r}, the argument's {namespace!r}")
        if lazy and lazy != url.info.lazy:
            raise SettingsError("lazy is the store's own setting; give it to the store that you hand in")
    elif hasattr(url, "channel") and hasattr(url, "metadata"):
        if namespace is None:
            raise SettingsError('a client names no namespace; give it: ConfigClient(client, namespace="shop")')
        authority = adopt_store(url, namespace=check_namespace(namespace), lazy=lazy)
    else:
        raise SettingsError(
            "a config URL is a str such as sqlite:///config.db; or hand in a store, or a client of etcd's that has a "
            f"channel and metadata, as etcd3.client(); not {type(url).__name__}"
        )
    if mirror == "":
        mirror = None
    if isinstance(mirror, str):
        mirror = open_mirror(parse_url(mirror, namespace=authority.info.namespace))
    if mirror is not None and not isinstance(mirror, Mirror):
        raise SettingsError(f"a mirror is a URL such as redis://h:6379/0, or a mirror; not {type(mirror).__name__}")
    if mirror is not None and mirror.info.namespace != authority.info.namespace:
        raise SettingsError(
            f"the mirror's namespace is {mirror.info.namespace!r}, the authority's {authority.info.namespace!r}"
        )
    return authority, mirror


def _followed(authority: Store, mirror: Mirror | None) -> Store:
    if mirror is None:
        return authority
    from veltrix_mw.stores.mirrored import MirroredStore

    return MirroredStore(authority, mirror)


def _lazy(lazy: Sequence[str]) -> tuple[str, ...]:
    if isinstance(lazy, str):
        raise SettingsError(f"lazy is a sequence of prefixes; write ({lazy!r},)")
    try:
        return tuple(sorted({check_prefix(prefix) for prefix in lazy}))
    except ValueError as exc:
        raise SettingsError(f"lazy: {exc}") from exc


def _instance() -> str:
    """`host:pid:` and what tells this process from another one of that number."""
    return _instances.setdefault(os.getpid(), f"{os.uname().nodename}:{os.getpid()}:{os.urandom(3).hex()}")


def _layers(layers: Sequence[str]) -> Sequence[str]:
    if isinstance(layers, str):
        raise SettingsError(f"layers is a sequence of prefixes; write ({layers!r},)")
    return layers


def _positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise SettingsError(f"{name} is a positive number of seconds, not {value!r}")
    return float(value)


# The process: forks and exits

_clients: WeakSet[ConfigClient] = WeakSet()
_process_locks: dict[int, threading.RLock] = {}  # by process id
_instances: dict[int, str] = {}  # by process id
_hooked = False


def _process_lock() -> threading.RLock:
    """Protects that a client has one follower, and who holds it.

    One for each process: a forked child finds a new one, whoever held the parent's.
    """
    return _process_locks.setdefault(os.getpid(), threading.RLock())


def _hook_process() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_forked)
        atexit.register(_exiting)


def _in_uwsgi_master() -> bool:
    """Whether this is uWSGI's master, which loads the app and then forks its workers in C.

    A thread that runs here is cut off in the middle of whatever it does, and its locks stay locked in each worker.
    """
    uwsgi = sys.modules.get("uwsgi")
    return uwsgi is not None and uwsgi.worker_id() == 0 and uwsgi.mule_id() == 0


def _forked() -> None:
    for client in list(_clients):
        client._after_fork_in_child()


def _exiting() -> None:
    # Only what runs in this process: a forked worker must not wait for its parent's threads.
    for client in list(_clients):
        if client._pid == os.getpid():
            client.close()
