"""OpenTelemetry's SDK for one worker: spans and metrics go to `$OTEL_EXPORTER_OTLP_ENDPOINT`, a collector's.

    pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http

Import it where each worker begins: with the app, or in gunicorn's `post_fork` under `--preload`. What is not sent yet
is sent at the end: by Python's `atexit` where the server lets workers come to that (gunicorn), else by `end()`, which
the lifespan of an ASGI app calls (otlp_starlette.py).
"""

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

traces = TracerProvider()
traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
trace.set_tracer_provider(traces)
metrics.set_meter_provider(meters)


def end():
    """Send what was not sent yet. Nothing is told after it."""
    traces.shutdown()
    meters.shutdown()
