"""What is said when the condition of a commit does not hold: for code and for the command line alike."""

from __future__ import annotations

import pytest

from veltrix_mw.errors import Conflict, KeyMissing
from veltrix_mw.protocols import RawOperation
from veltrix_mw.stores.conditions import check
from veltrix_mw.values import MISSING


@pytest.mark.parametrize(
    ("expected", "stands", "words"),
    [
        (1, 2, "'k' is at revision 2, but the write expected that it is at revision 1; {}expecting 2"),
        (0, 2, "'k' is at revision 2, but the write expected that it is absent; {}expecting 2"),
        (1, 0, "'k' is absent, but the write expected that it is at revision 1; {}expecting 0"),
    ],
)
def test_a_conflict_says_what_to_expect_in_no_languages_words(expected: int, stands: int, words: str) -> None:
    with pytest.raises(Conflict) as caught:
        check(RawOperation("k", b"1", expected), stands, lambda: b"5")
    assert str(caught.value) == words.format("read it again, then write ")
    assert (caught.value.key, caught.value.current.mod_revision) == ("k", stands)


def test_a_condition_that_holds_says_nothing_and_loads_nothing() -> None:
    def load() -> bytes:
        raise AssertionError("nobody asked for the value")

    for expected in (None, 2):
        check(RawOperation("k", b"1", expected), 2, load)
    check(RawOperation("k", b"1", 0), 0, load)
    with pytest.raises(KeyMissing, match="nothing to delete"):
        check(RawOperation("k", MISSING, None), 0, load)
