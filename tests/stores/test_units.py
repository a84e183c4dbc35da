"""The bounds of a unit."""

from __future__ import annotations

import itertools

import pytest

from veltrix_mw.stores.units import MAX_UNIT_BYTES, MAX_UNIT_KEYS, bounded


def test_a_unit_within_the_bounds_is_taken_whole() -> None:
    entries = [(f"users/1/{number:05}", b"1", number) for number in range(MAX_UNIT_KEYS)]
    assert bounded("users/1", entries).entries == tuple(entries)
    large = [("users/1", b"x" * MAX_UNIT_BYTES, 1)]
    assert bounded("users/1", large).entries == tuple(large)


@pytest.mark.parametrize(
    ("raw", "bound"), [(b"1", f"{MAX_UNIT_KEYS} keys"), (b"x" * (MAX_UNIT_BYTES // 4), "4 MiB of values")]
)
def test_beyond_them_it_is_refused_and_read_no_further(raw: bytes, bound: str) -> None:
    numbers = itertools.count()
    endless = ((f"users/1/{number}", raw, number) for number in numbers)
    unit = bounded("users/1", endless)
    assert (unit.entries, bound in unit.refused) == ((), True)
    assert next(numbers) <= MAX_UNIT_KEYS + 1
