"""The view: precedence, errors, memo, sections, binding, deriving, age."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import INVALID_SPAN

from veltrix_mw import (
    HeldBack,
    InvalidKey,
    InvalidValue,
    KeyMissing,
    NoCurrentView,
    NotReady,
    View,
    carry_view,
    current_view,
    override_config,
)
from veltrix_mw.counting_view import Tally
from veltrix_mw.current import Pinned
from veltrix_mw.snapshot import Proof, Rejection, Snapshot
from veltrix_mw.sorted_map import SortedMap
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.values import MISSING, freeze
from veltrix_mw.views import Views


def snapshot(
    values: Mapping[str, Any],
    *,
    revision: int = 1,
    rejected: Mapping[str, Rejection] = MappingProxyType({}),
    proved_at_s: float = 0.0,
) -> Snapshot:
    items = [(key, freeze(values[key]), 1) for key in sorted(values)]
    return Snapshot(
        SortedMap.from_sorted(items), revision=revision, origin="memory", rejected=rejected, proof=Proof(proved_at_s)
    )


def views_of(values: Mapping[str, Any], **options: Any) -> Views:
    views = Views(**options)
    views.publish(snapshot(values), None)
    return views


def test_the_first_of_overrides_request_layers_client_layers_base_and_defaults_wins() -> None:
    stored = {f"{layer}{key}": f"{layer}{key}" for layer in ("", "c/", "r2/", "r1/") for key in ("k",)}
    everything = {**stored, "only/base": "base"}
    for gone, wanted in [([], "r1/k"), (["r1/k"], "r2/k"), (["r1/k", "r2/k"], "c/k"), (["r1/k", "r2/k", "c/k"], "k")]:
        left = {key: value for key, value in everything.items() if key not in gone}
        view = views_of(left, layers=("c/",), defaults={"k": "default"}).view(("r1/", "r2/"))
        assert view["k"] == wanted
        assert view.get("k") == wanted
    views = views_of({"only/base": 1}, layers=("c/",), defaults={"k": "default"})
    assert views.view(("r1/",))["k"] == "default"
    assert views_of(everything, layers=("c/",)).view(("r1/",), {"k": "override"})["k"] == "override"


def test_iteration_length_and_membership_see_the_union_with_layer_prefixes_cut_off() -> None:
    view = views_of({"env/prod/a": 1, "b": 2}, layers=("env/prod/",), defaults={"d": 4}).view((), {"o": 5})
    assert list(view) == ["a", "b", "d", "env/prod/a", "o"]
    assert len(view) == 5
    assert all(key in view for key in view)
    assert dict(view) == {"a": 1, "b": 2, "d": 4, "env/prod/a": 1, "o": 5}
    assert "c" not in view
    assert isinstance(view, Mapping)


def test_values_are_frozen_and_still_what_json_can_write() -> None:
    view = views_of({"k": {"a": [1, {"b": 2}]}}).view()
    with pytest.raises(TypeError, match="frozen"):
        view["k"]["a"] = 2
    assert view["k"]["a"] == (1, {"b": 2})
    assert json.dumps(view["k"]) == '{"a": [1, {"b": 2}]}'


def test_an_absent_key_raises_key_missing_that_names_the_revision_and_get_gives_the_default() -> None:
    view = views_of({"a": 1}).view()
    with pytest.raises(KeyMissing, match="there is no key 'b' at revision 1") as raised:
        view["b"]
    assert isinstance(raised.value, KeyError)
    assert raised.value.__context__ is None
    assert view.get("b") is None
    assert view.get("b", 7) == 7
    with pytest.raises(KeyMissing, match="is not a key"):
        view["/b"]
    assert view.get(3) is None  # type: ignore[arg-type]


def test_a_null_is_a_value() -> None:
    view = views_of({"k": None}, defaults={"k": 1}).view()
    assert view["k"] is None
    assert view.get("k", 5) is None
    assert "k" in view


def test_before_the_first_list_only_defaults_and_overrides_can_be_read() -> None:
    views = Views(defaults={"d/a": 1}, trouble=lambda: "the store is away")
    view = views.view()
    assert view["d/a"] == 1
    assert view.get("d/a") == 1
    assert "d/a" in view
    assert views.view((), {"o": 2})["o"] == 2
    for read in (lambda: view["x"], lambda: view.get("x", 1), lambda: "x" in view, lambda: view.section("x/")):
        with pytest.raises(NotReady, match="the store is away"):
            read()
    assert view.age_s == math.inf
    assert view.stale
    assert view.origin == "none"
    assert dict(view.section("d/")) == {"a": 1}


def test_a_key_held_back_without_a_good_value_does_not_look_absent() -> None:
    views = Views(defaults={"with-default": 9}, layers=("env/",))
    held = {key: Rejection(3, "not JSON") for key in ("p/bad", "with-default", "env/layered")}
    views.publish(snapshot({"p/good": 1}, rejected=held), None)
    view = views.view()
    for read in (lambda: view["p/bad"], lambda: view.get("p/bad", 1), lambda: "p/bad" in view, lambda: view["layered"]):
        with pytest.raises(HeldBack, match=r"revision 3 was rejected \(not JSON"):
            read()
    assert view["with-default"] == 9
    assert "p/bad" not in list(view)
    section = view.section("p/")
    assert section["good"] == 1
    for read in (lambda: section["bad"], lambda: section.get("bad"), lambda: "bad" in section):
        with pytest.raises(HeldBack):
            read()
    with pytest.raises(HeldBack):
        view.bind(dict, "p/")


def test_a_view_keeps_its_revision_and_renew_gives_the_newest() -> None:
    views = views_of({"k": 1, "t/k": 10})
    old, layered = views.view(), views.view(("t/",), {"o": 1})
    views.publish(snapshot({"k": 2, "t/k": 20}, revision=2), frozenset({"k", "t/k"}))
    assert (old["k"], old.revision) == (1, 1)
    assert (layered["k"], layered.revision) == (10, 1)
    assert (old.renew()["k"], old.renew().revision) == (2, 2)
    assert (layered.renew()["k"], layered.renew()["o"]) == (20, 1)


def test_requests_without_layers_share_one_view_and_layered_ones_too() -> None:
    views = views_of({"k": 1})
    assert views.view() is views.view()
    assert views.view(("t/",)) is views.view(["t/"])
    assert views.view((), {"k": 2}) is not views.view((), {"k": 2})


@pytest.mark.parametrize("changed", [None, frozenset({"env/k", "new"})])
def test_what_was_memoized_is_dropped_when_it_changes(changed: frozenset[str] | None) -> None:
    views = views_of({"k": 1, "env/k": 2, "same": 3}, layers=("env/",), defaults={"new": 0})
    view = views.view()
    assert (view["k"], view["same"], view["new"], view["env/k"]) == (2, 3, 0, 2)
    views.publish(snapshot({"k": 1, "env/k": 5, "same": 3, "new": 6}, revision=2), changed)
    view = views.view()
    assert (view["k"], view["same"], view["new"], view["env/k"]) == (5, 3, 6, 5)


def test_the_memo_is_carried_over_and_bounded() -> None:
    views = views_of({f"k{number}": number for number in range(3000)})
    view = views.view()
    for number in range(3000):
        assert view[f"k{number}"] == number
    assert len(view._hot) <= 1024
    view["k1"]
    views.publish(snapshot({"k1": 1, "k2": 3}, revision=2), frozenset({"k2"}))
    assert "k1" in views.view()._hot


def test_views_of_invented_layers_are_bounded() -> None:
    views = views_of({"k": 1})
    for number in range(2000):
        assert views.view((f"tenants/t{number}/",))["k"] == 1
    assert len(views._layered) <= 256


@pytest.mark.parametrize("layers", [("bad",), ("/",), ("../",), ("a b/",), ("",), (1,), "t/"])
def test_an_invalid_layer_is_refused(layers: Any) -> None:
    with pytest.raises(InvalidKey):
        views_of({}).view(layers)


def test_a_section_is_the_mapping_below_a_prefix_over_every_layer() -> None:
    views = views_of(
        {"p/a": 1, "p/b/c": 2, "env/p/b/c": 3, "t/p/d": 4, "px": 5, "p": 6},
        layers=("env/",),
        defaults={"p/z": 0, "p/a": 9},
    )
    section = views.view(("t/",), {"p/o": 8}).section("p/")
    assert dict(section) == {"a": 1, "b/c": 3, "d": 4, "z": 0, "o": 8}
    assert section.get("nope", 1) == 1
    with pytest.raises(KeyMissing, match="p/nope"):
        section["nope"]
    assert len(views.view().section("nothing/")) == 0
    for wrong in ("p", "/p/", "", "p//"):
        with pytest.raises(InvalidKey):
            views.view().section(wrong)


@dataclass(frozen=True)
class Payments:
    currency: str
    max_retries: int = 3


def test_bind_gives_a_typed_object_shared_until_what_it_read_changes() -> None:
    views = views_of({"pay/currency": "EUR", "other": 1})
    bound = views.view().bind(Payments, "pay/")
    assert bound == Payments("EUR", 3)
    assert views.view().bind(Payments, "pay/") is bound
    views.publish(snapshot({"pay/currency": "EUR", "other": 2}, revision=2), frozenset({"other"}))
    assert views.view().bind(Payments, "pay/") is bound
    views.publish(snapshot({"pay/currency": "EUR", "pay/max-retries": 5, "other": 2}, revision=3), None)
    assert views.view().bind(Payments, "pay/") == Payments("EUR", 5)


def test_bind_of_one_key_and_of_a_json_schema() -> None:
    views = views_of({"limit": 5, "flags/a": True})
    assert views.view().bind(int, "limit") == 5
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    assert views.view().bind(schema, "flags/") == {"a": True}
    with pytest.raises(InvalidValue, match="limit"):
        views.view().bind(str, "limit")


def test_bind_through_request_layers_differs_by_layer() -> None:
    views = views_of({"pay/currency": "EUR", "t/pay/currency": "USD"})
    assert views.view().bind(Payments, "pay/").currency == "EUR"
    assert views.view(("t/",)).bind(Payments, "pay/").currency == "USD"
    assert views.view().bind(Payments, "pay/").currency == "EUR"
    assert views.view((), {"pay/currency": "GBP"}).bind(Payments, "pay/").currency == "GBP"


def test_derive_computes_once_per_change_of_the_keys_it_read() -> None:
    calls = []

    def total(view: View) -> int:
        calls.append(view["a"])
        return view["a"] + view.get("b", 0) + (100 if "c" in view else 0)

    views = views_of({"a": 1, "x": 1})
    assert [views.view().derive(total) for _ in range(3)] == [1, 1, 1]
    views.publish(snapshot({"a": 1, "x": 2}, revision=2), frozenset({"x"}))
    assert views.view().derive(total) == 1
    assert len(calls) == 1
    for number, (values, wanted) in enumerate(
        [({"a": 2}, 2), ({"a": 2, "b": 5}, 7), ({"a": 2, "b": 5, "c": 0}, 107), ({"a": True, "b": 5, "c": 0}, 106)]
    ):
        views.publish(snapshot(values, revision=number + 3), None)
        assert views.view().derive(total) == wanted
        assert len(calls) == number + 2


def test_derive_depends_on_what_it_iterated_and_on_what_it_derived() -> None:
    def names(view: View) -> tuple[str, ...]:
        return tuple(view)

    def below(view: View) -> dict[str, Any]:
        return dict(view.section("s/"))

    def both(view: View) -> tuple[Any, Any]:
        return view.derive(names), view.derive(below)

    views = views_of({"a": 1})
    assert views.view().derive(both) == (("a",), {})
    views.publish(snapshot({"a": 1, "s/b": 2}, revision=2), frozenset({"s/b"}))
    assert views.view().derive(both) == (("a", "s/b"), {"b": 2})
    views.publish(snapshot({"a": 1, "s/b": 3}, revision=3), frozenset({"s/b"}))
    assert views.view().derive(both) == (("a", "s/b"), {"b": 3})


def test_an_older_view_derives_from_its_own_revision() -> None:
    def value(view: View) -> int:
        return int(view["a"])

    views = views_of({"a": 1})
    old = views.view()
    views.publish(snapshot({"a": 2}, revision=2), frozenset({"a"}))
    assert views.view().derive(value) == 2
    assert old.derive(value) == 1
    assert views.view().derive(value) == 2


def test_concurrent_derivations_of_one_function_are_one_call() -> None:
    entered, release, calls = threading.Event(), threading.Event(), []

    def slow(view: View) -> int:
        calls.append(1)
        entered.set()
        assert release.wait(10)
        return int(view["a"])

    views = views_of({"a": 1})
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(views.view().derive(slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    release.set()
    for thread in threads:
        thread.join(10)
    assert results == [1] * 8
    assert len(calls) == 1


def test_a_derivation_that_fails_is_not_kept() -> None:
    views = views_of({"a": 1})
    outcomes = iter([ValueError("no"), 5])

    def flaky(view: View) -> int:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(ValueError, match="no"):
        views.view().derive(flaky)
    assert views.view().derive(flaky) == 5


def test_derived_values_are_bounded() -> None:
    views = views_of({"a": 1})
    view = views.view()
    for _ in range(1000):
        view.derive(lambda view: view["a"])
    assert len(view._derived) <= 256
    assert len(views.derived._kept) <= 256


def test_age_counts_from_the_last_proof_and_goes_on_ticking_for_a_pinned_view() -> None:
    now = [100.0]
    views = Views(clock=lambda: now[0], max_age_s=15)
    views.publish(snapshot({}, proved_at_s=99.0), None)
    view = views.view()
    assert view.age_s == 1.0
    assert not view.stale
    following = view._snapshot._succeeded({"k": (1, 2)}, revision=2, rejected={})
    views.publish(following, frozenset({"k"}))
    following._proof.at_s = now[0] = 120.0
    assert views.view().age_s == 0.0
    assert view.age_s == 21.0
    assert view.stale
    assert not views.view().stale


def test_a_view_is_made_by_a_client_alone() -> None:
    with pytest.raises(TypeError, match=r"client\.view"):
        View()


def test_the_current_view_is_the_pinned_one_and_pins_nest() -> None:
    views = views_of({"k": 1})
    with pytest.raises(NoCurrentView, match="pinned"):
        current_view()
    outer = Pinned(views.view())
    with outer as view:
        assert current_view() is view
        with Pinned(views.view((), {"k": 2})):
            assert current_view()["k"] == 2
        assert current_view() is view
    outer.leave()
    outer.report()
    with pytest.raises(NoCurrentView):
        current_view()


def test_carry_view_gives_a_thread_the_view_and_can_be_called_many_times() -> None:
    views = views_of({"k": 1})
    seen: list[Any] = []
    with Pinned(views.view()):
        carried = carry_view(lambda: seen.append(current_view()["k"]))
    threads = [threading.Thread(target=carried) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == [1, 1, 1]
    with pytest.raises(NoCurrentView):
        carry_view(print)


def test_overrides_of_the_process_lie_over_every_new_view() -> None:
    views = views_of({"k": 1, "p/a": 1})
    before = views.view()
    with override_config({"k": 5, "p/b": 2}):
        assert views.view()["k"] == 5
        assert views.view(("t/",))["k"] == 5
        assert views.view((), {"k": 3})["k"] == 5
        assert dict(views.view().section("p/")) == {"a": 1, "b": 2}
        assert before["k"] == 1
        views.publish(snapshot({"k": 7}, revision=2), frozenset({"k"}))
        assert views.view()["k"] == 5
    assert views.view()["k"] == 7


def test_reading_never_mixes_two_snapshots_while_they_are_published() -> None:
    """A view's two keys are always of one revision, however the memo is carried meanwhile."""
    views = views_of({"a": 0, "b": 0})
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            view = views.view()
            first, second = view["a"], view["b"]
            if first != second or first != view.revision - 1:
                wrong.append((first, second, view.revision))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for revision in range(2, 1500):
        value = revision - 1
        views.publish(snapshot({"a": value, "b": value}, revision=revision), frozenset({"a", "b"}))
    stop.set()
    for reader in readers:
        reader.join(10)
    assert not wrong


