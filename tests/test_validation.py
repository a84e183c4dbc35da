"""Schemas: keys become models, faults find their key, and no value is ever told."""

from __future__ import annotations

import datetime
import enum
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veltrix_mw.errors import InvalidValue, KeyMissing, SettingsError
from veltrix_mw.sorted_map import SortedMap
from veltrix_mw.validation import Fault, Schema, Schemas, assemble, bind
from veltrix_mw.values import MAX_DEPTH, FrozenDict, freeze

SECRET = "hunter2-5f3a"


# --- models ----------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Card(msgspec.Struct, frozen=True, tag="card", forbid_unknown_fields=True):
    number: Annotated[str, msgspec.Meta(pattern="^[0-9]*$")] = "0"


class Cash(msgspec.Struct, frozen=True, tag="cash"):
    limit: int = 0


class StripeStruct(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    time_out: int
    retries: list[int] = []
    hosts: dict[str, int] = {}
    means: list[Card | Cash] = []

    def __post_init__(self) -> None:
        if self.time_out == 13:
            raise ValueError(f"{SECRET} - at `$.hosts`")


@dataclass(frozen=True)
class StripeDataclass:
    time_out: int
    retries: list[int] = field(default_factory=list)
    hosts: dict[str, int] = field(default_factory=dict)
    means: list[dict[str, int]] = field(default_factory=list)
    ports: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Payments:
    stripe: StripeDataclass | None = None
    colour: Colour = Colour.RED
    mode: Literal["on", "off"] = "on"
    ratio: float = 0.5
    amount: Annotated[int, msgspec.Meta(ge=0)] = 0
    opened: datetime.date | None = None
    ident: uuid.UUID | None = None

    def __post_init__(self) -> None:
        if self.ratio == 13:
            raise LookupError(SECRET)


class PaymentsStruct(msgspec.Struct, frozen=True, rename="camel"):
    stripe: StripeStruct
    colour: Colour = Colour.RED
    max_items: Annotated[int, msgspec.Meta(ge=0)] = 0


class StripeModel(pydantic.BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    time_out: int = pydantic.Field(alias="timeOut", gt=0)
    retries: list[int] = []
    hosts: dict[str, int] = {}
    ident: uuid.UUID | None = None

    @pydantic.field_validator("retries")
    @classmethod
    def _few(cls, retries: list[int]) -> list[int]:
        if retries == [13]:
            raise ValueError(SECRET)
        if retries == [14]:
            raise LookupError(SECRET)
        assert retries != [15], SECRET
        if retries == [16]:
            raise pydantic.ValidationError.from_exception_data(SECRET, [])
        return retries

    @pydantic.model_validator(mode="after")
    def _whole(self) -> StripeModel:
        if self.time_out == 13:
            raise ValueError(SECRET)
        return self


class ByName(pydantic.BaseModel, frozen=True, loc_by_alias=False):
    time_out: int = pydantic.Field(1, validation_alias=pydantic.AliasChoices("timeOut", "TimeOut"))


class CardModel(pydantic.BaseModel, frozen=True):
    kind: Literal["card"]
    number: str = pydantic.Field("0", pattern="^[0-9]*$")


class CashModel(pydantic.BaseModel, frozen=True):
    kind: Literal["cash"]
    limit: int = 0


class PaymentsModel(pydantic.BaseModel, frozen=True):
    stripe: StripeModel | None = None
    colour: Colour = Colour.RED
    mode: Literal["on", "off"] = "on"
    means: list[Annotated[CardModel | CashModel, pydantic.Field(discriminator="kind")]] = []
    wide: int | list[int] = 0


class StrictModel(pydantic.BaseModel, frozen=True, strict=True):
    items: list[int] = []
    pair: tuple[int, int] = (0, 0)
    names: frozenset[str] = frozenset()
    opened: datetime.date | None = None
    nested: dict[str, dict[str, int]] = {}
    number: int = 0


@dataclass(frozen=True)
class HoldsPydantic:
    stripe: StripeModel
    few: pydantic.PositiveInt = 1


class Typed(TypedDict, total=False):
    number: int


class Pair(NamedTuple):
    one: int
    two: int


PAYMENTS_JSON: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Payments",
    "type": "object",
    "required": ["stripe"],
    "properties": {
        "stripe": {"$ref": "#/$defs/stripe"},
        "colour": {"enum": ["red", "blue"]},
        "amount": {"type": "integer", "minimum": 0, "multipleOf": 2},
        "name": {"type": "string", "pattern": "^[a-z]*$", "maxLength": 8},
        "wide": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
        "tags": {"type": "array", "uniqueItems": True, "items": {"type": "array"}},
        "again": {"$ref": "#"},
        "never": False,
        "labels": {"propertyNames": {"maxLength": 3}, "patternProperties": {"^x": {"type": "integer"}}},
    },
    "additionalProperties": False,
    "$defs": {
        "stripe": {
            "type": "object",
            "properties": {
                "time_out": {"type": "integer"},
                "retries": {"type": "array", "items": {"type": "integer"}},
                "hosts": {"type": "object", "additionalProperties": {"type": "integer"}},
            },
        }
    },
}


# Other work on the machine makes no test fail: what is asserted is what comes out, not when.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- helpers ---------------------------------------------------------------------------------------------------


def frozen(section: Mapping[str, Any]) -> dict[str, Any]:
    return {suffix: freeze(value) for suffix, value in section.items()}


def refusal(model: Any, prefix: str, section: Mapping[str, Any]) -> str:
    with pytest.raises(InvalidValue) as caught:
        bind(model, prefix, frozen(section))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return str(caught.value)


def below_of(stored: Mapping[str, Any]) -> Callable[[str], Iterator[tuple[str, Any, int]]]:
    return SortedMap.from_sorted([(key, freeze(stored[key]), 1) for key in sorted(stored)]).below


def check(
    name: str,
    model: Any,
    stored: Mapping[str, Any],
    *,
    layers: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Fault | None:
    schemas = Schemas({name: model}, layers=layers, defaults=frozen(defaults or {}))
    (schema,) = schemas
    return schemas.check(schema, below_of(stored))


def faulty_key(name: str, model: Any, stored: Mapping[str, Any], **options: Any) -> str | None:
    fault = check(name, model, stored, **options)
    assert fault is not None, "expected a fault"
    return fault.key


# --- assembling ------------------------------------------------------------------------------------------------

segments = st.text("abc-._~9", min_size=1, max_size=3).filter(lambda text: text not in {".", ".."})
suffixes = st.lists(segments, min_size=1, max_size=4).map("/".join)
values = st.one_of(st.integers(), st.text(max_size=3), st.none(), st.just(()), st.just(FrozenDict(a=1)))


def _fields(suffix: str) -> tuple[str, ...]:
    return tuple(suffix.replace("-", "_").replace(".", "_").split("/"))


@unhurried
@given(st.dictionaries(suffixes, values, max_size=12))
def test_a_section_nests_and_every_value_is_found_at_its_place_or_the_clash_is_real(section: dict[str, Any]) -> None:
    paths = [_fields(suffix) for suffix in section]
    clashes = len(set(paths)) < len(paths) or any(
        one != other and other[: len(one)] == one for one in paths for other in paths
    )
    if clashes:
        with pytest.raises(InvalidValue):
            assemble(section)
        return
    tree, places = assemble(section)
    assert places == {_fields(suffix): suffix for suffix in section}
    for suffix, value in section.items():
        node: Any = tree
        for name in _fields(suffix):
            assert type(node) is FrozenDict
            node = node[name]
        assert node is value

    def leaves(node: Any, path: tuple[str | int, ...]) -> int:
        return 1 if path in places else sum(leaves(inner, (*path, name)) for name, inner in node.items())

    assert leaves(tree, ()) == len(section), "the tree holds what the section holds, and no more"


def test_hyphens_and_dots_become_underscores_in_keys_but_not_inside_values() -> None:
    tree, _ = assemble({"time-out.max/a.b": freeze({"c-d": 1})})
    assert tree == {"time_out_max": {"a_b": {"c-d": 1}}}


def test_two_keys_of_one_field_are_an_error_that_names_both() -> None:
    message = refusal(dict[str, Any], "p/", {"a-b": 1, "a.b": 2})
    assert "'p/a-b'" in message
    assert "'p/a.b'" in message


def test_a_value_beside_values_below_it_is_an_error_that_names_both() -> None:
    message = refusal(dict[str, Any], "p/", {"a": {"x": 1}, "a-z": 1, "a/b/c": 2})
    assert "'p/a'" in message
    assert "'p/a/b/c'" in message


def test_segments_that_differ_only_in_spelling_share_what_lies_below() -> None:
    assert bind(dict[str, Any], "p/", {"a-b/x": 1, "a.b/y": 2}) == {"a_b": {"x": 1, "y": 2}}


def test_more_levels_than_a_value_may_have_are_refused() -> None:
    deep = "/".join(["a"] * MAX_DEPTH)
    assert bind(dict[str, Any], "p/", {deep: 1})
    assert "deeper" in refusal(dict[str, Any], "p/", {f"{deep}/a": 1})
    assert faulty_key("p/", dict[str, Any], {"p/b": 1, f"p/{deep}/a": 1}) == f"p/{deep}/a"


# --- binding ---------------------------------------------------------------------------------------------------

STRIPE = {"stripe/time_out": 5, "stripe/retries": [1, 2], "stripe/hosts": {"a": 1}, "colour": "blue"}


def test_a_dataclass_binds_nested_keys_and_objects() -> None:
    made = bind(Payments, "payments/", frozen(STRIPE))
    assert made == Payments(StripeDataclass(5, [1, 2], {"a": 1}), Colour.BLUE)
    nested = {"stripe": {"time_out": 5, "retries": [1, 2], "hosts": {"a": 1}}, "colour": "blue"}
    assert bind(Payments, "payments/", frozen(nested)) == made


def test_a_struct_binds_by_its_renamed_fields() -> None:
    made = bind(PaymentsStruct, "payments/", frozen({"stripe/timeOut": 5, "stripe/retries": [1], "maxItems": 3}))
    assert made == PaymentsStruct(stripe=StripeStruct(time_out=5, retries=[1]), max_items=3)


@pytest.mark.parametrize("name", ["time_out", "time-out", "timeOut"])
def test_a_pydantic_model_binds_by_field_and_by_alias(name: str) -> None:
    section = frozen({f"stripe/{name}": 5, "stripe/retries": [1, 2], "stripe/hosts": {"a": 1}, "colour": "blue"})
    made = bind(PaymentsModel, "payments/", section)
    assert made == PaymentsModel(stripe=StripeModel(time_out=5, retries=[1, 2], hosts={"a": 1}), colour=Colour.BLUE)


def test_a_strict_pydantic_model_takes_what_json_has() -> None:
    section = {
        "items": [1],
        "pair": [1, 2],
        "names": ["a"],
        "opened": "2024-02-29",
        "nested/a": {"b": 1},
    }
    made = bind(StrictModel, "p/", frozen(section))
    assert made.items == [1]
    assert made.pair == (1, 2)
    assert made.names == {"a"}
    assert made.opened == datetime.date(2024, 2, 29)
    assert made.nested == {"a": {"b": 1}}


def test_a_pydantic_model_is_lax_unless_its_config_says_strict() -> None:
    assert bind(PaymentsModel, "p/", {"stripe/time_out": "5"}).stripe.time_out == 5
    assert "expected an integer" in refusal(StrictModel, "p/", {"number": "5"})


def test_a_dataclass_that_holds_pydantic_types_is_validated_by_pydantic() -> None:
    assert bind(HoldsPydantic, "p/", {"stripe/timeOut": 5}).stripe == StripeModel(time_out=5)
    assert "'p/few'" in refusal(HoldsPydantic, "p/", {"stripe/timeOut": 5, "few": 0})


def test_types_made_of_pydantic_models_and_adapters_bind() -> None:
    assert bind(dict[str, StripeModel], "p/", {"eu/timeOut": 5}) == {"eu": StripeModel(time_out=5)}
    adapter = pydantic.TypeAdapter(list[pydantic.PositiveInt])
    assert bind(adapter, "p", {"": (1, 2)}) == [1, 2]
    assert bind(Annotated[int, pydantic.Field(gt=3)], "p", {"": 4}) == 4
    assert "'p'" in refusal(Annotated[int, pydantic.Field(gt=3)], "p", {"": 3})


def test_a_json_schema_gives_a_frozen_dict() -> None:
    made = bind(PAYMENTS_JSON, "payments/", frozen({"stripe/time-out": 5, "stripe/retries": [1], "wide": [1]}))
    assert made == {"stripe": {"time_out": 5, "retries": (1,)}, "wide": (1,)}
    assert type(made) is FrozenDict
    assert type(made["stripe"]) is FrozenDict


def test_a_json_schema_that_refers_to_itself_takes_arrays_at_every_level() -> None:
    section = frozen({"stripe": {}, "tags": [[1], [2]], "again": {"stripe": {"retries": [1]}, "tags": [[1]]}})
    assert bind(PAYMENTS_JSON, "payments/", section) == section
    assert "`again.tags`" in refusal(
        PAYMENTS_JSON, "payments/", {"stripe": {}, "again": {"stripe": {}, "tags": [[1], [1]]}}
    )


def test_the_dialect_of_a_json_schema_is_the_one_it_names() -> None:
    # Before 2019-09, a keyword beside $ref was ignored.
    schema = {"$ref": "#/definitions/any", "type": "string", "definitions": {"any": True}}
    assert bind(schema | {"$schema": "http://json-schema.org/draft-07/schema#"}, "p", {"": 5}) == 5
    assert "expected string" in refusal(schema, "p", {"": 5})


def test_a_later_change_to_the_apps_dict_changes_no_schema() -> None:
    mine: dict[str, Any] = {"type": "integer"}
    schemas = Schemas({"k": mine})
    mine["type"] = "string"
    (schema,) = schemas
    assert schemas.check(schema, below_of({"k": 5})) is None


@pytest.mark.parametrize(
    ("model", "value", "made"),
    [
        (int, 5, 5),
        (str, "a", "a"),
        (bool, True, True),
        (float, 5, 5.0),
        (Literal["a", "b"], "a", "a"),
        (list[int], [1, 2], [1, 2]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (frozenset[int], [1, 2], frozenset({1, 2})),
        (int | None, None, None),
        (int, 10**30, 10**30),
        (dict[int, str], {"5": "a"}, {5: "a"}),
        (Pair, [1, 2], Pair(1, 2)),
        (StripeDataclass, {"time_out": 1}, StripeDataclass(1)),
        (datetime.timedelta, "PT5S", datetime.timedelta(seconds=5)),
        (Any, {"a": [1]}, {"a": (1,)}),
        ({"type": "array"}, [1], (1,)),
    ],
    ids=repr,
)
def test_a_single_key_binds_to_plain_types_too(model: Any, value: Any, made: Any) -> None:
    bound = bind(model, "checkout/max_items", {"": freeze(value)})
    assert bound == made
    assert type(bound) is type(made) or model in (Any, {"type": "array"})


@pytest.mark.parametrize(
    ("model", "value"),
    [(int, "5"), (int, True), (int, 5.0), (bool, 1), (str, 5), (float, "5"), (list[int], ["5"]), (int, None)],
)
def test_json_types_are_not_converted_into_each_other(model: Any, value: Any) -> None:
    assert "'k' does not fit" in refusal(model, "k", {"": value})


def test_an_annotated_that_cannot_be_hashed_binds() -> None:
    model = Annotated[int, msgspec.Meta(ge=3), ["not", "hashable"]]
    assert bind(model, "k", {"": 3}) == 3
    assert ">= 3" in refusal(model, "k", {"": 2})


@pytest.mark.parametrize("model", [Payments, PaymentsModel, dict[str, int], Typed, {"type": "object"}], ids=str)
def test_a_model_with_defaults_binds_an_empty_section(model: Any) -> None:
    made = bind(model, "p/", {})
    assert made == (model() if isinstance(model, type) and model is not Typed else {})


def test_a_model_that_requires_something_refuses_an_empty_section() -> None:
    for model in (PaymentsStruct, HoldsPydantic, PAYMENTS_JSON):
        message = refusal(model, "p/", {})
        assert "'p/' does not fit" in message
        assert "`stripe`" in message


def test_a_single_key_without_a_value_is_missing() -> None:
    with pytest.raises(KeyMissing, match="'checkout/max_items'"):
        bind(int, "checkout/max_items", {})


def test_what_an_any_field_holds_is_frozen() -> None:
    made = bind(dict[str, Any], "p/", {"a/b/c": 1})
    with pytest.raises(TypeError):
        made["a"]["b"] = 2


def test_defaults_of_one_instance_are_not_shared_with_the_next() -> None:
    bind(StripeDataclass, "p/", {"time_out": 1}).retries.append(5)
    assert bind(StripeDataclass, "p/", {"time_out": 1}).retries == []


# --- the key at fault ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "stored", "key", "where"),
    [
        # msgspec
        (Payments, {"p/stripe/time-out": "x"}, "p/stripe/time-out", "`stripe.time_out`"),
        (Payments, {"p/stripe": {"time_out": 1, "retries": [1, "x"]}}, "p/stripe", "`stripe.retries[1]`"),
        (Payments, {"p/stripe/time_out": 1, "p/stripe/hosts": {"a": "x"}}, "p/stripe/hosts", "`stripe.hosts[...]`"),
        (
            Payments,
            {"p/stripe/time_out": 1} | {f"p/stripe/hosts/h{at}": "x" if at in {37, 60} else at for at in range(99)},
            "p/stripe/hosts/h37",
            "`stripe.hosts.h37`",
        ),
        (Payments, {"p/stripe/time_out": 1, "p/stripe/ports/80": 1, "p/stripe/ports/x": 1}, "p/stripe/ports/x", ""),
        (
            Payments,
            {"p/stripe/time_out": 1, "p/stripe/means": [{}, {"zz": "x"}]},
            "p/stripe/means",
            "`stripe.means[1][...]`",
        ),
        (Payments, {"p/stripe/retries": [1]}, None, "`stripe.time_out`"),
        (Payments, {"p/stripe": {}}, "p/stripe", "`stripe.time_out`"),
        (Payments, {"p/stripe": 5}, "p/stripe", "`stripe`"),
        (Payments, {"p/colour": "x", "p/amount": 1}, "p/colour", "allowed values"),
        (Payments, {"p/amount": -1, "p/colour": "red"}, "p/amount", ">= 0"),
        (Payments, {"p/ratio": 13, "p/colour": "red"}, None, "LookupError"),
        (PaymentsStruct, {"p/stripe/timeOut": "x"}, "p/stripe/timeOut", "`stripe.timeOut`"),
        (PaymentsStruct, {"p/stripe": {"timeOut": 13}}, "p/stripe", "(ValueError) at `stripe`"),
        (PaymentsStruct, {"p/stripe/timeOut": 13}, None, "(ValueError) at `stripe`"),
        (PaymentsStruct, {"p/stripe/timeOut": 1, "p/stripe/zz": 1}, "p/stripe/zz", "unknown field at `stripe.zz`"),
        (PaymentsStruct, {"p/stripe": {"timeOut": 1, "zz": 1}}, "p/stripe", "unknown field at `stripe[...]`"),
        (PaymentsStruct, {"p/stripe/timeOut": 1, "p/stripe/means": [{"type": "x"}]}, "p/stripe/means", "tag"),
        (dict[str, int], {"p/a": 1, "p/b": "x", "p/c": 1}, "p/b", "`b`"),
        (dict[str, dict[str, int]], {"p/a/b": 1, "p/b": {"k": 1}, "p/c/d": 1, "p/c/e": "x"}, "p/c/e", "`c.e`"),
        # pydantic
        (PaymentsModel, {"p/stripe/timeOut": "x"}, "p/stripe/timeOut", "`stripe.timeOut`"),
        (PaymentsModel, {"p/stripe/time-out": "x"}, "p/stripe/time-out", "`stripe.time_out`"),
        (dict[str, ByName], {"p/a/TimeOut": "x", "p/b/timeOut": 1}, "p/a/TimeOut", "`a.TimeOut`"),
        (PaymentsModel, {"p/stripe/time_out": 0}, "p/stripe/time_out", "> 0"),
        (PaymentsModel, {"p/stripe": {"timeOut": 1, "hosts": {"a": "x"}}}, "p/stripe", "`stripe.hosts[...]`"),
        (PaymentsModel, {"p/stripe/timeOut": 1, "p/stripe/hosts/a": "x"}, "p/stripe/hosts/a", "`stripe.hosts.a`"),
        (PaymentsModel, {"p/stripe/retries": [1]}, None, "`stripe.timeOut`"),
        (PaymentsModel, {"p/stripe/timeOut": 1, "p/stripe/zz": 1}, "p/stripe/zz", "unknown field"),
        (PaymentsModel, {"p/stripe/timeOut": 1, "p/stripe/retries": [13]}, "p/stripe/retries", "(ValueError)"),
        (PaymentsModel, {"p/stripe/timeOut": 1, "p/stripe/retries": [14]}, None, "(LookupError)"),
        (PaymentsModel, {"p/stripe/timeOut": 1, "p/stripe/retries": [15]}, "p/stripe/retries", "(AssertionError)"),
        (PaymentsModel, {"p/stripe/timeOut": 13}, None, "(ValueError) at `stripe`"),
        (PaymentsModel, {"p/means": [{"kind": "cash", "limit": "x"}]}, "p/means", "`means[0].limit`"),
        (PaymentsModel, {"p/means": [{"kind": "x"}], "p/mode": "on"}, "p/means", "'card', 'cash'"),
        (PaymentsModel, {"p/wide": [1, "x"], "p/mode": "on"}, "p/wide", "`wide`"),
        # Two faults, of which one has no key: the one with a key is told.
        (PaymentsModel, {"p/stripe/retries": [1], "p/mode": "x"}, "p/mode", "'on' or 'off'"),
        # JSON Schema
        (PAYMENTS_JSON, {"p/stripe/time-out": "x"}, "p/stripe/time-out", "expected integer at `stripe.time_out`"),
        (PAYMENTS_JSON, {"p/stripe": {"retries": [1, "x"]}}, "p/stripe", "`stripe.retries[1]`"),
        (PAYMENTS_JSON, {"p/stripe": {"hosts": {"a": "x"}}}, "p/stripe", "`stripe.hosts[...]`"),
        (PAYMENTS_JSON, {"p/stripe/hosts/a": "x"}, "p/stripe/hosts/a", "`stripe.hosts.a`"),
        (PAYMENTS_JSON, {"p/colour": "red"}, None, "a required member is missing at `stripe`"),
        (PAYMENTS_JSON, {"p/stripe": {}, "p/zz/y": 1}, None, "unknown member at `zz`"),
        (PAYMENTS_JSON, {"p/stripe": {}, "p/zz": 1}, "p/zz", "unknown member at `zz`"),
        (PAYMENTS_JSON, {"p/stripe": {}, "p/amount": -2}, "p/amount", "fails `minimum`: 0"),
        (PAYMENTS_JSON, {"p/stripe": {}, "p/wide": ["x"]}, "p/wide", "fails `anyOf`"),
        # jsonschema gives no path for a schema that is just `false`.
        (PAYMENTS_JSON, {"p/stripe": {}, "p/never": 1}, None, "no value is allowed"),
        (PAYMENTS_JSON, {"p/stripe": {}, "p/labels/long-one": 1}, "p/labels/long-one", "name fails `maxLength`"),
        (PAYMENTS_JSON, {"p/stripe": {}, "p/labels/x": "y"}, "p/labels/x", "`labels.x`"),
        (PAYMENTS_JSON, {"p/colour": "x", "p/zz/y": 1}, "p/colour", "fails `enum`"),
        # keys that clash
        (dict[str, Any], {"p/a": 1, "p/a/b": 1}, None, "'p/a/b' lies below it"),
    ],
)
def test_a_fault_names_the_stored_key_and_where_in_the_model(
    model: Any, stored: dict[str, Any], key: str | None, where: str
) -> None:
    fault = check("p/", model, stored)
    assert fault is not None
    assert fault.key == key
    assert where in fault.reason
    message = refusal(model, "p/", {name.removeprefix("p/"): value for name, value in stored.items()})
    assert message == fault.reason
    if key is not None:
        assert repr(key) in message


def test_a_fault_of_a_single_key_is_that_key_wherever_it_lies() -> None:
    for model in (Payments, PaymentsModel, PAYMENTS_JSON):
        assert faulty_key("k", model, {"k": {"stripe": {"time_out": "x"}}, "k/other": 1}) == "k"
        assert faulty_key("k", model, {"k": 5}) == "k"
    assert faulty_key("k", Payments, {"k": {"ratio": 13}}) == "k"


def test_a_member_is_not_guessed_where_the_model_wants_a_number_of_them() -> None:
    model = Annotated[dict[str, int], msgspec.Meta(min_length=3)]
    assert faulty_key("p/", model, {"p/a": "x", "p/b": 1, "p/c": 1, "p/d": 1}) is None


def test_a_field_renamed_to_what_looks_like_a_path_is_no_crash() -> None:
    class Odd(msgspec.Struct):
        hosts: dict[str, int] = msgspec.field(name="a.b[0]", default_factory=dict)

    assert "expected `int`" in refusal(Odd, "p", {"": {"a.b[0]": {"k": "x"}}})


# --- sections, layers, defaults --------------------------------------------------------------------------------


def test_an_empty_section_is_valid_whatever_the_model_requires() -> None:
    for model in (PaymentsStruct, HoldsPydantic, PAYMENTS_JSON):
        assert check("p/", model, {"other": 1, "p": 1, "pp/x": 1}) is None
        assert check("p/", model, {}, layers=("env/prod/",), defaults={"p/colour": "red"}) is None


def test_a_single_key_schema_ignores_keys_that_only_begin_alike() -> None:
    assert check("max", int, {"max/a": "x", "max-b": "x", "maximum": "x"}) is None
    assert check("max", int, {"max": 5, "max/a": "x"}) is None


def test_layers_cover_the_base_in_order() -> None:
    stored = {"p/a": "x", "env/p/a": "y", "env/eu/p/a": 1}
    layers = ("env/eu/", "env/")
    assert check("p/", dict[str, int], stored, layers=layers) is None
    assert faulty_key("p/", dict[str, int], stored, layers=layers[1:]) == "env/p/a"
    assert faulty_key("p/", dict[str, int], stored) == "p/a"
    assert check("p/a", int, stored, layers=layers) is None
    assert faulty_key("p/a", int, stored, layers=layers[1:]) == "env/p/a"


def test_a_layer_completes_what_the_base_lacks() -> None:
    stored = {"p/stripe/retries": [1], "env/p/stripe/time_out": 1}
    assert check("p/", Payments, stored, layers=("env/",)) is None
    assert faulty_key("p/", Payments, stored) is None


def test_keys_that_clash_across_layers_are_both_named_as_stored() -> None:
    fault = check("p/", dict[str, int], {"p/a-b": 1, "env/p/a.b": 1}, layers=("env/",))
    assert fault is not None
    assert fault.key is None
    assert "'p/a-b'" in fault.reason
    assert "'env/p/a.b'" in fault.reason


def test_defaults_lie_under_the_stored_keys() -> None:
    defaults = {"p/stripe/time_out": 5, "other": 1}
    assert check("p/", Payments, {"p/stripe/retries": [1]}, defaults=defaults) is None
    assert faulty_key("p/", Payments, {"p/stripe/time_out": "x"}, defaults=defaults) == "p/stripe/time_out"


def test_a_stored_key_that_clashes_with_a_default_is_the_one_at_fault() -> None:
    fault = check("p/", dict[str, Any], {"p/a/b": 1}, defaults={"p/a": 1})
    assert fault is not None
    assert fault.key == "p/a/b"
    assert "'p/a' (a default)" in fault.reason


def test_a_fault_that_only_shows_with_stored_keys_but_lies_in_a_default_has_no_key() -> None:
    schema = {"if": {"required": ["low"]}, "then": {"properties": {"limit": {"maximum": 3}}}}
    fault = check("p/", schema, {"p/low": True}, defaults={"p/limit": 5})
    assert fault is not None
    assert fault.key is None
    assert "'p/limit'" in fault.reason
    assert "default" in fault.reason


@pytest.mark.parametrize(
    ("name", "model", "defaults"),
    [
        ("p/", Payments, {"p/amount": SECRET}),
        ("p/", PaymentsModel, {"p/mode": SECRET}),
        ("p/amount", int, {"p/amount": SECRET}),
        ("p/", dict[str, Any], {"p/a": SECRET, "p/a/b": SECRET}),
    ],
)
def test_a_default_that_its_schema_refuses_is_an_error_of_the_settings(
    name: str, model: Any, defaults: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=r"^defaults: 'p/") as caught:
        Schemas({name: model}, defaults=defaults)
    assert SECRET not in str(caught.value)


def test_defaults_need_not_be_whole() -> None:
    assert len(Schemas({"p/": PAYMENTS_JSON}, defaults={"p/colour": "red"})) == 1


def test_keys_of_a_section_are_those_of_every_layer_and_the_base() -> None:
    schemas = Schemas({"p/": dict[str, int], "p/a": int}, layers=("env/",), defaults={"p/d": 1})
    whole, single = schemas
    below = below_of({"p/a": 1, "p/b/c": 1, "p-": 1, "env/p/a": 1, "env/q": 1, "p/a/x": 1})
    assert schemas.keys_of(whole, below) == ["env/p/a", "p/a", "p/a/x", "p/b/c"]
    assert schemas.keys_of(single, below) == ["env/p/a", "p/a"]


def test_no_key_is_told_twice_where_layers_overlap() -> None:
    schemas = Schemas({"env/": dict[str, Any]}, layers=("env/",))
    (schema,) = schemas
    assert schemas.keys_of(schema, below_of({"env/env/a": 1, "env/b": 1})) == ["env/env/a", "env/b"]


# --- touched ---------------------------------------------------------------------------------------------------


def names(schemas: Iterable[Schema]) -> list[str]:
    return [schema.name for schema in schemas]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], []),
        (["payments/x"], ["payments/"]),
        (["payments/stripe/x"], ["payments/", "payments/stripe/"]),
        (["payments", "payments-x", "paymentsx/y", "zz"], []),
        (["env/prod/payments/x"], ["payments/"]),
        (["env/test/payments/x", "x/env/prod/payments/x"], []),
        (["max"], ["max"]),
        (["max/x", "maximum", "ma"], []),
        (["env/prod/max", "payments/x"], ["payments/", "max"]),
        (["~", "payments/x", "a", "max"], ["payments/", "max"]),
    ],
)
def test_touched_schemas_are_those_a_key_falls_under(keys: list[str], expected: list[str]) -> None:
    schemas = Schemas({"payments/": Payments, "payments/stripe/": StripeDataclass, "max": int}, layers=("env/prod/",))
    assert names(schemas.touched(keys)) == expected
    assert names(schemas.touched(iter(reversed(keys)))) == expected


