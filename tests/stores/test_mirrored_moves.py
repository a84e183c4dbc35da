"""How a mirrored store moves between its tiers, with scripted ones: which is asked, and when, as time is a number."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from random import Random

import pytest

from veltrix_mw.errors import AuthFailed, Compacted, StoreError, StoreUnavailable
from veltrix_mw.protocols import (
    Batch,
    Confirmation,
    Limits,
    Listing,
    MirrorState,
    Moved,
    Position,
    Restored,
    StoreInfo,
    Watch,
)
from veltrix_mw.stores.mirrored import UNFOLLOWED_MOST, MirroredStore
from veltrix_mw.stores.tiers import Tier

HERE = Position("one", 5, "mark-5")


class Bringing:
    """A watch that brings the same each time."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def next(self, timeout_s: float) -> Sequence[Batch]:
        return self._batches

    def close(self) -> None:
        return None


class Scripted:
    """A tier that answers, or fails with what it is told to."""

    def __init__(self, origin: str) -> None:
        self.info = StoreInfo(origin, f"{origin}://there", "shop", Limits(max_value_bytes=1))
        self.fails: StoreError | None = None
        self.watch_fails: StoreError | None = None
        self.stands = HERE
        self.listed: Position | None = None  # where it stands by the time it is listed, if elsewhere
        self.age_s = 1.0
        self.lazy: tuple[str, ...] = ()
        self.lists_without: tuple[str, ...] = ()
        self.granted_s: list[float] = []
        self.brings: Sequence[Batch] = ()
        self.asked: list[str] = []

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.fails is not None:
            raise self.fails

    def list(self, *, timeout_s: float) -> Listing:
        self.granted_s.append(timeout_s)
        self._ask("list")
        return Listing(self.listed or self.stands, [], origin=self.info.origin, lazy=self.lists_without or self.lazy)

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        self._ask("watch")
        if self.watch_fails is not None:
            raise self.watch_fails
        return Bringing(self.brings)

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        self._ask("confirm")
        if position.incarnation != self.stands.incarnation:
            raise Restored("another incarnation")
        return Confirmation(self.stands.incarnation, self.stands.revision, 0)

    def state(self, *, timeout_s: float) -> MirrorState:
        self._ask("state")
        return MirrorState(self.stands, lazy=self.lazy, age_s=self.age_s)


