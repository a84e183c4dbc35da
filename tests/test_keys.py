"""Keys, prefixes and namespaces: what they may look like, and what is said of the others."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from veltrix_mw.errors import InvalidKey, SettingsError, VeltrixError
from veltrix_mw.keys import MAX_KEY_BYTES, check_key, check_namespace, check_prefix, is_key, outermost, unit_of

ALPHABET = set(string.ascii_letters + string.digits + "._~:@-")


def valid(key: str) -> bool:
    """The contract, spelt out once more without a regular expression."""
    segments = key.split("/")
    return len(key.encode("utf-8", "surrogatepass")) <= 512 and all(
        segment not in {"", ".", ".."} and set(segment) <= ALPHABET for segment in segments
    )


NEAR_KEYS = st.lists(
    st.one_of(
        st.sampled_from(["a", ".", "..", "...", "", ".a", "a.", "a" * 255, "\n", "é", "A-Z_9", "x:y@z~"]),
        st.text(max_size=5),
        st.text(alphabet="._~:@-aZ0\n /", max_size=4),
    ),
    min_size=1,
    max_size=4,
).map("/".join)


@given(NEAR_KEYS)
@example("checkout/max_items")
@example("a\n")
@example("..\n")
@example("./a")
@example("a/..")
@example("...")
@example("a" * 512)
@example("a" * 513)
@example("é" * 300)
@example("\ud800")
@example("\u0661")  # a digit, but not one of ASCII's
@example("a\0")
def test_a_key_is_what_the_contract_spells_out(key: str) -> None:
    assert is_key(key) is valid(key)
    if valid(key):
        assert check_key(key) is key
    else:
        with pytest.raises(InvalidKey):
            check_key(key)


@given(NEAR_KEYS)
@example("a")
@example("a/")
@example("/")
@example("")
@example("a//")
@example("a/\n")
@example("../")
@example("a" * 512 + "/")
@example("a" * 513 + "/")
def test_a_prefix_is_a_key_and_a_slash(prefix: str) -> None:
    if prefix.endswith("/") and valid(prefix[:-1]):
        assert check_prefix(prefix) is prefix
    else:
        with pytest.raises(InvalidKey):
            check_prefix(prefix)


@given(NEAR_KEYS)
@example(".veltrix")
@example(".veltrix/shop")
@example(".veltrixes")
@example("shop/.veltrix")
@example("n" * 128)
@example("n" * 129)
@example("shop\n")
def test_a_namespace_is_a_short_key_outside_of_the_bookkeeping(namespace: str) -> None:
    if valid(namespace) and len(namespace) <= 128 and namespace.split("/")[0] != ".veltrix":
        assert check_namespace(namespace) is namespace
    else:
        with pytest.raises(SettingsError):
            check_namespace(namespace)


@pytest.mark.parametrize("wrong", [None, 3, b"a", ("a",), ["a/"]])
def test_what_is_no_str_is_refused_by_its_type(wrong: Any) -> None:
    for check in (check_key, check_prefix):
        with pytest.raises(InvalidKey, match=rf"is a str, not {type(wrong).__name__}"):
            check(wrong)
    with pytest.raises(SettingsError):
        check_namespace(wrong)


def test_errors_say_what_a_name_looks_like_and_are_value_errors_of_the_library() -> None:
    with pytest.raises(InvalidKey, match=r"'a//b' is not a key: write segments of .* for example checkout/max_items"):
        check_key("a//b")
    with pytest.raises(InvalidKey, match="600 characters; at most 512 bytes"):
        check_key("k" * 600)
    with pytest.raises(InvalidKey, match="'tenants/acme' is not a prefix: it must end with '/'"):
        check_prefix("tenants/acme")
    with pytest.raises(InvalidKey, match=r"'a//' is not a prefix: write segments of"):
        check_prefix("a//")
    with pytest.raises(SettingsError, match="is not a namespace: write at most 128 characters"):
        check_namespace("")
    with pytest.raises(SettingsError, match=r"cannot begin with \.veltrix"):
        check_namespace(".veltrix/shop")
    for error in (InvalidKey, SettingsError):
        assert issubclass(error, VeltrixError)
        assert issubclass(error, ValueError)


@pytest.mark.parametrize("check", [check_key, check_prefix, check_namespace])
def test_an_error_is_short_whatever_came(check: Any) -> None:
    for huge in ("x" * 100_000, "é/" * 100_000, "x" * 100_000 + "//"):
        with pytest.raises(ValueError) as raised:
            check(huge)
        assert len(str(raised.value)) < 1000


def test_the_longest_key_has_512_bytes() -> None:
    assert MAX_KEY_BYTES == 512


def test_of_prefixes_that_lie_in_each_other_the_outermost_are_kept_in_order() -> None:
    given = ["users/", "tenants/acme/", "tenants-x/", "tenants/", "tenants/acme/eu/", "users/", "t/"]
    assert outermost(given) == ("t/", "tenants-x/", "tenants/", "users/")
    assert outermost([]) == ()
    with pytest.raises(InvalidKey, match="must end with '/'"):
        outermost(["users"])


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("tenants/acme", "tenants/acme"),
        ("tenants/acme/limits/max", "tenants/acme"),
        ("tenants/acme/", "tenants/acme"),
        ("tenants/", ""),
        ("tenants", ""),
        ("tenants-/acme", ""),
        ("a/b/users/1/x", ""),
        ("a/users/1/x", "a/users/1"),
    ],
)
def test_a_unit_is_the_first_segment_after_the_prefix(key: str, unit: str) -> None:
    assert unit_of(key, ("a/users/", "tenants/")) == unit
