"""The demo on etcd and Redis: four workers under load, while the servers below them are killed and come back.

Owns the play and its expectations; `demo_servers` runs the servers, `demo_stage` the app, `demo_load` asks it. Every
figure shown was measured in this run; an expectation that fails ends it with exit code 1.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from veltrix_mw import ConfigClient, Put, StoreError
from veltrix_mw.cli import output
from veltrix_mw.cli.demo_load import Load, loaded
from veltrix_mw.cli.demo_servers import Servers, serving
from veltrix_mw.cli.demo_stage import DemoFailed, Stage, expect, interruptible, staged

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["run"]

KEY: Final = "checkout/max_items"
FIRST: Final = 50
WORKERS: Final = 4

_APP: Final = "veltrix_mw.cli.demo_cluster_app:app"
_PATIENCE_S: Final = 60.0  # seconds are what it takes; a machine under load gets this long
_TRIES: Final = 3  # on a machine under load, a worker may leave the mirror for a moment
_LOOK_S: Final = 0.01
_REFRESH_PER_S: Final = 4


@dataclass(frozen=True, slots=True)
class Served:
    """One worker after a step: `after_s` from the step's beginning to its first answer with the change."""

    pid: int
    after_s: float
    revision: int
    value: Any
    origin: str
    age_s: float | None
    stale: bool
    requests: int
    failed: int


@dataclass(frozen=True, slots=True)
class Step:
    """A change, and every worker's way to it.

    Seconds count from the step's beginning: the kill, where something was killed. `write_tries` is how often the change
    was sent until the authority acknowledged it; `converged_s` is the last worker's.
    """

    name: str
    revision: int
    value: int
    write_tries: int
    acknowledged_s: float
    converged_s: float
    relay: str | None
    workers: tuple[Served, ...]


@dataclass(frozen=True, slots=True)
class Outage:
    """The time without any server: `stale_s` until every worker said that it is stale, and what was asked meanwhile."""

    stale_s: float
    requests: int
    failed: int
    workers: tuple[Served, ...]


@dataclass(frozen=True, slots=True)
class Return:
    """How long it took once every server answered again, `started_s` after the first of them was started.

    `fresh_s` until no worker was stale, `mirrored_s` until each of them followed the mirror again.
    """

    started_s: float
    fresh_s: float
    mirrored_s: float


def run(*, as_json: bool) -> int:
    """Play the demo; returns the exit code."""
    from rich.console import Console

    # Without a handler, logging would write what the writer meets to stderr, between the lines of the play.
    logging.getLogger("veltrix_mw").addHandler(logging.NullHandler())
    screen = Console(quiet=True) if as_json else output.console()
    try:
        with interruptible(), _set(screen) as (servers, stage):
            try:
                measured = _play(servers, stage, screen)
            except DemoFailed as exc:
                raise DemoFailed(f"{exc}{stage.log_tail()}") from exc
    except DemoFailed as exc:
        click.echo(f"error: the demo failed: {exc}", err=True)
        return 1
    if as_json:
        output.say_json(measured)
    return 0


@contextmanager
def _set(screen: Console) -> Iterator[tuple[Servers, Stage]]:
    """The servers, and the stage for an app on them."""
    _title(screen, "1", "Three etcd, a Redis, and an app that reads its config")
    begun_s = time.monotonic()
    with serving() as servers:
        screen.print(f"  etcd x {len(servers.etcd)}, redis     up after {time.monotonic() - begun_s:.1f} s")
        with staged(WORKERS, app=_APP, url=servers.url, mirror_url=servers.mirror_url) as stage:
            yield servers, stage


def _play(servers: Servers, stage: Stage, screen: Console) -> dict[str, Any]:
    # Writes and lists go to the authority alone: it follows nothing, and stands for no election.
    client = ConfigClient(servers.url, mirror=servers.mirror_url, relay="never")
    with contextlib.closing(client):
        client.write([Put(KEY, FIRST), Put("checkout/headline", "Free shipping over 30 EUR")], reason="the demo")
        screen.print(f"  uvicorn             {WORKERS} workers up after {stage.serve():.1f} s at {stage.address}")
        with stage.lines_by_pid() as lines, loaded(lines) as loads, _live(screen, loads):
            play = _Play(servers, client, loads, screen)
            return play.all()


