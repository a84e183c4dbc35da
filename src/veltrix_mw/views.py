"""Views: makes a client's views, and keeps those that requests share.

Owns which view a request gets, and what all of them share: layers, defaults, derived values, the clock of their age.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from veltrix_mw.coalesce.inline_flight import InlineFlight
from veltrix_mw.counting_view import CountingView, LookupView, Tally
from veltrix_mw.deriving import DerivedCache
from veltrix_mw.errors import InvalidKey
from veltrix_mw.keys import check_key, check_layer, check_prefix
from veltrix_mw.overrides import process_overrides, tell_of_overrides
from veltrix_mw.pinning import pinned_view
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.values import FrozenDict, freeze
from veltrix_mw.view import View

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from veltrix_mw.freshness import FreshnessRules
    from veltrix_mw.lapses import Lapses
    from veltrix_mw.lazy import LazyUnits
    from veltrix_mw.unit_reader import UnitReader

__all__ = ["Views", "checked_layers"]

_LAYERED_VIEWS: Final = 256  # combinations of request layers whose view is kept for a snapshot


def _no_trouble() -> str:
    return ""


def _nothing_runs() -> None:
    return None


class Views:
    """Makes a client's views: one for all requests of a snapshot that have no layers of their own.

    Where there are lazy prefixes each gets a view of its own, for the units that it loads; the memo is shared.

    `publish` is called by one thread; `view` by any.
    """

    # Of a client that asks for freshness: `FreshViews`.
    freshness: FreshnessRules | None = None
    lapses: Lapses | None = None

    def __init__(
        self,
        *,
        layers: Sequence[str] = (),
        defaults: Mapping[str, Any] = FrozenDict(),
        lazy: Sequence[str] = (),
        units: LazyUnits | None = None,
        reader: UnitReader | None = None,
        max_age_s: float = 15.0,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
        trouble: Callable[[], str] = _no_trouble,
        ensure_running: Callable[[], None] = _nothing_runs,
    ) -> None:
        self.layers = tuple(check_prefix(layer) for layer in layers)
        self.defaults = FrozenDict({check_key(key): freeze(value) for key, value in defaults.items()})
        self.lazy = tuple(lazy)
        # Then any key may come from a lazy unit, in every view.
        self._has_lazy_layers = any(
            layer.startswith(prefix) or prefix.startswith(layer) for layer in self.layers for prefix in self.lazy
        )
        self.units = units
        self.reader = reader
        self.max_age_s = max_age_s
        self.telemetry = Telemetry("off") if telemetry is None else telemetry
        self.clock = clock
        self.trouble = trouble
        self.ensure_running = ensure_running
        self.derived = DerivedCache()
        self.flights = InlineFlight()
        self.made = 0  # views given out
        self.dropped = 0  # invalid layers of requests that were dropped
        self.stale_reads = 0  # reads that were refused
        self._layered: OrderedDict[tuple[str, ...], View] = OrderedDict()
        self._lock = threading.Lock()  # protects _layered's order, and publish against override_process
        self.base = View._make(self, Snapshot(), (), process_overrides(), {})
        tell_of_overrides(self)

    def publish(self, snapshot: Snapshot, changed: frozenset[str] | None) -> None:
        """Serve `snapshot` from now on. `changed` names the eager keys that may differ; None: any may."""
        with self._lock:
            hot: dict[str, Any] = {}
            if changed is not None and not self._has_lazy_layers and self.base._overrides is process_overrides():
                hot = self.base._hot.copy()
                for key in changed:
                    hot.pop(key, None)
                    for layer in self.layers:
                        if key.startswith(layer):
                            hot.pop(key[len(layer) :], None)
            self._rebase(snapshot, hot)

    def after_fork(self) -> None:
        """Make the locks anew in a forked child: another thread of the parent may have held them."""
        if self.units is not None:
            self.units.after_fork()
        if self.reader is not None:
            self.reader.after_fork()
        self._lock = threading.Lock()
        self.derived = DerivedCache()
        self.flights = InlineFlight()

    def override(self) -> None:
        """Take up the process's overrides as they are now."""
        with self._lock:
            self._rebase(self.base._snapshot, {})

    def _rebase(self, snapshot: Snapshot, hot: dict[str, Any]) -> None:
        self._layered = OrderedDict()
        self.base = View._make(self, snapshot, (), process_overrides(), hot)

    def view(self, layers: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> View:
        """A view pinned to the newest snapshot. Raises `InvalidKey` for a layer or key that is none."""
        self.made += 1
        view = self._layered_view(checked_layers(layers, self.lazy), overrides) if layers or overrides else self.base
        return view._of_one() if self.lazy else view

    def _layered_view(self, layers: tuple[str, ...], overrides: Mapping[str, Any] | None) -> View:
        base = self.base
        if overrides:
            own = {check_key(key): freeze(value) for key, value in overrides.items()}
            merged = {**own, **base._overrides}
            return View._make(self, base._snapshot, layers, merged, {}, own)
        with self._lock:
            base, layered = self.base, self._layered
            view = layered.get(layers)
            if view is None:
                view = layered[layers] = View._make(self, base._snapshot, layers, base._overrides, {})
                if len(layered) > _LAYERED_VIEWS:
                    layered.popitem(last=False)
            else:
                layered.move_to_end(layers)
            return view

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait of a request's own: it is part of what config cost that, if that is counted."""
        view, begun_ns = pinned_view.get(None), time.perf_counter_ns()
        try:
            yield
        finally:
            if isinstance(view, CountingView) and view._views is self:
                view._waited(begun_ns)

    def counted(self, view: View, context: Context) -> CountingView | None:
        """`view` as a request reads it that began in `context`; None where that has no span which records."""
        span = self.telemetry.recording_span(context)
        return None if span is None else self.counting(view, Tally(span, context))

    def counting(self, view: View, tally: Tally) -> CountingView:
        """`view` as a request reads it whose reads are told to `tally`."""
        counting = view._as(LookupView if self.telemetry.level == "lookups" else CountingView)
        counting._tally = tally
        return counting


def checked_layers(layers: Sequence[str], lazy: Sequence[str]) -> tuple[str, ...]:
    """`layers`, each of them a prefix, and one of the prefixes `lazy` a whole unit. Raises `InvalidKey`."""
    if isinstance(layers, str):
        raise InvalidKey(f"layers are a sequence of prefixes; write ({layers!r},)")
    return tuple(check_layer(layer, lazy) for layer in layers)
