"""Operations: what they hold."""

from __future__ import annotations

import dataclasses

import pytest

from veltrix_mw.operations import Delete, Put


def test_an_operation_is_frozen_and_expects_nothing_unless_told() -> None:
    assert Put("a", 1) == Put("a", 1, None) == Put("a", 1, expected=None)
    assert Delete("a") == Delete("a", None)
    assert Put("a", 1, 0) != Put("a", 1)
    for operation in (Put("a", 1), Delete("a")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            operation.key = "b"  # type: ignore[misc]
        assert not hasattr(operation, "__dict__")