class _Play:
    """The steps, in turn. Each leaves the servers as the next one finds them."""

    def __init__(self, servers: Servers, client: ConfigClient, loads: Sequence[Load], screen: Console) -> None:
        self._servers = servers
        self._client = client
        self._loads = loads
        self._screen = screen
        self._value = FIRST
        self._steps: list[Step] = []

    def all(self) -> dict[str, Any]:
        _title(self._screen, "2", "A change goes through the mirror")
        self._change_through_mirror("change through the mirror")

        leader = self._servers.leader()
        _title(self._screen, "3", f"Kill {leader.name}, which leads the cluster; change")
        begun_s = time.monotonic()
        leader.kill()
        successor = self._servers.leader()
        elected_s = time.monotonic() - begun_s
        self._screen.print(f"  {successor.name:<19} leads after {elected_s:.2f} s")
        self._change("etcd's leader killed", begun_s)

        _title(self._screen, "4", "Kill Redis too; change")
        begun_s = time.monotonic()
        self._servers.redis.kill()
        self._change("Redis killed", begun_s)
        expect(self._all("origin", "etcd"), "a worker says that its config came from Redis, which is dead")

        _title(self._screen, "5", "Kill everything")
        outage = self._outage()

        _title(self._screen, "6", "Bring all back; change")
        returned = self._return()

        _title(self._screen, "7", "A change goes through the mirror again")
        self._change_through_mirror("through the mirror again")

        self._check()
        _show_summary(self._screen, self._steps, outage, returned, self._loads)
        return self._measured(elected_s, outage, returned)

    def _change_through_mirror(self, name: str) -> None:
        for _ in range(_TRIES):
            self._until(lambda: self._all("follows", "redis"), "every worker follows the mirror")
            self._until(lambda: self._relay() is not None, "a relay is elected")
            self._change(name, time.monotonic())
            if self._all("origin", "redis"):
                return
        raise DemoFailed(f"{_TRIES} times a worker took the change from somewhere else than the mirror")

    def _change(self, name: str, begun_s: float) -> Step:
        """Write a value, see every worker serve it, and compare each of them with a list of the authority."""
        self._value += 10
        revision, tries = self._written(self._value)
        acknowledged_s = time.monotonic() - begun_s
        self._until(
            lambda: all(load.reached_s(revision) is not None for load in self._loads),
            f"every worker serves revision {revision}",
        )
        self._until(self._is_equal, "every worker holds what a list of etcd holds")
        workers = self._served(begun_s, revision)
        converged_s = max(one.after_s for one in workers)
        step = Step(name, revision, self._value, tries, acknowledged_s, converged_s, self._relay(), workers)
        self._steps.append(step)
        _show_step(self._screen, step)
        self._check()
        return step

    def _written(self, value: int) -> tuple[int, int]:
        """The revision, and how often it was tried: a write that fails for want of a leader is made again."""
        end_s = time.monotonic() + _PATIENCE_S
        tries = 0
        while True:
            tries += 1
            try:
                return self._client.put(KEY, value, reason="the demo"), tries
            except StoreError as exc:
                expect(time.monotonic() < end_s, f"no write is acknowledged: {exc}")
            threading.Event().wait(_LOOK_S)

    def _is_equal(self) -> bool:
        try:
            listed = self._client.list()
        except StoreError:
            return False  # until the cluster is itself again
        return all(load.answer["digest"] == listed.digest for load in self._loads)

    def _outage(self) -> Outage:
        revision = self._steps[-1].revision
        before = sum(load.requests for load in self._loads)
        begun_s = time.monotonic()
        self._servers.kill_all()
        self._until(lambda: all(load.answer["stale"] for load in self._loads), "every worker says that it is stale")
        stale_s = time.monotonic() - begun_s
        workers = self._served(begun_s, revision)
        for one in workers:
            expect(one.value == self._value, f"worker {one.pid} serves {one.value!r}, not {self._value}")
        requests = sum(load.requests for load in self._loads) - before
        outage = Outage(stale_s, requests, sum(load.failed for load in self._loads), workers)
        self._screen.print(f"  requests            {requests} in {stale_s:.1f} s, {outage.failed} failed")
        _show_workers(self._screen, workers, timed=False)
        self._check()
        return outage

    def _return(self) -> Return:
        started_s = self._servers.start()
        begun_s = time.monotonic()
        self._screen.print(f"  etcd x {len(self._servers.etcd)}, redis     up after {started_s:.1f} s; Redis is empty")
        self._change("all back", begun_s)
        self._until(lambda: not any(load.answer["stale"] for load in self._loads), "no worker is stale")
        fresh_s = time.monotonic() - begun_s
        self._until(lambda: self._all("follows", "redis"), "every worker follows the mirror again")
        mirrored_s = time.monotonic() - begun_s
        self._screen.print(f"  fresh again         no worker was stale any more after {fresh_s:.1f} s")
        self._screen.print(f"  through the mirror  all of them again after {mirrored_s:.1f} s, fed by {self._relay()}")
        return Return(started_s, fresh_s, mirrored_s)

    def _all(self, name: str, value: str) -> bool:
        """Whether every worker's last answer says so."""
        return all(load.answer.get(name) == value for load in self._loads)

    def _relay(self) -> str | None:
        """The process that feeds the mirror, as the workers see it."""
        return next((load.answer["relay"] for load in self._loads if load.answer.get("relay")), None)

    def _served(self, begun_s: float, revision: int) -> tuple[Served, ...]:
        served = []
        for load in self._loads:
            answer, at_s = load.answer, load.reached_s(revision)
            assert at_s is not None  # it was waited for
            served.append(
                Served(
                    pid=load.pid,
                    after_s=max(0.0, at_s - begun_s),
                    revision=answer["revision"],
                    value=answer["max_items"],
                    origin=answer["origin"],
                    age_s=answer["age_s"],
                    stale=answer["stale"],
                    requests=load.requests,
                    failed=load.failed,
                )
            )
        return tuple(served)

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + _PATIENCE_S
        while not holds():
            self._check()
            expect(time.monotonic() < end_s, f"waited {_PATIENCE_S:g} s, but not yet so: {what}")
            threading.Event().wait(_LOOK_S)

    def _check(self) -> None:
        """What holds at every moment, whatever is dead."""
        for load in self._loads:
            expect(not load.failed, f"a request to worker {load.pid} failed: {load.failure}")
            expect(not load.backwards, f"worker {load.pid} went back to an older revision")
            expect(not load.torn, f"worker {load.pid} served two values at one revision")

    def _measured(self, elected_s: float, outage: Outage, returned: Return) -> dict[str, Any]:
        return {
            "requests": sum(load.requests for load in self._loads),
            "failed": sum(load.failed for load in self._loads),
            "slowest_s": max(load.slowest_s for load in self._loads),
            "relays": _relays(self._steps),
            "steps": [asdict(step) for step in self._steps],
            "elected_s": elected_s,
            "outage": asdict(outage),
            "return": asdict(returned),
        }


