"""System checks: what `manage.py check` says about a project's settings.

Owns the checks' ids, which people write into SILENCED_SYSTEM_CHECKS: an id keeps its meaning. Opens no store.

E001 VELTRIX is no dict, or a value in it is wrong; E002 an unknown name in VELTRIX; E003 no URL in production;
W001 the middleware is missing; W002 it is listed twice; W003 OpenTelemetry's middleware comes after it;
W004 (`--deploy`) a store in memory in production.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from django.conf import settings as project_settings
from django.core import checks
from django.utils.module_loading import import_string

from django_veltrix.middleware import ConfigMiddleware
from django_veltrix.project import Project
from django_veltrix.settings import MissingUrl, Settings, unknown_names
from veltrix_mw import SettingsError

__all__ = ["check_deployment", "check_middleware", "check_settings"]

_OTEL: Final = "opentelemetry.instrumentation.django.middleware.otel_middleware._DjangoMiddleware"
_HERE: Final = '"django_veltrix.ConfigMiddleware"'


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """E001, E002, E003: what would end the server when it starts."""
    given = getattr(project_settings, "VELTRIX", None)
    unknown: list[checks.CheckMessage] = [
        checks.Error(
            f"settings.VELTRIX has no setting {name!r}.",
            hint=f"Did you mean {close!r}?" if close else "Remove it.",
            id="django_veltrix.E002",
        )
        for name, close in (unknown_names(given) if isinstance(given, dict) else ())
    ]
    if unknown:
        return unknown
    try:
        settings = Settings.read()
        if settings.client is None:
            Project(settings)  # opens nothing: the URL and the values are looked at, no more
    except MissingUrl as exc:
        return [
            checks.Error("VELTRIX names no URL, and DEBUG is off.", hint=_sentence(exc), id="django_veltrix.E003"),
        ]
    except SettingsError as exc:
        return [checks.Error("settings.VELTRIX is wrong.", hint=_sentence(exc), id="django_veltrix.E001")]
    return []


def check_middleware(**_: Any) -> list[checks.CheckMessage]:
    """W001, W002, W003: where the middleware stands."""
    middleware = list(project_settings.MIDDLEWARE)
    ours = list(_positions(middleware))
    if not ours:
        hint = f"Add {_HERE} to MIDDLEWARE, before whatever reads request.config."
        message = "django_veltrix is in INSTALLED_APPS, but its middleware is not in MIDDLEWARE: no request has config."
        return [checks.Warning(message, hint=hint, id="django_veltrix.W001")]
    found: list[checks.CheckMessage] = []
    if len(ours) > 1:
        hint = "Keep the first; the others do nothing."
        found.append(
            checks.Warning("django_veltrix's middleware is listed more than once.", hint=hint, id="django_veltrix.W002")
        )
    if _OTEL in middleware[ours[0] :]:
        hint = f"Put {_HERE} after it, or set OTEL_PYTHON_DJANGO_MIDDLEWARE_POSITION=0: the default."
        message = "OpenTelemetry's middleware comes after django_veltrix's: request spans will not tell of config."
        found.append(checks.Warning(message, hint=hint, id="django_veltrix.W003"))
    return found


def check_deployment(**_: Any) -> list[checks.CheckMessage]:
    """W004: what only `check --deploy` asks."""
    try:
        settings = Settings.read()
    except SettingsError:
        return []  # check_settings says so
    if not str(settings.arguments.get("url", "")).startswith("memory:"):
        return []
    hint = "Name a store that processes share, such as sqlite:////srv/shop/config.db."
    message = "VELTRIX keeps config in memory: each worker has a store of its own, which nobody else can write."
    return [checks.Warning(message, hint=hint, id="django_veltrix.W004")]


def _positions(middleware: Sequence[str]) -> Iterator[int]:
    for position, path in enumerate(middleware):
        try:
            found = import_string(path)
        except ImportError:
            continue  # Django itself says so
        if isinstance(found, type) and issubclass(found, ConfigMiddleware):
            yield position


def _sentence(error: SettingsError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + "."
