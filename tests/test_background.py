"""Background threads: under gevent they go on whichever native thread was the first to need one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Final

import pytest

from veltrix_mw.background import BackgroundThread

WITHIN_S: Final = 60.0
ROOT: Final = Path(__file__).parents[1]

BEGIN: Final = """
from gevent import monkey
monkey.patch_all()
import gevent
import gevent.event
from gevent import get_hub
from veltrix_mw import ConfigClient
from veltrix_mw.coalesce import SingleFlight

def natively(call):
    return get_hub().threadpool.spawn(call).get()

client = ConfigClient("memory://", lazy=("tenants/",), fetch_timeout_s=5)
"""


def said(script: str) -> list[str]:
    """What a process of its own prints, that is patched by gevent."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_greenlets_fetch_after_a_native_thread_was_the_first_to() -> None:
    script = """
    with client:
        client.wait_for(client.put("tenants/acme/a", 1))
        print(natively(lambda: client.view().fetch("tenants/acme/a")))
        print(client.view().fetch("tenants/beta/a", default=2))
        print(gevent.spawn(lambda: client.view().fetch("tenants/gamma/a", default=3)).get())
        print(natively(lambda: client.view().fetch("tenants/delta/a", default=4)))
    """
    assert said(script) == ["1", "2", "3", "4"]


def test_a_client_that_a_native_thread_started_is_followed_and_closed_by_others() -> None:
    script = """
    def begin():
        client.start()
        client.wait_ready()
        client.put("a", 1)

    natively(begin)
    client.wait_for(client.put("a", 2))
    print(client.view()["a"])
    client.close()
    print(client.status().tiers[0].state)
    client.start()
    client.wait_ready()
    natively(client.close)
    print(client.status().tiers[0].state)
    """
    assert said(script) == ["2", "stopped", "stopped"]


def test_a_flight_that_a_native_thread_led_lands_though_that_waits_no_more() -> None:
    script = """
    flights, may_end = SingleFlight(timeout_s=30), gevent.event.Event()

    def lead():
        try:
            flights.run("a", lambda: may_end.wait() and 7, timeout_s=0.01)
        except Exception as exc:
            print(type(exc).__name__)

    natively(lead)
    gevent.spawn_later(0, may_end.set)
    print(flights.run("a", lambda: 8))
    """
    assert said(script) == ["StoreUnavailable", "7"]


def test_native_threads_and_greenlets_wait_for_one_flight_and_one_computation() -> None:
    script = """
    from veltrix_mw.coalesce.inline_flight import InlineFlight

    # Of a detached flight the leader waits, too; of an inline one it computes.
    for flights, waiters in ((SingleFlight(timeout_s=30), 7), (InlineFlight(), 6)):
        may_end, called = gevent.event.Event(), []

        def call():
            called.append(1)
            may_end.wait()
            return 7

        pool, led = get_hub().threadpool, gevent.spawn(flights.run, "a", call)
        while not called:
            gevent.sleep(0)
        waiting = [pool.spawn(flights.run, "a", call) for _ in range(3)]
        waiting += [gevent.spawn(flights.run, "a", call) for _ in range(3)]
        flight = flights._flights["a"]
        signal = getattr(flight, "done", None) or flight._landed
        while len(signal._changed._waiters) < waiters:
            gevent.sleep(0.01)  # not 0: that would leave the native threads no time
        may_end.set()
        print(*[each.get() for each in (led, *waiting)], len(called))
    """
    assert said(script) == [*["7"] * 7, "1"] * 2


def test_where_the_main_thread_runs_no_greenlets_a_native_thread_serves_itself() -> None:
    script = """
    gevent.sleep(0)  # there is a hub
    done = monkey.get_original("_thread", "allocate_lock")()
    done.acquire()

    def native():
        print(SingleFlight().run("a", lambda: 1))
        done.release()

    monkey.get_original("_thread", "start_new_thread")(native, ())
    done.acquire()  # as whatever blocks and knows nothing of gevent
    """
    assert said(script) == ["1"]


def test_without_gevent_it_is_a_thread() -> None:
    done: list[int] = []
    thread = BackgroundThread(target=done.append, args=(1,), name="ours")
    assert thread.daemon
    thread.start()
    thread.join(WITHIN_S)
    assert done == [1]
    assert not thread.is_alive()
    with pytest.raises(RuntimeError):
        thread.start()