def test_missing_is_falsy_and_is_never_a_value() -> None:
    assert not MISSING
    assert repr(MISSING) == "MISSING"


@pytest.mark.parametrize("taken", [lambda views: views.view(("t/",)), lambda views: views.view((), {"t/own": 1})])
def test_what_views_of_invented_layers_keep_is_bounded(taken: Any) -> None:
    views = views_of({f"big/k{number:05}": number for number in range(5000)})
    view = taken(views)

    def total(view: View) -> int:
        return sum(view.section("big/").values()) + len(view)

    assert view.derive(total) == sum(range(5000)) + len(view)
    assert view.section("big/")["k00007"] == 7
    assert len(list(view)) == len(view)
    assert len(view.bind(dict, "big/")) == 5000
    for number in range(100):
        assert len(view.section(f"big/k{number:03}".removesuffix("0") + "/")) == 0
        assert len(view.section("big/")) == 5000
    assert view._keys is None
    assert sum(len(section) for section in view._sections.values()) <= 256
    assert all(derived.size <= 256 for derived in (*view._derived.values(), *views.derived._kept.values()))
    base = views.view()
    assert base.section("big/") is base.section("big/")


def test_what_a_layered_view_derived_from_much_is_shared_by_its_requests_and_made_anew_for_a_later_snapshot() -> None:
    calls = []

    def total(view: View) -> int:
        calls.append(1)
        return sum(view.section("n/").values())

    values = {f"n/k{number:05}": 1 for number in range(1000)}
    views = views_of(values)
    assert [views.view(("t/",)).derive(total) for _ in range(3)] == [1000] * 3
    assert len(calls) == 1
    views.publish(snapshot({**values, "n/k00001": 5}, revision=2), frozenset({"n/k00001"}))
    assert views.view(("t/",)).derive(total) == 1004
    assert views.view(("t/",), {"n/k00002": 7}).derive(total) == 1010


