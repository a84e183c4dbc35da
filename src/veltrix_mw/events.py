"""Events: what the library tells in the log, by stable names and fields, and no more lines of it than help.

Owns how a line is made and when it is logged; knows nobody who tells one, and sets up no handler.

::

    a fault  ──► the first at once ──► repeats within WINDOW_S are held back and counted
                                           └──► the next line, or the last one at the window's end, says how many
    its end  ──► at once: the log never leaves off at a fault that is over, nor at an end after which it failed again

A fault that the teller tells once, when it begins, is told at once also when it comes back soon, BURST times within a
window: what comes and goes all the time is then told as it stands at the window's end.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Final

from opentelemetry import trace

from veltrix_mw.faults import without_credentials

__all__ = ["BURST", "ENDS", "NO_THREAD", "WINDOW_S", "Events", "Field", "Limit", "reset", "settle", "told_after"]

Field = str | int | float | bool | None
"""What a field of an event may be: what every log's encoder can carry."""

WINDOW_S: Final = 60.0  # a fault that lasts is told once a minute: often enough to be seen, 1,440 lines a day
BURST: Final = 5  # a store that comes and goes every few seconds is told so, and fills no disk
MOST_KEPT: Final = 1024  # faults that are told apart; those beyond share one count for each event

NO_THREAD: Final = "no thread could be started; raise the limit on threads"

ENDS: Final[Mapping[str, tuple[str, ...]]] = {
    "veltrix.accepted": ("veltrix.rejected",),
    "veltrix.confirmed": ("veltrix.confirm_failed",),
    "veltrix.current": ("veltrix.stale",),
    "veltrix.failover": ("veltrix.failover",),  # at level info: the mirror is followed again
    "veltrix.filled": ("veltrix.fill_failed",),
    "veltrix.follower_started": ("veltrix.follower_not_started",),
    "veltrix.lapses_started": ("veltrix.lapses_not_started",),
    "veltrix.guides_agree": ("veltrix.guides_disagree",),
    "veltrix.guides_answer": ("veltrix.guides_failed",),
    "veltrix.last_known_good_saved": ("veltrix.last_known_good_unsaved",),
    "veltrix.member_belongs": ("veltrix.member_foreign",),
    "veltrix.ready": ("veltrix.not_ready",),
    "veltrix.relay_elected": ("veltrix.relay_deposed", "veltrix.relay_resigned"),
    "veltrix.relay_started": ("veltrix.relay_not_started",),
    "veltrix.store_answers": ("veltrix.store_failed",),
    "veltrix.subscriber_recovered": ("veltrix.subscriber_failed",),
    "veltrix.subscriber_started": ("veltrix.subscriber_not_started",),
    "veltrix.user_checked": ("veltrix.user_unused",),
    "veltrix.written": ("veltrix.unwritten",),
}
"""The events, below level warning, that say that others are over."""

_APART_BY: Final[Mapping[str, str]] = {
    "veltrix.accepted": "key",
    "veltrix.member_belongs": "host",
    "veltrix.member_foreign": "host",
    "veltrix.rejected": "key",
    "veltrix.user_checked": "host",
    "veltrix.user_unused": "host",
}
"""The field by which one event tells several faults that are limited each by itself."""

_At = tuple[int, str, object]  # a fault: of whom, which event, told apart by what
_BEYOND: Final = object()  # what all are told apart by that are more than are kept


@dataclass(frozen=True, slots=True)
class _Line:
    """A line as it was when it was told, wherever and whenever it is logged."""

    logger: str
    level: int
    event: str
    text: str
    fields: Mapping[str, Field]
    about: Mapping[str, Field]
    where: tuple[str, int, str]
    span: tuple[str, str] | None
    told_s: float
    suppressed: int = 0
    late_s: float = 0.0

    def after(self, suppressed: int, late_s: float = 0.0) -> _Line:
        """The line, as the one that is logged after `suppressed` were not."""
        return replace(self, suppressed=suppressed, late_s=late_s)


@dataclass(slots=True)
class _Fault:
    told_s: deque[float] = field(default_factory=lambda: deque(maxlen=BURST))  # when it was told last
    shown: bool = False  # whether the log's last line of it says that it lasts
    once: bool = True  # whether its teller tells it once, when it begins
    held: int = 0  # lines that were held back since the last one
    line: _Line | None = None  # the newest of those

    def due_s(self, *, begins: bool) -> float:
        """When the next line may be logged; `begins`: it says that the fault begins, or is over."""
        allowed = BURST if begins else 1
        return self.told_s[-allowed] + WINDOW_S if len(self.told_s) >= allowed else -math.inf

    def line_due_s(self) -> float:
        """When the line that was held back is to be logged."""
        line = self.line
        if line is None:
            return math.inf
        return self.due_s(begins=self.once or not self.shown or _is_end(line))

    def log(self, line: _Line, now_s: float) -> _Line:
        """Note that this line is logged from here on; as it is to be logged."""
        is_late = line is self.line
        suppressed, self.held, self.line = self.held - is_late, 0, None
        self.shown = not _is_end(line)
        if self.shown:
            self.told_s.append(now_s)
        return line.after(suppressed, now_s - line.told_s if is_late else 0.0)

    def hold(self, line: _Line) -> None:
        self.held += 1
        self.line = line


