"""The context processor: `config` in every template.

Owns the template's name for the view. Pins nothing.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from django_veltrix.current import config as current

__all__ = ["config"]


def config(request: HttpRequest) -> dict[str, Any]:
    """`config`, the request's view: `{{ config.title }}`, and `{{ config|key:"checkout/max_items" }}`.

    The request's own comes first: it is there also where an outer middleware renders a page. The filter `key` is in
    the tag library `veltrix`, as Django's dots cannot write a slash.
    """
    return {"config": getattr(request, "config", current)}