def test_before_the_first_list_a_section_of_defaults_knows_no_other_key() -> None:
    views = Views(defaults={"d/a": 1}, trouble=lambda: "the store is away")
    view = views.view((), {"o/b": 2})
    for section, key in ((view.section("d/"), "a"), (view.section("o/"), "b")):
        assert key in section
        assert section[key] == section.get(key)
        for read in (
            lambda section=section: section["x"],
            lambda section=section: section.get("x", 1),
            lambda section=section: "x" in section,
            lambda section=section: view.bind(dict, section.prefix),
            lambda: view.section("x/"),
        ):
            with pytest.raises(NotReady, match="the store is away"):
                read()
    assert view.bind(int, "d/a") == 1
    views.publish(snapshot({}), None)
    assert "x" not in views.view().section("d/")
    assert views.view().bind(dict, "d/") == {"a": 1}


def test_what_derive_fell_back_to_while_a_read_failed_does_not_outlive_the_failure() -> None:
    def limit(view: View) -> int:
        try:
            return view["a"]
        except (HeldBack, NotReady):
            return -1

    views = Views()
    assert views.view().derive(limit) == -1
    views.publish(snapshot({}, rejected={"a": Rejection(1, "not JSON")}), None)
    assert views.view().derive(limit) == -1
    views.publish(snapshot({"a": 2}, revision=2), frozenset({"a"}))
    assert views.view().derive(limit) == 2


