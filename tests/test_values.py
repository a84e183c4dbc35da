"""Values: strict JSON in, frozen values out, and back; no word of a value in any error."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import random
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from veltrix_mw.errors import InvalidValue
from veltrix_mw.values import MAX_DEPTH, MAX_VALUE_BYTES, MISSING, FrozenDict, Missing, decode, encode, freeze

SECRET = "hunter2"

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
)
names = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4))
)


def same(frozen: Any, plain: Any) -> bool:
    """Whether `frozen` is `plain` with tuples for lists and frozen dicts for dicts, types and signs included."""
    if isinstance(plain, dict):
        return (
            type(frozen) is FrozenDict
            and frozen.keys() == plain.keys()
            and all(same(frozen[key], plain[key]) for key in plain)
        )
    if isinstance(plain, (list, tuple)):
        return (
            type(frozen) is tuple
            and len(frozen) == len(plain)
            and all(same(one, other) for one, other in zip(frozen, plain, strict=True))
        )
    if isinstance(plain, float) and math.copysign(1, plain) != math.copysign(1, frozen):
        return False
    return type(frozen) is type(plain) and frozen == plain


def nested(depth: int, kind: str, inner: str) -> bytes:
    """`depth` objects or arrays in one another, with `inner` in the innermost."""
    if kind == "array":
        text = "[" * depth + inner + "]" * depth
    elif kind == "object":
        text = '{"a":' * (depth - 1) + ("{" + f'"a":{inner}' * bool(inner) + "}") + "}" * (depth - 1)
    else:
        text = inner
        for level in range(depth):
            text = f"[{text}]" if level % 2 else ('{"a":' + text + "}" if text else "{}")
    return text.encode()


# Round trips


@given(values)
@example(-0.0)
@example(5e-324)
@example(1.7976931348623157e308)
@example('\0\x1f\u2028\U0010ffff"\\')
@example({"": [[], {}], "é": [None, True, 1, 1.0]})
@example(2**70)
def test_what_is_encoded_decodes_to_the_same_frozen(value: Any) -> None:
    raw = encode(value)
    assert same(decode(raw), value)
    assert same(freeze(value), value)
    assert encode(decode(raw)) == raw
    assert json.loads(json.dumps(decode(raw))) == json.loads(raw)
    hash(decode(raw))


@given(st.binary(max_size=40))
@example(b"[" * 5000)
@example(b'{"a":' * 5000)
def test_bytes_either_decode_and_come_back_or_raise_invalid_value(raw: bytes) -> None:
    try:
        value = decode(raw)
    except InvalidValue:
        return
    assert same(decode(encode(value)), value)


@given(values, st.integers(0, 1), st.randoms(use_true_random=False))
def test_any_spelling_of_json_decodes_to_the_same(value: Any, ascii_only: int, chance: random.Random) -> None:
    text = json.dumps(value, ensure_ascii=bool(ascii_only), indent=chance.choice([None, 0, 2]))
    assert same(decode(f"\n\t {text}\r\n".encode()), value)


def test_the_text_is_compact_utf_8() -> None:
    assert encode({"a": [1, "é"], "b": None}) == '{"a":[1,"é"],"b":null}'.encode()


def test_str_enums_int_enums_and_subclasses_of_the_plain_types_become_plain() -> None:
    class Colour(str, Enum):  # noqa: UP042  # StrEnum differs, and both are met
        RED = "red"

    class Level(IntEnum):
        HIGH = 3

    class Pair(NamedTuple):
        one: int
        two: int

    given_value = {"c": Colour.RED, "l": Level.HIGH, "p": Pair(1, 2), "d": OrderedDict(a=defaultdict(int, b=1))}
    assert same(freeze(given_value), {"c": "red", "l": 3, "p": [1, 2], "d": {"a": {"b": 1}}})
    assert type(freeze(Level.HIGH)) is int
    assert type(freeze(Colour.RED)) is str


# What is refused

NOT_JSON = [
    b"",
    b" ",
    b"blue",
    b"'blue'",
    b"{a:1}",
    b'{"a":1,}',
    b"[1,]",
    b"01",
    b"1.",
    b".5",
    b"+1",
    b"0x10",
    b"1_000",
    "\u0661".encode(),
    "1\u0662".encode(),
    b"1 2",
    b"None",
    b"True",
    b'"a\nb"',
    b'{"a\tb":1}',
    b'"\\x41"',
    b'"\\u12"',
    b"[1\xc2\xa02]",
    b"/* c */ 1",
    b"{} {}",
]


@pytest.mark.parametrize("raw", NOT_JSON)
def test_what_is_not_json_by_rfc_8259_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidValue, match="not JSON"):
        decode(raw)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_nan_and_infinity_are_refused_wherever_they_stand(name: str) -> None:
    for raw in (name, f"[1,{name}]", f'{{"a":{{"b":{name}}}}}'):
        with pytest.raises(InvalidValue, match=f"^{name} is not JSON"):
            decode(raw.encode())
    for value in (float(name), [float(name)], {"a": {"b": float(name)}}):
        with pytest.raises(InvalidValue, match="NaN, an infinity"):
            encode(value)


@pytest.mark.parametrize("raw", [b"1e999", b"-1e999", b"[1e999]", b'{"a":-1e309}', b"1" + b"0" * 400 + b".0"])
def test_a_float_beyond_64_bits_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidValue, match="too large for a 64-bit float"):
        decode(raw)


def test_integers_have_at_most_4300_digits() -> None:
    for sign in ("", "-"):
        longest = f"{sign}{'7' * 4300}"
        assert decode(longest.encode()) == int(longest)
        assert encode(int(longest)) == longest.encode()
        with pytest.raises(InvalidValue, match="too many digits"):
            decode(f"{longest}7".encode())
        with pytest.raises(InvalidValue, match="too many digits"):
            encode(int(longest) * 10)
    with pytest.raises(InvalidValue, match="too many digits"):
        decode(b'{"a":[' + b"7" * 4301 + b"]}")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"b":2,"a":3}',
        b'{"x":{"a":1,"a":2}}',
        b'[[{"x":[{"a":null,"a":null}]}]]',
        b'{"a":1,"\\u0061":2}',
        b'{"":1,"":1}',
    ],
)
def test_a_member_named_twice_is_refused_at_any_depth(raw: bytes) -> None:
    with pytest.raises(InvalidValue, match="same member twice"):
        decode(raw)


@pytest.mark.parametrize("kind", ["array", "object", "both"])
@pytest.mark.parametrize("inner", ["", "1"])
def test_objects_and_arrays_nest_64_levels_and_no_more(kind: str, inner: str) -> None:
    assert MAX_DEPTH == 64
    if kind == "object" and not inner:
        assert nested(2, kind, inner) == b'{"a":{}}'
    deepest = decode(nested(64, kind, inner))
    assert encode(deepest) == nested(64, kind, inner)
    for depth in (65, 66, 500, 50_000):
        with pytest.raises(InvalidValue, match="nests deeper than 64 levels"):
            decode(nested(depth, kind, inner))
    for one_more in ([deepest], {"a": deepest}):
        with pytest.raises(InvalidValue, match="nests deeper than 64 levels"):
            encode(one_more)


def test_many_brackets_side_by_side_are_not_deep() -> None:
    raw = b"[" + b",".join([b'{"a":[]}'] * 1000) + b"]"
    assert len(decode(raw)) == 1000
    assert decode(b'"' + b"[" * 100 + b'"') == "[" * 100


@pytest.mark.parametrize("raw", [b'"\\ud800"', b'"\\udc00\\ud800"', b'{"\\ud800":1}', b'[["a\\udfff"]]', b'"\\ud83dx"'])
def test_half_of_a_surrogate_pair_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidValue, match="half of a surrogate pair"):
        decode(raw)
    with pytest.raises(InvalidValue, match="half of a surrogate pair"):
        encode(json.loads(raw))


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert decode(b'"\\ud83d\\ude00 \\\\u"') == "\U0001f600 \\u"


@pytest.mark.parametrize("raw", [b"\xff", b'"\xc3"', b'"\xed\xa0\x80"', b'"\xc0\x80"', "1".encode("utf-16")])
def test_what_is_not_utf_8_is_refused_with_the_place(raw: bytes) -> None:
    with pytest.raises(InvalidValue, match=r"not UTF-8 \(byte \d+\)"):
        decode(raw)


def test_a_byte_order_mark_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidValue, match="byte order mark; save it as UTF-8 without one"):
        decode(b"\xef\xbb\xbf1")
    assert decode(b'"\xef\xbb\xbf"') == "\ufeff"


def test_a_value_has_at_most_one_mebibyte() -> None:
    assert MAX_VALUE_BYTES == 1024 * 1024
    longest = "x" * (MAX_VALUE_BYTES - 2)
    assert decode(encode(longest)) == longest
    with pytest.raises(InvalidValue, match=f"{MAX_VALUE_BYTES}"):
        encode(longest + "x")
    with pytest.raises(InvalidValue, match=f"has {MAX_VALUE_BYTES + 1} bytes; at most {MAX_VALUE_BYTES}"):
        decode(b'"' + longest.encode() + b'x"')
    # Bytes, not characters.
    with pytest.raises(InvalidValue, match=f"at most {MAX_VALUE_BYTES}"):
        encode("é" * (MAX_VALUE_BYTES // 2))
    many = decode(b"[" + b"1," * (MAX_VALUE_BYTES // 2 - 2) + b"1]")
    assert len(many) == MAX_VALUE_BYTES // 2 - 1
    with pytest.raises(InvalidValue, match=f"{MAX_VALUE_BYTES}"):
        encode([*many, 1])


def test_the_limit_can_be_set() -> None:
    assert encode("abc", max_bytes=5) == b'"abc"'
    assert decode(b'"abc"', max_bytes=5) == "abc"
    for refuse in (lambda: encode("abc", max_bytes=4), lambda: decode(b'"abc"', max_bytes=4)):
        with pytest.raises(InvalidValue, match="4"):
            refuse()


@given(values, st.integers(0, 30))
def test_encode_refuses_for_its_size_exactly_what_is_longer(value: Any, max_bytes: int) -> None:
    size = len(encode(value))
    if size <= max_bytes:
        assert len(encode(value, max_bytes=max_bytes)) == size
    else:
        with pytest.raises(InvalidValue, match=f"{max_bytes}"):
            encode(value, max_bytes=max_bytes)


def ring(kind: str) -> Any:
    listed: list[Any] = [1]
    named: dict[str, Any] = {"x": 1}
    match kind:
        case "list":
            listed.append(listed)
        case "dict":
            named["me"] = named
            return named
        case "both":
            named["l"] = listed
            listed.append(named)
        case "twice":
            listed.extend([listed, listed])
    return listed


@pytest.mark.parametrize("kind", ["list", "dict", "both", "twice"])
def test_a_value_that_holds_itself_is_refused(kind: str) -> None:
    with pytest.raises(InvalidValue, match=r"holds itself|more than"):
        encode(ring(kind))


def doubled(value: Any, times: int) -> Any:
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "bomb",
    [doubled(1, 60), doubled("x" * 1000, 40), [["x" * 100_000] * 1000] * 1000, [{"y" * 100_000: 1}] * 1000],
    ids=["numbers", "strings", "wide", "names"],
)
def test_a_small_value_that_would_be_written_out_huge_is_refused_before_it_is(bomb: Any) -> None:
    with pytest.raises(InvalidValue, match="more than 1048576 bytes"):
        encode(bomb)


@pytest.mark.parametrize("name", [1, 1.5, None, True, b"a", ("a",)])
def test_member_names_are_strings(name: Any) -> None:
    for value in ({name: 1}, [{"a": {name: 1}}]):
        with pytest.raises(InvalidValue, match=f"member names are str, not {type(name).__name__}"):
            encode(value)


@pytest.mark.parametrize("value", [{1}, b"bytes", object(), 1j, range(3), MISSING, [SECRET.encode()]])
def test_what_json_has_no_type_for_is_refused_by_its_type(value: Any) -> None:
    kind = type(value[0] if isinstance(value, list) else value).__name__
    for attempt in (encode, freeze):
        with pytest.raises(InvalidValue, match=f"type {kind} is not JSON"):
            attempt(value)


def test_freeze_refuses_what_encode_refuses() -> None:
    for value in (math.nan, "\ud800", "x" * (MAX_VALUE_BYTES + 1), 10**4300, {1: 1}):
        with pytest.raises(InvalidValue):
            freeze(value)


# Nothing of a value in an error

REFUSED: list[tuple[Callable[[Any], Any], Any]] = [
    (decode, SECRET.encode()),
    (decode, b'"' + SECRET.encode()),
    (decode, b'"' + SECRET.encode() + b'" x'),
    (decode, b'"' + SECRET.encode() + b'\xff"'),
    (decode, b'"' + SECRET.encode() + b'\\ud800"'),
    (decode, b'"' + SECRET.encode() + b'\\x"'),
    (decode, b"\xef\xbb\xbf" + SECRET.encode()),
    (decode, b'{"' + SECRET.encode() + b'":1,"' + SECRET.encode() + b'":1}'),
    (decode, b'["' + SECRET.encode() + b'",NaN,1e999]'),
    (decode, b'["' + SECRET.encode() + b'",' + b"1" * 5000 + b"]"),
    (decode, b'{"' + SECRET.encode() + b'":' * 1 + b"[" * 5000),
    (encode, SECRET + "\ud800"),
    (encode, {SECRET: {1: SECRET}}),
    (encode, {SECRET: {SECRET}}),
    (encode, [SECRET, math.nan]),
    (encode, [SECRET, 10**5000]),
    (encode, SECRET * 1_000_000),
    (encode, doubled(SECRET, 65)),
    (freeze, {SECRET: SECRET.encode()}),
]


@pytest.mark.parametrize(("attempt", "value"), REFUSED, ids=range(len(REFUSED)))
def test_no_part_of_a_value_is_in_an_error_its_traceback_or_the_errors_behind_it(
    attempt: Callable[[Any], Any], value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidValue) as raised:
        attempt(value)
    error: BaseException | None = raised.value
    shown = "".join(traceback.format_exception(raised.value))
    try:
        raise raised.value
    except InvalidValue:
        logging.getLogger("app").exception("refused")
    assert SECRET not in shown + caplog.text + repr(raised.value)
    # The parser's errors hold the text whole: tools that walk the chain would send it away.
    assert error is not None
    assert error.__cause__ is None
    assert error.__context__ is None


# Frozen

MUTATORS: dict[str, Callable[[Any], Any]] = {
    "item": lambda d: d.__setitem__("a", 2),
    "new item": lambda d: d.__setitem__("z", 2),
    "del": lambda d: d.__delitem__("a"),
    "ior": lambda d: d.__ior__({"a": 2}),
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("a"),
    "pop with default": lambda d: d.pop("z", None),
    "popitem": lambda d: d.popitem(),
    "setdefault": lambda d: d.setdefault("z", 1),
    "setdefault of a member": lambda d: d.setdefault("a", 1),
    "update": lambda d: d.update({"a": 2}),
    "update by name": lambda d: d.update(a=2),
    "attribute": lambda d: setattr(d, "a", 2),
}


@pytest.mark.parametrize("mutate", MUTATORS.values(), ids=MUTATORS.keys())
def test_every_way_to_change_an_object_raises_and_changes_nothing(mutate: Callable[[Any], Any]) -> None:
    for value in (decode(b'{"a":1,"b":{"a":1}}'), FrozenDict(a=1, b=FrozenDict(a=1))):
        for target in (value, value["b"]):
            with pytest.raises((TypeError, AttributeError)):
                mutate(target)
        assert value == {"a": 1, "b": {"a": 1}}


def test_every_method_by_which_a_dict_changes_is_refused() -> None:
    harmless = {"__init__", "__new__", "__class_getitem__", "fromkeys", "copy", "get", "items", "keys", "values"}
    for name in set(vars(dict)) - set(vars(object)) - harmless:
        before = {"a": 1}
        plain, frozen = dict(before), FrozenDict(before)
        for arguments in ((), ("a",), ("z", 2), ({"z": 2},)):
            try:
                getattr(plain, name)(*arguments)
            except (TypeError, KeyError, ValueError):
                continue
            if plain != before:
                with pytest.raises(TypeError, match="frozen; copy first"):
                    getattr(frozen, name)(*arguments)
                break
        assert frozen == before


def test_initialising_an_object_again_changes_nothing() -> None:
    for value in (FrozenDict(), FrozenDict(a=1), decode(b"{}"), decode(b'{"a":1}')):
        before = dict(value)
        value.__init__({"a": 2, "z": 3})
        value.__init__(a=2)
        assert value == before


def test_the_augmented_union_is_refused_and_the_union_gives_a_plain_dict() -> None:
    value = held = decode(b'{"a":1}')
    with pytest.raises(TypeError, match="frozen"):
        value |= {"a": 2}
    assert held == {"a": 1}
    united = held | {"b": 2}
    assert united == {"a": 1, "b": 2}
    assert type(united) is dict
    assert type(held.copy()) is dict
    assert type(dict(held)) is dict


def test_a_frozen_dict_is_built_as_a_dict_is() -> None:
    assert FrozenDict() == {}
    assert FrozenDict({"a": 1}, b=2) == FrozenDict([("a", 1), ("b", 2)]) == FrozenDict(a=1, b=2) == {"a": 1, "b": 2}
    with pytest.raises(TypeError):
        FrozenDict({}, {})  # type: ignore[arg-type]


def test_copies_of_a_value_are_the_value_and_pickles_come_back_equal_and_frozen() -> None:
    value = decode(b'{"a":[1,{"b":[]}]}')
    assert copy.copy(value) is value
    assert copy.deepcopy(value) is value
    assert copy.deepcopy({"v": value})["v"] is value
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(value, protocol))
        assert same(again, json.loads(encode(value)))


@given(st.dictionaries(names, values, max_size=4))
def test_equal_objects_hash_the_same_and_can_be_keys(plain: dict[str, Any]) -> None:
    one = freeze(plain)
    other = freeze(dict(reversed(plain.items())))
    assert one == other == freeze(plain)
    assert hash(one) == hash(other)
    assert {one: 1}[other] == 1


def test_missing_is_one_false_value_that_is_not_none() -> None:
    assert MISSING is Missing.MISSING
    assert not MISSING
    assert repr(MISSING) == "MISSING"
    assert pickle.loads(pickle.dumps(MISSING)) is MISSING
    assert copy.deepcopy(MISSING) is MISSING
