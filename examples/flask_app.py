"""A shop whose checkout limit is changed while it runs.

    export VELTRIX_URL=sqlite:///shop.db
    veltrix put checkout/max_items 50
    flask --app examples/flask_app.py run

    curl -d items=60 http://127.0.0.1:5000/checkout      # 409: at most 50 items
    veltrix put checkout/max_items 80                    # in another terminal
    curl -d items=60 http://127.0.0.1:5000/checkout      # 200, without a restart

With `gunicorn -w 2 examples.flask_app:app` each worker sees the change by itself. On many hosts only the URLs differ:

    export VELTRIX_URL=etcd://h1:2379,h2:2379,h3:2379/shop VELTRIX_MIRROR_URL=redis://h4:6379/0
"""

import os

from flask import Flask, render_template_string, request

from flask_veltrix import Veltrix, config

app = Flask(__name__)
app.config["VELTRIX_DEFAULTS"] = {"checkout/max_items": 50, "shop/name": "The corner shop"}
Veltrix(app)  # reads VELTRIX_URL


@app.post("/checkout")
def checkout():
    items = request.form.get("items", 1, type=int)
    if items > config["checkout/max_items"]:
        # The limit is the one of the line above, even if it was changed in between: a request sees one revision.
        return {"error": f"at most {config['checkout/max_items']} items"}, 409
    return {"bought": items}


@app.get("/")
def front():
    return render_template_string(
        "<h1>{{ veltrix['shop/name'] }}</h1><p>At most {{ veltrix['checkout/max_items'] }} items a checkout.</p>"
    )


@app.get("/config")
def show():
    """Which process answered, from which revision, and how old that is."""
    return {
        "pid": os.getpid(),
        "checkout/max_items": config["checkout/max_items"],
        "revision": config.revision,
        "origin": config.origin,
        "stale": config.stale,
    }
