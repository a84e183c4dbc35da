"""Routes: whose answer is believed, who is asked next, and in which slot a key is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from veltrix_mw.errors import AuthFailed, StoreError, StoreUnavailable
from veltrix_mw.settings import Host
from veltrix_mw.stores.redis_routes import Guided, Nodes, Question, Sentinels, Server, slot_of

S1, S2, S3 = ("s1", 1), ("s2", 2), ("s3", 3)
OLD, NEW = ("old", 6379), ("new", 6379)


class Guides:
    """Sentinels as a test wants them: what each says, and who was asked for how long."""

    def __init__(self) -> None:
        self.says: dict[Host, tuple[Host, int] | StoreError] = {}
        self.asked: list[Host] = []
        self.granted_s: list[float] = []
        self.later_s = 0.0

    def clock(self) -> float:
        return time.monotonic() + self.later_s

    def ask(self, guide: Host, questions: Sequence[Question], deadline_s: float) -> list[Any]:
        assert [question[:2] for question in questions] == [
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME"),
            ("SENTINEL", "MASTER"),
        ]
        self.asked.append(guide)
        self.granted_s.append(deadline_s - self.clock())
        said = self.says[guide]
        if isinstance(said, StoreError):
            raise said
        (host, port), epoch = said
        return [[host.encode(), b"%d" % port], [b"name", b"m", b"config-epoch", b"%d" % epoch]]

    def find(self, route: Guided, timeout_s: float = 8.0) -> Host:
        self.asked, self.granted_s = [], []
        return route.find(self.ask, self.clock() + timeout_s)


@pytest.fixture
def guides() -> Guides:
    return Guides()


@pytest.fixture
def route(guides: Guides) -> Sentinels:
    route = Sentinels([S1, S2, S3], "m", clock=guides.clock)
    route._order = [S1, S2, S3]  # which is drawn
    return route


AWAY = StoreUnavailable("away")


def test_the_first_that_answers_is_believed_and_not_asked_again_at_once(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: AWAY, S2: (OLD, 3)}
    assert (guides.find(route), guides.asked) == (OLD, [S1, S2])
    assert (guides.find(route), guides.asked) == (OLD, [])
    route.doubt()
    guides.says = {S3: (NEW, 4)}  # who sent us to a server that failed is asked last, as who did not answer
    assert (guides.find(route), guides.asked) == (NEW, [S3])


def test_each_gets_its_share_of_the_time_and_leaves_one_for_the_server(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: AWAY, S2: AWAY, S3: (OLD, 1)}
    guides.find(route)
    assert [round(granted_s, 1) for granted_s in guides.granted_s] == [2.0, 2.7, 4.0]
    route._ask_at_s = 0.0  # only to look whether that holds
    guides.find(route)
    assert max(guides.granted_s) < 0.5


def test_one_that_is_behind_is_believed_no_longer_than_until_another_is_asked(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (OLD, 3), S2: (NEW, 4), S3: (NEW, 4)}
    assert (guides.find(route), guides.asked) == (OLD, [S1])
    route.ask_again()
    assert (guides.find(route), guides.asked) == (NEW, [S2])
    for asked in ([S3], [S1, S2], [S3]):
        route.ask_again()
        assert (guides.find(route), guides.asked) == (NEW, asked)


def test_one_that_is_behind_is_not_believed_while_another_knows_better(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (NEW, 4)}
    guides.find(route)
    guides.says = {S1: AWAY, S2: (OLD, 3), S3: (NEW, 4)}
    route._ask_at_s = 0.0
    assert (guides.find(route), guides.asked) == (NEW, [S2, S3])


def test_those_that_are_behind_are_not_believed_while_one_is_away(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (NEW, 4)}
    guides.find(route)
    guides.says = {S1: AWAY, S2: (OLD, 3), S3: (OLD, 3)}
    route.doubt()
    assert guides.find(route) == NEW


def test_when_all_say_so_they_were_set_up_anew(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (NEW, 4)}
    guides.find(route)
    guides.says = {S1: (OLD, 0), S2: (OLD, 0), S3: (OLD, 0)}
    route.doubt()
    assert guides.find(route) == OLD


def found_after(guides: Guides, route: Sentinels, failing_s: float) -> Host:
    """What is found where the server has failed again and again for so long."""
    route.doubt()
    for _ in range(4):
        guides.find(route)
        guides.later_s += failing_s / 4
        route.doubt()
    return guides.find(route)


def test_when_most_say_so_after_the_server_failed_for_long_they_were_set_up_anew(
    guides: Guides, route: Sentinels
) -> None:
    """One that is dead, of all that were reinstalled, must not keep workers at a server that is no more."""
    guides.says = {S1: (NEW, 4)}
    guides.find(route)
    guides.says = {S1: AWAY, S2: (OLD, 0), S3: (OLD, 0)}
    assert found_after(guides, route, 25) == NEW
    assert found_after(guides, route, 6) == OLD
    guides.says = {S1: AWAY, S2: (NEW, 1), S3: (NEW, 1)}
    route.ask_again()
    assert guides.find(route) == NEW  # from there on epochs count again


def test_a_server_that_answers_in_between_has_not_failed_for_long(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (NEW, 4)}
    guides.find(route)
    guides.says = {S1: AWAY, S2: (OLD, 0), S3: (OLD, 0)}
    assert found_after(guides, route, 25) == NEW
    route.trust()
    assert found_after(guides, route, 25) == NEW
    assert found_after(guides, route, 6) == OLD


@pytest.mark.parametrize("third", [AWAY, ((("other", 6379)), 1)])
def test_a_server_that_failed_for_long_is_kept_while_too_few_or_no_two_agree(
    guides: Guides, route: Sentinels, third: Any
) -> None:
    guides.says = {S1: (NEW, 4)}
    guides.find(route)
    guides.says = {S1: AWAY, S2: (OLD, 0), S3: third}
    assert found_after(guides, route, 100) == NEW


def test_without_an_answer_what_is_known_stands_and_a_newcomer_is_told(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: AWAY, S2: AWAY, S3: AWAY}
    with pytest.raises(StoreUnavailable, match=r"none of the sentinels \(3\) says where 'm' is: away"):
        guides.find(route)
    guides.says[S2] = (OLD, 1)
    assert guides.find(route) == OLD
    guides.says[S2] = AWAY
    route.doubt()
    assert guides.find(route) == OLD


def test_what_has_to_be_mended_is_said_before_what_is_away(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: AWAY, S2: AuthFailed("a password"), S3: AWAY}
    with pytest.raises(AuthFailed, match="a password"):
        guides.find(route)


def test_a_new_process_draws_whom_it_asks_first() -> None:
    route = Sentinels([S1, S2, S3], "m")
    orders = set()
    for _ in range(200):
        route.begin_anew()
        orders.add(tuple(route._order))
    assert len(orders) == 6


def test_a_server_that_a_url_names_is_asked_nothing() -> None:
    route = Server("h1", 7)
    route.doubt()
    assert route.find(Guides().ask, 0.0) == ("h1", 7)


# --- a cluster

NODES = b"""aaa h1:1@11 myself,master - 0 0 7 connected 0-99
bbb h2:2@12,name2 master - 0 0 9 connected 100-16383 [5->-ccc]
ccc h3:3@13 slave aaa 0 0 7 connected
"""
A, B, C = [b"h1", 1, b"aaa", []], [b"h2", 2, b"bbb", []], [b"h3", 3, b"ccc", []]


def test_the_owner_of_the_slot_is_found_with_its_epoch() -> None:
    slots = [[0, 99, A, C], [100, 16383, B]]
    asked: list[Host] = []

    def ask(guide: Host, questions: Sequence[Question], _deadline_s: float) -> list[Any]:
        assert questions == (("CLUSTER", "SLOTS"), ("CLUSTER", "NODES"))
        asked.append(guide)
        return [slots, NODES]

    route = Nodes([("h2", 2), ("seed", 1)], 100)
    route._order = [("h2", 2), ("seed", 1)]
    assert route.find(ask, time.monotonic() + 1) == ("h2", 2)
    assert route._known is not None
    assert (route._known.epoch, set(route._known.others)) == (9, {("h1", 1), ("h2", 2), ("h3", 3)})
    for _ in range(4):
        route._ask_at_s = 0.0
        route.find(ask, time.monotonic() + 1)
    # All but the owner itself, in turn: it knows the least of what it lost.
    assert asked == [("h2", 2), ("h1", 1), ("h3", 3), ("seed", 1), ("h1", 1)]
    route.moved(("h1", 1))
    assert route.find(ask, 0.0) == ("h1", 1)


def test_one_seed_that_is_behind_is_not_asked_alone() -> None:
    """As the name is that stands for all nodes: the others are learned."""
    behind, ahead = NODES, NODES.replace(b" 7 connected 0-99", b" 12 connected 0-99")
    asked: list[Host] = []

    def ask(guide: Host, _questions: Sequence[Question], _deadline_s: float) -> list[Any]:
        asked.append(guide)
        if guide == ("seed", 1):
            return [[[0, 99, A, C], [100, 16383, B]], behind]
        return [[[0, 16383, A, C], [5, 5, B]], ahead]

    route = Nodes([("seed", 1)], 100)
    assert route.find(ask, time.monotonic() + 1) == ("h2", 2)
    for _ in range(4):
        route.ask_again()
        assert route.find(ask, time.monotonic() + 1) == ("h1", 1)
    assert asked[0] == ("seed", 1)


def test_nodes_that_were_learned_of_and_are_gone_do_not_count_against_the_named() -> None:
    guides = Guides()
    alive = {("seed", 1)}
    epoch = 12

    def ask(guide: Host, _questions: Sequence[Question], _deadline_s: float) -> list[Any]:
        if guide not in alive:
            raise AWAY
        owner = A if epoch < 12 else B
        return [[[0, 16383, owner, C]], NODES.replace(b" 7 ", b" %d " % epoch).replace(b" 9 ", b" %d " % epoch)]

    route = Nodes([("seed", 1)], 100, clock=guides.clock)
    assert route.find(ask, guides.clock() + 1) == ("h2", 2)
    epoch = 1
    for later_s, found in ((0, ("h2", 2)), (29, ("h2", 2)), (2, ("h1", 1))):
        guides.later_s += later_s
        route.doubt()
        assert route.find(ask, guides.clock() + 1) == found


def test_a_slot_without_an_owner_is_said() -> None:
    route = Nodes([("h1", 1)], 100)
    with pytest.raises(StoreUnavailable, match="the cluster's node h1:1 knows no owner of slot 100"):
        route.find(lambda *_: [[[0, 99, A]], NODES], time.monotonic() + 1)


@pytest.mark.parametrize("unknown", [None, b"", b"?"])
def test_a_node_that_does_not_know_its_address_is_where_it_was_asked(unknown: bytes | None) -> None:
    route = Nodes([("h1", 1)], 5)
    said = [[[0, 99, [unknown, 1, b"aaa"]]], NODES]
    assert route.find(lambda *_: said, time.monotonic() + 1) == ("h1", 1)


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("123456789", 12739),  # the check value of the cluster's specification
        ("foo", 12182),
        ("veltrix:{foo}:entries", 12182),
        ("{foo}{bar}", 12182),
        ("foo}{foo}", 12182),
        ("{}foo", slot_of("{}foo")),
    ],
)
def test_the_slot_is_the_one_that_redis_computes(key: str, slot: int) -> None:
    assert slot_of(key) == slot
    assert slot_of("{}foo") != slot_of("foo")


def test_who_asked_longest_does_not_bring_back_a_primary_that_was_left(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (OLD, 1), S2: (OLD, 1), S3: (OLD, 1)}
    guides.find(route)

    def slowly(guide: Host, questions: Sequence[Question], deadline_s: float) -> list[Any]:
        answer = guides.ask(guide, questions, deadline_s)
        if guides.says[S1] != (NEW, 2):
            # Meanwhile another thread asks, and one that knows of the failover.
            guides.says = dict.fromkeys((S1, S2, S3), (NEW, 2))
            route.ask_again()
            assert guides.find(route) == NEW
        return answer

    route.ask_again()
    assert route.find(slowly, guides.clock() + 8.0) == NEW
    assert guides.find(route) == NEW
