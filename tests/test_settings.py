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
from veltrix_mw.settings import DEFAULT_NAMESPACE, StoreUrl, find_mirror_url, find_url, parse_url

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


def test_a_mirror_is_named_by_the_argument_or_the_environment_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"VELTRIX_MIRROR_URL": "redis://b"}
    assert find_mirror_url("redis://a", environ=environ) == "redis://a"
    for nothing in (None, ""):
        assert find_mirror_url(nothing, environ=environ) == "redis://b"
        assert find_mirror_url(nothing, environ={"VELTRIX_MIRROR_URL": ""}) is None
    monkeypatch.setenv("VELTRIX_MIRROR_URL", "redis://env")
    assert find_mirror_url(None) == "redis://env"


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
    assert said == (
        "the memory:// URL names the namespace 'shop', but 'stage' was given beside it, as an argument or by the "
        "authority's URL; keep one"
    )


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


# Servers


def test_etcd_is_named_by_its_members_and_the_namespace_is_the_path() -> None:
    assert parse_url("etcd://h1:2380,h2,h3/shop?timeout_s=2") == StoreUrl(
        "etcd", "", "shop", {"timeout_s": 2.0}, (("h1", 2380), ("h2", 2379), ("h3", 2379))
    )
    assert parse_url("etcd://H1/shop/eu/").namespace == "shop/eu"
    assert parse_url("etcds://h1", namespace="shop") == parse_url("etcds://h1/shop") == parse_url("ETCDS://h1/s%68op")


def test_redis_is_one_host_with_a_database_and_a_namespace() -> None:
    assert parse_url("redis://h1?namespace=shop") == StoreUrl("redis", "", "shop", {}, (("h1", 6379),))
    assert parse_url("redis://h1:7000/3?namespace=shop&keep_revisions=9") == StoreUrl(
        "redis", "", "shop", {"keep_revisions": 9}, (("h1", 7000),), 3
    )
    # A mirror's URL names none: it is given the authority's.
    assert parse_url("rediss://h1/", namespace="shop") == parse_url("rediss://h1/0?namespace=shop")


def test_hosts_may_be_ipv6_addresses_in_brackets() -> None:
    hosts = (("::1", 2379), ("fe80::a", 2380), ("127.0.0.1", 2379))
    assert parse_url("etcd://[::1],[FE80::a]:2380,127.0.0.1/shop").hosts == hosts
    assert parse_url("redis://u:p@[::1]:7000?namespace=shop").hosts == (("::1", 7000),)


def test_sentinels_are_named_with_what_they_call_the_primary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINEL_PASSWORD", "spw")
    options = "namespace=shop&sentinel_user=watch&sentinel_password_env=SENTINEL_PASSWORD&wait_replicas=1"
    parsed = parse_url(f"redis+sentinel://ann:pw@s1,s2:7000/my.master-1/3?{options}")
    assert parsed == StoreUrl(
        "redis+sentinel", "my.master-1", "shop", {"wait_replicas": 1}, (("s1", 26379), ("s2", 7000)), 3,
        "ann", "pw", "watch", "spw",
    )  # fmt: skip
    assert parse_url("rediss+sentinel://s1/m?namespace=shop") == parse_url("rediss+sentinel://s1/m/0/?namespace=shop")
    assert parse_url("rediss+sentinel://s1/m?namespace=shop").tls


def test_a_cluster_is_some_of_its_nodes() -> None:
    parsed = parse_url("redis+cluster://h1:7001,h2?namespace=shop")
    assert parsed == StoreUrl("redis+cluster", "", "shop", {}, (("h1", 7001), ("h2", 6379)))
    assert parse_url("redis+cluster://h1:7001,h2/0?namespace=shop") == parsed
    assert (parsed.is_redis, parsed.tls) == (True, False)
    assert parse_url("rediss+cluster://h1?namespace=shop").tls