def _relays(steps: Sequence[Step]) -> list[str]:
    """Who fed the mirror, in turn."""
    found: list[str] = []
    for step in steps:
        if step.relay is not None and found[-1:] != [step.relay]:
            found.append(step.relay)
    return found


# Shown


def _title(screen: Console, number: str, text: str) -> None:
    screen.print(f"\n[bold]{number}  {text}[/]")


def _show_step(screen: Console, step: Step) -> None:
    tries = "" if step.write_tries == 1 else f", at try {step.write_tries}"
    screen.print(
        f"  put {KEY} {step.value}  acknowledged as revision {step.revision} after {step.acknowledged_s:.2f} s{tries}"
    )
    _show_workers(screen, step.workers)
    screen.print(f"  relay               {step.relay or 'none'}")


def _show_workers(screen: Console, workers: Sequence[Served], *, timed: bool = True) -> None:
    for one in workers:
        after = f"[bold green]{one.after_s:.2f} s[/], " if timed else ""
        stale = "[bold yellow]stale[/]" if one.stale else "current"
        screen.print(
            f"  worker {one.pid:<12} {one.value} at revision {one.revision}: {after}{one.origin}, "
            f"age {_seconds(one.age_s)}, {stale}"
        )


def _show_summary(
    screen: Console, steps: Sequence[Step], outage: Outage, returned: Return, loads: Sequence[Load]
) -> None:
    _title(screen, "8", "Summary")
    for step in steps:
        screen.print(f"  {step.name:<26} all workers converged after {step.converged_s:.2f} s")
    screen.print(f"  {'everything killed':<26} all workers said stale after {outage.stale_s:.1f} s")
    screen.print(f"  {'all back':<26} none stale after {returned.fresh_s:.1f} s")
    screen.print(f"  {'relays, in turn':<26} {', '.join(_relays(steps))}")
    slowest_ms = max(load.slowest_s for load in loads) * 1000
    screen.print(f"  {'requests':<26} {sum(load.requests for load in loads)}, the slowest took {slowest_ms:.0f} ms")
    screen.print(f"  {'failed requests':<26} [bold green]{sum(load.failed for load in loads)}[/]")


@contextmanager
def _live(screen: Console, loads: Sequence[Load]) -> Iterator[None]:
    """On a terminal: a table of the workers below what is printed, redrawn until the block ends."""
    if not screen.is_terminal or screen.quiet:
        yield
        return
    from rich.live import Live

    # Its thread draws; what the play prints on the same console appears above it.
    with Live(console=screen, get_renderable=lambda: _table(loads), refresh_per_second=_REFRESH_PER_S):
        yield


def _table(loads: Sequence[Load]) -> Table:
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    drawn.add_column("worker")
    for name in ("revision", "value", "age", "origin", "stale", "requests", "failed"):
        drawn.add_column(name, justify="right")
    for load in loads:
        drawn.add_row(str(load.pid), *_cells(load.answer), str(load.requests), str(load.failed))
    return drawn


def _cells(answer: Mapping[str, Any]) -> Sequence[str]:
    if not answer:
        return [""] * 5
    stale = "[bold yellow]yes[/]" if answer["stale"] else "no"
    shown = [str(answer["revision"]), str(answer["max_items"]), _seconds(answer["age_s"]), answer["origin"]]
    return [*shown, stale]


def _seconds(age_s: float | None) -> str:
    return "unknown" if age_s is None else f"{age_s:.1f} s"
