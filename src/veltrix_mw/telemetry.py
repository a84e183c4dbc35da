"""What OpenTelemetry is told: the spans, their attributes and what is recorded, and the level that decides which.

Owns their names, and the rule that no value reaches them. It is told plain numbers and strings; it knows no snapshot,
client, store or framework, and needs no SDK. The metrics themselves are in `instruments`.

Only `opentelemetry.trace` is imported with this module. Measured beside it: `opentelemetry.metrics` costs 12% more,
the W3C propagator 9% and `importlib.metadata` 79%, so each waits for its first use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, get_current_span, propagation

from veltrix_mw.errors import HeldBack, KeyMissing, SettingsError, StoreError, VeltrixError, public_class
from veltrix_mw.events import Events
from veltrix_mw.faults import told as told_of
from veltrix_mw.instruments import SCHEMA_URL, SCOPE, Instruments, Stats, instruments_of
from veltrix_mw.version import __version__

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import Link, Span, Tracer, TracerProvider

__all__ = [
    "LEVELS",
    "current_context",
    "FetchOutcome",
    "LookupOutcome",
    "RefreshOutcome",
    "Telemetry",
    "WriteOutcome",
    "store_call",
    "unless_current",
]

LEVELS: Final = ("off", "requests", "lookups")
"""From nothing to everything: `requests` tells what config cost a request, `lookups` adds a span for each read."""

MAX_LINKS: Final = 32
"""The most links of one span: of a refresh the newest changes of a burst. SDKs keep 128 by default."""

_MAX_SHOWN_KEY: Final = 512  # the longest valid key; a read may ask for any string, and spans wait in memory

# In the OpenTelemetry context: who is to be told of the stores' calls, and whom a call is made for beside its parent.
_TOLD: Final = otel_context.create_key("veltrix-telemetry")
_LEADERS: Final = otel_context.create_key("veltrix-leaders")
# What the instrumentations of drivers look for: they would tell of each call a second time, and of each watch.
_SUPPRESSED: Final = "suppress_instrumentation"

_events: Final = Events(part="telemetry")

_fetch_duration = attrgetter("fetch_duration")
_call_duration = attrgetter("call_duration")
_refresh_duration = attrgetter("refresh_duration")
_propagation_duration = attrgetter("propagation_duration")

# The context without the public accessor's outer call, as every request asks for it: a tenth of what attaching a view
# costs. The name is private, so where it is gone the public one serves.
current_context: Final[Callable[[], otel_context.Context]] = getattr(
    getattr(otel_context, "_RUNTIME_CONTEXT", None), "get_current", otel_context.get_current
)


def _known_key(key: Any) -> str | None:
    """`key`, if this is where the API keeps a context's span."""
    kept = trace.set_span_in_context(INVALID_SPAN, otel_context.Context())
    return key if kept.get(key) is INVALID_SPAN else None


# Where a context has its span. `get_current_span` also makes sure of its type, by an `isinstance` of an abstract class,
# which is most of what it costs. As private as the above.
_SPAN_KEY: Final[str | None] = _known_key(getattr(propagation, "_SPAN_KEY", None))


# Plain classes, as dataclasses are dear to make at import, which the benchmark P9 counts.
class LookupOutcome:
    """What a read found; an exception that leaves the read overrules it."""

    __slots__ = ("result",)

    def __init__(self) -> None:
        self.result: Literal["hit", "miss", "error"] = "hit"


class FetchOutcome:
    """How a fetch of lazy units came by them: `hit` where all were held, `coalesced` where others had them read.

    `absent` is a miss that brought no entry. `error` is the first that a unit ended in; it makes the result one.
    `origin` is the tier that what it had read came from, `span` its own and `leaders` those of whom it waited for.
    """

    __slots__ = ("error", "leaders", "origin", "result", "span")

    def __init__(
        self,
        result: Literal["hit", "miss", "absent", "coalesced", "error"] = "coalesced",
        error: Exception | None = None,
    ) -> None:
        self.result = result
        self.error = error
        self.origin: str | None = None
        self.span: Span = INVALID_SPAN
        self.leaders: list[Span] = []

    def follows(self, leader: object) -> None:
        """It waits for what `leader`, another fetch, has read: said before its span begins, or while it waits."""
        if (
            isinstance(leader, FetchOutcome)
            and leader is not self
            and leader.span.get_span_context().is_valid
            and leader.span not in self.leaders
            and len(self.leaders) < MAX_LINKS
        ):
            self.leaders.append(leader.span)
            self.span.add_link(leader.span.get_span_context())  # of no effect before it has begun