def test_a_renewed_view_keeps_its_own_overrides_and_takes_the_process_s_as_they_are_now() -> None:
    views = views_of({"k": 1, "own": 1})
    with override_config({"k": 5, "own": 6}):
        plain, layered, own = views.view(), views.view(("t/",)), views.view((), {"own": 7})
        assert own["own"] == 6
        assert [view.renew()["k"] for view in (plain, layered, own)] == [5, 5, 5]
    assert [view.renew()["k"] for view in (plain, layered, own)] == [1, 1, 1]
    assert own.renew()["own"] == own.renew().renew()["own"] == 7
    with override_config({"k": 8}):
        assert [view.renew()["k"] for view in (plain, layered, own)] == [8, 8, 8]


@pytest.mark.parametrize("level", ["requests", "lookups"])
def test_a_renewed_counting_view_counts_on(level: Any) -> None:
    views = views_of({"k": 1}, telemetry=Telemetry(level))
    counting = views.counting(views.view(), Tally(INVALID_SPAN, Context()))
    assert counting["k"] == 1
    views.publish(snapshot({"k": 2}, revision=2), None)
    renewed = counting.renew()
    assert type(renewed) is type(counting)
    assert renewed["k"] == 2
    assert next(iter(renewed)) == "k"
    assert counting._tally.count == renewed._tally.count == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["revision", "origin", "incarnation", "age_s", "stale"])