class Limit:
    """Decides which lines are logged; thread-safe, and bounded in what it keeps.

    Logs nothing itself, so that no lock is held while anything is logged. A forked child begins anew: what the parent
    held back is the parent's to tell. That is found out by the process id, as some servers fork without any hook.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self._pid = os.getpid()
        # Protects what follows. Reentrant: a finalizer, which may run at any allocation, may have something to tell.
        self._lock = threading.RLock()
        self._faults: dict[_At, _Fault] = {}
        self._held: set[_At] = set()  # those with a line that was held back
        self._due_s = math.inf  # the first of them is due no sooner
        self._crowded_until_s = -math.inf  # until when it is not looked again for what can be forgotten

    def fault(self, at: _At, line: _Line, *, once: bool) -> _Line | None:
        """The line as it is to be logged now; None if it is held back."""
        self._own()
        with self._lock:
            at, fault = self._kept(at)
            fault.once = once
            if line.told_s >= fault.due_s(begins=once or not fault.shown):
                self._held.discard(at)
                return fault.log(line, line.told_s)
            self._hold(at, fault, line)
            return None

    def end(self, ended: Iterable[_At], line: _Line, *, if_told: bool) -> _Line | None:
        """The line that says that the faults are over, as it is to be logged now; None if it is held back, or needless.

        It is logged at once, but after a fault that was held back itself: then they are told together, as they stand
        when that one is due. `if_told`: it is needless where none of the faults was.
        """
        self._own()
        with self._lock:
            known = [(at, self._faults[at]) for at in ended if at in self._faults]
            shown = [(at, fault) for at, fault in known if fault.shown]
            if not shown:
                for at, fault in known:
                    if fault.line is not None:
                        self._hold(at, fault, line)
                        return None
                return None if if_told else line
            suppressed = 0
            for at, fault in shown:
                self._held.discard(at)
                suppressed += fault.log(line, line.told_s).suppressed
            return line.after(suppressed)

    def is_told(self, at: _At) -> bool:
        """Whether the log's last line of the fault says that it lasts, or a line of it is held back."""
        fault = self._faults.get(at)
        return fault is not None and (fault.shown or fault.line is not None)

    def due(self) -> list[_Line]:
        """The lines that were held back and are to be logged now."""
        if not self._held or self.clock() < self._due_s:
            return []
        self._own()
        with self._lock:
            now_s, due = self.clock(), []
            for at in list(self._held):
                fault = self._faults[at]
                if fault.line is not None and now_s >= fault.line_due_s():
                    self._held.discard(at)
                    due.append(fault.log(fault.line, now_s))
            self._due_s = min((self._faults[at].line_due_s() for at in self._held), default=math.inf)
            return due

    def _own(self) -> None:
        if self._pid != os.getpid():
            self.reset()

    def _hold(self, at: _At, fault: _Fault, line: _Line) -> None:
        fault.hold(line)
        self._held.add(at)
        self._due_s = min(self._due_s, fault.line_due_s())

    def _kept(self, at: _At) -> tuple[_At, _Fault]:
        fault = self._faults.get(at)
        if fault is None:
            if len(self._faults) >= MOST_KEPT:
                self._forget_some()
            if len(self._faults) >= MOST_KEPT:
                at = (0, at[1], _BEYOND)
            fault = self._faults.setdefault(at, _Fault())
        return at, fault

    def _forget_some(self) -> None:
        """Forget faults that tell nothing more: whose window is over, and whose end is told whether known or not.

        Looks at all of them, so at most once a second.
        """
        now_s = self.clock()
        if now_s < self._crowded_until_s:
            return
        self._crowded_until_s = now_s + 1.0
        over_s = now_s - WINDOW_S
        for at, fault in list(self._faults.items()):
            is_over = bool(fault.told_s) and fault.told_s[-1] <= over_s
            if is_over and fault.line is None and (fault.once or not fault.shown):
                del self._faults[at]


_limit: Final = Limit()  # the process's
_numbers: Final = itertools.count(1)


