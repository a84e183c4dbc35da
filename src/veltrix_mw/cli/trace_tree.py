"""The trace tree: finished spans, as plain data, and as lines of text with times.

Owns how a trace looks without a tracing backend. Knows the SDK's spans by their attributes alone, and imports no SDK.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from veltrix_mw.words import counted

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

__all__ = ["FinishedSpan", "Line", "finished", "lines", "plain", "roots", "shown_time"]


@dataclass(frozen=True, slots=True)
class FinishedSpan:
    """A finished span. Times are nanoseconds since 1970; ids are hexadecimal, `parent_id` empty for a root."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    links: Sequence[tuple[str, str]]  # (trace id, span id)

    @property
    def took_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the tree: the branches before it, the span's name, its times and what else it says."""

    branches: str
    name: str
    took: str
    after: str  # since the tree's root began; empty for the root
    details: str


def finished(spans: Iterable[ReadableSpan]) -> list[FinishedSpan]:
    """Spans that have ended, in the order in which they began."""
    ended = [
        FinishedSpan(
            span.name,
            span.kind.name.lower(),
            f"{span.context.trace_id:032x}",
            f"{span.context.span_id:016x}",
            "" if span.parent is None else f"{span.parent.span_id:016x}",
            span.start_time,
            span.end_time,
            dict(span.attributes or {}),
            [(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links],
        )
        for span in spans
        if span.context is not None and span.start_time is not None and span.end_time is not None
    ]
    return sorted(ended, key=lambda span: (span.start_ns, -span.end_ns))


def roots(spans: Sequence[FinishedSpan]) -> list[FinishedSpan]:
    """Those whose parent is not among them."""
    known = {span.span_id for span in spans}
    return [span for span in spans if span.parent_id not in known]


def plain(span: FinishedSpan, spans: Sequence[FinishedSpan]) -> dict[str, Any]:
    """A span and all below it as JSON has it; times are seconds."""
    return {
        "name": span.name,
        "kind": span.kind,
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "start_s": span.start_ns / 1e9,
        "duration_s": span.took_ns / 1e9,
        "attributes": {
            name: list(value) if isinstance(value, tuple) else value for name, value in span.attributes.items()
        },
        "links": [{"trace_id": trace_id, "span_id": span_id} for trace_id, span_id in span.links],
        "children": [plain(child, spans) for child in spans if child.parent_id == span.span_id],
    }


def lines(root: FinishedSpan, spans: Sequence[FinishedSpan]) -> Iterator[Line]:
    """The tree below `root`, and itself, a line each."""
    names = {span.span_id: span.name for span in spans}

    def below(span: FinishedSpan, lead: str) -> Iterator[Line]:
        children = [child for child in spans if child.parent_id == span.span_id]
        for child in children:
            is_last = child is children[-1]
            after = f"+{shown_time(child.start_ns - root.start_ns)}"
            branches = f"{lead}{'└─ ' if is_last else '├─ '}"
            yield Line(branches, child.name, shown_time(child.took_ns), after, _details(child, names))
            yield from below(child, f"{lead}{'   ' if is_last else '│  '}")

    yield Line("", root.name, shown_time(root.took_ns), "", _details(root, names))
    yield from below(root, "")


def shown_time(time_ns: float) -> str:
    """A span of time as people read it: `12 µs`, `3.4 ms`, `1.20 s`."""
    if time_ns < 999_500:
        return f"{time_ns / 1e3:.0f} µs"
    return f"{time_ns / 1e6:.1f} ms" if time_ns < 999_950_000 else f"{time_ns / 1e9:.2f} s"


def _details(span: FinishedSpan, names: Mapping[str, str]) -> str:
    said = [part(span.attributes[name]) for name, part in _PARTS.items() if name in span.attributes]
    said += [f"links to {names.get(span_id) or 'a span of trace ' + trace_id}" for trace_id, span_id in span.links]
    return ", ".join(filter(None, said))


# What an attribute says in the tree, in this order; those that are not here have nothing to say to a person.
_PARTS: Final[Mapping[str, Any]] = {
    "veltrix.key": str,
    "veltrix.unit_count": lambda count: counted(count, "unit"),
    "veltrix.prefix": lambda prefix: f"below {prefix}",
    "veltrix.refresh.kind": str,
    "veltrix.result": str,
    "veltrix.origin": lambda origin: f"from {origin}",
    "veltrix.revision": lambda revision: f"revision {revision}",
    "veltrix.changes": lambda count: counted(count, "change"),
    "veltrix.stale": lambda stale: "stale" if stale else "",
    "veltrix.lookup.count": lambda count: counted(count, "look-up"),
    "veltrix.lookup.total": lambda total_s: f"{shown_time(1e9 * total_s)} together",
    "db.operation.batch.size": lambda size: f"{size} commands",
    "server.address": lambda host: f"at {host}",
    "server.port": lambda port: f"port {port}",
    "error.type": lambda kind: f"failed: {kind}",
}