def test_what_derive_read_of_the_snapshot_itself_holds_for_that_snapshot_alone(what: str) -> None:
    calls = []

    def read(view: View) -> Any:
        calls.append(1)
        return getattr(view, what)

    def outer(view: View) -> Any:
        return view.derive(read)

    views = views_of({"k": 1})
    for fn in (read, outer):
        assert views.view().derive(fn) == views.view().derive(fn)
    assert len(calls) == 1
    views.publish(snapshot({"k": 1}, revision=2), frozenset())
    assert views.view().derive(outer) == getattr(views.view(), what) or what in {"age_s"}
    assert len(calls) == 2


def test_what_derive_reads_by_way_of_the_current_view_is_tracked() -> None:
    def doubled(view: View) -> int:
        return 2 * current_view()["k"]

    views = views_of({"k": 1})
    with Pinned(views.view()):
        assert views.view().derive(doubled) == 2
    assert views.view().derive(doubled) == 2
    views.publish(snapshot({"k": 5}, revision=2), frozenset({"k"}))
    with Pinned(views.view()) as pinned:
        assert pinned.derive(doubled) == 10
        assert current_view() is pinned
    with pytest.raises(NoCurrentView):
        current_view()


def test_deriving_leaves_the_current_view_of_another_client_alone() -> None:
    other = views_of({"k": 7})
    with Pinned(other.view()):
        assert views_of({"k": 1}).view().derive(lambda view: (view["k"], current_view()["k"])) == (1, 7)


