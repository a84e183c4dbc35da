"""The session: which store a verb works on, and how it is to answer.

Owns the options that every verb has; knows no verb.
"""

from __future__ import annotations

import functools
import getpass
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import click

from veltrix_mw import ConfigClient, SettingsError, Snapshot, VeltrixError
from veltrix_mw.cli.failure import NoSuchRevision

__all__ = ["Session", "answers", "on_store", "recorded", "revision_option"]


@dataclass(frozen=True, slots=True)
class Session:
    """What the options say, those of the verb over those before it."""

    url: str | None = None
    namespace: str | None = None
    as_json: bool = False

    def over(self, other: Session) -> Session:
        return Session(self.url or other.url, self.namespace or other.namespace, self.as_json or other.as_json)

    @contextmanager
    def client(self) -> Iterator[ConfigClient]:
        """A client that follows nothing yet; closed at the end. Raises `SettingsError`."""
        url = self.url or os.environ.get("VELTRIX_URL", "")
        if url.strip().startswith("memory:"):
            raise SettingsError(
                "a memory:// store lives in one process; name one that is shared, as sqlite:///config.db"
            )
        # Without a handler, logging would write warnings to stderr in its own words, beside ours.
        logging.getLogger("veltrix_mw").addHandler(logging.NullHandler())
        client = ConfigClient(self.url, namespace=self.namespace)
        try:
            yield client
        finally:
            client.close()


def listed(client: ConfigClient, revision: int | None = None) -> Snapshot:
    """Every entry, now or as of `revision`. Raises `NoSuchRevision` where there is none yet."""
    with past():
        return client.list(revision)


@contextmanager
def past() -> Iterator[None]:
    """Around a call that names a past revision."""
    try:
        yield
    except VeltrixError:
        raise
    except ValueError as exc:
        raise NoSuchRevision(str(exc)) from exc


_URL: Final = click.option("--url", metavar="URL", help="The store, as sqlite:///config.db; default $VELTRIX_URL.")
_NAMESPACE: Final = click.option("--namespace", metavar="NAME", help="The namespace, if the URL does not name it.")
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Answer in JSON, and tell errors in JSON.")

revision_option: Final = click.option(
    "--revision", type=click.IntRange(min=0), metavar="REV", help="As of this past revision; default now."
)


def answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the option `--json`; its first argument is the `Session`."""
    return _JSON(_with_session(function))


def on_store(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the options that every verb on a store has; its first argument is the `Session`."""
    return _URL(_NAMESPACE(_JSON(_with_session(function))))


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the options of the change record: who, and why."""
    author = click.option(
        "--author", metavar="NAME", default=_user, help="Who makes the change; default you.", show_default=False
    )
    return author(click.option("--reason", metavar="TEXT", default="", help="Why.")(function))


def _user() -> str:
    """As `getpass` finds it: the environment, else the password database; empty where neither knows."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _with_session(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(
        *arguments: Any, url: str | None = None, namespace: str | None = None, as_json: bool = False, **options: Any
    ) -> Any:
        before = click.get_current_context().find_object(Session) or Session()
        return function(Session(url, namespace, as_json).over(before), *arguments, **options)

    return call