class RefreshOutcome:
    """What a refresh applied: the revision reached and the number of keys changed; None is left out.

    `origin` is the tier that it came from, if that is another than was asked.
    """

    __slots__ = ("changes", "origin", "revision")

    def __init__(self) -> None:
        self.revision: int | None = None
        self.origin: str | None = None
        self.changes: int | None = None


class WriteOutcome:
    """What a write made: its revision; None is left out."""

    __slots__ = ("revision",)

    def __init__(self) -> None:
        self.revision: int | None = None


class Telemetry:
    """What one client tells OpenTelemetry, at one level.

    At level `off` nothing is emitted, created or registered. No method raises because of what it is told, and
    no value of a key reaches a span or a metric. Safe to use from any number of threads, and after a fork.

    The providers are those given, else the global ones, also when these are set later.
    """

    __slots__ = ("_instruments", "_meter_provider", "_tracer", "_tracer_provider", "level")

    def __init__(
        self,
        level: str = "requests",
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        """Create nothing yet. Raises `SettingsError` for a level that is none of `LEVELS`."""
        if level not in LEVELS:
            raise SettingsError(f"telemetry={level!r} is not a level: write one of {', '.join(LEVELS)}")
        self.level: Final = level
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider
        self._tracer: Tracer | None = None
        self._instruments: Instruments | None = None

    def load(self) -> None:
        """Import what the follower will use.

        Not left to its thread: a process that forks while a thread imports has children that wait for that import
        for ever, as the module's lock is held by nobody there.
        """
        if self.level != "off":
            import opentelemetry.metrics
            import opentelemetry.trace.propagation.tracecontext  # noqa: F401

    # Requests. What an SDK raises, or what people hang into it, is told in the log, and changes nothing else.

    def recording_span(self, context: otel_context.Context | None = None) -> Span | None:
        """The current span, or that of `context`, if it is recording and the level is not `off`, else None.

        The middlewares ask only where the OpenTelemetry context is not empty, as without instrumentation it is.
        """
        if self.level == "off":
            return None
        try:
            span: Span | None
            if context is None or _SPAN_KEY is None:
                span = get_current_span(context)
            else:
                span = cast("Span | None", context.get(_SPAN_KEY))
            return None if span is None or not span.is_recording() else span
        except Exception as exc:  # noqa: BLE001  # whatever an SDK does, config comes
            _failed(exc)
            return None

    def annotate_request(self, span: Span, revision: int, origin: str, stale: bool, count: int, total_s: float) -> None:
        """Set the five attributes on the request's span, if it is still recording; may be called again.

        `count` and `total_s` are the number of reads so far and the seconds they took together.
        """
        try:
            if self.level != "off" and span.is_recording():
                span.set_attributes(
                    {
                        "veltrix.revision": revision,
                        "veltrix.origin": origin,
                        "veltrix.stale": stale,
                        "veltrix.lookup.count": count,
                        "veltrix.lookup.total": total_s,
                    }
                )
        except Exception as exc:  # noqa: BLE001
            _failed(exc)

    def record_request(self, context: otel_context.Context, origin: str, total_s: float) -> None:
        """Record `veltrix.lookup.duration`, once for each request that `recording_span` gave a span.

        `context` is what was current then, with the span: that may have ended since, or be current no longer (a WSGI
        body is closed late), and the exemplar is to name it all the same.
        """
        try:  # as `_record` does, written out: each request comes here, and P12 counts its calls
            if self.level != "off":
                told = {"veltrix.origin": origin}
                (self._instruments or self._metrics()).lookup_duration.record(total_s, told, context)
        except Exception as exc:  # noqa: BLE001
            _failed(exc)

    @contextmanager
    def lookup(self, key: str, context: otel_context.Context | None = None) -> Iterator[LookupOutcome]:
        """Around one read: a `veltrix.lookup` span at level `lookups`, nothing at the others.

        Child of the current span, or of that of `context`; an empty `key` is of a read that names none.
        `KeyMissing` that leaves it is a miss, `HeldBack` and any other exception an error. The span does not
        become the current one, as a read calls nothing that has spans of its own; that halves its price.
        """
        outcome = LookupOutcome()
        if self.level != "lookups":
            yield outcome
            return
        named = {"veltrix.key": _shown(key)} if key else None
        span = self._start_span("veltrix.lookup", attributes=named, context=context)
        try:
            yield outcome
        except Exception as exc:
            if isinstance(exc, KeyMissing) and not isinstance(exc, HeldBack):
                outcome.result = "miss"
            else:
                outcome.result = "error"
                self._tell_error(span, exc)
            raise
        finally:
            _set(span, {"veltrix.result": outcome.result})
            _end(span)

    @contextmanager
    def fetch(
        self,
        outcome: FetchOutcome,
        attributes: Mapping[str, str | int],
        context: otel_context.Context | None = None,
    ) -> Iterator[None]:
        """Around a wait for lazy units: a `veltrix.fetch` span, child of the current one, and a record of its duration.

        Or child of that of `context`. The span links to those of the fetches that it waits for. It is in `outcome`, and
        does not become the current one: a task that waits may be closed in another context. One that was cancelled
        has that as its result, and no record.
        """
        if self.level == "off":
            yield
            return
        # Those known now are given now: samplers see no later ones.
        links = [trace.Link(leader.get_span_context()) for leader in outcome.leaders]
        outcome.span = span = self._start_span("veltrix.fetch", attributes=attributes, links=links, context=context)
        started_s = time.perf_counter()
        is_cancelled = True
        try:
            yield
            is_cancelled = False
        except Exception as exc:
            outcome.error, outcome.result = exc, "error"
            is_cancelled = False
            raise
        finally:
            if outcome.error is not None:
                self._tell_error(span, outcome.error)
            told: dict[str, str] = {"veltrix.result": "cancelled" if is_cancelled else outcome.result}
            if outcome.origin is not None:
                told["veltrix.origin"] = outcome.origin
            _set(span, told)
            if not is_cancelled:
                took_s = time.perf_counter() - started_s
                self._record(_fetch_duration, took_s, told, trace.set_span_in_context(span, context))
            _end(span)

    @contextmanager
    def awaiting(self, revision: int | None = None) -> Iterator[None]:
        """Around a wait until this process serves a revision: a `veltrix.fetch` span, and a record of its duration.

        None stands for the first list after a start.
        """
        what: dict[str, str | int] = {"veltrix.start": True} if revision is None else {"veltrix.revision": revision}
        with self.fetch(FetchOutcome("hit"), what):
            yield

    # Stores

    @contextmanager
    def background(self) -> Iterator[None]:
        """Around what a thread of ours does: in an empty context, and silent but for what we tell ourselves."""
        with _within(self._context()):
            yield

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Around a call to a store that a caller waits for: the store's spans are children of the caller's."""
        with _within(self._context(otel_context.get_current())):
            yield

    @contextmanager
    def leading(self, leaders: Sequence[FetchOutcome]) -> Iterator[None]:
        """Around a call to a store on behalf of several fetches: child of one that records, linked to the others."""
        context = self._context()
        known = list(dict.fromkeys(each.span for each in leaders if each.span.get_span_context().is_valid))
        known.sort(key=lambda span: not span.is_recording())
        if known:
            links = [trace.Link(span.get_span_context()) for span in known[1 : MAX_LINKS + 1]]
            context = otel_context.set_value(_LEADERS, links, trace.set_span_in_context(known[0], context))
        with _within(context):
            yield

    def _context(self, around: otel_context.Context | None = None) -> otel_context.Context:
        """The context with what `store_call` looks for, and without what drivers' instrumentations would tell."""
        context = otel_context.Context() if around is None else around
        if self.level == "off" and around is not None:
            return context
        return otel_context.set_value(_SUPPRESSED, True, otel_context.set_value(_TOLD, self, context))

    @contextmanager
    def _store_call(
        self, system: str, operation: str, namespace: str, host: tuple[str, int], size: int
    ) -> Iterator[None]:
        common: dict[str, str | int] = {
            "db.system.name": system,
            "db.operation.name": operation,
            "db.namespace": namespace,
            "server.address": host[0],
            "server.port": host[1],
        }
        span: Span = INVALID_SPAN
        if get_current_span().is_recording():
            # Without a span that waits for it, a call is what following consists of: some a second, for ever.
            links = otel_context.get_value(_LEADERS)
            span = self._start_span(
                f"{operation} {namespace}",
                kind=trace.SpanKind.CLIENT,
                attributes=common if size < 2 else {**common, "db.operation.batch.size": size},
                links=links if isinstance(links, list) else None,
            )
        context = otel_context.get_current() if span is INVALID_SPAN else trace.set_span_in_context(span)
        started_s = time.perf_counter()
        error: dict[str, str | int] = {}
        try:
            yield
        except Exception as exc:
            self._tell_error(span, exc)
            error["error.type"] = public_class(exc).__name__
            raise
        finally:
            took_s = time.perf_counter() - started_s
            self._record(_call_duration, took_s, {**common, **error}, context)
            _end(span)

    # Following

    @contextmanager
    def refresh(self, kind: str, origin: str, *, links: Sequence[str] = ()) -> Iterator[RefreshOutcome]:
        """Around a list, a relist or the application of a batch: a `veltrix.refresh` span, a new root.

        `kind` says which of them it is. `links` are the traceparents of the change records applied, oldest
        first; the newest `MAX_LINKS` well-formed ones become span links. The body runs in an otherwise empty
        context with this span. `veltrix.refresh.duration` has the refreshes that no exception ended.
        """
        outcome = RefreshOutcome()
        if self.level == "off":
            yield outcome
            return
        attributes = {"veltrix.refresh.kind": kind, "veltrix.origin": origin}
        started_s = time.perf_counter()
        with self._span("veltrix.refresh", self._context(), attributes, _links(links)) as span:
            try:
                yield outcome
            finally:
                told = {"veltrix.revision": outcome.revision, "veltrix.changes": outcome.changes}
                _set(span, {**told, "veltrix.origin": outcome.origin})
            self._record(_refresh_duration, time.perf_counter() - started_s)

    def propagated(self, written_at_s: float, now_s: float) -> None:
        """Record how long a change took from its write to its application here.

        Both are Unix times in seconds, of two machines' clocks: a negative difference counts as 0, and a
        change whose time is not known (0) is left out.
        """
        if self.level != "off" and written_at_s > 0:
            self._record(_propagation_duration, max(0.0, now_s - written_at_s))

    # Writing

    @contextmanager
    def write(self) -> Iterator[WriteOutcome]:
        """Around a put, delete, write or rollback: a `veltrix.write` span, child of the current one, and current."""
        outcome = WriteOutcome()
        if self.level == "off":
            yield outcome
            return
        with self._span("veltrix.write", self._context(otel_context.get_current())) as span:
            try:
                yield outcome
            finally:
                _set(span, {"veltrix.revision": outcome.revision})

    def traceparent(self) -> str:
        """The W3C `traceparent` of the current span; empty at level `off` or without a valid span."""
        told = get_current_span().get_span_context()
        if self.level == "off" or not told.is_valid:
            return ""
        # Written here, not by the API's propagator: importing that reads files, and a write may run on an event loop.
        return f"00-{trace.format_trace_id(told.trace_id)}-{trace.format_span_id(told.span_id)}-{told.trace_flags:02x}"

    # Clients

    def observe(self, stats: Stats) -> None:
        """Let the observable instruments read `stats` for as long as it lives. Idempotent.

        The first call in a process imports modules and reads the package's metadata (some 40 ms). Make it on the
        follower's thread, before anything else: then nothing here blocks an event loop later.
        """
        if self.level != "off":
            try:
                self._metrics().observe(stats)
            except Exception as exc:  # noqa: BLE001
                _failed(exc)

    # Behind it

    @contextmanager
    def _span(
        self,
        name: str,
        context: otel_context.Context,
        attributes: Mapping[str, str] | None = None,
        links: Sequence[Link] = (),
    ) -> Iterator[Span]:
        """Run the body in `context` with a new INTERNAL span, and tell the span of an exception that leaves it.

        The API's own `start_as_current_span` would keep the surrounding context around a new root.
        """
        span = self._start_span(name, context=context, attributes=attributes, links=links)
        token = otel_context.attach(trace.set_span_in_context(span, context))
        try:
            yield span
        except Exception as exc:
            self._tell_error(span, exc)
            raise
        finally:
            otel_context.detach(token)
            _end(span)

    def _start_span(self, name: str, **how: Any) -> Span:
        """A new span; one that is invalid, and takes everything, where the SDK or what is in it fails."""
        try:
            return self._spans().start_span(name, **how)
        except Exception as exc:  # noqa: BLE001  # samplers and processors are other people's
            _failed(exc)
            return INVALID_SPAN

    def _record(
        self,
        histogram: Callable[[Instruments], Histogram],
        value: float,
        attributes: Mapping[str, str | int] | None = None,
        context: otel_context.Context | None = None,
    ) -> None:
        try:
            histogram(self._instruments or self._metrics()).record(value, attributes, context)
        except Exception as exc:  # noqa: BLE001
            _failed(exc)

    def _tell_error(self, span: Span, exc: Exception) -> None:
        """Set status ERROR and `error.type`, and record the exception without anything that may hold a value.

        Not by `record_exception`: the traceback it keeps shows source lines (`put("key", "...")`) and the driver's
        errors below ours. Of other people's exceptions only the type is told; so it is of those of ours that name keys,
        below level `lookups`: a key may have a tenant in it. Those of stores name servers.
        """
        is_told = isinstance(exc, StoreError) or (isinstance(exc, VeltrixError) and self.level == "lookups")
        try:
            if not span.is_recording():
                return
            kind = public_class(exc)
            message = str(exc) if is_told else None
            event = {"exception.type": f"{kind.__module__}.{kind.__qualname__}"}
            if message is not None:
                event["exception.message"] = message
            span.add_event("exception", event)
            span.set_attribute("error.type", kind.__name__)
            span.set_status(trace.StatusCode.ERROR, message)
        except Exception as failure:  # noqa: BLE001
            _failed(failure)

    def _spans(self) -> Tracer:
        # Two threads may make one each: tracers of one scope are interchangeable.
        if self._tracer is None:
            self._tracer = trace.get_tracer(
                SCOPE, __version__, tracer_provider=self._tracer_provider, schema_url=SCHEMA_URL
            )
        return self._tracer

    def _metrics(self) -> Instruments:
        if self._instruments is None:
            self._instruments = instruments_of(self._meter_provider)
        return self._instruments


@contextmanager
def _within(context: otel_context.Context) -> Iterator[None]:
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)


