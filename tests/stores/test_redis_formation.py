"""The formation: verdicts on what sentinels and nodes said, where no real servers would say it for long."""

from __future__ import annotations

from veltrix_mw.findings import Said, State
from veltrix_mw.settings import Host
from veltrix_mw.stores.redis_formation import NodesSeen, SentinelsSeen, view_of

ONE, TWO, THREE = (("h1", 1), ("h2", 2), ("h3", 3))


def line(name: str, host: Host, flags: str, *rest: str, primary: str = "-", linked: bool = True) -> str:
    link = "connected" if linked else "disconnected"
    return " ".join([name, f"{host[0]}:{host[1]}@1{host[1]}", flags, primary, "0", "0", "1", link, *rest])


def seen(*lines: str, slot: int = 5) -> NodesSeen:
    """What the first node says, which the URL names."""
    view = view_of("\n".join(lines).encode(), ONE)
    assert view is not None
    return NodesSeen(slot, {ONE: view}, named=[ONE])


def told(said: Said | None, state: State) -> str:
    assert said is not None
    assert said.state is state
    return said.text


THE_OTHERS = (line("c", THREE, "master", "10000-16383"), line("r", ("h4", 4), "slave", primary="b"))


def test_a_primary_that_is_down_and_not_replaced_is_a_failure() -> None:
    mine = line("a", ONE, "myself,master", "6000-9999")
    down = seen(mine, line("b", TWO, "master,fail", "0-5999", linked=False), *THE_OTHERS)
    assert "h2:2, the primary of the namespace, is down" in told(down.fault(), State.FAIL)
    assert seen(mine, line("b", TWO, "master", "0-5999"), *THE_OTHERS).fault() is None


def test_slots_of_others_that_nobody_has_are_a_warning() -> None:
    nodes = seen(line("a", ONE, "myself,master", "0-99"), line("b", TWO, "master", "101-16383"))
    text = told(nodes.fault(), State.WARN)
    assert "1 slot of 16384 without a node, none of them the namespace's" in text
    assert "redis-cli --cluster fix h1:1" in text


def test_primaries_of_which_no_majority_would_be_left_are_a_warning() -> None:
    lines = [line("a", ONE, "myself,master", "6000-9999"), line("b", TWO, "master", "0-5999")]
    down = seen(*lines, line("c", THREE, "master,fail", "10000-16383"), THE_OTHERS[1])
    assert "2 of 3 primaries are up" in told(down.failover(1, 0), State.WARN)
    assert seen(*lines, *THE_OTHERS).failover(1, 0).state is State.OK


def test_a_replica_that_is_not_linked_takes_nothing_over() -> None:
    lines = (line("a", ONE, "myself,master", "0-5999"), line("b", TWO, "master", "6000-9999"), THE_OTHERS[0])
    for replica, state in (
        (line("r", ("h4", 4), "slave", primary="a", linked=False), State.WARN),
        (line("r", ("h4", 4), "slave,fail", primary="a"), State.WARN),
        (line("r", ("h4", 4), "slave", primary="b"), State.WARN),
        (line("r", ("h4", 4), "slave", primary="a"), State.OK),
    ):
        assert seen(*lines, replica).failover(1, 0).state is state


def test_one_side_of_a_move_alone_is_told() -> None:
    moving = seen(line("a", ONE, "myself,master", "0-16383", "[5->-gone]", "[6-<-b]"))
    assert "half moved (h1:1 gives it to a node that is gone)" in told(moving.fault(), State.WARN)


def test_what_is_no_answer_of_a_node_is_no_view() -> None:
    assert view_of(b"", ONE) is None
    assert view_of(b"\xff what is this", ONE) is None


def test_sentinels_that_cannot_reach_the_primary_are_named() -> None:
    said = {"ip": "h9", "port": "1", "runid": "x", "flags": "master", "num-other-sentinels": "2", "quorum": "2"}
    blind = SentinelsSeen("shop", {ONE: said, TWO: {**said, "flags": "s_down,master"}}, named=2)
    assert "h2:2 cannot reach the primary" in told(blind.failover(1, 0), State.WARN)
    assert SentinelsSeen("shop", {ONE: said}, named=1).failover(1, 0).state is State.OK


def test_one_server_by_two_addresses_is_one() -> None:
    said = {"ip": "10.0.0.1", "port": "1", "runid": "x"}
    assert SentinelsSeen("shop", {ONE: said, TWO: {**said, "ip": "192.168.0.1"}}, named=2).fault() is None
    other = SentinelsSeen("shop", {ONE: said, TWO: {"ip": "10.0.0.2", "port": "1", "runid": "y"}}, named=2)
    assert "h1:1 says 10.0.0.1:1, h2:2 says 10.0.0.2:1" in told(other.fault(), State.FAIL)
