"""Flask: each request reads configuration from a view pinned to it.

    from flask_veltrix import Veltrix, config

    Veltrix(app)
    config["checkout/max_items"]

Also `g.config`, `veltrix` in templates and `flask veltrix ...` on the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask_veltrix.current import config
    from flask_veltrix.extension import Veltrix

__all__ = ["Veltrix", "config"]


def __getattr__(name: str) -> Any:
    # Late: the `flask` command loads `flask_veltrix.commands` in every project, maybe before gevent patches threads.
    if name == "Veltrix":
        from flask_veltrix.extension import Veltrix as found
    elif name == "config":
        from flask_veltrix.current import config as found  # type: ignore[assignment]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
