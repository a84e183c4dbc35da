"""Every server dies: requests go on and say how old their truth is; a cold start serves the last-known-good."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.rig import SLACK, rig
from tests.support.serving import serve
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

CONVERGED_S = 5.0
STALE_S = 15.0


def test_requests_outlive_every_server_and_a_cold_start_serves_what_was_last_known(tmp_path: Path) -> None:
    kept = {"TRACED_LAST_KNOWN_GOOD": str(tmp_path / "kept"), "TRACED_START_TIMEOUT_S": "1"}
    with rig(environment=kept) as made:
        wait_until(lambda: list((tmp_path / "kept").iterdir()), 20, reason="the last-known-good is written")
        made.all_down()
        down_s = time.monotonic()
        answered = len(made.checker.answers)

        made.until_status(lambda told: told["stale"], STALE_S * SLACK + 5, reason="every worker says stale")
        later = [each.told for each in made.checker.answers[answered:]]
        assert len({told["pid"] for told in later}) == made.workers, "every worker was asked meanwhile"
        for told in later:
            assert told["stale"] == (told["age_s"] > STALE_S), told
        newest = {told["pid"]: told for told in later}
        for told in newest.values():
            assert told["age_s"] >= told["t"] - down_s, "nothing was confirmed since"
        for status in made.statuses().values():
            assert any(tier["error"] for tier in status["tiers"]), "the trouble is named"

        cold = tmp_path / "cold"
        cold.mkdir()
        env = {**made.links.environment, **kept, "TRACE_FOLDER": str(cold)}
        with serve("tests.support.apps.traced:app", server="gunicorn", workers=1, env=env) as fresh:
            told = fresh.get()
            assert (told["value"], told["origin"], told["stale"]) == (41, "disk", True)
            assert told["revision"] > 0

            made.heal()
            begun_s = time.monotonic()
            # Without a restart: those that went on, and the one that started in the dark.
            made.caught_up_s(made.writer.first_after(begun_s).revision, CONVERGED_S * SLACK)
            made.equal_within(CONVERGED_S)
            with made.writer.paused():
                digest, _ = made.writer.truth()
                wait_until(
                    lambda: fresh.get()["digest"] == digest, CONVERGED_S * SLACK, reason="the cold start caught up"
                )
            made.steady()
            assert not any(status["stale"] for status in made.statuses().values())
