"""A Flask app whose spans and metrics go to a collector, from each of its workers, to the last one.

export VELTRIX_URL=sqlite:///shop.db OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 OTEL_SERVICE_NAME=shop
veltrix put checkout/max_items 50
pip install opentelemetry-instrumentation-flask
gunicorn examples.otlp_flask:app --workers 2

curl http://127.0.0.1:8000/config
"""

import os

from flask import Flask
from opentelemetry.instrumentation.flask import FlaskInstrumentor

from examples import otlp  # noqa: F401  # what is not sent when the worker ends, `atexit` sends
from flask_veltrix import Veltrix, config

app = Flask(__name__)
Veltrix(app)
FlaskInstrumentor().instrument_app(app)


@app.get("/config")
def show():
    return {"pid": os.getpid(), "checkout/max_items": config["checkout/max_items"], "revision": config.revision}