@pytest.mark.parametrize("scheme", ["etcd", "redis"])
def test_user_and_password_are_read_wherever_they_stand(scheme: str) -> None:
    environ = {"SHOP_USER": "ann", "SHOP_PASSWORD": f"{SECRET}/@+ é\r\n"}
    password = f"{SECRET}/@+ é"
    encoded = quote(password, safe="+")
    for login, query in (
        (f"ann:{encoded}@", ""),
        ("", f"?user=ann&password={encoded}"),
        ("ann@", f"?password={encoded}"),
        ("ann@", "?password_env=SHOP_PASSWORD"),
        ("", "?user_env=SHOP_USER&password_env=SHOP_PASSWORD"),
    ):
        parsed = parse_url(f"{scheme}://{login}h1{query}", namespace="shop", environ=environ)
        assert (parsed.user, parsed.password, parsed.options) == ("ann", password, {})
    parsed = parse_url(f"{scheme}://h1", namespace="shop", environ=environ)
    assert (parsed.user, parsed.password) == (None, None)


def test_redis_takes_a_password_alone_and_etcd_does_not() -> None:
    parsed = parse_url("redis://:pw@h1?namespace=shop")
    assert (parsed.user, parsed.password) == (None, "pw")
    assert "a password without a user; etcd wants both" in refused(f"etcd://:{SECRET}@h1/shop")


def test_the_environment_of_secrets_is_the_process_s_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", "pw")
    assert parse_url("redis://h1?namespace=shop&password_env=SHOP_PASSWORD").password == "pw"


def test_files_of_tls_are_absolute_from_the_directory_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"ca": str(tmp_path / "ca.pem"), "cert": "/etc/a b.pem", "key": str(tmp_path / "tls" / "key.pem")}
    for url in ("etcds://h1/shop?", "rediss://h1?namespace=shop&"):
        parsed = parse_url(f"{url}ca=ca.pem&cert=/etc/a%20b.pem&key=tls/key.pem")
        assert (parsed.options, parsed.tls) == (files, True)
    assert parse_url("etcds://h1/shop?cert=/both.pem").options == {"cert": "/both.pem"}
    assert not parse_url("etcd://h1/shop").tls
    assert not parse_url("redis://h1?namespace=shop").tls


