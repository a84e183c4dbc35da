"""Faults in the log: what an exception says, and the code it came through, stay out of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.support.waiting import wait_until
from veltrix_mw.faults import told
from veltrix_mw.follower import Follower
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.replica import Replica
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.validation import Schemas

WITHIN_S = 10.0


def failing(value: str) -> None:
    raise ValueError(f"{value} is no number, hunter2 neither")


def test_a_fault_is_its_type_and_where_it_came_through() -> None:
    try:
        try:
            failing("hunter3")
        except ValueError as exc:
            raise RuntimeError("hunter4") from exc
    except RuntimeError as exc:
        text = told(exc)
    first, second = text.split(" caused by ")
    assert first.startswith(f"RuntimeError > {__file__}:")
    assert second.startswith(f"ValueError > {__file__}:")
    assert second.endswith(" failing")
    assert "hunter" not in text
    assert "raise" not in text


def test_a_recursion_does_not_fill_the_log_and_a_circle_of_causes_ends() -> None:
    def deep(levels: int) -> None:
        if levels == 0:
            raise KeyError("hunter2")
        deep(levels - 1)

    try:
        deep(200)
    except KeyError as exc:
        other = ValueError()
        exc.__cause__, other.__cause__ = other, exc
        text = told(exc)
    assert text.count(" deep") == 20
    assert text.endswith(" caused by ValueError")


def test_no_value_comes_into_the_log_of_a_follower_that_crashes(caplog: pytest.LogCaptureFixture) -> None:
    def crash(*_: Any) -> Any:
        failing("hunter3")

    follower = Follower(
        MemoryStore(),
        replica=Replica(Keyspace(Schemas({})), origin="memory"),
        publish=crash,
        failed=crash,
        telemetry=Telemetry("off"),
        prepare=crash,
    )
    follower.start()
    try:
        wait_until(lambda: follower.crashes > 0, WITHIN_S, reason="publishing raises")
    finally:
        follower.stop(WITHIN_S)
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert {record.getMessage().split()[0] for record in logged} == {
        "veltrix.telemetry_failed",
        "veltrix.follower_crashed",
    }
    assert all(" failing" in record.getMessage() for record in logged)
    assert "hunter" not in caplog.text
    assert "hunter" not in str(follower.replica.error)
