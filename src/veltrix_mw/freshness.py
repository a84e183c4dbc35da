"""Freshness: how old a value below a prefix may be, and what is done with one that is older.

Owns the rules, and which of them counts for a key; knows no view, no clock and no store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Final, Literal

from veltrix_mw.errors import InvalidKey, SettingsError
from veltrix_mw.keys import check_prefix

__all__ = ["Freshness", "FreshnessRules", "OnStale"]

OnStale = Literal["fail", "serve", "default"]

_ON_STALE: Final = ("fail", "serve", "default")
_SHAPE: Final = 'Freshness("flags/", max_age_s=20, on_stale="fail")'


@dataclass(frozen=True, slots=True)
class Freshness:
    """What is done with the keys below a prefix once `view.age_s` is beyond `max_age_s`.

    `on_stale`: `fail` raises `StaleRead` where one of them is read; `default` reads as if the store had none of them,
    which leaves the client's `defaults`; `serve` goes on as if they were fresh. Of two prefixes that a key lies below,
    the longer one counts. Raises `SettingsError`.
    """

    prefix: str
    _: KW_ONLY
    max_age_s: float
    on_stale: OnStale

    def __post_init__(self) -> None:
        try:
            check_prefix(self.prefix)
        except InvalidKey as exc:
            raise SettingsError(f"freshness: {exc}") from exc
        age_s = self.max_age_s
        if not isinstance(age_s, (int, float)) or isinstance(age_s, bool) or not 0 < age_s < float("inf"):
            raise SettingsError(
                f"freshness of {self.prefix!r}: max_age_s is a positive number of seconds, not {age_s!r}"
            )
        if self.on_stale not in _ON_STALE:
            raise SettingsError(
                f"freshness of {self.prefix!r}: on_stale is 'fail', 'serve' or 'default', not {self.on_stale!r}"
            )


class FreshnessRules:
    """What a client asks of its prefixes: the rules that may refuse a value, and those that take prefixes out of them.

    Immutable; false where nothing is ever refused.
    """

    def __init__(self, freshness: Iterable[Freshness] = (), *, least_s: float = 0.0) -> None:
        """`least_s` is how old a value may become while nothing is wrong. Raises `SettingsError`."""
        if isinstance(freshness, Freshness) or not isinstance(freshness, Iterable):
            raise SettingsError(f"freshness is a sequence; write ({_SHAPE},)")
        rules: dict[str, Freshness] = {}
        for rule in freshness:
            if not isinstance(rule, Freshness):
                raise SettingsError(f"freshness is a sequence such as ({_SHAPE},), without {rule!r}")
            if rule.prefix in rules:
                raise SettingsError(f"freshness names {rule.prefix!r} twice: keep one of the two")
            if rule.max_age_s < least_s:
                raise SettingsError(
                    f"freshness of {rule.prefix!r}: max_age_s is {rule.max_age_s:g}, and what is well can be "
                    f"{least_s:g} s old, as it is confirmed no more often: write at least max_age_s={least_s:g}"
                )
            rules[rule.prefix] = rule
        self._all = tuple(sorted(rules.values(), key=lambda rule: len(rule.prefix), reverse=True))  # the longest first
        self._strict = tuple(rule for rule in self._all if rule.on_stale != "serve")
        self.least_s: float = min((rule.max_age_s for rule in self._strict), default=float("inf"))
        """The least age at which anything is refused."""

    def __bool__(self) -> bool:
        return bool(self._strict)

    def of(self, name: str) -> Freshness | None:
        """The rule that may refuse the store's key, or a prefix as a whole; None where it is served at any age."""
        for rule in self._all:
            if name.startswith(rule.prefix):
                return None if rule.on_stale == "serve" else rule
        return None

    def within(self, prefix: str) -> tuple[Freshness, ...]:
        """The rules that may refuse some of the store's keys below `prefix`; "" is above all."""
        over = self.of(prefix)
        inner = tuple(rule for rule in self._strict if rule is not over and rule.prefix.startswith(prefix))
        return inner if over is None else (over, *inner)

    def divides(self, prefix: str) -> bool:
        """Whether a rule counts for some of the keys below `prefix` alone."""
        return any(len(rule.prefix) > len(prefix) and rule.prefix.startswith(prefix) for rule in self._all)