class Events:
    """Tells the events of one part of the process in the log; thread-safe.

    Never raises, whatever a handler of the application does. `about` are fields of each event, which its message leaves
    out: `part`, `namespace`, `tier`, ... Faults of two of these are limited each by itself.
    """

    def __init__(self, logger: str = "veltrix_mw", *, limit: Limit = _limit, **about: Field) -> None:
        self._logger = logger
        self._limit = limit
        self._about = about
        self._number = next(_numbers)

    def tell(
        self,
        event: str,
        level: int,
        text: str = "",
        /,
        *,
        once: bool = False,
        about: Mapping[str, Field] | None = None,
        **fields: Field,
    ) -> None:
        """Log `event`, unless it is a repeat within `WINDOW_S`.

        `once`: the teller itself tells it once for each time that it begins. Neither fields nor `text`, which is for
        people, may hold a value; credentials in URLs are cut.
        """
        self._tell(event, level, text, about, fields, once=once)

    def tell_end(self, event: str, text: str = "", /, **fields: Field) -> None:
        """Log at level info that the faults that `event` ends are over, if one of them was told; cheap where not."""
        ats = [(self._number, fault, _apart(event, fields)) for fault in ENDS[event]]
        if any(self._limit.is_told(at) for at in ats):
            self._tell(event, logging.INFO, text, None, fields, if_told=True)

    def _tell(
        self,
        event: str,
        level: int,
        text: str,
        about: Mapping[str, Field] | None,
        fields: Mapping[str, Field],
        *,
        once: bool = False,
        if_told: bool = False,
    ) -> None:
        try:
            logger = logging.getLogger(self._logger)
            ends = ENDS.get(event, ()) if level < logging.WARNING else ()
            if not ends and not logger.isEnabledFor(level):
                return
            line = _Line(
                self._logger,
                level,
                event,
                without_credentials(text),
                _shown(fields),
                _shown({**self._about, **(about or {})}),
                logger.findCaller(stacklevel=3)[:3],
                _current_span(),
                self._limit.clock(),
            )
            apart = _apart(event, fields)
            if ends:
                ended = [(self._number, fault, apart) for fault in ends]
                logged = self._limit.end(ended, line, if_told=if_told)
            else:
                logged = self._limit.fault((self._number, event, apart), line, once=once)
            if logged is not None:
                _log(logged)
            _settle(self._limit)
        except Exception:  # noqa: BLE001, S110  # a log that fails is no reason to fail, and there is nowhere to say so
            pass


def settle() -> None:
    """Log what was held back and is due. Whoever has a thread that wakes up now and then calls this; cheap."""
    # Nothing but a defect would raise here; what handlers raise, `_log` keeps.
    _settle(_limit)


@contextlib.contextmanager
def told_after() -> Iterator[None]:
    """Around a lock: what this thread tells in the block is logged at its end, when the lock is free again.

    A handler may do anything: read a view, wait for a socket, fork.
    """
    kept = _kept.get()
    if kept is not None and kept.thread == threading.get_ident():
        yield  # the outer block's end it is
        return
    kept = _Kept(threading.get_ident())
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        for line in kept.lines:
            _log_now(line)


@dataclass(slots=True)
class _Kept:
    thread: int  # a thread that is started in the block may inherit its context
    lines: list[_Line] = field(default_factory=list)


_kept: Final[ContextVar[_Kept | None]] = ContextVar("veltrix_events", default=None)


def _is_end(line: _Line) -> bool:
    return line.level < logging.WARNING and line.event in ENDS


def _apart(event: str, fields: Mapping[str, Field]) -> object:
    return fields.get(_APART_BY[event]) if event in _APART_BY else None


def _shown(fields: Mapping[str, Field]) -> dict[str, Field]:
    return {name: without_credentials(value) if isinstance(value, str) else value for name, value in fields.items()}


def _current_span() -> tuple[str, str] | None:
    """Trace id and span id of the current span, in hex; None without a valid one."""
    told = trace.get_current_span().get_span_context()
    if not told.is_valid:
        return None
    return trace.format_trace_id(told.trace_id), trace.format_span_id(told.span_id)


def _settle(limit: Limit) -> None:
    for line in limit.due():
        _log(line)


def _log(line: _Line) -> None:
    kept = _kept.get()
    if kept is not None and kept.thread == threading.get_ident():
        kept.lines.append(line)
    else:
        _log_now(line)


def _log_now(line: _Line) -> None:
    try:
        logger = logging.getLogger(line.logger)
        if not logger.isEnabledFor(line.level):
            return
        counts: dict[str, Field] = {}
        if line.suppressed:
            counts["suppressed"] = line.suppressed
        if line.late_s:
            counts["late_s"] = round(line.late_s, 1)
        told = "".join(f" {name}={_written(name, value)}" for name, value in {**line.fields, **counts}.items())
        path, number, function = line.where
        # Not by `extra=`: an application whose records have an attribute of that name already would get a KeyError.
        record = logger.makeRecord(
            line.logger,
            line.level,
            path,
            number,
            f"{line.event}%s",  # the same for each line of an event: what groups by it finds them together
            (f"{told}: {line.text}" if line.text else told,),
            None,
            function,
        )
        told_fields = {"event": line.event, **line.about, **line.fields, **counts}
        attributes: dict[str, object] = {"veltrix": told_fields, **told_fields}
        # OpenTelemetry's instrumentation of logging has them as otelTraceID, "0" where it found no span.
        if line.span is not None and getattr(record, "otelTraceID", "0") == "0":
            attributes |= {"trace_id": line.span[0], "span_id": line.span[1]}
        for name, value in attributes.items():
            record.__dict__.setdefault(name, value)
        logger.handle(record)
    except Exception:  # noqa: BLE001, S110  # a handler or filter of the application's: as above
        pass


def _written(name: str, value: Field) -> str:
    return str(value) if name == "error" else repr(value)  # a type, and where it came through


def reset() -> None:
    """Forget what was told, for tests."""
    _limit.reset()
