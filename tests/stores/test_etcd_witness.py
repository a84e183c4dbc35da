"""The witness: a restore is told once, however it was noticed."""

from __future__ import annotations

import pytest

from veltrix_mw.protocols import Position, Restored
from veltrix_mw.stores.etcd_messages import Header
from veltrix_mw.stores.etcd_witness import Witness


def _header(revision: int, *, cluster_id: str = "c", raft_term: int = 2) -> Header:
    return Header(cluster_id=cluster_id, revision=revision, raft_term=raft_term)


def test_a_restore_that_was_told_otherwise_is_not_told_again_by_the_next_header() -> None:
    """A second incarnation would be minted for it, and every worker would list once more."""
    witness = Witness()
    witness.answered(_header(12), witness.seen)
    witness.forget()  # an error said that the revision does not exist
    witness.answered(_header(5), witness.seen)
    witness.check()


def test_an_answer_that_was_asked_for_before_it_was_told_is_no_restore_either() -> None:
    witness = Witness()
    witness.answered(_header(12), witness.seen)
    before = witness.seen
    witness.forget()
    witness.answered(_header(5), witness.seen)
    witness.answered(_header(5), before)
    witness.check()


@pytest.mark.parametrize("later", [_header(4), _header(9, raft_term=1), _header(9, cluster_id="d")])
def test_the_next_restore_is_told(later: Header) -> None:
    witness = Witness()
    witness.answered(_header(12), witness.seen)
    witness.forget()
    witness.answered(_header(5), witness.seen)
    witness.remember(Position("label", 5), 5, witness.seen.epoch)
    witness.answered(later, witness.seen)
    with pytest.raises(Restored):
        witness.check()
    witness.check()