@contextmanager
def store_call(system: str, operation: str, namespace: str, host: tuple[str, int], *, size: int = 1) -> Iterator[None]:
    """Around one call of a store to a server; `size` is the number of commands sent together.

    Tells the `Telemetry` on whose behalf the call is made (`background`, `calling`, `leading`, `refresh`, `write`), if
    there is one: a span of kind CLIENT where a span that records is current, and a record of
    `db.client.operation.duration`. `operation` and `namespace` are names, never keys nor values.
    """
    told = otel_context.get_value(_TOLD)
    if isinstance(told, Telemetry) and told.level != "off":
        with told._store_call(system, operation, namespace, host, size):
            yield
    else:
        yield


def _shown(key: str) -> str:
    """The key as a span may carry it: bounded, and ASCII, as half a surrogate pair fails a whole export."""
    try:
        text = str(key)
    except Exception:  # noqa: BLE001  # whatever was asked for
        text = type(key).__qualname__
    return text[:_MAX_SHOWN_KEY].encode("ascii", "backslashreplace").decode("ascii")


def _set(span: Span, attributes: Mapping[str, int | str | None]) -> None:
    """Set what is known."""
    try:
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    except Exception as exc:  # noqa: BLE001
        _failed(exc)


def _end(span: Span) -> None:
    try:
        span.end()
    except Exception as exc:  # noqa: BLE001  # of a processor
        _failed(exc)


def unless_current(context: otel_context.Context) -> otel_context.Context | None:
    """`context`, unless a span is current: then None, which stands for the current context."""
    return None if get_current_span().get_span_context().is_valid else context


def _failed(exc: Exception) -> None:
    """OpenTelemetry failed; config goes on without what it was to be told."""
    _events.tell("veltrix.telemetry_failed", logging.ERROR, error=told_of(exc))


def _links(traceparents: Sequence[str]) -> list[Link]:
    """Links to the newest `MAX_LINKS` well-formed traceparents, oldest first."""
    if not traceparents:
        return []
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    extract = TraceContextTextMapPropagator().extract
    links: list[Link] = []
    for traceparent in reversed(traceparents):
        told = get_current_span(extract({"traceparent": traceparent}, otel_context.Context())).get_span_context()
        if told.is_valid:
            links.append(trace.Link(told))
            if len(links) == MAX_LINKS:
                break
    links.reverse()
    return links
