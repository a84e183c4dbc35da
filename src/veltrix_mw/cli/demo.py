"""The demo: an app with two workers, a change while it serves, and what each request saw.

Owns the play and its expectations; `demo_app` is what is served, `demo_stage` runs it. Every figure shown was
measured in this run; an expectation that fails ends it with exit code 1.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from veltrix_mw import ConfigClient
from veltrix_mw.cli import output
from veltrix_mw.cli.demo_stage import DemoFailed, Line, Stage, expect, interruptible, staged
from veltrix_mw.cli.trace_tree import shown_time

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run"]

KEY: Final = "checkout/max_items"
BEFORE: Final = 50
AFTER: Final = 80
HEADLINE: Final = "Free shipping over 30 EUR"
WORKERS: Final = 2

_PATIENCE_S: Final = 10.0  # a change takes some 30 ms; a machine under load gets this long
_POLL_S: Final = 0.002  # between two requests to one worker: the error of what is measured


@dataclass(frozen=True, slots=True)
class Served:
    """One worker's way through the change: `after_s` from the write to its first answer with the new value."""

    pid: int
    old: Any
    new: Any
    revision: int
    after_s: float
    requests: int


@dataclass(frozen=True, slots=True)
class Straddling:
    """A streamed response that began before the change and ended after it: what its lines said.

    `lines_after` were sent when the worker itself served `worker_revision` already.
    """

    pid: int
    lines: int
    lines_after: int
    revision: int
    value: Any
    worker_revision: int


def run(*, as_json: bool) -> int:
    """Play the demo; returns the exit code. On a terminal, stay up afterwards until Ctrl-C."""
    from rich.console import Console

    stays = output.on_terminal() and not as_json
    screen = Console(quiet=True) if as_json else output.console()
    with interruptible():
        try:
            with staged(WORKERS) as stage:
                try:
                    measured = _play(stage, screen)
                except Exception as exc:
                    raise DemoFailed(f"{exc}{stage.log_tail()}") from exc
                if as_json:
                    output.say_json(measured)
                elif stays:
                    _stay(stage, screen)
        except DemoFailed as exc:
            click.echo(f"error: the demo failed: {exc}", err=True)
            return 1
    return 0


def _play(stage: Stage, screen: Console) -> dict[str, Any]:
    _title(screen, "1", "The config, and an app that reads it")
    first = {KEY: BEFORE, "checkout/headline": HEADLINE}
    revision = stage.veltrix("import", "-", stdin=json.dumps(first))
    screen.print(f"  veltrix import      wrote {len(first)} keys at revision {revision}")
    started_s = stage.serve()
    screen.print(f"  uvicorn             {WORKERS} workers up after {started_s:.1f} s at {stage.address}")

    with ConfigClient(stage.url, mirror="") as client, stage.lines_by_pid() as lines:
        _title(screen, "2", "Every worker serves it")
        for pid, line in lines.items():
            answer, took_s = line.get("/")
            expect(answer["max_items"] == BEFORE, f"worker {pid} serves {answer['max_items']!r}, not {BEFORE}")
            screen.print(
                f"  worker {pid:<12} {KEY} = {answer['max_items']} at revision {answer['revision']}, "
                f"answered in {took_s * 1000:.1f} ms"
            )

        _title(screen, "3", "Someone changes it, while requests run")
        with stage.stream() as stream:
            begun = next(stream)
            served, written = _changed(stage, client, lines)
            screen.print(f"  veltrix put         {KEY} {AFTER}: acknowledged as revision {written}")
            for one in served:
                screen.print(
                    f"  worker {one.pid:<12} {one.old} → {one.new} at revision {one.revision}, "
                    f"[bold green]{one.after_s * 1000:.0f} ms[/] after the write"
                )
            total = sum(one.requests for one in served)
            screen.print(f"  meanwhile           {total} requests, none failed")

            _title(screen, "4", "A request that straddled the change saw one revision")
            straddling = _straddled([begun, *stream], written)
        _show_straddling(screen, straddling)

        _title(screen, "5", "The trace of a request")
        spans = _trace(stage, next(iter(lines.values())))
        _show_trace(screen, spans)
    return {
        "revision": written,
        "workers": [asdict(one) for one in served],
        "stream": asdict(straddling),
        "trace": spans,
    }


