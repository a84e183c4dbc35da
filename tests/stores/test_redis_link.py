"""The link to a Redis: how long a late answer may be asked about."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from veltrix_mw.stores.redis_link import RedisLink
from veltrix_mw.stores.redis_routes import Sentinels


@pytest.mark.parametrize("left_s", [0.1, 60.0])
def test_whether_a_late_answer_counts_is_asked_within_the_calls_deadline(left_s: float) -> None:
    options: dict[str, Any] = dict.fromkeys(("user", "password", "ca", "cert", "key"))
    link = RedisLink(Sentinels([("s1", 1)], "m"), db=0, namespace="shop", tls=False, **options)
    asked_until_s: list[float] = []
    link.look = lambda deadline_s: asked_until_s.append(deadline_s) or ("h1", 1)  # type: ignore[assignment, func-returns-value, method-assign]
    deadline_s = time.monotonic() + left_s
    link.check_late(SimpleNamespace(host=None), time.monotonic() - 9, deadline_s)  # type: ignore[arg-type]
    assert len(asked_until_s) == 1
    assert asked_until_s[0] <= min(deadline_s, time.monotonic() + 1)
