"""A Flask app, which takes its settings from the environment."""

from __future__ import annotations

from flask import Flask, g

from flask_veltrix import Veltrix
from tests.support.apps.answers import report

app = Flask(__name__)
Veltrix(app)


@app.get("/config")
def config() -> dict[str, int]:
    return report(g.config)
