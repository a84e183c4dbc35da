"""System checks: each id, when it speaks and when it is silent."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import CheckMessage, run_checks
from django.test import override_settings

from django_veltrix import ConfigMiddleware
from veltrix_mw import ConfigClient

OURS = "django_veltrix.ConfigMiddleware"
OTEL = "opentelemetry.instrumentation.django.middleware.otel_middleware._DjangoMiddleware"


class Derived(ConfigMiddleware):
    """A project's own form of the middleware."""


def found(*, deploy: bool = False, **settings: Any) -> list[CheckMessage]:
    with override_settings(**settings):
        return run_checks(tags=["veltrix"], include_deployment_checks=deploy)


def ids(**settings: Any) -> list[str]:
    return [message.id.removeprefix("django_veltrix.") for message in found(**settings)]


@pytest.mark.parametrize("deploy", [False, True])
def test_right_settings_are_no_finding(deploy):
    assert ids(VELTRIX={"URL": "sqlite:////srv/shop/config.db"}, MIDDLEWARE=[OURS], deploy=deploy) == []


@pytest.mark.parametrize(
    ("veltrix", "hint"),
    [
        ([], "dict"),
        ({"URL": "memry://"}, "did you mean memory"),
        ({"URL": "memory://", "MAX_AGE_S": -1}, "positive number of seconds"),
        ({"URL": "memory://", "ON_INVALID_LAYER": "shrug"}, "'reject' or 'ignore'"),
        ({"URL": "memory://", "REQUEST_LAYERS": "no.such.function"}, "dotted path"),
        ({"URL": "memory://", "MIRROR_URL": 5}, "'redis://h4:6379/0', not int"),
        ({"URL": "memory://", "MIRROR_URL": "sqlite:///m.db"}, "a mirror is a Redis"),
        ({"URL": "memory://", "MIRROR_URL": "redis://h/0?namespace=other"}, "namespace"),
        ({"URL": "memory://", "LAZY": "tenants/"}, "['tenants/'], not str"),
        ({"URL": "memory://", "LAZY": ["tenants"]}, "lazy"),
        ({"URL": "memory://", "RELAY": "always"}, "'auto' or 'never'"),
        ({"URL": "memory://", "INSTANCE": 5}, "a str, not int"),
    ],
)
def test_e001_a_wrong_value(veltrix, hint):
    (message,) = found(VELTRIX=veltrix)
    assert message.id == "django_veltrix.E001"
    assert hint in message.hint


def test_e002_unknown_settings_each_with_a_close_match():
    messages = found(VELTRIX={"URL": "memory://", "NAMESPCE": "shop", "XYZZY": 1})
    assert [(message.id, message.hint) for message in messages] == [
        ("django_veltrix.E002", "Did you mean 'NAMESPACE'?"),
        ("django_veltrix.E002", "Remove it."),
    ]


def test_e003_no_url_in_production(monkeypatch, tmp_path):
    (message,) = found(VELTRIX={}, DEBUG=False)
    assert message.id == "django_veltrix.E003"
    assert "VELTRIX_URL" in message.hint
    assert ids(VELTRIX={}, DEBUG=True, BASE_DIR=tmp_path) == []
    monkeypatch.setenv("VELTRIX_URL", "sqlite:////srv/shop/config.db")
    assert ids(VELTRIX={}, DEBUG=False) == []
    assert list(tmp_path.iterdir()) == []


def test_w001_the_middleware_is_missing():
    (message,) = found(MIDDLEWARE=["django.middleware.common.CommonMiddleware", "no.such.Middleware"])
    assert message.id == "django_veltrix.W001"
    assert OURS in message.hint


@pytest.mark.parametrize("path", [OURS, "django_veltrix.middleware.ConfigMiddleware", f"{__name__}.Derived"])
def test_the_middleware_is_known_by_any_path(path):
    assert ids(MIDDLEWARE=[path]) == []


def test_w002_the_middleware_is_listed_twice():
    assert ids(MIDDLEWARE=[OURS, "django_veltrix.middleware.ConfigMiddleware"]) == ["W002"]


def test_w003_opentelemetrys_middleware_comes_after_it():
    assert ids(MIDDLEWARE=[OURS, OTEL]) == ["W003"]
    assert ids(MIDDLEWARE=[OTEL, OURS]) == []


def test_w004_a_store_in_memory_in_production():
    assert ids(VELTRIX={"URL": "memory://"}, deploy=True) == ["W004"]
    assert ids(VELTRIX={"URL": "memory://"}, deploy=False) == []
    assert ids(VELTRIX={"URL": 5}, deploy=True) == ["E001"]


def test_a_check_makes_no_client_of_the_projects_own_function():
    def make() -> ConfigClient:
        raise AssertionError("called by a check")

    assert ids(VELTRIX={"CLIENT": make}) == []
