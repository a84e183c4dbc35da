"""The memo: what views of one pin remember of what they read, where that is to be forgotten in time.

Owns what is forgotten, and the age at which; who sees to it is `lapses`.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

from veltrix_mw.snapshot import Proof

__all__ = ["Memo"]


class Memo:
    """The dictionaries that views of one snapshot and the same layers share, which read them without a look at the age.

    `limit_s` is the age up to which all of it may be read; `lapses` alone sets it.
    """

    __slots__ = ("__weakref__", "_kept", "limit_s", "proof")

    def __init__(self, proof: Proof, *kept: MutableMapping[str, Any] | MutableMapping[Any, Any]) -> None:
        self.proof = proof
        self.limit_s = math.inf
        self._kept = kept

    @property
    def lapses_at_s(self) -> float:
        """When it is to be forgotten, on the monotonic clock; a confirmation moves it on."""
        return self.proof.at_s + self.limit_s

    def forget(self) -> None:
        for kept in self._kept:
            kept.clear()
