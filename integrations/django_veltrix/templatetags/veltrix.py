"""The tag library `veltrix`: reading a key with a slash in a template.

Owns the filter `key`; the context processor says what `config` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django import template

__all__ = ["key", "register"]

register = template.Library()


@register.filter
def key(config: Mapping[str, Any], name: str) -> Any:
    """`{{ config|key:"checkout/max_items" }}`: the key's value, None when it is absent.

    Raises `HeldBack` and `NotReady`, as reading a view does.
    """
    return config.get(name)