def test_etcd_reads_data_that_is_there_already() -> None:
    parsed = parse_url("etcd://h1/shop?prefix=/config/a+b%20c/&values=text")
    assert parsed.options == {"prefix": "/config/a+b c/", "values": "text"}
    assert parse_url("etcd://h1/shop?values=json").options == {"values": "json"}


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        (f"etcd://ann:{SECRET}@h1,[::1]:23/shop/eu?timeout_s=1&values=text", "etcd://h1:2379,[::1]:23/shop/eu"),
        (f"etcds://ann:{SECRET}@h1/shop?transport=grpc&ca=/ca.pem", "etcds://h1:2379/shop?transport=grpc"),
        (f"rediss://:{SECRET}@h1?namespace=shop&ca=/ca.pem", "rediss://h1:6379/0?namespace=shop"),
        (
            "redis+sentinel://s1/m?wait_timeout_s=1&wait_replicas=2&namespace=shop",
            "redis+sentinel://s1:26379/m/0?namespace=shop&wait_replicas=2",
        ),
        (f"redis://h1/2?namespace=shop&user=ann&password={SECRET}", "redis://h1:6379/2?namespace=shop"),
        (
            f"redis+sentinel://ann:{SECRET}@s1,[::1]:7/m/2?namespace=shop&sentinel_user=bob&sentinel_password={SECRET}",
            "redis+sentinel://s1:26379,[::1]:7/m/2?namespace=shop",
        ),
        (f"rediss+cluster://:{SECRET}@h1,h2:7?namespace=shop", "rediss+cluster://h1:6379,h2:7?namespace=shop"),
        ("sqlite:////srv/a%20b.db?timeout_s=1", "sqlite:////srv/a%20b.db"),
        ("sqlite:////srv/x.db?namespace=shop", "sqlite:////srv/x.db?namespace=shop"),
        ("memory://my%20shop", "memory://my%20shop"),
        ("memory://", "memory://"),
    ],
)
def test_a_url_can_be_shown_without_its_secrets(url: str, redacted: str) -> None:
    parsed = parse_url(url)
    assert parsed.redacted == redacted
    assert SECRET not in repr(parsed)
    again = parse_url(redacted)
    assert (again.scheme, again.name, again.namespace, again.hosts, again.db) == (
        *(parsed.scheme, parsed.name, parsed.namespace, parsed.hosts, parsed.db),
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("etcd:h1/shop", "etcd: is followed by //, for example etcd://h1:2379,h2:2379,h3:2379/shop"),
        ("etcd:///shop", "a host is missing in the etcd:// URL; write for example etcd://h1:2379,h2:2379,h3:2379/shop"),
        ("etcd://h1,,h2/shop", "a host is missing"),
        ("etcd://h1,h2,/shop", "a host is missing"),
        ("redis://u:p@/0?namespace=shop", "a host is missing in the redis:// URL; write for example redis://h1:6379/0"),
        ("etcd://h1:0/shop", "a host in the etcd:// URL is no HOST or HOST:PORT"),
        ("etcd://h1:65536/shop", "no HOST or HOST:PORT"),
        ("etcd://h1:/shop", "no HOST or HOST:PORT"),
        ("etcd://h1:2379:1/shop", "no HOST or HOST:PORT"),
        ("etcd://h1:x/shop", "no HOST or HOST:PORT"),
        ("etcd://h 1/shop", "no HOST or HOST:PORT"),
        ("etcd://::1/shop", "an IPv6 address in brackets"),
        ("etcd://[::1/shop", "an IPv6 address in brackets"),
        ("etcd://[1:2]/shop", "an IPv6 address in brackets"),
        ("etcd://[::1]2379/shop", "an IPv6 address in brackets"),
        ("etcd://h1,h2,H1:2379/shop", "a host stands twice in the etcd:// URL; keep one of them"),
        ("etcd://h1", "names no namespace, which has no default: etcd://h1:2379,h2:2379,h3:2379/shop"),
        ("etcd://h1/", "names no namespace"),
        ("etcds://h1", "the etcds:// URL names no namespace, which has no default: etcds://h1:2379,"),
        ("etcd://h1/a//b", "'a//b' is not a namespace"),
        ("etcd://h1/.veltrix/x", "a namespace cannot begin with .veltrix"),
        ("etcd://h1?namespace=shop", "the namespace of an etcd:// URL is its path: etcd://h1:2379"),
        ("etcd://h1/%ff", "the name in the config URL is percent-encoded UTF-8 without NUL, for example"),
        ("etcd://h1/a#b", "the etcd:// URL has a '#'; write %23 for one in a name or a password"),
        ("redis://h1/0", "the redis:// URL names no namespace, which has no default: redis://h1:6379/0?namespace=shop"),
        ("redis://h1/shop", "the path of a redis:// URL is the number of a database: redis://h1:6379/0?namespace=shop"),
        ("redis://h1/-1?namespace=shop", "is the number of a database"),
        ("redis://h1,h2?namespace=shop", "a redis:// URL names one host, for example redis://h1:6379/0?namespace=shop"),
        ("redis://h1,h2?namespace=shop", "redis+sentinel:// and redis+cluster:// name several"),
        ("redis+sentinel://s1,s2/m/0", "the redis+sentinel:// URL names no namespace"),
        ("redis+sentinel://s1,s2?namespace=shop", "is what the sentinels call the primary, then the number of a"),
        ("redis+sentinel://s1,s2/a%20b/0?namespace=shop", "is what the sentinels call the primary"),
        ("redis+sentinel://s1/m/shop?namespace=shop", "the end of the path of a redis+sentinel:// URL is the number"),
        ("redis+sentinel://s1/m/0/1?namespace=shop", "the end of the path of a redis+sentinel:// URL is the number"),
        ("redis+sentinel://s1,S1/m?namespace=shop", "a host stands twice in the redis+sentinel:// URL"),
        ("redis+sentinel://s1/m?namespace=shop&sentinel_user=a", "gives a sentinel_user without a password"),
        ("redis+sentinel://s1/m?namespace=shop&sentinel_password_env=NO_SUCH", "names NO_SUCH, which is not set"),
        ("redis+sentinel://s1/m?namespace=shop&ca=x", "ca is an option of rediss+sentinel://, which speaks TLS"),
        ("redis://h1?namespace=shop&sentinel_user=a", "a redis:// URL has no option 'sentinel_user'"),
        ("rediss+cluster://h1:1,h2:2", "the rediss+cluster:// URL names no namespace"),
        ("redis+cluster://h1/3?namespace=shop", "a Redis Cluster has one database, 0: leave the path out"),
        ("redis+cluster://h1/shop?namespace=shop", "the path of a redis+cluster:// URL is the number of a database"),
        ("redis+cluster://h1?namespace=shop&cert=x", "cert is an option of rediss+cluster://"),
        ("redis://h1?namespace=shop&wait_timeout_s=1", "wait_timeout_s in the redis:// URL wants wait_replicas too"),
        ("redis://h1?namespace=shop&wait_replicas=0", "wait_replicas in the redis:// URL must be a positive whole"),
        ("redis+tls://h1", "'redis+tls' is not a store that this version knows"),
        ("etcd3://h1/shop", "did you mean etcd"),
        ("etcd://h1/shop?transport=http", "transport in the etcd:// URL is gateway or grpc"),
        ("etcds://h1/shop?discover=1", "the option discover of etcds:// comes with the next release; leave it out"),
        ("redis://h1/0?discover=1", "a redis:// URL has no option 'discover'"),
        ("etcd://h1/shop?ca=x", "ca is an option of etcds://, which speaks TLS; etcd:// does not"),
        ("redis://h1?key=x", "key is an option of rediss://, which speaks TLS; redis:// does not"),
        ("sqlite:///x.db?ca=x", "a sqlite:// URL has no option 'ca'"),
        ("etcd://h1/shop?keep_revisions=1", "an etcd:// URL has no option 'keep_revisions'"),
        ("redis://h1?namespace=shop&values=text", "a redis:// URL has no option 'values'"),
        ("etcd://h1/shop?timeout=1", "did you mean timeout_s?"),
        ("etcd://h1/shop?timeout_s=0", "timeout_s in the etcd:// URL must be a positive number of seconds"),
        ("redis://h1?namespace=shop&keep_revisions=1.5", "must be a positive whole number"),
        ("etcd://h1/shop?values=yaml", "values in the etcd:// URL is json or text"),
        ("etcd://h1/shop?values=", "values in the etcd:// URL is json or text"),
        ("etcd://h1/shop?prefix=", "prefix in the etcd:// URL is empty; leave it out"),
        ("etcd://h1/shop?prefix=.veltrix/shop/", "prefix in the etcd:// URL cannot hold .veltrix/"),
        ("etcd://h1/shop?prefix=.v", "cannot hold .veltrix/"),
        ("etcds://h1/shop?ca=", "ca in the etcds:// URL is empty; leave it out"),
        ("etcds://h1/shop?key=/k.pem", "key in the etcds:// URL wants cert too"),
        ("etcd://h1/shop?values=json&values=text", "stands twice in the etcd:// URL"),
        ("etcd://h1/shop?prefix=%ff", "the options in the etcd:// URL are percent-encoded UTF-8 without NUL"),
        ("etcd://h1/shop?prefix=a%00", "percent-encoded UTF-8 without NUL"),
        ("etcd://ann@h1/shop", "gives a user without a password; add it behind the user, as USER:PASSWORD@"),
        ("redis://ann:@h1?namespace=shop", "?password_env=NAME"),
        (f"etcd://ann:{SECRET}@h1/shop?password={SECRET}", "the etcd:// URL gives the password twice; keep one"),
        (f"etcd://ann:{SECRET}@h1/shop?user=bob", "the etcd:// URL gives the user twice; keep one"),
        ("etcd://ann@h1/shop?password_env=NO_SUCH", "password_env in the etcd:// URL names NO_SUCH, which is not set"),
        ("redis://h1?namespace=shop&user_env=NO_SUCH", "user_env in the redis:// URL names NO_SUCH, which is not set"),
        (
            f"redis://h1?namespace=shop&password_env={SECRET}",
            "names an environment variable, which is not set or empty",
        ),
        (f"etcd://ann:{SECRET}%ff@h1/shop", "the password in the config URL is percent-encoded UTF-8 without NUL"),
    ],
)
def test_a_wrong_url_of_a_server_is_told_how_to_write_it(url: str, said: str) -> None:
    assert said in refused(url)


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", "\n")
    assert "SHOP_PASSWORD, which is not set or empty" in refused("redis://h1?namespace=s&password_env=SHOP_PASSWORD")


