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

__all__ = ["Session", "answers", "lazy_option", "on_store", "quieten_log", "recorded", "revision_option"]


@dataclass(frozen=True, slots=True)
class Session:
    """What the options say, those of the verb over those before it."""

    url: str | None = None
    mirror: str | None = None
    namespace: str | None = None
    lazy: tuple[str, ...] = ()
    as_json: bool = False

    def over(self, other: Session) -> Session:
        return Session(
            url=self.url or other.url,
            mirror=other.mirror if self.mirror is None else self.mirror,  # an empty one means none
            namespace=self.namespace or other.namespace,
            lazy=self.lazy or other.lazy,
            as_json=self.as_json or other.as_json,
        )

    @contextmanager
    def client(self, *, mirrored: bool = False, **settings: Any) -> Iterator[ConfigClient]:
        """A client that follows nothing yet; closed at the end. Raises `SettingsError`.

        `mirrored`: it knows the mirror and the lazy prefixes too. Without, it has the authority alone: a mirror that is
        away or named wrongly is nothing to a verb that does not need one. `settings` are further ones of the client's.
        """
        url = self.url or os.environ.get("VELTRIX_URL", "")
        if url.strip().startswith("memory:"):
            raise SettingsError(
                "a memory:// store lives in one process; name one that is shared, as sqlite:///config.db"
            )
        quieten_log()
        client = ConfigClient(
            self.url,
            mirror=self.mirror if mirrored else "",
            namespace=self.namespace,
            lazy=self.lazy if mirrored else (),
            relay="never",  # a command that ends in a moment is no relay
            **settings,
        )
        try:
            yield client
        finally:
            client.close()


def quieten_log() -> None:
    """Give the library's log a handler: without one, logging would write warnings to stderr in its own words."""
    logging.getLogger("veltrix_mw").addHandler(logging.NullHandler())


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


_URL: Final = click.option("--url", metavar="URL", help="The authority, as sqlite:///config.db; default $VELTRIX_URL.")
_MIRROR: Final = click.option(
    "--mirror", metavar="URL", help="Its mirror, as redis://h:6379/0; default $VELTRIX_MIRROR_URL."
)
_NAMESPACE: Final = click.option("--namespace", metavar="NAME", help="The namespace, if the URL does not name it.")
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Answer in JSON, and tell errors in JSON.")

lazy_option: Final = click.option(
    "--lazy",
    multiple=True,
    metavar="PREFIX",
    help="A prefix that the mirror leaves out, as in the workers' lazy setting; may be repeated.",
)

revision_option: Final = click.option(
    "--revision", type=click.IntRange(min=0), metavar="REV", help="As of this past revision; default now."
)


def answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the option `--json`; its first argument is the `Session`."""
    return _JSON(_with_session(function))


def on_store(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the options that every verb on a store has; its first argument is the `Session`."""
    return _URL(_MIRROR(_NAMESPACE(_JSON(_with_session(function)))))


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
        *arguments: Any,
        url: str | None = None,
        mirror: str | None = None,
        namespace: str | None = None,
        lazy: tuple[str, ...] = (),
        as_json: bool = False,
        **options: Any,
    ) -> Any:
        before = click.get_current_context().find_object(Session) or Session()
        return function(Session(url, mirror, namespace, lazy, as_json).over(before), *arguments, **options)

    return call
