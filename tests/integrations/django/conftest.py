"""A configured Django, and `site`: one test's own URLs, settings and client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any, Protocol

import pytest

from veltrix_mw import ConfigClient


class Site(Protocol):
    """`site(view, veltrix={...}, handlers={...}, **settings)` serves `view` at "/" and gives the project's client."""

    def __call__(
        self,
        view: Callable[..., Any],
        *,
        veltrix: dict[str, Any] | None = None,
        handlers: dict[str, Any] | None = None,
        **settings: Any,
    ) -> ConfigClient: ...


@pytest.fixture(scope="session", autouse=True)
def _django() -> Iterator[None]:
    """Django with the project's settings, as its own test runner would have it, for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DJANGO_SETTINGS_MODULE", "tests.integrations.django.project.settings")
        import django
        from django.test.utils import setup_test_environment, teardown_test_environment

        django.setup()
    setup_test_environment()
    yield
    teardown_test_environment()


@pytest.fixture
def site(_django: None) -> Iterator[Site]:
    from django.test import override_settings
    from django.urls import path

    from django_veltrix import get_client

    with ExitStack() as stack:

        def build(
            view: Callable[..., Any],
            *,
            veltrix: dict[str, Any] | None = None,
            handlers: dict[str, Any] | None = None,
            **settings: Any,
        ) -> ConfigClient:
            urls = ModuleType("urls_of_one_test")
            vars(urls).update(handlers or {}, urlpatterns=[path("", view)])
            given = {"URL": "memory://"} if veltrix is None else veltrix
            stack.enter_context(override_settings(ROOT_URLCONF=urls, VELTRIX=given, **settings))
            client = get_client()
            client.wait_ready()
            return client

        yield build


@pytest.fixture
def put() -> Callable[..., int]:
    """`put(client, key, value)`: written, and served by this process."""

    def write(client: ConfigClient, key: str, value: Any) -> int:
        revision = client.put(key, value)
        client.wait_for(revision)
        return revision

    return write