@unhurried
@given(st.sets(suffixes, max_size=20), st.sets(suffixes, max_size=6), st.sets(suffixes, max_size=3))
def test_touched_agrees_with_trying_every_key(keys: set[str], schemas: set[str], layers: set[str]) -> None:
    wanted = {f"{name}/" if len(name) % 2 else name: Any for name in schemas}
    starts = ["", *(f"{layer}/" for layer in layers)]
    expected = [
        name
        for name in wanted
        if any(
            key.startswith(start + name) if name.endswith("/") else key == start + name
            for key in keys
            for start in starts
        )
    ]
    assert names(Schemas(wanted, layers=starts[1:]).touched(keys)) == expected


class CountedKey(str):
    """A key that counts how often it is looked at."""

    __slots__ = ()
    looks = 0

    def startswith(self, *args: Any) -> bool:
        CountedKey.looks += 1
        return super().startswith(*args)

    def __lt__(self, other: str) -> bool:
        CountedKey.looks += 1
        return super().__lt__(other)

    def __eq__(self, other: object) -> bool:
        CountedKey.looks += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_touched_looks_at_each_of_many_keys_hardly_more_than_once() -> None:
    keys = [CountedKey(f"tenants/{number:06}/limit") for number in range(100_000)]
    schemas = Schemas(
        {f"section{number}/": Any for number in range(40)} | {"tenants/099999/limit": int}, layers=("a/",)
    )
    CountedKey.looks = 0
    assert names(schemas.touched(keys)) == ["tenants/099999/limit"]
    assert CountedKey.looks < 1.1 * len(keys)