class Rig:
    """A mirrored store over two scripted tiers, and its clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.authority, self.mirror = Scripted("etcd"), Scripted("redis")
        self.store = MirroredStore(
            self.authority,  # type: ignore[arg-type]  # what is not scripted is not called
            self.mirror,  # type: ignore[arg-type]
            random=Random(0),
            clock=lambda: self.now_s,
        )

    def at_authority(self) -> None:
        """List of the mirror, then lose it."""
        self.store.list(timeout_s=1)
        self.mirror.fails = StoreUnavailable("gone")
        with pytest.raises(Moved) as moved:
            self.store.watch(HERE, timeout_s=1)
        self.now_s += moved.value.after_s
        self.store.watch(HERE, timeout_s=1)
        assert self.store.tiers.current is Tier.AUTHORITY


@pytest.mark.parametrize("call", ["watch", "list"])
@pytest.mark.parametrize("error", [StoreUnavailable("no route"), AuthFailed("another password")])
def test_a_worker_that_loses_its_authority_too_comes_back_to_a_mirror_that_is_well(
    call: str, error: StoreError
) -> None:
    rig = Rig()
    rig.at_authority()
    rig.authority.fails, rig.mirror.fails = error, None
    for _ in range(100):
        rig.now_s += 1
        try:
            if call == "watch":
                rig.store.watch(HERE, timeout_s=1)
            else:
                rig.store.list(timeout_s=1)
        except Moved as moved:
            assert not moved.mended  # noqa: PT017  # it is worth a warning: the authority fails
            rig.now_s += moved.after_s
            break
        except StoreError as exc:
            assert exc is error  # noqa: PT017  # while the mirror is not looked at yet
    rig.store.watch(HERE, timeout_s=1)
    assert rig.store.tiers.current is Tier.MIRROR


def test_a_mirror_that_never_worked_is_told_once_with_the_first_listing() -> None:
    rig = Rig()
    rig.mirror.fails = StoreUnavailable("nobody listens on that port")
    rig.authority.fails = StoreUnavailable("no route")
    with pytest.raises(StoreUnavailable, match="no route"):
        rig.store.list(timeout_s=1)
    rig.authority.fails = None
    told = rig.store.list(timeout_s=1).passed_over
    assert told == "the mirror is not followed, and the authority is: nobody listens on that port"
    assert not rig.store.list(timeout_s=1).passed_over


def test_nothing_is_told_of_a_mirror_that_is_followed() -> None:
    assert not Rig().store.list(timeout_s=1).passed_over


@pytest.mark.parametrize(("worked", "said"), [(True, "well again,"), (False, "well,")])
def test_going_to_a_mirror_that_is_well_is_nothing_wrong(worked: bool, said: str) -> None:
    rig = Rig()
    if worked:
        rig.store.list(timeout_s=1)
        rig.store.watch(HERE, timeout_s=1)
        rig.at_authority()
    else:
        rig.mirror.fails = StoreUnavailable("gone")
        rig.store.list(timeout_s=1)
    watch = rig.store.watch(HERE, timeout_s=1)
    rig.mirror.fails = None
    rig.now_s += 10
    with pytest.raises(Moved, match=f"the mirror is {said}") as moved:
        while True:
            watch.next(0)
            rig.now_s += 1
    assert moved.value.mended


def test_an_authority_that_fails_beside_a_mirror_that_is_away_is_told_as_it_is() -> None:
    rig = Rig()
    rig.at_authority()
    rig.authority.fails = StoreUnavailable("no route")
    for _ in range(20):
        rig.now_s += 1
        with pytest.raises(StoreUnavailable, match="no route"):
            rig.store.watch(HERE, timeout_s=1)
    assert rig.mirror.asked[-1] == "state"


def test_a_mirror_that_says_it_is_well_and_cannot_be_followed_is_left() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.mirror.watch_fails = StoreError("its stream is another's")
    for _ in range(UNFOLLOWED_MOST - 1):
        with pytest.raises(StoreUnavailable) as caught:
            rig.store.watch(HERE, timeout_s=1)
        assert not isinstance(caught.value, Moved)
    with pytest.raises(Moved) as moved:
        rig.store.watch(HERE, timeout_s=1)
    rig.now_s += moved.value.after_s
    rig.store.watch(HERE, timeout_s=1)
    assert rig.store.tiers.current is Tier.AUTHORITY


def test_a_mirror_that_does_not_let_this_process_follow_is_left_at_once() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.mirror.watch_fails = AuthFailed("the ACL lacks +xread")
    with pytest.raises(Moved, match="xread"):
        rig.store.watch(HERE, timeout_s=1)


def test_a_mirror_that_another_authority_s_relay_has_filled_is_left_for_the_authority() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.mirror.stands = Position("staging", 9, "mark-9")
    rig.now_s += 10
    with pytest.raises(Moved, match="does not have") as moved:
        rig.store.list(timeout_s=1)
    rig.now_s += moved.value.after_s
    assert rig.store.list(timeout_s=1).position == HERE
    for _ in range(100):
        rig.now_s += 1
        with contextlib.suppress(Moved):
            rig.store.watch(HERE, timeout_s=1).next(0)
    assert rig.store.tiers.current is Tier.AUTHORITY


def test_a_new_incarnation_that_the_authority_has_too_is_taken_from_the_mirror() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.mirror.stands = rig.authority.stands = Position("two", 3, "mark-3")
    rig.now_s += 10
    listing = rig.store.list(timeout_s=1)
    assert (listing.position, listing.origin) == (rig.mirror.stands, "redis")


def test_a_new_incarnation_is_taken_from_the_mirror_where_the_authority_does_not_answer() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.mirror.stands = Position("two", 3, "mark-3")
    rig.authority.fails = StoreUnavailable("no route")
    rig.now_s += 10
    assert rig.store.list(timeout_s=1).position == rig.mirror.stands


def test_an_incarnation_that_a_mirror_took_on_as_it_was_listed_is_vouched_for_too() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.mirror.listed = Position("staging", 9, "mark-9")
    rig.now_s += 10
    with pytest.raises(Moved, match="does not have"):
        rig.store.list(timeout_s=1)
    assert rig.authority.asked == ["confirm", "confirm"]


@pytest.mark.parametrize("how", ["watch", "confirm"])
def test_what_is_followed_through_a_mirror_that_leaves_out_more_now_is_listed_at_the_authority(how: str) -> None:
    """It was filled at the revision that was followed, and a later one came without the changes that it leaves out."""
    rig = Rig()
    rig.store.list(timeout_s=1)
    later = Position("one", 6, "mark-6")
    if how == "watch":
        rig.mirror.brings = [Batch(later, 5, (), lazy=("tenants/",))]
        with pytest.raises(Compacted, match="leaves out"):
            rig.store.watch(HERE, timeout_s=1).next(0)
        rig.mirror.lazy = ("tenants/",)
    else:
        rig.mirror.lazy = ("tenants/",)
        with pytest.raises(Compacted, match="leaves out tenants/"):
            rig.store.confirm(later, timeout_s=1)
    rig.authority.stands = later
    with pytest.raises(Moved) as moved:
        rig.store.list(timeout_s=1)
    rig.now_s += moved.value.after_s
    assert rig.store.list(timeout_s=1).origin == "etcd"


def test_a_mirror_that_left_out_more_as_it_was_listed_is_not_taken() -> None:
    rig = Rig()
    rig.mirror.lists_without = ("tenants/",)
    assert rig.store.list(timeout_s=1).origin == "etcd"


def test_a_worker_that_loses_its_authority_takes_a_new_incarnation_of_a_mirror_that_is_well() -> None:
    rig = Rig()
    rig.at_authority()
    rig.authority.fails, rig.mirror.fails = StoreUnavailable("no route"), None
    rig.mirror.stands = Position("two", 3, "mark-3")
    for _ in range(100):
        rig.now_s += 1
        try:
            rig.store.watch(HERE, timeout_s=1)
        except Moved as moved:
            rig.now_s += moved.after_s
            break
        except StoreUnavailable:
            continue
    assert rig.store.list(timeout_s=1).position == rig.mirror.stands


def test_a_mirror_that_hangs_as_it_is_listed_leaves_a_start_time_for_the_authority() -> None:
    rig = Rig()

    def hang(*, timeout_s: float) -> Listing:
        rig.now_s += timeout_s
        raise StoreUnavailable("it hangs")

    rig.mirror.list = hang  # type: ignore[method-assign]
    assert rig.store.list(timeout_s=10).origin == "etcd"
    assert rig.authority.granted_s == [5]


def test_a_forked_child_knows_what_its_parent_knew_of_the_authority() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.store._learned(Position("two", 3, "mark-3"), rig.now_s)
    rig.store._tiers.doubt("two", now_s=rig.now_s)
    parents = rig.store.tiers
    rig.store._pid = -1
    with contextlib.suppress(StoreError):
        rig.store.list(timeout_s=1)
    tiers = rig.store.tiers
    assert tiers is not parents
    assert tiers.known == parents.known
    for left in (HERE, Position("two", 9, "mark-9")):
        assert tiers.refuses(MirrorState(left, age_s=1.0), sent_at_s=rig.now_s)


def test_a_forked_child_that_first_looks_for_units_waits_for_no_thread_of_its_parent_s() -> None:
    rig = Rig()
    rig.store.list(timeout_s=1)
    rig.store._lock.acquire()
    rig.store._pid = -1
    found: list[object] = []
    looking = threading.Thread(
        target=lambda: found.append(rig.store.find_units(["users/1"], HERE, timeout_s=1)), daemon=True
    )
    looking.start()
    looking.join(10)
    assert found == [None]


def test_a_start_asks_the_authority_whether_the_mirror_is_its_own() -> None:
    rig = Rig()
    rig.mirror.stands = Position("staging", 9, "mark-9")
    listing = rig.store.list(timeout_s=1)
    assert (listing.position, listing.origin) == (HERE, "etcd")
    assert "does not have" in listing.passed_over
    rig = Rig()
    assert rig.store.list(timeout_s=1).origin == "redis"
    assert rig.authority.asked == ["confirm"]
    rig.now_s += 10
    rig.store.list(timeout_s=1)
    assert rig.authority.asked == ["confirm"], "it knows the mirror by now"
    rig = Rig()
    rig.mirror.stands = Position("two", 3, "mark-3")
    rig.authority.fails = StoreUnavailable("no route")
    listing = rig.store.list(timeout_s=1)
    assert listing.position == rig.mirror.stands
    assert listing.passed_over == "the mirror is followed, and the authority does not answer: no route"
    assert not rig.store.list(timeout_s=1).passed_over


@pytest.mark.parametrize(
    ("answer", "asked", "origin"),
    [
        (None, ["recognize"], "redis"),
        (Restored("another"), ["recognize", "list"], "etcd"),
        (Compacted("nobody knows"), ["recognize", "confirm"], "redis"),
        (StoreUnavailable("no route"), ["recognize"], "redis"),
    ],
)
def test_a_start_asks_cheaper_where_the_authority_can_be(
    answer: Exception | None, asked: list[str], origin: str
) -> None:
    rig = Rig()

    def recognize(position: Position, *, timeout_s: float) -> None:
        assert position == rig.mirror.stands
        rig.authority.asked.append("recognize")
        if answer is not None:
            raise answer

    rig.authority.recognize = recognize  # type: ignore[attr-defined]
    assert (rig.store.list(timeout_s=1).origin, rig.authority.asked) == (origin, asked)


def test_a_start_from_a_mirror_that_is_not_well_says_which_tier_fails_and_asks_that_once() -> None:
    rig = Rig()
    rig.mirror.age_s = 60.0
    rig.authority.fails = StoreUnavailable("no route")
    listing = rig.store.list(timeout_s=1)
    assert listing.origin == "redis"
    assert listing.passed_over == "the mirror is followed, and the authority does not answer: no route"
    assert rig.authority.asked == ["list"]
    rig.authority.fails = None
    assert not rig.store.list(timeout_s=1).passed_over
