"""Fresh views: the views of a client that asks for freshness.

Owns that a view is looked at by the clock as it is given out, and that what it remembers is forgotten in time. Which
keys are refused when is the view's to say, by the rules in `freshness`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from veltrix_mw.freshness import FreshnessRules
from veltrix_mw.lapses import Lapses
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.view import View
from veltrix_mw.views import Views

__all__ = ["FreshViews", "least_age_s"]


def least_age_s(*, mirrored: bool) -> float:
    """How old what is well may become between two confirmations, each of which may take as long as a call may.

    Through a mirror its relay's confirmations come first. The authority of a huge keyspace is asked more seldom.
    """
    from veltrix_mw.follower import CALL_TIMEOUT_S
    from veltrix_mw.replica import CONFIRM_INTERVAL_S

    own_s = CONFIRM_INTERVAL_S + CALL_TIMEOUT_S
    if not mirrored:
        return own_s
    from veltrix_mw.relay import CONFIRM_AT_MOST_S

    return own_s + CONFIRM_AT_MOST_S + CALL_TIMEOUT_S


class FreshViews(Views):
    """Makes views that refuse what is too old, and that read what is fresh as others do: by one subscript.

    Given out, a view is right at that moment, also where the process was stopped for a while. One that lives on is
    right from when `lapses` comes to run.
    """

    def __init__(
        self, freshness: FreshnessRules, *, clock: Callable[[], float] = time.monotonic, **options: Any
    ) -> None:
        """`clock` and `options` are those of `Views`."""
        self.freshness = freshness
        self.lapses = self._lapses = Lapses(clock)
        self._least_s = freshness.least_s
        super().__init__(clock=clock, **options)

    # A property, as the middlewares take the attribute and call nothing: other clients' requests pay nothing for this.
    @property
    def base(self) -> View:
        memo = self._base_memo
        if memo is not None and memo.proof.at_s + memo.limit_s <= self.clock():
            self._lapses.look(memo)
        return self._base

    @base.setter
    def base(self, view: View) -> None:
        self._base = view
        self._base_memo = view._memo

    def _layered_view(self, layers: tuple[str, ...], overrides: Mapping[str, Any] | None) -> View:
        view = super()._layered_view(layers, overrides)
        if view._memo is not None:
            self._lapses.look(view._memo)
        return view

    def _rebase(self, snapshot: Snapshot, hot: dict[str, Any]) -> None:
        super()._rebase(snapshot, hot)
        memo = self._base._memo
        if hot and memo is not None:
            # What it takes over may be of any rule; the one before may have been emptied while it was copied.
            self._lapses.keep(memo, self._least_s)

    def after_fork(self) -> None:
        super().after_fork()
        self._lapses.after_fork()
