"""Routes: whose answer is believed, who is asked next, and in which slot a key is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from veltrix_mw.errors import AuthFailed, StoreError, StoreNotFound, StoreUnavailable
from veltrix_mw.protocols import NotPermitted, Silent
from veltrix_mw.settings import Host
from veltrix_mw.stores.redis_routes import WORD_S, Guided, Nodes, Question, Sentinels, Server, Word, slot_of

S1, S2, S3 = ("s1", 1), ("s2", 2), ("s3", 3)
OLD, NEW = ("old", 6379), ("new", 6379)


class Guides:
    """Sentinels as a test wants them: what each says, and who was asked for how long."""

    def __init__(self) -> None:
        self.says: dict[Host, tuple[Host, int] | StoreError] = {}
        self.asked: list[Host] = []
        self.granted_s: list[float] = []
        self.later_s = 0.0
        self.takes_s: Callable[[float], float] = lambda _granted_s: 0.0  # what one that hangs costs

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
        if isinstance(said, Silent):
            self.later_s += self.takes_s(self.granted_s[-1])
        if isinstance(said, StoreError):
            raise said
        (host, port), epoch = said
        return [[host.encode(), b"%d" % port], [b"name", b"m", b"config-epoch", b"%d" % epoch]]

    def find(self, route: Guided, timeout_s: float = 8.0, *, word: Word = Word.KNOWN) -> Host:
        self.asked, self.granted_s = [], []
        return route.find(self.ask, self.clock() + timeout_s, word)


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


def test_each_gets_a_short_attempt_and_leaves_a_share_of_the_time_for_the_server(
    guides: Guides, route: Sentinels
) -> None:
    guides.says = {S1: AWAY, S2: AWAY, S3: (OLD, 1)}
    guides.find(route)
    assert [round(granted_s, 1) for granted_s in guides.granted_s] == [0.5, 0.5, 0.5]
    route.begin_anew()
    route._known = None
    guides.find(route, 1.2)
    assert guides.granted_s[0] == pytest.approx(0.3, abs=0.05)
    route._ask_at_s = 0.0  # only to look whether that holds
    guides.find(route)
    assert max(guides.granted_s) < 0.5


def test_those_that_hang_are_asked_again_for_longer_where_nothing_is_known(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: Silent("hangs"), S2: AWAY, S3: Silent("hangs")}
    guides.takes_s = lambda granted_s: granted_s
    with pytest.raises(StoreNotFound, match="hangs"):
        guides.find(route)
    assert guides.asked[:7] == [S1, S2, S3, S1, S3, S1, S3]
    assert guides.granted_s[:5] == pytest.approx([0.5, 0.5, 0.5, 1.0, 1.0], abs=0.05)
    assert guides.later_s < 7  # of 8, of which the server is to have its share
    guides.says[S3] = (OLD, 1)
    route.doubt()
    guides.find(route)
    guides.says[S3] = Silent("hangs")
    route.doubt()
    assert (guides.find(route), len(guides.asked)) == (OLD, 3)  # where one is known, each is asked once


def test_one_that_hangs_is_asked_after_the_others_for_a_while(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: Silent("hangs"), S2: (OLD, 1), S3: (OLD, 1)}
    assert (guides.find(route), guides.asked) == (OLD, [S1, S2])
    for asked in (S3, S2, S3, S2):
        route.ask_again()
        assert (guides.find(route), guides.asked) == (OLD, [asked])
    guides.later_s += 31
    asked_since = []
    for _ in range(3):
        route.ask_again()
        assert guides.find(route) == OLD
        asked_since += guides.asked
    assert S1 in asked_since


class Herd:
    """Threads that all want to know at once, while the guides are let answer only when all are there."""

    SIZE = 40

    def __init__(self, guides: Guides, route: Guided) -> None:
        self._guides = guides
        self._route = route
        self._entered = threading.Semaphore(0)
        self._go = threading.Event()

    def ask(self, guide: Host, questions: Sequence[Question], deadline_s: float) -> list[Any]:
        assert self._go.wait(10)
        return self._guides.ask(guide, questions, deadline_s)

    def find(self, word: Word) -> list[Host | StoreError]:
        self._guides.asked = []
        with ThreadPoolExecutor(self.SIZE) as pool:
            found = [pool.submit(self._one, word) for _ in range(self.SIZE)]
            for _ in range(self.SIZE):
                assert self._entered.acquire(timeout=10)
            self._go.set()
            return [each.result(10) for each in found]

    def _one(self, word: Word) -> Host | StoreError:
        self._entered.release()
        try:
            return self._route.find(self.ask, self._guides.clock() + 60, word)
        except StoreError as exc:
            return exc


@pytest.mark.parametrize("word", Word)
@pytest.mark.parametrize("is_known", [False, True])
def test_a_herd_asks_no_guide_twice(guides: Guides, route: Sentinels, word: Word, is_known: bool) -> None:
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 1))
    if is_known:
        guides.find(route)
        route.doubt()
    assert Herd(guides, route).find(word) == [OLD] * Herd.SIZE
    assert len(guides.asked) == (1 if word is Word.KNOWN else 3)
    assert len(set(guides.asked)) == len(guides.asked)


def test_a_herd_that_nobody_answers_asks_few_times_and_each_has_an_error_of_its_own(
    guides: Guides, route: Sentinels
) -> None:
    guides.says = dict.fromkeys((S1, S2, S3), AWAY)
    found = Herd(guides, route).find(Word.KNOWN)
    assert all(isinstance(each, StoreNotFound) and "away" in str(each) for each in found)
    assert len(set(map(id, found))) == Herd.SIZE
    assert len(guides.asked) < 3 * Herd.SIZE / 2


def test_a_herd_that_is_told_nothing_newer_asks_few_times(guides: Guides, route: Sentinels) -> None:
    guides.says = dict.fromkeys((S1, S2, S3), (NEW, 4))
    guides.find(route)
    guides.says = {S1: (OLD, 3), S2: AWAY, S3: AWAY}
    route.ask_again()
    found = Herd(guides, route).find(Word.REQUIRED)
    assert all(isinstance(each, StoreNotFound) and "are behind" in str(each) for each in found)
    assert len(guides.asked) < 3 * Herd.SIZE / 2


def test_who_has_little_time_left_does_not_fail_those_that_have_more(guides: Guides, route: Sentinels) -> None:
    """The first of them asks for all, and its questions end by its own deadline."""
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 1))
    is_asked, go = threading.Event(), threading.Event()

    def ask(guide: Host, questions: Sequence[Question], deadline_s: float) -> list[Any]:
        if deadline_s - guides.clock() < 0.4:
            is_asked.set()
            assert go.wait(10)
            raise Silent("no time")
        return guides.ask(guide, questions, deadline_s)

    with ThreadPoolExecutor(2) as pool:
        hasty = pool.submit(route.find, ask, guides.clock() + 0.1)
        assert is_asked.wait(10)
        patient = pool.submit(route.find, ask, guides.clock() + 60)
        with pytest.raises(TimeoutError):
            patient.result(0.05)
        go.set()
        assert patient.result(10) == OLD
        with pytest.raises(StoreNotFound):
            hasty.result(10)


def test_what_was_asked_before_the_server_failed_does_not_answer_who_doubts_it(
    guides: Guides, route: Sentinels
) -> None:
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 1))
    guides.find(route)
    route.ask_again()

    def ask(guide: Host, questions: Sequence[Question], deadline_s: float) -> list[Any]:
        answer = guides.ask(guide, questions, deadline_s)
        guides.says = dict.fromkeys((S1, S2, S3), (NEW, 2))
        route.doubt()  # of another thread, in the meantime
        return answer

    assert route.find(ask, guides.clock() + 8) == OLD
    assert guides.find(route) == NEW


def test_a_write_needs_a_word_of_the_last_second(guides: Guides, route: Sentinels) -> None:
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 1))
    guides.find(route)
    assert (guides.find(route, word=Word.REQUIRED), len(guides.asked)) == (OLD, 3)  # one alone does not do
    guides.says = dict.fromkeys((S1, S2, S3), (NEW, 2))
    guides.later_s += 0.9 * WORD_S
    for word in Word:
        assert (guides.find(route, word=word), guides.asked) == (OLD, [])
    guides.later_s += 0.2 * WORD_S
    assert (guides.find(route), guides.asked) == (OLD, [])
    assert (guides.find(route, word=Word.REQUIRED), len(guides.asked)) == (NEW, 3)
    guides.later_s += 1.1 * WORD_S
    assert (guides.find(route, word=Word.RECENT), len(guides.asked)) == (NEW, 3)


@pytest.mark.parametrize("word", [Word.REQUIRED, Word.RECENT])
@pytest.mark.parametrize("is_known", [False, True])
def test_before_a_write_all_are_heard_as_one_that_answers_may_be_behind(
    guides: Guides, route: Sentinels, word: Word, is_known: bool
) -> None:
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 3))
    if is_known:
        guides.find(route)
        guides.later_s += 1.1 * WORD_S
    for newer in (S3, S2, S1):
        route._known = route._known if is_known else None
        route._order = [S1, S2, S3]
        guides.says = dict.fromkeys((S1, S2, S3), (OLD, 3)) | {newer: (NEW, 4)}
        known = route._known
        assert guides.find(route, word=word) == NEW
        route._known, route._ask_at_s = known, 0.0
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 3))
    route.ask_again()
    assert (guides.find(route, word=word), sorted(guides.asked)) == (OLD, [S1, S2, S3])
    assert not route.apart


def test_one_that_hangs_holds_up_one_write_in_half_a_minute(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (OLD, 3), S2: Silent("hangs"), S3: (OLD, 3)}
    guides.takes_s = lambda granted_s: granted_s
    begun_s = guides.later_s
    assert (guides.find(route, word=Word.REQUIRED), guides.asked) == (OLD, [S1, S2, S3])
    assert guides.later_s - begun_s == pytest.approx(0.5, abs=0.05)
    for _ in range(3):
        guides.later_s += 1.1 * WORD_S
        assert (guides.find(route, word=Word.REQUIRED), sorted(guides.asked)) == (OLD, [S1, S3])
    guides.says[S1] = guides.says[S3] = AWAY
    guides.says[S2] = (OLD, 3)  # where the others say nothing, it is asked all the same
    guides.later_s += 1.1 * WORD_S
    assert (guides.find(route, word=Word.REQUIRED), guides.asked[-1]) == (OLD, S2)


def test_without_a_word_nothing_is_written_and_what_is_read_is_as_good_as_what_is_known(
    guides: Guides, route: Sentinels
) -> None:
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 1))
    guides.find(route)
    guides.says = dict.fromkeys((S1, S2, S3), AWAY)
    guides.later_s += 1.1 * WORD_S
    for _ in range(2):
        with pytest.raises(StoreNotFound, match=r"'m' is: away; nothing is written .* replaced\. Start them, or"):
            guides.find(route, word=Word.REQUIRED)
    assert guides.find(route, word=Word.RECENT) == OLD
    guides.says = {S1: (OLD, 0), S2: AWAY, S3: AWAY}
    with pytest.raises(StoreNotFound, match="those that answer are behind"):
        guides.find(route, word=Word.REQUIRED)
    guides.says = dict.fromkeys((S1, S2, S3), NotPermitted("a right", lacking="+sentinel"))
    with pytest.raises(NotPermitted, match="a right") as raised:
        guides.find(route, word=Word.REQUIRED)
    assert raised.value.lacking == "+sentinel"
    assert raised.value is not guides.says[S1]


def test_guides_of_two_sets_do_not_make_it_go_back_and_forth(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (OLD, 0), S2: (NEW, 0), S3: (NEW, 0)}
    for _ in range(7):
        route.ask_again()
        assert guides.find(route) == OLD
    assert "the sentinel s2:2 says new:6379" in route.apart
    assert "what is followed is old:6379" in route.apart
    guides.says = dict.fromkeys((S1, S2, S3), (OLD, 0))
    for _ in range(3):
        route.ask_again()
        guides.find(route)
    assert not route.apart


def test_one_that_stays_behind_is_told_after_longer_than_a_failover(guides: Guides, route: Sentinels) -> None:
    guides.says = {S1: (OLD, 3), S2: (NEW, 4), S3: (NEW, 4)}
    for _ in range(10):
        guides.later_s += 2.5
        route.ask_again()
        guides.find(route)
    assert not route.apart
    for _ in range(8):
        guides.later_s += 2.5
        route.ask_again()
        assert guides.find(route) == NEW
    assert route.apart == "the sentinel s1:1 says old:6379; what is followed is new:6379"


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


def test_nodes_of_another_cluster_are_not_believed_while_one_of_the_first_answers() -> None:
    """Their epochs are of another count, and may be higher."""
    other_nodes = b"ddd h4:4@14 myself,master - 0 0 99 connected 0-16383\n"
    other = [[[0, 16383, [b"h4", 4, b"ddd", []]]], other_nodes]
    first: Any = [[[0, 16383, B]], b"bbb h2:2@12 myself,master - 0 0 9 connected 0-16383\n"]
    says = {("h2", 2): first, ("h4", 4): other}

    def ask(guide: Host, _questions: Sequence[Question], _deadline_s: float) -> list[Any]:
        answer = says[guide]
        if isinstance(answer, StoreError):
            raise answer
        return answer

    route = Nodes([("h2", 2), ("h4", 4)], 100)
    route._order = [("h2", 2), ("h4", 4)]
    for _ in range(5):
        route.ask_again()
        assert route.find(ask, time.monotonic() + 1) == ("h2", 2)
    assert "the cluster's node h4:4 says h4:4" in route.apart
    says["h2", 2] = AWAY
    route.doubt()
    assert route.find(ask, time.monotonic() + 1) == ("h2", 2)
    says["h2", 2] = other  # set up anew
    route.doubt()
    assert route.find(ask, time.monotonic() + 1) == ("h4", 4)
    assert not route.apart