def _changed(stage: Stage, client: ConfigClient, lines: Mapping[int, Line]) -> tuple[list[Served], int]:
    """Change the value from a shell while every worker is asked over and over."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(lines)) as pool:
        try:
            asked = [pool.submit(_asked, pid, line, stop) for pid, line in lines.items()]
            written = int(stage.veltrix("put", KEY, str(AFTER), "--reason", "the demo"))
            answers = [future.result(_PATIENCE_S * 2) for future in asked]
        finally:
            stop.set()
    version = client.history(KEY, limit=1)[0]
    expect(version.revision == written, f"the history says revision {version.revision}, the write {written}")
    # Both ends are this machine's wall clock; the record's time is taken just before the write is committed.
    served = [
        Served(pid, old, answer["max_items"], answer["revision"], seen_s - version.time_s, requests)
        for pid, old, answer, seen_s, requests in answers
    ]
    for one in served:
        expect(one.revision == written, f"worker {one.pid} serves the new value at revision {one.revision}")
    return served, written


def _asked(pid: int, line: Line, stop: threading.Event) -> tuple[int, Any, dict[str, Any], float, int]:
    """Ask one worker until it serves the new value: what it served before, that answer, its time, how many asked."""
    end_s = time.monotonic() + _PATIENCE_S
    old, requests = None, 0
    while not stop.is_set():
        answer, _ = line.get("/")
        seen_s = time.time()
        requests += 1
        expect(answer["pid"] == pid, f"worker {answer['pid']} answered in the place of {pid}")
        if answer["max_items"] == AFTER:
            return pid, old, answer, seen_s, requests
        old = answer["max_items"]
        expect(time.monotonic() < end_s, f"worker {pid} still serves {old!r} after {_PATIENCE_S:g} s")
        stop.wait(_POLL_S)
    raise DemoFailed(f"worker {pid} was asked no longer")


def _straddled(lines: Sequence[Mapping[str, Any]], written: int) -> Straddling:
    seen = {(line["revision"], line["max_items"]) for line in lines}
    expect(len(seen) == 1, f"one response held several states: {sorted(seen)}")
    ((revision, value),) = seen
    after = [line for line in lines if line["worker_revision"] >= written]
    expect(revision < written and bool(after), "the streamed response did not straddle the change")
    return Straddling(lines[0]["pid"], len(lines), len(after), revision, value, after[-1]["worker_revision"])


def _show_straddling(screen: Console, seen: Straddling) -> None:
    screen.print(f"  worker {seen.pid:<12} streamed {seen.lines} lines, begun before the change, ended after")
    screen.print(f"  each line           {KEY} = {seen.value} at revision {seen.revision}")
    screen.print(
        f"  the last {seen.lines_after:<10} were sent when this worker gave new requests revision "
        f"{seen.worker_revision}"
    )


def _trace(stage: Stage, line: Line) -> list[dict[str, Any]]:
    """The spans of one request, the server's first; empty without OpenTelemetry's SDK."""
    from importlib.util import find_spec

    if find_spec("opentelemetry.sdk") is None:
        return []
    trace_id, caller_id = secrets.token_hex(16), secrets.token_hex(8)
    line.get("/", {"traceparent": f"00-{trace_id}-{caller_id}-01"})
    spans = stage.spans_of(trace_id, caller_id, _PATIENCE_S)
    root = spans[0]["attributes"]
    for name in ("veltrix.revision", "veltrix.origin", "veltrix.lookup.count"):
        expect(name in root, f"the request's span has no {name}")
    return spans


def _show_trace(screen: Console, spans: Sequence[Mapping[str, Any]]) -> None:
    from rich.padding import Padding
    from rich.text import Text
    from rich.tree import Tree

    if not spans:
        screen.print("  to see one here:    pip install opentelemetry-sdk")
        return
    root, *children = spans
    tree = Tree(_span_text(root))
    for name, value in root["attributes"].items():
        if name.startswith("veltrix."):
            shown = shown_time(1e9 * value) if name == "veltrix.lookup.total" else value
            tree.add(Text.assemble((f"{name} ", "dim"), str(shown)))
    for child in children:
        text = _span_text(child)
        text.append(" ".join(f" {value}" for name, value in child["attributes"].items() if name.startswith("veltrix.")))
        tree.add(text)
    screen.print(Padding(tree, (0, 0, 0, 2), expand=False))


def _span_text(span: Mapping[str, Any]) -> Any:
    from rich.text import Text

    return Text.assemble((str(span["name"]), "bold"), f"  {shown_time(span['end_ns'] - span['start_ns'])}")


def _title(screen: Console, number: str, text: str) -> None:
    screen.print(f"\n[bold]{number}  {text}[/]")


def _stay(stage: Stage, screen: Console) -> None:
    """Leave the app to the person until Ctrl-C. Raises `DemoFailed` if the app ends before that."""
    command = stage.shown_command()
    _title(screen, "6", "Now you: the app stays up until Ctrl-C")
    for text in (
        f"  {stage.address}/         what a worker serves",
        f"  {stage.address}/stream   a streamed response, until a change arrives",
        "",
        "  In another terminal:",
        f"    cd {os.getcwd()}",
        f"    export VELTRIX_URL={stage.url}",
        f"    {command} put {KEY} 120",
        f"    {command} watch",
    ):
        screen.print(text, soft_wrap=True, markup=False)
    try:
        stage.wait()
    except KeyboardInterrupt:
        screen.print("\nstopped")
