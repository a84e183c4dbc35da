"""The verb `trace`: what config costs a request, as a tree of spans with times, without a tracing backend.

Owns the two requests that it sends through the middleware, and how their trees are drawn. The spans are the library's
own, as a tracing backend would get them at level `lookups`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import click

from veltrix_mw import InvalidKey, SettingsError, current_view
from veltrix_mw.cli import json_text, output, trace_tree
from veltrix_mw.cli.session import Session, lazy_option, on_store
from veltrix_mw.wsgi import ConfigMiddleware

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from veltrix_mw import ConfigClient

__all__ = ["trace"]

_READ_BY_ITSELF: Final = 5  # keys, where none is named: enough to see what one costs
_START_WITHIN_S: Final = 5.0
_NEEDED: Final = 'this needs opentelemetry-sdk: pip install "veltrix-mw[trace]"'


@click.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--layer", "layers", multiple=True, metavar="PREFIX", help="Lay PREFIX over the base; may be repeated.")
@lazy_option
@on_store
def trace(session: Session, keys: Sequence[str], layers: Sequence[str]) -> None:
    """Send two requests that read KEYs, and show their traces.

    The requests go through the middleware in this process, with telemetry="lookups": a span for each read, each wait
    for lazy units and each call to etcd or Redis. The first meets a worker that has just started; the next one what
    that holds by then. Before them stands what the worker listed. Without KEYs the first five are read.

    \b
    veltrix trace checkout/max_items
    veltrix trace --lazy tenants/ --layer tenants/acme/ checkout/max_items

    Needs opentelemetry-sdk: pip install "veltrix-mw[trace]". Exports nothing; with --json the spans are printed whole.
    """
    with _collected() as (provider, spans):
        with session.client(mirrored=True, telemetry="lookups", tracer_provider=provider) as client:
            client.start()
            client.wait_ready(_START_WITHIN_S)
            asked = keys or tuple(islice(client.snapshot, _READ_BY_ITSELF))
            if not asked:
                raise SettingsError("there is nothing to read: name keys, as `veltrix trace tenants/acme/limit`")
            app = _app(client, asked, layers)
            requests = [_request(provider, app) for _ in range(2)]
            troubles = [f"the {tier.role} {tier.url}: {tier.error}" for tier in client.status().tiers if tier.error]
            if not client.snapshot.incarnation:
                troubles.append(client.unwritten())
        everything = trace_tree.finished(spans())
    for trouble in filter(None, troubles):
        click.echo(f"warning: {json_text.plain(trouble)}", err=True)
    by_trace = {trace_id: [span for span in everything if span.trace_id == trace_id] for trace_id in requests}
    began_ns = min(span.start_ns for each in by_trace.values() for span in each)
    before = [span for span in everything if span.trace_id not in by_trace and span.end_ns <= began_ns]
    parts = {"start": before, "first_request": by_trace[requests[0]], "next_request": by_trace[requests[1]]}
    if session.as_json:
        output.say_json(
            {part: [trace_tree.plain(root, each) for root in trace_tree.roots(each)] for part, each in parts.items()}
        )
        return
    for part, each in parts.items():
        _draw(part.replace("_", " "), each)


@contextmanager
def _collected() -> Iterator[tuple[TracerProvider, Callable[[], Iterable[Any]]]]:
    """A tracer provider that samples all, whatever the environment says, and what gives the spans that have ended."""
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    except ModuleNotFoundError as exc:
        raise SettingsError(_NEEDED) from exc
    exporter: InMemorySpanExporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    if not provider.get_tracer("veltrix").start_span("probe").is_recording():
        raise SettingsError("OTEL_SDK_DISABLED is set, so there are no spans: unset it")
    try:
        yield provider, exporter.get_finished_spans
    finally:
        provider.shutdown()


def _app(client: ConfigClient, keys: Sequence[str], layers: Sequence[str]) -> ConfigMiddleware:
    """A WSGI app behind the middleware that reads the keys, and nothing else."""

    def read(_environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        config = current_view()
        for key in keys:
            config.get(key)
        start_response("204 No Content", [])
        return []

    def prefetch(_environ: dict[str, Any]) -> Sequence[str]:
        return [key for key in keys if key.startswith(tuple(client.lazy))]

    return ConfigMiddleware(read, client=client, layers=(lambda _: layers) if layers else None, prefetch=prefetch)


def _request(provider: TracerProvider, app: ConfigMiddleware) -> str:
    """Send it a request in a span of its own, as a server's instrumentation would; returns the id of its trace."""
    from opentelemetry.trace import SpanKind

    answered: list[str] = []

    def start_response(status: str, _headers: Sequence[tuple[str, str]]) -> Callable[[bytes], object]:
        answered.append(status)
        return lambda _written: None

    with provider.get_tracer("veltrix").start_as_current_span("GET /", kind=SpanKind.SERVER) as span:
        body = app({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, start_response)
        close = getattr(body, "close", None)
        if close is not None:
            close()
    if answered != ["204 No Content"]:
        raise InvalidKey(
            "refused: a layer is a prefix that ends in a slash, as tenants/acme/, and a key is one as shop/limit"
        )
    return f"{span.get_span_context().trace_id:032x}"


def _draw(title: str, spans: Sequence[trace_tree.FinishedSpan]) -> None:
    click.echo(click.style(title, bold=True))
    for root in trace_tree.roots(spans):
        for line in trace_tree.lines(root, spans):
            times = f"{line.took} ({line.after})" if line.after else line.took
            text = f"{line.branches}{click.style(line.name, fg='cyan')}  {times}"
            click.echo(f"  {text}{click.style('  ' + json_text.plain(line.details), dim=True) if line.details else ''}")
    if not spans:
        click.echo("  nothing was asked of a store")
