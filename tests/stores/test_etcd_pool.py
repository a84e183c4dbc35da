"""What waits for the next call to a member, and for whom it waits no longer."""

from __future__ import annotations

import os

from veltrix_mw.stores.etcd_pool import Pool

HOST, OTHER = ("h1", 2379), ("h2", 2379)


class Connection:
    def __init__(self) -> None:
        self.rests = True
        self.closed = False

    def is_at_rest(self) -> bool:
        return self.rests

    def close(self) -> None:
        self.closed = True


def filled(number: int) -> tuple[Pool[Connection], list[Connection]]:
    pool, made = Pool[Connection](), [Connection() for _ in range(number)]
    for connection in made:
        pool.give_back(HOST, connection, pool.epoch)
    return pool, made


def test_what_is_given_back_is_lent_again_to_calls_of_its_member_alone() -> None:
    pool, (one,) = filled(1)
    assert pool.borrow(OTHER) is None
    assert pool.borrow(HOST) is one
    assert pool.borrow(HOST) is None


def test_no_more_than_four_wait_for_a_member() -> None:
    pool, made = filled(6)
    assert [connection.closed for connection in made] == [False] * 4 + [True] * 2
    assert len(pool.idle) == 4


def test_what_does_not_rest_is_closed_and_not_lent() -> None:
    pool, (first, second) = filled(2)
    second.rests = False
    assert pool.borrow(HOST) is first
    assert second.closed


def test_a_member_that_is_dropped_keeps_nothing_and_the_others_all() -> None:
    pool, made = filled(2)
    other = Connection()
    pool.give_back(OTHER, other, pool.epoch)
    pool.drop(HOST)
    assert all(connection.closed for connection in made)
    assert pool.idle == (other,)


def test_what_is_in_use_while_all_is_dropped_is_closed_when_it_comes_back() -> None:
    pool, (one,) = filled(1)
    epoch = pool.epoch
    assert pool.borrow(HOST) is one
    pool.drop()
    pool.give_back(HOST, one, epoch)
    assert one.closed
    assert pool.idle == ()


def test_what_another_process_kept_is_closed_whoever_holds_its_lock() -> None:
    pool, made = filled(2)
    pool._kept.pid = os.getpid() + 1  # as in a child, and one that no hook told so
    pool._kept.lock.acquire()  # as by a thread that the child does not have
    assert pool.borrow(HOST) is None
    assert all(connection.closed for connection in made)
