"""Freshness: what a view refuses, and from when on, by an injected clock."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN

from tests.stores.contract import in_a_fork
from tests.support.waiting import wait_until
from tests.test_view import snapshot
from veltrix_mw import (
    Freshness,
    HeldBack,
    KeyMissing,
    NotReady,
    SettingsError,
    StaleRead,
    View,
    carry_view,
    current_view,
    override_config,
)
from veltrix_mw.counting_view import Tally
from veltrix_mw.current import Pinned
from veltrix_mw.fresh_views import FreshViews
from veltrix_mw.freshness import FreshnessRules
from veltrix_mw.snapshot import Rejection

FLAGS = Freshness("flags/", max_age_s=20, on_stale="fail")
COPY = Freshness("copy/", max_age_s=20, on_stale="serve")
PRICES = Freshness("prices/", max_age_s=20, on_stale="default")

STORED = {"flags/stop": False, "copy/title": "Shop", "prices/vat": 19, "other": 1}
DEFAULTS = {"prices/vat": 20, "prices/fee": 2, "flags/dark": True}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


Make = Callable[..., FreshViews]


@pytest.fixture
def make(clock: Clock) -> Iterator[Make]:
    """Makes views whose memos are seen to by a thread, as those of a client that was started."""
    made: list[FreshViews] = []

    def make(
        *rules: Freshness, stored: Mapping[str, Any] = STORED, proved_at_s: float = 0.0, **options: Any
    ) -> FreshViews:
        views = FreshViews(FreshnessRules(rules), clock=clock, **{"defaults": DEFAULTS, **options})
        made.append(views)
        views.publish(snapshot(stored, proved_at_s=proved_at_s), None)
        views.lapses.start()
        return views

    yield make
    for views in made:
        views.lapses.stop()


def ages(views: FreshViews, clock: Clock, to_s: float) -> None:
    """Let time pass, and its thread do at once what it does then."""
    clock.now_s = to_s
    views.lapses.sweep()


def stop_of(view: View) -> Any:
    return view["flags/stop"]


def vat_of(view: View) -> Any:
    return view.get("prices/vat")


@dataclass(frozen=True)
class Flags:
    stop: bool = True


@dataclass(frozen=True)
class Prices:
    vat: int = 0
    fee: int = 0


READS: dict[str, Callable[[View], Any]] = {
    "[]": stop_of,
    "get": lambda view: view.get("flags/stop", "missing"),
    "get of an absent key": lambda view: view.get("flags/other", "missing"),
    "get of a key with a default": lambda view: view["flags/dark"],
    "in": lambda view: "flags/stop" in view,
    "section": lambda view: view.section("flags/"),
    "iter": list,
    "len": len,
    "bind": lambda view: view.bind(Flags, "flags/"),
    "bind of one key": lambda view: view.bind({"type": "boolean"}, "flags/stop"),
    "derive": lambda view: view.derive(stop_of),
    "fetch": lambda view: view.fetch("flags/stop", "missing"),
    "fetch_many": lambda view: view.fetch_many(["flags/stop"]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_below_a_prefix_that_fails_every_read_does_so_once_the_age_is_beyond_its_limit(
    make: Make, clock: Clock, read: Callable[[View], Any]
) -> None:
    views = make(FLAGS)
    view = views.view()
    at_first = read(view)
    ages(views, clock, 20.0)
    assert read(view) == at_first
    ages(views, clock, 20.1)
    for _ in range(2):
        with pytest.raises(StaleRead):
            read(view)
        with pytest.raises(StaleRead):
            read(views.view())
    view._snapshot._proof.at_s = 20.05  # a confirmation
    assert read(view) == at_first


def test_what_has_no_rule_or_is_to_be_served_is_read_at_any_age(make: Make, clock: Clock) -> None:
    views = make(FLAGS, COPY)
    view = views.view()
    for at_s in (0.0, 20.1, math.inf):
        ages(views, clock, at_s)
        assert (view["other"], view["copy/title"], view.get("copy/absent", 5)) == (1, "Shop", 5)
        assert dict(view.section("copy/")) == {"title": "Shop"}
        assert dict(view.section("absent/")) == {}
    assert views.stale_reads == 0


def test_below_a_prefix_of_defaults_it_is_as_if_the_store_had_nothing_there(make: Make, clock: Clock) -> None:
    rejected = {"prices/held": Rejection(3, "no number")}
    views = make(PRICES)
    views.publish(snapshot(STORED, rejected=rejected), None)
    view = views.view()

    def seen() -> tuple[Any, ...]:
        prices = view.section("prices/")
        return (
            *(view["prices/vat"], view["prices/fee"], dict(prices)),
            *(view.derive(vat_of), "prices/vat" in view, sorted(view), len(view)),
        )

    fresh = (19, 2, {"vat": 19, "fee": 2}, 19, True, sorted({*STORED, *DEFAULTS}), 6)
    old = (20, 2, {"vat": 20, "fee": 2}, 20, True, sorted({*STORED, *DEFAULTS}), 6)
    assert seen() == fresh
    with pytest.raises(HeldBack):
        view["prices/held"]
    ages(views, clock, 20.1)
    assert seen() == old
    assert view.bind(Prices, "prices/") == Prices(20, 2)
    assert "prices/held" not in view
    with pytest.raises(KeyMissing, match="'prices/held' has no default, and what the store has is older"):
        view["prices/held"]
    view._snapshot._proof.at_s = 20.0
    assert seen() == fresh


def test_iteration_and_length_leave_out_what_counts_as_absent(make: Make, clock: Clock) -> None:
    views = make(PRICES, defaults={})
    view = views.view((), {"prices/own": 1})
    assert list(view) == ["copy/title", "flags/stop", "other", "prices/own", "prices/vat"]
    ages(views, clock, 21.0)
    assert list(view) == ["copy/title", "flags/stop", "other", "prices/own"]
    assert len(view) == 4
    assert "prices/vat" not in view
    assert dict(view.section("prices/")) == {"own": 1}


def test_the_longest_prefix_counts(make: Make, clock: Clock) -> None:
    stored = {"a/b/c/k": 1, "a/b/k": 2, "a/k": 3}
    views = make(
        Freshness("a/", max_age_s=20, on_stale="fail"),
        Freshness("a/b/c/", max_age_s=40, on_stale="fail"),
        Freshness("a/b/", max_age_s=10, on_stale="serve"),
        stored=stored,
    )
    view = views.view()
    ages(views, clock, 30.0)
    assert (view["a/b/k"], view["a/b/c/k"]) == (2, 1)
    assert dict(view.section("a/b/")) == {"c/k": 1, "k": 2}
    for read in (lambda: view["a/k"], lambda: view.section("a/")):
        with pytest.raises(StaleRead, match="'a/' allows 20 s"):
            read()
    ages(views, clock, 41.0)
    assert view["a/b/k"] == 2
    for read in (lambda: view["a/b/c/k"], lambda: view.section("a/b/")):
        with pytest.raises(StaleRead, match="'a/b/c/' allows 40 s"):
            read()


def test_a_limit_that_passes_later_is_kept_to_as_well(make: Make, clock: Clock) -> None:
    views = make(FLAGS, Freshness("prices/", max_age_s=40, on_stale="default"))
    view = views.view()
    assert (view["flags/stop"], view["prices/vat"]) == (False, 19)
    ages(views, clock, 21.0)
    assert view["prices/vat"] == 19
    assert "prices/vat" in view._hot  # remembered anew
    ages(views, clock, 41.0)
    assert view["prices/vat"] == 20


# Layers and overrides


LAYERED = {"tenants/acme/theme": "dark", "theme": "light", "other": 1}


def test_the_stores_whole_key_counts_not_what_a_layer_leaves_of_it(make: Make, clock: Clock) -> None:
    views = make(Freshness("tenants/", max_age_s=20, on_stale="fail"), stored=LAYERED)
    acme, base = views.view(("tenants/acme/",)), views.view()
    assert acme["theme"] == "dark"
    ages(views, clock, 21.0)
    assert base["theme"] == "light"
    for key in ("theme", "other"):  # whether the tenant has one of its own is as little known
        with pytest.raises(StaleRead, match="'tenants/acme/"):
            acme[key]
    with pytest.raises(StaleRead):
        acme.section("x/")


def test_a_rule_of_the_cut_off_name_is_not_the_layers(make: Make, clock: Clock) -> None:
    stored = {"env/prod/flags/stop": True, "flags/stop": False, "flags/dark": False}
    views = make(FLAGS, stored=stored, layers=("env/prod/",))
    view = views.view()
    ages(views, clock, 21.0)
    assert view["flags/stop"] is True
    with pytest.raises(StaleRead):
        view["flags/dark"]


def test_a_layer_of_defaults_lets_through_what_lies_below_it(make: Make, clock: Clock) -> None:
    views = make(Freshness("tenants/", max_age_s=20, on_stale="default"), stored=LAYERED)
    view = views.view(("tenants/acme/",))
    assert (view["theme"], dict(view)["theme"]) == ("dark", "dark")
    ages(views, clock, 21.0)
    assert (view["theme"], dict(view)["theme"]) == ("light", "light")
    assert "tenants/acme/theme" not in view


def test_overrides_are_never_stale(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    ages(views, clock, 21.0)
    own = views.view((), {"flags/stop": True})
    assert own["flags/stop"] is True
    assert own.get("flags/stop") is True
    assert "flags/stop" in own
    with override_config({"flags/stop": 5}):
        assert views.view()["flags/stop"] == 5
    with pytest.raises(StaleRead):
        own["flags/dark"]
    with pytest.raises(StaleRead):
        views.view()["flags/stop"]


# From when on


def test_before_the_first_list_it_is_not_ready(clock: Clock) -> None:
    view = FreshViews(FreshnessRules((FLAGS,)), clock=clock, defaults=DEFAULTS).view()
    for read in (lambda: view["flags/stop"], lambda: view.get("flags/stop"), lambda: "flags/stop" in view):
        with pytest.raises(NotReady):
            read()
    assert view["flags/dark"] is True
    assert view.section("flags/")["dark"] is True


def test_what_was_never_proved_current_fails(make: Make) -> None:
    view = make(FLAGS, proved_at_s=-math.inf).view()
    with pytest.raises(StaleRead, match=r"'flags/stop' was never proved current, and 'flags/' allows 20 s: wait until"):
        view["flags/stop"]


def test_the_error_says_key_age_limit_and_what_to_do(make: Make, clock: Clock) -> None:
    views = make(FLAGS, trouble=lambda: "etcd does not answer")
    view = views.view()
    ages(views, clock, 25.0)
    message = (
        "'flags/stop' was last proved current 25 s ago, and 'flags/' allows 20 s: wait until the store confirms it"
    )
    with pytest.raises(StaleRead) as raised:
        view["flags/stop"]
    assert str(raised.value) == f"{message} (etcd does not answer)"
    assert raised.value.__context__ is None
    with pytest.raises(StaleRead, match="all below 'flags/' was last proved"):
        view.section("flags/")
    views.publish(snapshot(STORED, revision=2, proved_at_s=25.0), frozenset())
    with pytest.raises(StaleRead, match="renew the view: the newest one is fresh"):
        view["flags/stop"]
    assert view.renew()["flags/stop"] is False
    assert views.stale_reads == 3


def test_a_newer_snapshot_that_was_not_confirmed_is_as_old(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    stop_of(views.view())
    ages(views, clock, 19.0)
    views.publish(snapshot(STORED, revision=2), frozenset({"other"}))
    view = views.view()
    assert "flags/stop" in view._hot  # taken over
    assert view["flags/stop"] is False
    ages(views, clock, 21.0)
    with pytest.raises(StaleRead):
        view["flags/stop"]


def test_views_that_share_what_they_remember_forget_it_together(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    base = views.view()
    counted = views.counting(base, Tally(INVALID_SPAN, Context()))
    old = Pinned(base)
    assert counted["flags/stop"] is False
    views.publish(snapshot(STORED, revision=2), None)
    del base
    gc.collect()
    ages(views, clock, 21.0)
    for view in (counted, old.view):
        with pytest.raises(StaleRead):
            view["flags/stop"]
    assert counted._tally.count == 2


def test_a_view_that_is_given_out_is_right_at_once_also_where_no_thread_came_to_run(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    stop_of(views.view())
    stop_of(views.view(("r1/",)))
    clock.now_s = 21.0
    for view in (views.base, views.view(), views.view(("r1/",))):
        with pytest.raises(StaleRead):
            view["flags/stop"]


def test_without_the_thread_each_read_is_judged_by_itself(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    view = views.view()
    assert (stop_of(view), view.derive(stop_of), len(view.section("flags/"))) == (False, False, 2)
    views.lapses.stop()
    assert (stop_of(view), view.derive(stop_of), len(view.section("flags/"))) == (False, False, 2)
    assert not view._hot
    clock.now_s = 21.0
    for read in (stop_of, lambda view: view.derive(stop_of), lambda view: view.section("flags/")):
        with pytest.raises(StaleRead):
            read(view)


def test_a_view_that_lives_on_is_refused_by_a_thread_that_nobody_calls() -> None:
    views = FreshViews(FreshnessRules((Freshness("flags/", max_age_s=0.05, on_stale="fail"),)))
    views.publish(snapshot(STORED, proved_at_s=views.clock()), None)
    views.lapses.start()
    view = views.view()
    assert view["flags/stop"] is False
    try:
        wait_until(lambda: not view._hot, 30, reason="what it remembers to be forgotten")
        with pytest.raises(StaleRead):
            view["flags/stop"]
        # The next deadline is an earlier one than what the thread waits for: none.
        view._snapshot._proof.at_s = views.clock()
        assert view["flags/stop"] is False
        wait_until(lambda: not view._hot, 30, reason="it to be forgotten once more")
    finally:
        views.lapses.stop()


def test_a_forked_child_remembers_nothing_that_no_thread_of_its_own_sees_to(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    view = views.view()
    assert view["flags/stop"] is False

    def child() -> None:
        views.after_fork()
        assert view["flags/stop"] is False
        clock.now_s = 21.0
        with pytest.raises(StaleRead):
            view["flags/stop"]
        clock.now_s = 19.0
        views.lapses.start()
        assert view["flags/stop"] is False
        assert "flags/stop" in view._hot
        ages(views, clock, 21.0)
        with pytest.raises(StaleRead):
            view["flags/stop"]

    in_a_fork(child)


def test_what_is_derived_from_a_read_that_was_refused_is_not_kept(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    view = views.view()

    def stop(view: View) -> Any:
        try:
            return view.bind(Flags, "flags/").stop
        except StaleRead:
            return "closed"

    ages(views, clock, 21.0)
    assert view.derive(stop) == "closed"
    view._snapshot._proof.at_s = 21.0
    assert view.derive(stop) is False
    ages(views, clock, 42.0)
    assert view.derive(stop) == "closed"


def test_a_refused_read_goes_through_whatever_carries_the_view(make: Make, clock: Clock) -> None:
    views = make(FLAGS)
    ages(views, clock, 21.0)
    with Pinned(views.view()), pytest.raises(StaleRead):
        carry_view(lambda: current_view()["flags/stop"])()


# Settings


def test_of_an_unknown_shape_a_setting_says_what_it_takes() -> None:
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: Freshness("flags", max_age_s=20, on_stale="fail"), "freshness: 'flags' is not a prefix"),
        (lambda: Freshness("/", max_age_s=20, on_stale="fail"), "freshness: '/' is not a prefix"),
        (lambda: Freshness("f/", max_age_s=20, on_stale="drop"), "'fail', 'serve' or 'default', not 'drop'"),  # type: ignore[arg-type]
        (lambda: Freshness("f/", max_age_s=0, on_stale="fail"), "a positive number of seconds, not 0"),
        (lambda: Freshness("f/", max_age_s="20", on_stale="fail"), "a positive number of seconds, not '20'"),  # type: ignore[arg-type]
        (lambda: Freshness("f/", max_age_s=math.inf, on_stale="fail"), "a positive number of seconds, not inf"),
        (lambda: FreshnessRules(FLAGS), "freshness is a sequence; write"),  # type: ignore[arg-type]
        (lambda: FreshnessRules(("flags/",)), "without 'flags/'"),  # type: ignore[arg-type]
        (lambda: FreshnessRules((FLAGS, FLAGS)), "names 'flags/' twice"),
        (lambda: FreshnessRules((FLAGS,), least_s=20.5), "write at least max_age_s=20.5"),
    ]
    for make_it, message in wrong:
        with pytest.raises(SettingsError) as raised:
            make_it()
        assert message in str(raised.value)


# A model: what is remembered never shows


RULES = (
    Freshness("a/", max_age_s=10, on_stale="fail"),
    Freshness("a/x/", max_age_s=20, on_stale="serve"),
    Freshness("b/", max_age_s=15, on_stale="default"),
    Freshness("l/", max_age_s=30, on_stale="default"),
    Freshness("l/a/", max_age_s=12, on_stale="fail"),
)
KEYS = ("a/k", "a/x/k", "b/k", "k", "l/k")
MODEL_DEFAULTS = {"b/k": "default", "k": "default"}


def expected(stored: Mapping[str, Any], age_s: float, layers: tuple[str, ...], key: str) -> Any:
    for name in (*(layer + key for layer in layers), key):
        rules = [rule for rule in RULES if name.startswith(rule.prefix)]
        rule = max(rules, key=lambda rule: len(rule.prefix), default=None)
        if rule is not None and age_s > rule.max_age_s and rule.on_stale != "serve":
            if rule.on_stale == "fail":
                return "stale"
        elif name in stored:
            return stored[name]
    return MODEL_DEFAULTS.get(key, "missing")


def told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except StaleRead:
        return "stale"


def below(view: View, prefix: str) -> Any:
    return told(lambda: view.section(prefix).get("k", "missing"))


STEPS = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([1.0, 3.0, 6.0, 11.0])),
    st.tuples(st.just("confirm"), st.just(0)),
    st.tuples(st.just("change"), st.sampled_from([f"{layer}{key}" for layer in ("", "l/") for key in KEYS])),
    st.tuples(st.just("pin"), st.sampled_from([(), ("l/",)])),
    st.tuples(st.just("read"), st.sampled_from(KEYS)),
)


@given(st.lists(STEPS, max_size=40))
def test_a_view_reads_at_each_moment_what_it_would_read_if_it_remembered_nothing(steps: list[tuple[str, Any]]) -> None:
    clock = Clock()
    views = FreshViews(FreshnessRules(RULES), clock=clock, defaults=MODEL_DEFAULTS)
    stored: dict[str, Any] = {f"{layer}{key}": 0 for layer in ("", "l/") for key in KEYS}
    views.publish(snapshot(stored), None)
    views.lapses.start()
    derivations = {key: (lambda view, key=key: view.get(key, "missing")) for key in KEYS}
    pinned: list[tuple[View, dict[str, Any], tuple[str, ...]]] = [(views.view(), stored, ())]
    try:
        for revision, (what, value) in enumerate(steps, 2):
            if what == "wait":
                ages(views, clock, clock.now_s + value)
            elif what == "confirm":
                views.base._snapshot._proof.at_s = clock.now_s
            elif what == "change":
                stored = {**stored, value: revision}
                proved_at_s = views.base._snapshot._proof.at_s
                views.publish(snapshot(stored, revision=revision, proved_at_s=proved_at_s), frozenset({value}))
            elif what == "pin":
                pinned.append((views.view(value), stored, value))
            else:
                for view, held, layers in pinned:
                    wanted = expected(held, view.age_s, layers, value)
                    assert told(partial(view.get, value, "missing")) == wanted
                    assert told(partial(view.derive, derivations[value])) == wanted
                    if value in {"a/x/k", "b/k"}:  # below the others, rules differ
                        assert below(view, value.removesuffix("k")) == wanted
    finally:
        views.lapses.stop()