def test_no_schemas_are_false_and_touch_nothing() -> None:
    assert not Schemas({})
    assert Schemas({"a/": Any})
    assert Schemas({}).touched(["a"]) == []


# --- settings --------------------------------------------------------------------------------------------------


class Unknown:
    """What no library here can make of JSON."""


@dataclass
class HoldsUnknown:
    thing: Unknown


@dataclass
class Unresolved:
    thing: NoSuchName  # type: ignore[name-defined]  # noqa: F821


class Unfinished(pydantic.BaseModel):
    thing: NoSuchName  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("name", "model", "told"),
    [
        ("bad key", int, "schemas: 'bad key'"),
        ("a//", Payments, "schemas: 'a//'"),
        ("", Payments, "schemas: ''"),
        (5, Payments, "schemas: "),
        ("k", Unknown, "'k': Unknown"),
        ("k", HoldsUnknown, "msgspec.Struct.*pydantic.*jsonschema"),
        ("k", Unresolved, "'k': Unresolved cannot be used as a model .*NoSuchName"),
        ("k", Unfinished, "'k': Unfinished cannot be used as a model"),
        ("k", complex, "complex"),
        ("k", 5, "'k': 5"),
        ("k", "Payments", "'k'"),
        ("k", Card | StripeStruct, "'k'"),
        ("p/", int, "'p/': int is no model for the keys below a prefix"),
        ("p/", list[int], "leave out the trailing '/'"),
        ("p/", Pair, "prefix"),
        ("k", {"type": "no-such-type"}, r"not a valid JSON Schema at \$\.type"),
        ("k", {"properties": {"a": {"minimum": "3"}}}, r"\$\.properties\.a\.minimum"),
        ("k", {"type": {1, 2}}, "not a JSON Schema"),
        ("k", {"pattern": "("}, "not a valid JSON Schema"),
        ("k", {"$schema": "https://example.com/none"}, "no dialect"),
        ("k", {"$schema": 5}, "not a valid JSON Schema"),
        ("k", {"$ref": "#/$defs/none"}, r"\$ref '#/\$defs/none' leads nowhere"),
        ("k", {"properties": {"a": {"items": {"$ref": "http://127.0.0.1:9/x"}}}}, "leads nowhere"),
    ],
    ids=str,
)
def test_a_wrong_schema_is_an_error_of_the_settings_that_names_it(name: Any, model: Any, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        Schemas({name: model})


def test_references_within_a_schema_are_followed() -> None:
    schema = {
        "$id": "https://example.com/top",
        "properties": {
            "a": {"$ref": "#/$defs/one"},
            "b": {"$ref": "two"},
            "c": {"$ref": "#three"},
            "d": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        },
        "$defs": {"one": {"type": "integer"}, "x": {"$id": "two", "type": "string"}, "y": {"$anchor": "three"}},
    }
    assert bind(schema, "p/", {"a": 1, "b": "b", "c": None, "d": freeze({"type": "string"})})["b"] == "b"
    assert "'p/b'" in refusal(schema, "p/", {"b": 1})
    assert "'p/d'" in refusal(schema, "p/", {"d": {"type": 5}})


def test_a_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(SettingsError, match=r"install veltrix-mw\[jsonschema\]"):
        Schemas({"k": {"title": "not compiled yet"}})
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(SettingsError, match="needs pydantic"):
        Schemas({"k": Annotated[int, pydantic.Field(gt=12345)]})


def test_importing_the_module_loads_no_validator() -> None:
    program = (
        "import sys, veltrix_mw.validation as v\n"
        "print([m for m in ('msgspec', 'pydantic', 'jsonschema', 'referencing') if m in sys.modules])\n"
        "v.bind(int, 'k', {'': 5})\n"
        "print([m for m in ('pydantic', 'jsonschema', 'referencing') if m in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["[]", "[]"]


# --- secrets ---------------------------------------------------------------------------------------------------

BAD_VALUES: list[Any] = [
    SECRET,
    [SECRET],
    {SECRET: SECRET},
    {"time_out": SECRET},
    {"timeOut": SECRET},
    {"time_out": 1, "hosts": {SECRET: SECRET}},
    {"timeOut": 1, "hosts": {SECRET: SECRET}},
    {"timeOut": 1, "retries": [13]},
    {"timeOut": 1, "retries": [14]},
    {"timeOut": 1, "retries": [15]},
    {"timeOut": 1, "retries": [16]},
    {"timeOut": 1, "means": [{"type": SECRET}]},
    {"timeOut": 1, "means": [{"type": "card", "number": SECRET}]},
    {"timeOut": 1, "means": [{"type": "card", SECRET: 1}]},
    {"timeOut": 1, SECRET: 1},
    {"timeOut": 13},
    {"timeOut": 1, "ident": SECRET},
    {"time_out": 1, "ports": {SECRET: 1}},
    [{"kind": SECRET}],
    [{"kind": "card", "number": SECRET}],
    [{SECRET: SECRET}],
]


class Refuses(pydantic.BaseModel):
    """Refuses in each way that pydantic offers."""

    value: Any = None
    link: pydantic.AnyUrl | None = None
    opened: datetime.datetime | None = None
    zone: Annotated[str, pydantic.StringConstraints(pattern="^x$")] = "x"

    @pydantic.field_validator("value")
    @classmethod
    def _never(cls, value: Any) -> Any:
        import pydantic_core

        if isinstance(value, str):
            raise pydantic_core.PydanticCustomError(value, "{text} is bad", {"text": value})  # type: ignore[arg-type]
        if isinstance(value, list):
            raise pydantic_core.PydanticCustomError("value_error", "{text} is bad", {"text": str(value)})
        raise pydantic_core.PydanticCustomError("missing", "{text} is bad", {"text": str(value)})


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        yield from _chain(error.__cause__)
        error = error.__context__


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (Payments, ["stripe", "colour", "mode", "ratio", "amount", "opened", "ident"]),
        (PaymentsStruct, ["stripe", "colour", "maxItems", "extra"]),
        (PaymentsModel, ["stripe", "colour", "mode", "means", "wide"]),
        (Refuses, ["value", "link", "opened", "zone"]),
        (HoldsPydantic, ["stripe", "few"]),
        (PAYMENTS_JSON, [*PAYMENTS_JSON["properties"], "extra"]),
        ({"additionalProperties": {"const": 1}}, ["a"]),
        ({"unevaluatedProperties": False, "not": {}}, ["a"]),
        ({"dependentRequired": {"a": ["b"]}, "propertyNames": {"pattern": "^b"}}, ["a"]),
        (dict[str, int], ["a"]),
        (dict[str, dict[int, int]], ["a"]),
        (Typed, ["number"]),
    ],
    ids=str,
)
def test_no_part_of_a_value_is_ever_told(model: Any, fields: list[str]) -> None:
    refused = 0
    for name in fields:
        for value in BAD_VALUES:
            fault = check("p/", model, {f"p/{name}": value})
            try:
                bind(model, "p/", {name: freeze(value)})
            except InvalidValue as exc:
                refused += 1
                assert fault is not None
                for error in _chain(exc):
                    assert SECRET not in f"{error} {error!r} {error.args} {vars(error)}"
            else:
                assert fault is None
            assert fault is None or SECRET not in repr(fault)
            single = check("k", model, {"k": {name: value}})
            assert single is None or SECRET not in repr(single)
    assert refused >= len(fields), "the planted values must be bad ones"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(
    st.sampled_from(["stripe", "colour", "mode", "ratio", "means", "wide", "amount", "tags", "labels", "again"])
    | suffixes,
    json_values,
    max_size=5,
)


@pytest.mark.parametrize("model", [Payments, PaymentsStruct, PaymentsModel, PAYMENTS_JSON, StrictModel], ids=str)
@unhurried
@given(section=json_objects)
def test_whatever_is_stored_binding_gives_a_model_or_invalid_value_and_checking_agrees(
    model: Any, section: dict[str, Any]
) -> None:
    try:
        bind(model, "p/", frozen(section))
        bound = True
    except InvalidValue:
        bound = False
    fault = check("p/", model, {f"p/{suffix}": value for suffix, value in section.items()})
    assert (fault is None) == (bound or not section)
    assert fault is None or fault.key is None or fault.key.removeprefix("p/") in section
