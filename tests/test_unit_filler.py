"""What a relay reads of the units that are wanted: within a rate, in parts, and nothing that is there already."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import pytest

from tests.support.scripted_mirror import ScriptedMirror
from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.protocols import Position, RawUnit, TooMuch
from veltrix_mw.rate import Rate
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.unit_filler import AT_ONCE, FILLS_AT_ONCE, FILLS_PER_S, FIRST, UnitFiller

LAZY = ("tenants/",)
HERE = Position("one", 1)


class Authority(MemoryStore):
    """Has a key of `size` bytes in each unit, and tells what was read of it."""

    def __init__(self, size: int = 1) -> None:
        super().__init__(lazy=LAZY)
        self.size = size
        self.most = 10_000  # units that a reply may have
        self.reads: list[list[str]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        self.reads.append(list(names))
        self.meanwhile()
        if len(names) > self.most:
            raise TooMuch("more than a reply may have")
        return {name: RawUnit(((f"{name}/a", b"1" * self.size, 1),)) for name in names}


class Rig:
    """A filler that leads, called by hand, and a clock that stands."""

    def __init__(self, *, at_once: int = FILLS_AT_ONCE, size: int = 1) -> None:
        self.now_s = 100.0
        self.authority = Authority(size)
        self.mirror = ScriptedMirror(LAZY, HERE)
        rate = Rate(FILLS_PER_S, at_once, clock=lambda: self.now_s)
        self.filler = UnitFiller(self.authority, self.mirror, rate=rate, clock=lambda: self.now_s)
        self.filler._thread = threading.current_thread()  # so that it begins none
        self.filler._portions.learn({"tenants/known": size})  # the first ones of all go in small parts
        self.lead()

    def lead(self) -> None:
        self.filler.stands(self.mirror.elect(), self.mirror.position)

    def want(self, *names: str) -> list[list[str]]:
        """Have them filled; returns what was read at the authority for it."""
        before = len(self.authority.reads)
        self.filler._fill_all(names)
        return self.authority.reads[before:]


def units(count: int, *, since: int = 0) -> list[str]:
    return [f"tenants/t{number}" for number in range(since, since + count)]


def test_no_more_is_read_than_the_rate_allows_and_the_rest_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(at_once=100)
    with caplog.at_level(logging.WARNING, logger="veltrix_mw"):
        assert rig.want(*units(1_000)) == [units(100)]
        assert rig.mirror.announced == [units(100)]
        assert rig.want(*units(1_000, since=1_000)) == []
    assert [record.getMessage() for record in caplog.records] == ["veltrix.fills_capped units=900"]
    rig.now_s += 1 / 16
    assert rig.want(*units(1_000, since=2_000)) == [units(FILLS_PER_S // 16, since=2_000)]


def test_what_was_dropped_is_told_in_sum_and_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(at_once=1)
    with caplog.at_level(logging.WARNING, logger="veltrix_mw"):
        for _ in range(3):
            rig.want(*units(2))
            rig.mirror.units.clear()
        rig.now_s += 60
        rig.want(*units(1))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["veltrix.fills_capped units=1", "veltrix.fills_capped units=4"]


def test_what_is_there_is_announced_again_at_once_and_costs_nothing_of_the_rate() -> None:
    rig = Rig(at_once=100)
    rig.want(*units(50))
    assert rig.want(*units(100)) == [units(50, since=50)]
    assert rig.mirror.announced[1:] == [sorted(units(50)), units(50, since=50)]
    for _ in range(100):
        assert rig.want(*units(100)) == []
    assert rig.want("tenants/other") == [], "the rate was used up by what was read"
    assert len(rig.mirror.announced) == 103


def test_what_nobody_filled_lately_is_read_without_a_look_at_the_mirror() -> None:
    rig = Rig()
    rig.want(*units(2))
    assert rig.mirror.looked == []
    rig.want(*units(3))
    assert rig.mirror.looked == [units(2)]
    rig.now_s += 60  # who asks now has looked, and not found it
    assert rig.want(*units(1)) == [units(1)]
    assert rig.mirror.looked == [units(2)]


@pytest.mark.parametrize("how", ["evicted", "filled anew"])
def test_what_the_mirror_lost_is_read_again(how: str) -> None:
    rig = Rig()
    rig.want(*units(2))
    rig.mirror.units.clear()
    if how == "filled anew":
        rig.lead()
    assert rig.want(*units(2)) == [units(2)]
    assert rig.mirror.units.keys() == set(units(2))


def test_many_are_read_in_parts_and_each_is_announced_once() -> None:
    rig = Rig()
    names, second, third = units(FIRST + AT_ONCE + 5), FIRST, FIRST + AT_ONCE
    parts = [names[:second], names[second:third], names[third:]]  # the first is small, and so is there soon
    assert sorted(rig.want(*names)) == sorted(parts)
    assert rig.mirror.announced == parts
    assert rig.mirror.units.keys() == set(names)
    assert rig.filler.filled == len(names)


def test_what_came_into_the_queue_while_parts_were_read_is_taken_as_the_last_one_is_filled() -> None:
    rig = Rig()
    rig.mirror.wanted = ["tenants/next"]
    rig.want(*units(AT_ONCE + 1))
    assert rig.filler._taken == ["tenants/next"]
    assert rig.mirror.wanted == []


def test_fewer_are_read_at_a_time_while_they_are_large() -> None:
    rig = Rig(size=1024 * 1024)
    assert max(len(part) for part in rig.want(*units(20))) == 8  # of a MiB each, so it is 8 MiB
    rig.authority.size = 1
    rig.want(*units(10, since=20))
    assert max(len(part) for part in rig.want(*units(50, since=50))) > 8


def test_a_part_that_is_too_much_for_a_reply_is_read_again_by_half() -> None:
    rig = Rig()
    names = units(100)
    rig.authority.most = 30
    sizes = [len(part) for part in rig.want(*names)]
    assert sizes[:2] == [100, 50]
    assert 25 in sizes, "half of a half"
    assert sorted(name for part in rig.mirror.announced for name in part) == sorted(names), "each once"


def test_one_unit_that_is_too_much_is_told() -> None:
    rig = Rig()
    rig.authority.most = 0
    with pytest.raises(TooMuch):
        rig.want(*units(4))
    assert {len(part) for part in rig.authority.reads} == {4, 2, 1}
    assert rig.mirror.announced == []


def test_what_nobody_waits_for_any_more_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()

    def take_long() -> None:
        rig.now_s += 2

    rig.authority.meanwhile = take_long
    with caplog.at_level(logging.WARNING, logger="veltrix_mw"):
        assert len(rig.want(*units(FIRST + 3 * AT_ONCE))) == 2  # two at a time
    assert rig.mirror.announced == [units(FIRST), units(AT_ONCE, since=FIRST)]
    assert [record.getMessage() for record in caplog.records] == [f"veltrix.fills_capped units={2 * AT_ONCE}"]


def test_parts_end_where_the_mirror_is_filled_anew_meanwhile() -> None:
    rig = Rig()

    def fill_anew() -> None:
        rig.authority.meanwhile = lambda: None
        rig.mirror.refill(rig.filler._lease, HERE)  # type: ignore[arg-type]
        rig.filler.stands(rig.mirror.lease, HERE)

    rig.authority.meanwhile = fill_anew
    rig.want(*units(2 * AT_ONCE))
    assert rig.mirror.units == {}
    assert rig.mirror.announced == []
    assert rig.filler._reading == {}
    assert rig.want("tenants/t0") == [["tenants/t0"]]
    assert rig.mirror.units.keys() == {"tenants/t0"}


def test_what_the_authority_does_not_answer_is_not_announced() -> None:
    rig = Rig()

    def fail() -> None:
        raise StoreUnavailable("it is away")

    rig.authority.meanwhile = fail
    with pytest.raises(StoreUnavailable):
        rig.want(*units(2 * AT_ONCE))
    assert rig.mirror.announced == []
    assert rig.filler._reading == {}
