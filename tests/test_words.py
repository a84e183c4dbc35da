"""Words: counts and ages as they read."""

from __future__ import annotations

import math

import pytest

from veltrix_mw.words import ago, counted, milliseconds, seconds


@pytest.mark.parametrize(("number", "text"), [(0, "0 keys"), (1, "1 key"), (2, "2 keys")])
def test_a_count_is_singular_for_one_alone(number: int, text: str) -> None:
    assert counted(number, "key") == text


@pytest.mark.parametrize(
    ("age_s", "text"),
    [
        (-1.0, "0.0 s ago"),
        (0.04, "0.0 s ago"),
        (9.9, "9.9 s ago"),
        (10.4, "10 s ago"),
        (119.0, "119 s ago"),
        (120.0, "2 minutes ago"),
        (7200.0, "2 hours ago"),
        (2 * 86400.0, "2 days ago"),
        (math.inf, "never"),
    ],
)
def test_an_age_is_told_in_the_largest_unit_of_which_there_are_two(age_s: float, text: str) -> None:
    assert ago(age_s) == text


@pytest.mark.parametrize(
    ("took_s", "text"),
    [(0.0000412, "0.04 ms"), (0.00096, "1 ms"), (0.00123, "1.2 ms"), (0.0123, "12 ms"), (1.2345, "1234 ms")],
)
def test_a_time_has_the_digits_that_say_something(took_s: float, text: str) -> None:
    assert milliseconds(took_s) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (600.0, "600 s"),
        (9.99987, "10 s"),
        (2.5, "2.5 s"),
        (1.0, "1 s"),
        (0.124873, "0.12 s"),
        (0.0, "0.001 s"),
        (-1.0, "0.001 s"),
    ],
)
def test_what_is_left_of_a_deadline_is_told_by_two_digits_and_is_never_nothing(time_s: float, text: str) -> None:
    assert seconds(time_s) == text
