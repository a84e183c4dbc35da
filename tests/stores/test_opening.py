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

SECRET = "hunter2"
SERVER = {"namespace": "shop", "tls": True, "user": "ann", "password": "pw"}


@pytest.mark.parametrize(
    ("url", "origin", "shown"),
    [
        ("memory://shop?namespace=shop&keep_revisions=5&keep_bytes=9", "memory", "memory://shop"),
        ("sqlite:////srv/x.db?namespace=shop&timeout_s=1&keep_revisions=5", "sqlite", "sqlite:////srv/x.db"),
        (f"etcd://ann:{SECRET}@h1,h2:23/shop?timeout_s=1&values=text", "etcd", "etcd://h1:2379,h2:23/shop"),
        (f"etcds://ann:{SECRET}@h1/shop?ca=/ca&cert=/c&key=/k&prefix=/p/", "etcd", "etcds://h1:2379/shop"),
        (f"redis://ann:{SECRET}@h1/3?namespace=shop&keep_revisions=5", "redis", "redis://h1:6379/3"),
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

    url = "etcds://ann:pw@h1,h2:23?timeout_s=1.5&ca=/ca&cert=/c&key=/k&prefix=/p/&values=text"
    options = {"ca": "/ca", "cert": "/c", "key": "/k", "timeout_s": 1.5, "prefix": "/p/", "values": "text"}
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
    assert _given(monkeypatch, cls, url, opening) == {
        "place": ("h1", 23),
        **SERVER,
        **lazy,
        **options,
    }


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
        ("redis://h1?namespace=shop", {"redis"}),
    ],
)
def test_opening_loads_the_driver_of_its_scheme_and_no_other(url: str, loaded: set[str]) -> None:
    show = (
        "import sys; from veltrix_mw.settings import parse_url; from veltrix_mw.stores.opening import open_store; "
        f"open_store(parse_url({url!r})); print(*({{'sqlite3', 'urllib3', 'redis'}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == loaded
