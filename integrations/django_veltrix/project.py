"""The project's client: one a process, made from the settings when it is first asked for.

Owns the client's life in a Django process, `override_settings(VELTRIX=...)` included; knows no request.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from django.core.signals import setting_changed

from django_veltrix.settings import OfRequest, Settings
from veltrix_mw import ConfigClient, SettingsError
from veltrix_mw.events import Events, told_after

__all__ = ["Project", "current_project", "get_client"]

_events = Events("django_veltrix")


class Project:
    """The client of the project, and what its requests ask of it.

    Making one opens nothing and starts nothing. A client that the project handed in is the project's to close.
    """

    __slots__ = ("_ours", "client", "ignore_invalid_layer", "request_layers", "request_prefetch", "revision_header")

    def __init__(self, settings: Settings) -> None:
        self.client, self._ours = _client(settings)
        self.request_layers: OfRequest | None = settings.request_layers
        self.request_prefetch: OfRequest | None = settings.request_prefetch
        self.ignore_invalid_layer = settings.ignore_invalid_layer
        self.revision_header = settings.revision_header

    def close(self) -> None:
        """Close the client, if it was made here."""
        if self._ours:
            self.client.close()


def _client(settings: Settings) -> tuple[ConfigClient, bool]:
    """The client, and whether it is ours to close."""
    if isinstance(settings.client, ConfigClient):
        return settings.client, False
    if settings.client is not None:
        client = settings.client()
        if not isinstance(client, ConfigClient):
            raise SettingsError(f"settings.VELTRIX['CLIENT'] made a {type(client).__name__}, not a ConfigClient")
        return client, True
    try:
        return ConfigClient(**settings.arguments), True
    except SettingsError as exc:
        raise SettingsError(f"settings.VELTRIX: {exc}") from exc


_project: Project | None = None
_lock = threading.Lock()  # protects making and dropping _project: a client that a project's function makes is made once


def current_project() -> Project:
    """The project of this process. Raises `SettingsError` for wrong settings."""
    project = _project
    return _make() if project is None else project


def get_client() -> ConfigClient:
    """The project's client: the one that requests read through, for writing, subscribing, pinning.

    Asking for it starts nothing; the first request or the first read does. Raises `SettingsError`.
    """
    return current_project().client


def _make() -> Project:
    global _project
    with told_after(), _lock:
        if _project is None:
            settings = Settings.read()
            project = Project(settings)
            if settings.embedded is not None:
                _events.tell(
                    "veltrix.embedded",
                    logging.WARNING,
                    "VELTRIX names no URL and DEBUG is on; production needs one",
                    once=True,
                    path=str(settings.embedded),
                )
            _project = project
        return _project


def _drop() -> None:
    global _project
    with _lock:
        project, _project = _project, None
    if project is not None:
        project.close()


def _on_setting_changed(*, setting: str, **_: Any) -> None:
    """Tests change settings: the next use makes a client of the new ones."""
    if setting == "VELTRIX":
        _drop()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


setting_changed.connect(_on_setting_changed, dispatch_uid="django_veltrix")
# A fork may come while another thread holds the lock; in the child nobody would release it.
os.register_at_fork(after_in_child=_renew_lock)
