"""Opening: which URL is which backend, with what it says; and what is said where the driver is missing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from veltrix_mw.errors import SettingsError
from veltrix_mw.protocols import Mirror, MirrorWriter, Store
from veltrix_mw.settings import parse_url
from veltrix_mw.stores.opening import open_mirror, open_store
from veltrix_mw.stores.redis_routes import Nodes, Sentinels, slot_of

SECRET = "hunter2"
SERVER = {"namespace": "shop", "tls": True, "user": "ann", "password": "pw"}


@pytest.mark.parametrize(
    ("url", "origin", "shown"),
    [
        ("memory://shop?namespace=shop&keep_revisions=5&keep_bytes=9", "memory", "memory://shop"),
        ("sqlite:////srv/x.db?namespace=shop&timeout_s=1&keep_revisions=5", "sqlite", "sqlite:////srv/x.db"),
        (f"etcd://ann:{SECRET}@h1,h2:23/shop?timeout_s=1&values=text", "etcd", "etcd://h1:2379,h2:23/shop"),
        (f"etcds://ann:{SECRET}@h1/shop?ca=/ca&cert=/c&key=/k&prefix=/p/", "etcd", "etcds://h1:2379/shop"),
        (f"etcd://ann:{SECRET}@h1/shop?transport=grpc", "etcd", "etcd://h1:2379/shop?transport=grpc"),
        (f"redis://ann:{SECRET}@h1/3?namespace=shop&keep_revisions=5", "redis", "redis://h1:6379/3"),
        ("redis://h1?namespace=shop&wait_replicas=2", "redis", "redis://h1:6379/0?wait_replicas=2"),
        (f"rediss://:{SECRET}@h1?namespace=shop&ca=/ca&cert=/c&key=/k&timeout_s=1", "redis", "rediss://h1:6379/0"),
    ],
)
def test_a_url_opens_its_store_and_connects_to_nothing(url: str, origin: str, shown: str) -> None:
    store = open_store(parse_url(url), lazy=("users/", "tenants/"))
    assert isinstance(store, Store)
    info = store.info
    assert (info.origin, info.url, info.namespace, info.lazy) == (origin, shown, "shop", ("tenants/", "users/"))
    store.close()


def _given(monkeypatch: pytest.MonkeyPatch, cls: type, url: str, opening: Any) -> dict[str, Any]:
    """What the URL hands to the constructor, by name."""
    given: dict[str, Any] = {}

    def noting(_self: object, *args: object, **options: object) -> None:
        given.update(options, place=args)

    monkeypatch.setattr(cls, "__init__", noting)
    opening(parse_url(url, namespace="shop"))
    return given


def test_all_that_an_etcd_url_says_reaches_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from veltrix_mw.stores.etcd import EtcdStore

    url = "etcds://ann:pw@h1,h2:23?timeout_s=1.5&ca=/ca&cert=/c&key=/k&prefix=/p/&values=text&transport=grpc"
    options = {
        "transport": "grpc",
        "ca": "/ca",
        "cert": "/c",
        "key": "/k",
        "timeout_s": 1.5,
        "prefix": "/p/",
        "values": "text",
    }
    assert _given(monkeypatch, EtcdStore, url, open_store) == {
        "place": ((("h1", 2379), ("h2", 23)),),
        "lazy": (),
        **SERVER,
        **options,
    }


@pytest.mark.parametrize("kind", ["store", "mirror"])
def test_all_that_a_redis_url_says_reaches_the_store_and_the_mirror(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from veltrix_mw.stores.redis import RedisStore
    from veltrix_mw.stores.redis_mirror import RedisMirror

    cls, opening = {"store": (RedisStore, open_store), "mirror": (RedisMirror, open_mirror)}[kind]
    url = "rediss://ann:pw@h1:23/4?timeout_s=1.5&keep_revisions=7&ca=/ca&cert=/c&key=/k"
    options = {"ca": "/ca", "cert": "/c", "key": "/k", "timeout_s": 1.5, "keep_revisions": 7, "db": 4}
    lazy = {"lazy": ()} if kind == "store" else {}
    given = _given(monkeypatch, cls, url, opening)
    (route,) = given.pop("place")
    assert (type(route).__name__, route.at) == ("Server", ("h1", 23))
    assert given == {**SERVER, **lazy, **options}


@pytest.mark.parametrize("opening", [open_store, open_mirror])
def test_a_redis_url_says_how_its_server_is_found(opening: Any) -> None:
    sentinels = opening(parse_url("redis+sentinel://s1,s2/m/4?sentinel_password=pw", namespace="shop"))
    route = sentinels._link._route
    assert isinstance(route, Sentinels)
    assert (sorted(route._order), route._name, route.login) == ([("s1", 26379), ("s2", 26379)], "m", (None, "pw"))
    assert (sentinels._link._db, sentinels.info.url) == (4, "redis+sentinel://s1:26379,s2:26379/m/4")
    cluster = opening(parse_url("rediss+cluster://h1,h2:7", namespace="shop"))
    route = cluster._link._route
    assert isinstance(route, Nodes)
    assert (sorted(route._order), route.slot) == ([("h1", 6379), ("h2", 7)], slot_of("shop"))
    assert cluster.info.url == "rediss+cluster://h1:6379,h2:7"


def test_how_many_replicas_a_write_waits_for_is_an_authority_s_option() -> None:
    url = parse_url("redis+sentinel://s1/m?wait_replicas=2&wait_timeout_s=0.5", namespace="shop")
    store: Any = open_store(url)
    assert (store._wait_replicas, store._wait_timeout_s) == (2, 0.5)
    with pytest.raises(SettingsError, match=r"wait_replicas in a redis\+sentinel:// URL is for an authority"):
        open_mirror(url)


def test_how_many_bytes_the_stream_keeps_is_a_mirror_s_option() -> None:
    url = parse_url("redis://h1/2?keep_bytes=1000", namespace="shop")
    assert open_mirror(url)._keep_bytes == 1000
    with pytest.raises(SettingsError, match="keep_bytes in a redis:// URL is for a mirror"):
        open_store(url)


def test_a_mirror_is_opened_with_the_namespace_of_its_authority() -> None:
    mirror = open_mirror(parse_url("redis://h1/2", namespace="shop"))
    assert isinstance(mirror, Mirror)
    reading: MirrorWriter = mirror
    assert (reading is mirror, mirror.info.namespace, mirror.info.url) == (True, "shop", "redis://h1:6379/2")
    mirror.close()


@pytest.mark.parametrize("url", ["memory://", "sqlite:////srv/x.db", f"etcd://ann:{SECRET}@h1/shop"])
def test_what_cannot_be_a_mirror_is_told_what_can(url: str) -> None:
    with pytest.raises(SettingsError, match=r"a mirror is a Redis, for example redis://h4:6379/0; not ") as caught:
        open_mirror(parse_url(url))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("opening", "url", "driver", "extra"),
    [
        ("open_store", "etcds://h1/shop", "urllib3", "etcd"),
        ("open_store", "etcd://h1/shop?transport=grpc", "grpc", "grpc"),
        ("open_store", "redis://h1?namespace=shop", "redis", "redis"),
        ("open_mirror", "rediss://h1?namespace=shop", "redis", "redis"),
    ],
)
def test_a_missing_driver_is_named_with_the_extra_that_brings_it(
    opening: str, url: str, driver: str, extra: str
) -> None:
    # In a process of its own: here the driver is loaded already.
    show = (
        f"import sys; sys.modules[{driver!r}] = None; from veltrix_mw.settings import parse_url; "
        "from veltrix_mw.errors import SettingsError; from veltrix_mw.stores import opening\n"
        f"try: opening.{opening}(parse_url({url!r}))\nexcept SettingsError as exc: print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    scheme = url.partition(":")[0]
    assert done.stdout == f"{scheme}:// needs the driver {driver}: pip install 'veltrix-mw[{extra}]'\n"


@pytest.mark.parametrize(
    ("url", "loaded"),
    [
        ("memory://", set[str]()),
        ("sqlite:////srv/x.db", {"sqlite3"}),
        ("etcd://h1/shop", {"urllib3"}),
        ("etcd://h1/shop?transport=gateway", {"urllib3"}),
        ("etcd://h1/shop?transport=grpc", {"grpc"}),
        ("redis://h1?namespace=shop", {"redis"}),
    ],
)
def test_opening_loads_the_driver_of_its_scheme_and_no_other(url: str, loaded: set[str]) -> None:
    show = (
        "import sys; from veltrix_mw.settings import parse_url; from veltrix_mw.stores.opening import open_store; "
        f"open_store(parse_url({url!r})); print(*({{'sqlite3', 'urllib3', 'redis', 'grpc'}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == loaded