# What wrong URLs are told


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "",
            "redis+sentinel://, rediss://, rediss+cluster://, rediss+sentinel://, sqlite://, for example sqlite:///config.db",
        ),
        ("config.db", "begins with one of etcd://, etcds://, memory://, redis://"),
        ("/srv/config.db", "begins with one of etcd://, etcds://, memory://, redis://"),
        ("//srv/config.db", "begins with one of etcd://, etcds://, memory://, redis://"),
        ("sqlit:///x.db", "did you mean sqlite://?"),
        ("sqlite3:///x.db", "did you mean sqlite://?"),
        (
            "postgres://h/x",
            "'postgres' is not a store that this version knows (etcd://, etcds://, memory://, redis://,",
        ),
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
        *(
            # A password with a character that ends the user, the hosts, the path or the query, not percent-encoded.
            f"{scheme}://ann:{left}{cut}{right}@h1{place}"
            for scheme, place in (("etcd", "/shop"), ("redis", "/0?namespace=shop"))
            for left, right in ((SECRET, "1"), ("1", SECRET), (SECRET, SECRET))
            for cut in ("/", "?", "#", "/?", ",/", ":1/", "]/")
        ),
        f"etcd://ann:{SECRET}@h1@/shop",
        f"etcd://h1,{SECRET}:x/shop",
        f"redis://{SECRET}:x?namespace=shop",
        f"redis://:{SECRET}@h1/0",
        f"redis+sentinel://:{SECRET}@s1,[::1]/m",
        f"redis+sentinel://s1/{SECRET}{SECRET * 20}?namespace=shop",
        f"redis+sentinel://s1/m?namespace=shop&sentinel_user={SECRET}",
        f"redis+cluster://:{SECRET}@h1",
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


@given(st.text(max_size=30))
def test_any_text_is_a_server_s_url_or_a_settings_error(text: str) -> None:
    for url in (
        *(f"{scheme}://{text}" for scheme in ("etcd", "rediss", "redis+sentinel", "redis+cluster")),
        *(f"redis+sentinel://s1/{text}?namespace=shop", f"redis+cluster://h1/{text}?namespace=shop"),
        *(f"etcd://{text}/shop", f"redis://h1/{text}?namespace=shop", f"etcds://h1/shop?{text}"),
        *(f"etcd://ann:{text}@h1/shop", f"redis://h1?namespace=shop&password={text}"),
    ):
        try:
            parsed = parse_url(url, environ={})
        except SettingsError as exc:
            assert exc.__context__ is None  # noqa: PT017
            continue
        assert all(host and 0 < port < 65536 for host, port in parsed.hosts)
        assert parsed.hosts
        assert parsed.namespace


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_password_can_be_written_percent_encoded(password: str) -> None:
    for url in ("etcd://ann:{}@h1/shop", "redis://h1?namespace=shop&password={}", "redis://:{}@h1?namespace=shop"):
        assert parse_url(url.format(quote(password, safe=""))).password == password
