"""Settings: where config comes from, and what each wrong URL is told."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veltrix_mw.errors import SettingsError
from veltrix_mw.settings import DEFAULT_NAMESPACE, StoreUrl, find_url, parse_url

SECRET = "hunter2"


def refused(url: Any, **options: Any) -> str:
    """What is said of a wrong URL; nothing secret is, nor in any error behind it."""
    with pytest.raises(SettingsError) as raised:
        parse_url(url, **options)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


# Which URL


def test_the_argument_comes_before_the_environment() -> None:
    assert find_url("memory://a", environ={"VELTRIX_URL": "memory://b"}) == "memory://a"
    for nothing in (None, ""):
        assert find_url(nothing, environ={"VELTRIX_URL": "memory://b"}) == "memory://b"


def test_the_environment_is_the_process_s_at_the_time_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VELTRIX_URL", "memory://env")
    assert find_url(None) == "memory://env"
    monkeypatch.delenv("VELTRIX_URL")
    with pytest.raises(SettingsError):
        find_url(None)


@pytest.mark.parametrize("environ", [{}, {"VELTRIX_URL": ""}, {"veltrix_url": "memory://"}])
def test_without_either_the_error_shows_the_embedded_form(environ: dict[str, str]) -> None:
    for url in (None, ""):
        with pytest.raises(SettingsError, match=r"pass a URL or set VELTRIX_URL, for example sqlite:///config\.db"):
            find_url(url, environ=environ)


# Files and names


def test_three_slashes_are_relative_to_the_working_directory_and_four_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_url("sqlite:///config.db") == StoreUrl("sqlite", str(tmp_path / "config.db"), "default")
    assert parse_url("sqlite:///etc/config.db").name == str(tmp_path / "etc" / "config.db")
    assert parse_url("sqlite:////srv/shop/config.db").name == "/srv/shop/config.db"
    # The directory of the moment, not of a later one.
    taken = parse_url("sqlite:///config.db")
    monkeypatch.chdir("/")
    assert taken.name == str(tmp_path / "config.db")
    assert os.listdir(tmp_path) == []


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_file_name_can_be_written_percent_encoded(name: str) -> None:
    path = "/srv/" + name.replace("/", "_")
    assert parse_url("sqlite:///" + quote(path)).name == str(Path(path))


def test_a_name_is_percent_decoded_once_and_a_plus_is_a_plus() -> None:
    assert parse_url("sqlite:////srv/a%20b%2523%3F%23+c.db").name == "/srv/a b%23?#+c.db"
    assert parse_url("memory://my%20shop").name == "my shop"


def test_a_memory_url_takes_a_name_or_none() -> None:
    assert parse_url("memory://") == StoreUrl("memory", "", "default")
    assert parse_url("memory://shop") == parse_url("memory://shop/") == StoreUrl("memory", "shop", "default")


def test_a_scheme_may_be_written_in_capitals() -> None:
    assert parse_url("SQLite:////srv/A.db").name == "/srv/A.db"


def test_white_space_around_a_url_is_not_part_of_it() -> None:
    assert parse_url(" sqlite:////srv/a.db\n").name == "/srv/a.db"
    assert parse_url("memory://shop\r\n").name == "shop"


# Namespaces and options


def test_a_namespace_comes_from_the_argument_or_the_url() -> None:
    assert parse_url("memory://").namespace == DEFAULT_NAMESPACE == "default"
    assert parse_url("memory://?namespace=shop").namespace == "shop"
    assert parse_url("memory://", namespace="shop/eu").namespace == "shop/eu"
    assert parse_url("memory://?namespace=shop", namespace="shop").namespace == "shop"


def test_two_namespaces_that_differ_are_refused() -> None:
    said = refused("memory://?namespace=shop", namespace="stage")
    assert said == "the URL names the namespace 'shop', the argument 'stage'; keep one"


@pytest.mark.parametrize("namespace", ["", "/", "a//b", "..", "a b", ".veltrix", "x" * 129, "é"])
def test_an_invalid_namespace_is_refused_and_never_replaced_by_the_default(namespace: str) -> None:
    assert "namespace" in refused("memory://", namespace=namespace)
    assert "namespace" in refused(f"memory://?namespace={quote(namespace)}")


def test_options_are_numbers() -> None:
    parsed = parse_url("sqlite:///x.db?timeout_s=0.5&keep_revisions=10&keep_bytes=1024")
    assert parsed.options == {"timeout_s": 0.5, "keep_revisions": 10, "keep_bytes": 1024}
    assert type(parsed.options["keep_bytes"]) is int
    assert parse_url("sqlite:///x.db?timeout_s=.5").options == {"timeout_s": 0.5}
    assert parse_url("memory://?keep_revisions=10").options == {"keep_revisions": 10}


@pytest.mark.parametrize("wrong", ["", "0", "-1", "x", "nan", "inf", "1e3", "1_0", "%D9%A3", "+5", "%205", "1" * 5000])
@pytest.mark.parametrize("option", ["timeout_s", "keep_revisions", "keep_bytes"])
def test_an_option_that_is_no_positive_number_is_refused_by_its_name(option: str, wrong: str) -> None:
    said = refused(f"sqlite:///x.db?{option}={wrong}")
    assert said.startswith(f"{option} in the sqlite:// URL must be a positive ")


@pytest.mark.parametrize("option", ["keep_revisions", "keep_bytes"])
def test_a_count_is_whole(option: str) -> None:
    assert refused(f"sqlite:///x.db?{option}=1.5").endswith("must be a positive whole number")


# What wrong URLs are told


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "begins with one of memory://, sqlite://, for example sqlite:///config.db"),
        ("config.db", "begins with one of memory://, sqlite://"),
        ("/srv/config.db", "begins with one of memory://, sqlite://"),
        ("//srv/config.db", "begins with one of memory://, sqlite://"),
        ("sqlit:///x.db", "did you mean sqlite://?"),
        ("sqlite3:///x.db", "did you mean sqlite://?"),
        ("postgres://h/x", "'postgres' is not a store that this version knows (memory://, sqlite://)"),
        ("sqlite:", "sqlite: is followed by //, for example sqlite:///config.db"),
        ("sqlite:x.db", "is followed by //"),
        ("sqlite:/srv/x.db", "is followed by //"),
        ("memory:", "memory: is followed by //, for example memory://shop"),
        ("memory:shop", "is followed by //"),
        ("sqlite://", "names a file, for example sqlite:///config.db"),
        ("sqlite:///", "names a file, for example sqlite:///config.db"),
        ("sqlite:///?timeout_s=1", "names a file"),
        ("sqlite://config.db", "needs three slashes and a path: sqlite:///config.db is relative"),
        ("sqlite://srv/x.db", "sqlite:///srv/x.db is relative to the working directory, sqlite:////srv/shop/config.db"),
        ("sqlite:///:memory:", "write memory://"),
        ("sqlite:///a#b.db", "write %23"),
        ("memory://a#b", "write %23"),
        ("sqlite:///x.db?timeout_s=1#b", "write %23"),
        ("sqlite:///a\nb.db", "cannot be parsed; write for example sqlite:///config.db"),
        ("sqlite:///a\tb.db", "cannot be parsed"),
        ("sqlite:///a%00b.db", "percent-encoded UTF-8 without NUL"),
        ("sqlite:///a%ffb.db", "percent-encoded UTF-8 without NUL"),
        ("memory://[", "cannot be parsed"),
        ("memory://shop/path", "takes a name and no path, for example memory://shop"),
        ("sqlite:///x.db?timeout=1", "a sqlite:// URL has no option 'timeout'; did you mean timeout_s?"),
        ("sqlite:///x.db?colour=1", "no option 'colour'; it takes keep_bytes, keep_revisions, namespace, timeout_s"),
        ("memory://?timeout_s=1", "a memory:// URL has no option 'timeout_s'"),
        ("sqlite:///x.db?timeout_s=1&timeout_s=2", "stands twice in the sqlite:// URL; keep one of them"),
        ("memory://?namespace=a&namespace=b", "stands twice"),
    ],
)
def test_a_wrong_url_is_told_how_to_write_it(url: str, said: str) -> None:
    assert said in refused(url)


@pytest.mark.parametrize("url", [None, 3, b"sqlite:///x.db", Path("x.db")])
def test_what_is_no_str_is_refused_by_its_type(url: Any) -> None:
    assert refused(url) == f"a config URL is a str, not {type(url).__name__}"


@pytest.mark.parametrize(
    "url",
    [
        f"sqlite://user:{SECRET}@host/x.db",
        f"sqlite://{SECRET}@host",
        f"memory://user:{SECRET}@shop",
        f"memory://user:{SECRET}@shop/path",
        f"memory://user:{SECRET}@[",
        f"memory://user:{SECRET}@shop\u2100",  # the parser's own error quotes such a host
        f"redis://:{SECRET}@host:6379/0",
        f"user:{SECRET}@host",
        f"sqlite:///x.db?password={SECRET}",
        f"sqlite:///x.db?timeout_s={SECRET}",
        f"sqlite:///x.db#{SECRET}",
        f"https://host/{SECRET}",
    ],
)
def test_no_secret_of_a_wrong_url_is_said(url: str) -> None:
    refused(url)


@given(st.text(max_size=30))
def test_any_text_is_a_url_or_a_settings_error(text: str) -> None:
    for url in (text, f"sqlite://{text}", f"sqlite:///{text}", f"memory://{text}", f"memory://?{text}"):
        try:
            parsed = parse_url(url)
        except SettingsError:
            continue
        assert parsed.scheme in {"sqlite", "memory"}
        assert parsed.scheme == "memory" or os.path.isabs(parsed.name)