def test_at_level_lookups_membership_sections_and_iteration_have_a_span_too() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    views = views_of({"a/k": 1}, telemetry=Telemetry("lookups", tracer_provider=provider))
    counting = views.counting(views.view(), Tally(INVALID_SPAN, Context()))
    assert "a/k" in counting
    assert "b" not in counting
    assert 7 not in counting
    assert dict(counting.section("a/")) == {"k": 1}
    assert next(iter(counting)) == "a/k"
    spans = [span.attributes or {} for span in exporter.get_finished_spans()]
    told = [(span.get("veltrix.key"), span["veltrix.result"]) for span in spans]
    assert told == [("a/k", "hit"), ("b", "miss"), ("a/", "hit"), (None, "hit")]


def test_of_a_key_held_back_in_two_layers_the_first_is_named() -> None:
    views = Views(layers=("env/",))
    held = {key: Rejection(3, "not JSON") for key in ("p/bad", "env/p/bad", "p/gone", "pq/other", "t/p/bad", "x")}
    held["p/gone"] = Rejection(3, "not JSON", deleted=True)
    views.publish(snapshot({"p/good": 1}, rejected=held), None)
    for layers, first in (((), "env/p/bad"), (("t/",), "t/p/bad")):
        section = views.view(layers).section("p/")
        with pytest.raises(HeldBack, match=f"'{first}'"):
            section["bad"]
        assert "gone" not in section


def test_telling_what_a_request_cost_reads_nothing() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    unready = Views(telemetry=Telemetry("requests", tracer_provider=provider))
    with provider.get_tracer("test").start_as_current_span("request"), Pinned(unready.view()):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["veltrix.lookup.count"] == 0


def test_a_derived_value_that_caught_an_error_within_is_computed_anew_in_the_next_snapshot() -> None:
    @dataclass(frozen=True)
    class Limits:
        most: int = 0

    def most(view: View) -> int:
        try:
            return view.bind(Limits, "limits/").most
        except InvalidValue:
            return -1

    views = views_of({"limits/most": "many"})
    assert views.view().derive(most) == -1
    views.publish(snapshot({"limits/most": 3}, revision=2), frozenset({"limits/most"}))
    assert views.view().derive(most) == 3
