"""`request.config`: one view a request, in everything that a request calls."""

from __future__ import annotations

import asyncio
import inspect
import threading
import unittest
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from blockbuster import blockbuster_ctx
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template.response import TemplateResponse
from django.test import AsyncClient, Client, RequestFactory, SimpleTestCase, override_settings
from django.views import View as DjangoView

import django_veltrix
from django_veltrix import ConfigMiddleware, config, get_client, override_config
from veltrix_mw import ConfigClient, NoCurrentView, SettingsError, StoreUnavailable, current_view
from veltrix_mw import wsgi as core_wsgi
from veltrix_mw.protocols import Listing
from veltrix_mw.stores.memory import MemoryStore

MIDDLEWARE = "django_veltrix.ConfigMiddleware"
URLS = "tests.integrations.django.project.urls"
HIDDEN = "a value that no page shows"  # written here, as the page shows the source around a fault


def aget(path: str = "/", **headers: str) -> Any:
    """One request to the project under ASGI."""
    client = AsyncClient(raise_request_exception=False)
    return async_to_sync(client.get)(path, headers=headers)


def get(path: str = "/", **headers: str) -> Any:
    """One request to the project under WSGI."""
    return Client(raise_request_exception=False).get(path, headers=headers)


def seen(request: HttpRequest) -> dict[str, Any]:
    """What a view reads, by every name there is, and whether they agree."""
    view = request.config
    same = view is current_view() and config.revision == view.revision and config["greeting"] == view["greeting"]
    return {"greeting": view["greeting"], "revision": view.revision, "same": same, "thread": threading.get_ident()}


def sync_view(request: HttpRequest) -> JsonResponse:
    return JsonResponse(seen(request))


async def async_view(request: HttpRequest) -> JsonResponse:
    await asyncio.to_thread(seen, request)
    return JsonResponse(seen(request))


class SyncClassView(DjangoView):
    def get(self, request: HttpRequest) -> JsonResponse:
        return JsonResponse(seen(request))


class AsyncClassView(DjangoView):
    async def get(self, request: HttpRequest) -> JsonResponse:
        return JsonResponse(seen(request))


VIEWS = [sync_view, async_view, SyncClassView.as_view(), AsyncClassView.as_view()]


@pytest.mark.parametrize("fetch", [get, aget])
@pytest.mark.parametrize("view", VIEWS, ids=["sync", "async", "sync class", "async class"])
def test_a_view_of_either_kind_reads_the_requests_view_by_every_name(site, put, view, fetch):
    client = site(view)
    revision = put(client, "greeting", "hello")
    answer = fetch().json()
    assert (answer["greeting"], answer["revision"], answer["same"]) == ("hello", revision, True)


def test_an_async_view_runs_on_the_loops_own_thread(site, put):
    put(site(async_view), "greeting", "hello")

    async def run() -> tuple[int, int]:
        return threading.get_ident(), (await AsyncClient().get("/")).json()["thread"]

    mine, views = asyncio.run(run())
    assert views == mine


def test_the_middleware_is_a_coroutine_function_exactly_in_an_asynchronous_chain(site):
    site(sync_view)

    async def respond(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    assert iscoroutinefunction(ConfigMiddleware(respond))
    assert not iscoroutinefunction(ConfigMiddleware(lambda request: HttpResponse()))
    assert ConfigMiddleware.sync_capable
    assert ConfigMiddleware.async_capable


@pytest.mark.parametrize("fail", [False, True], ids=["answered", "raised"])
def test_no_view_stays_behind_in_the_thread(site, put, fail):
    def view(request: HttpRequest) -> HttpResponse:
        assert current_view() is request.config
        if fail:
            raise RuntimeError("of the view")
        return HttpResponse()

    put(site(view), "greeting", "hello")
    get()
    with pytest.raises(NoCurrentView):
        current_view()


def test_no_view_stays_behind_when_something_worse_than_an_exception_leaves_the_view(site):
    def respond(request: HttpRequest) -> HttpResponse:
        raise KeyboardInterrupt

    async def respond_async(request: HttpRequest) -> HttpResponse:
        raise asyncio.CancelledError

    site(sync_view)
    with pytest.raises(KeyboardInterrupt):
        ConfigMiddleware(respond)(RequestFactory().get("/"))

    async def run() -> None:
        with pytest.raises(asyncio.CancelledError):
            await ConfigMiddleware(respond_async)(RequestFactory().get("/"))
        with pytest.raises(NoCurrentView):
            current_view()

    asyncio.run(run())
    with pytest.raises(NoCurrentView):
        current_view()


def test_no_view_stays_behind_in_the_context_of_an_async_caller(site, put):
    put(site(async_view), "greeting", "hello")

    async def run() -> None:
        await AsyncClient().get("/")
        with pytest.raises(NoCurrentView):
            current_view()

    asyncio.run(run())


def test_a_change_during_a_request_is_the_next_requests(site, put):
    def view(request: HttpRequest) -> JsonResponse:
        before = request.config["greeting"]
        put(client, "greeting", "after")
        return JsonResponse([before, request.config["greeting"], config["greeting"]], safe=False)

    client = site(view)
    put(client, "greeting", "before")
    assert get().json() == ["before", "before", "before"]
    assert get().json() == ["after", "after", "after"]


def test_concurrent_requests_in_threads_keep_their_own_revisions(site, put):
    inside, go_on = threading.Semaphore(0), threading.Event()

    def view(request: HttpRequest) -> JsonResponse:
        first = config["greeting"]
        inside.release()
        assert go_on.wait(20)
        return JsonResponse([first, config["greeting"], request.config["greeting"]], safe=False)

    client = site(view)
    with ThreadPoolExecutor(2) as pool:
        put(client, "greeting", "one")
        one = pool.submit(get)
        assert inside.acquire(timeout=20)
        put(client, "greeting", "two")
        two = pool.submit(get)
        assert inside.acquire(timeout=20)
        put(client, "greeting", "three")
        go_on.set()
        assert one.result().json() == ["one", "one", "one"]
        assert two.result().json() == ["two", "two", "two"]


def test_concurrent_requests_on_one_loop_keep_their_own_revisions(site):
    async def run() -> list[Any]:
        arrived: asyncio.Queue[None] = asyncio.Queue()
        go_on = asyncio.Event()

        async def view(request: HttpRequest) -> JsonResponse:
            first = config["greeting"]
            arrived.put_nowait(None)
            await go_on.wait()
            return JsonResponse([first, config["greeting"], request.config["greeting"]], safe=False)

        client = await asyncio.to_thread(site, view)
        tasks = []
        for greeting in ("one", "two"):
            await client.await_for(await client.aput("greeting", greeting))
            tasks.append(asyncio.create_task(AsyncClient().get("/")))
            await asyncio.wait_for(arrived.get(), 20)
        go_on.set()
        return [(await task).json() for task in tasks]

    assert asyncio.run(run()) == [["one"] * 3, ["two"] * 3]


# Errors and error pages


@pytest.mark.parametrize("fetch", [get, aget])
def test_the_500_handler_reads_the_requests_view_by_every_name(site, put, fetch):
    def view(request: HttpRequest) -> HttpResponse:
        raise RuntimeError("of the view")

    def handler500(request: HttpRequest) -> HttpResponse:
        return JsonResponse(seen(request), status=500)

    put(site(view, handlers={"handler500": handler500}), "greeting", "sorry")
    answer = fetch()
    assert answer.status_code == 500
    assert (answer.json()["greeting"], answer.json()["same"]) == ("sorry", True)


@pytest.mark.parametrize("fetch", [get, aget])
def test_the_404_handler_reads_the_requests_view_by_every_name(site, put, fetch):
    def handler404(request: HttpRequest, exception: Exception) -> HttpResponse:
        return JsonResponse(seen(request), status=404)

    put(site(sync_view, handlers={"handler404": handler404}), "greeting", "lost")
    answer = fetch("/nowhere")
    assert answer.status_code == 404
    assert (answer.json()["greeting"], answer.json()["same"]) == ("lost", True)


class BreaksOutside:
    """A middleware further out that fails after the response."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        self.get_response(request)
        raise RuntimeError("of a middleware further out")


def test_the_500_handler_has_request_config_also_when_a_middleware_further_out_failed(site, put):
    def handler500(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.config["greeting"], status=500)

    put(
        site(sync_view, handlers={"handler500": handler500}, MIDDLEWARE=[f"{__name__}.BreaksOutside", MIDDLEWARE]),
        "greeting",
        "sorry",
    )
    assert get().content == b"sorry"


class ExcusesInside:
    """A middleware further in that answers a view's exception from config."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        return self.get_response(request)

    def process_exception(self, request, exception):
        return JsonResponse(seen(request), status=503)


@pytest.mark.parametrize("fetch", [get, aget])
def test_process_exception_reads_the_requests_view(site, put, fetch):
    def view(request: HttpRequest) -> HttpResponse:
        raise RuntimeError("of the view")

    put(site(view, MIDDLEWARE=[MIDDLEWARE, f"{__name__}.ExcusesInside"]), "greeting", "sorry")
    answer = fetch()
    assert (answer.status_code, answer.json()["greeting"], answer.json()["same"]) == (503, "sorry", True)


@pytest.mark.parametrize("fetch", [get, aget])
@pytest.mark.parametrize(("path", "status"), [("/", 500), ("/nowhere", 404)])
def test_the_technical_pages_are_made_and_show_no_value(site, put, fetch, path, status):
    def view(request: HttpRequest) -> HttpResponse:
        pinned = request.config  # a local that the page shows
        raise RuntimeError(f"of the view at {pinned.revision}")

    put(site(view, DEBUG=True), "greeting", HIDDEN)
    answer = fetch(path)
    assert answer.status_code == status
    assert HIDDEN.encode() not in answer.content
    if status == 500:
        assert b"&lt;View revision=" in answer.content


# Templates


@pytest.mark.parametrize("fetch", [get, aget])
def test_a_template_rendered_late_reads_the_requests_view(site, put, fetch):
    def view(request: HttpRequest) -> TemplateResponse:
        response = TemplateResponse(request, "page.html")
        put(client, "greeting", "too late")
        return response

    client = site(view)
    put(client, "checkout/max_items", 7)
    revision = put(client, "greeting", "hello")
    assert fetch().content.decode().split() == ["hello", "7", "None", str(revision)]


class RendersOutside:
    """A middleware further out that renders a page of its own, as flat pages do."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        self.get_response(request)
        return TemplateResponse(request, "page.html").render()


def test_a_template_rendered_by_a_middleware_further_out_reads_the_requests_view(site, put):
    client = site(sync_view, MIDDLEWARE=[f"{__name__}.RendersOutside", MIDDLEWARE])
    put(client, "greeting", "hello")
    assert get().content.split()[0] == b"hello"


# Listed twice, or around Django as well


def test_listed_twice_it_pins_once(site, put):
    client = site(sync_view, MIDDLEWARE=[MIDDLEWARE, MIDDLEWARE])
    put(client, "greeting", "hello")
    made = client._views.made
    assert get().json()["same"]
    assert aget().json()["same"]
    assert client._views.made == made + 2


def test_a_request_object_that_is_sent_again_gets_a_new_view(site, put):
    client = site(sync_view)
    middleware, request = ConfigMiddleware(sync_view), RequestFactory().get("/")
    for greeting in ("one", "two"):
        put(client, "greeting", greeting)
        assert b'"greeting": "%s"' % greeting.encode() in middleware(request).content


def test_within_the_core_middleware_on_the_same_client_both_see_one_revision(site, put):
    from django.core.handlers.wsgi import WSGIHandler

    client = site(sync_view)
    put(client, "greeting", "outside")
    handler = WSGIHandler()

    def changes(environ, start_response):
        put(client, "greeting", "changed in between")
        return handler(environ, start_response)

    app = core_wsgi.ConfigMiddleware(changes, client=client)
    response = app(RequestFactory().get("/").environ, lambda *_: None)
    assert b'"greeting": "outside"' in b"".join(response)
    response.close()


def test_request_layers_lie_over_those_of_the_core_middleware_around_it_at_one_revision(site, put):
    from django.core.handlers.wsgi import WSGIHandler

    def view(request: HttpRequest) -> JsonResponse:
        assert request.config is current_view()
        return JsonResponse([request.config["greeting"], request.config["both"]], safe=False)

    client = site(view, veltrix={"URL": "memory://", "REQUEST_LAYERS": lambda request: ["tenants/acme/"]})
    for key, value in {"regions/eu/greeting": "eu", "regions/eu/both": "eu", "tenants/acme/both": "acme"}.items():
        put(client, key, value)
    handler = WSGIHandler()

    def changes(environ, start_response):
        put(client, "regions/eu/greeting", "changed in between")
        put(client, "tenants/acme/both", "changed in between")
        return handler(environ, start_response)

    app = core_wsgi.ConfigMiddleware(changes, client=client, layers=lambda environ: ["regions/eu/"])
    response = app(RequestFactory().get("/").environ, lambda *_: None)
    assert b"".join(response) == b'["eu", "acme"]'
    response.close()


# Layers


def layers_of(request: HttpRequest) -> Sequence[str] | None:
    asked = request.headers.get("X-Layers")
    return asked.split(",") if asked else None


async def layers_of_async(request: HttpRequest) -> Sequence[str] | None:
    await asyncio.sleep(0)
    return layers_of(request)


LAYERS = [f"{__name__}.layers_of", layers_of, layers_of_async]


@pytest.mark.parametrize("fetch", [get, aget])
@pytest.mark.parametrize("layers", LAYERS, ids=["dotted path", "function", "coroutine function"])
def test_request_layers_lie_over_the_base_for_that_request_alone(site, put, fetch, layers):
    client = site(sync_view, veltrix={"URL": "memory://", "REQUEST_LAYERS": layers})
    put(client, "greeting", "base")
    put(client, "tenants/acme/greeting", "acme")
    assert fetch(**{"X-Layers": "tenants/acme/"}).json()["greeting"] == "acme"
    assert fetch().json()["greeting"] == "base"


@pytest.mark.parametrize("fetch", [get, aget])
def test_an_invalid_layer_is_answered_400_before_the_view_runs(site, fetch):
    ran = []

    def view(request: HttpRequest) -> HttpResponse:
        ran.append(request)
        return HttpResponse()

    site(view, veltrix={"URL": "memory://", "REQUEST_LAYERS": layers_of})
    answer = fetch(**{"X-Layers": "tenants/../admin/"})
    assert (answer.status_code, ran) == (400, [])
    assert answer["Content-Type"] == "text/plain; charset=utf-8"
    assert b"admin" not in answer.content


@pytest.mark.parametrize("fetch", [get, aget])
def test_an_invalid_layer_can_be_ignored_and_the_others_stay(site, put, fetch):
    veltrix = {"URL": "memory://", "REQUEST_LAYERS": layers_of, "ON_INVALID_LAYER": "ignore"}
    client = site(sync_view, veltrix=veltrix)
    put(client, "tenants/acme/greeting", "acme")
    assert fetch(**{"X-Layers": "tenants/../admin/,tenants/acme/"}).json()["greeting"] == "acme"
    assert client.dropped_layers == 1


def test_layers_given_as_one_str_are_the_projects_fault_not_the_requests(site):
    site(sync_view, veltrix={"URL": "memory://", "REQUEST_LAYERS": lambda request: "tenants/acme/"})
    with pytest.raises(SettingsError, match="list of prefixes"):
        Client().get("/")


# Lazy keys


def keys_of(request: HttpRequest) -> Sequence[str]:
    return request.headers.get("X-Keys", "").split(",")


async def keys_of_async(request: HttpRequest) -> Sequence[str]:
    await asyncio.sleep(0)
    return keys_of(request)


def lazy_view(request: HttpRequest) -> JsonResponse:
    return JsonResponse([request.config["greeting"], request.config["users/1/name"]], safe=False)


@pytest.mark.parametrize("fetch", [get, aget])
@pytest.mark.parametrize("keys", [f"{__name__}.keys_of", keys_of, keys_of_async])
def test_lazy_layers_and_prefetched_keys_are_loaded_before_the_view_runs(site, put, fetch, keys):
    veltrix = {"URL": "memory://", "LAZY": ["tenants/", "users/"], "FETCH_TIMEOUT_S": 5, "LAZY_MAX_BYTES": 1_000_000}
    client = site(lazy_view, veltrix={**veltrix, "REQUEST_LAYERS": layers_of, "REQUEST_PREFETCH": keys})
    put(client, "tenants/acme/greeting", "acme")
    put(client, "users/1/name", "ann")
    assert fetch(**{"X-Layers": "tenants/acme/", "X-Keys": "users/1/name"}).json() == ["acme", "ann"]
    assert fetch(**{"X-Layers": "tenants/acme/", "X-Keys": "users/../name"}).status_code == 400
    assert (client.lazy, client.fetch_timeout_s) == (("tenants/", "users/"), 5)


@pytest.mark.parametrize("fetch", [get, aget])
def test_an_invalid_key_to_prefetch_can_be_ignored(site, put, fetch):
    veltrix = {"URL": "memory://", "LAZY": ["users/"], "REQUEST_PREFETCH": keys_of, "ON_INVALID_LAYER": "ignore"}
    client = site(lazy_view, veltrix=veltrix)
    put(client, "greeting", "base")
    put(client, "users/1/name", "ann")
    assert fetch(**{"X-Keys": "users/../name,users/1/name"}).json() == ["base", "ann"]
    assert client.dropped_layers == 1


def test_keys_given_as_one_str_are_the_projects_fault(site):
    site(
        lazy_view, veltrix={"URL": "memory://", "LAZY": ["users/"], "REQUEST_PREFETCH": lambda request: "users/1/name"}
    )
    with pytest.raises(SettingsError, match="list of keys"):
        Client().get("/")


# The header


@pytest.mark.parametrize("fetch", [get, aget])
def test_the_revision_header_is_sent_when_asked_for(site, put, fetch):
    client = site(sync_view, veltrix={"URL": "memory://", "REVISION_HEADER": True})
    revision = put(client, "greeting", "hello")
    assert fetch()["X-Config-Revision"] == str(revision)


def test_no_header_is_sent_when_not_asked_for(site, put):
    put(site(sync_view), "greeting", "hello")
    assert "X-Config-Revision" not in get()


# Without a list


@pytest.mark.parametrize("fetch", [get, aget])
def test_a_request_goes_on_without_a_list_and_reading_says_why(fetch, tmp_path):
    broken = tmp_path / "config.db"
    broken.write_bytes(b"this is no database" * 100)
    veltrix = {"URL": f"sqlite:///{broken}", "START_TIMEOUT_S": 0.05, "DEFAULTS": {"greeting": "default"}}

    with override_settings(VELTRIX=veltrix, ROOT_URLCONF=URLS):
        assert fetch("/config").json()["greeting"] == "default"
        assert not get_client().ready


class AwayStore(MemoryStore):
    """A store that cannot be reached until it is `there`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.there = threading.Event(), threading.Event()

    def list(self, *, timeout_s: float) -> Listing:
        self.asked.set()
        if not self.there.is_set():
            raise StoreUnavailable("away")
        return super().list(timeout_s=timeout_s)


def test_the_first_request_under_wsgi_waits_for_the_first_list():
    store = AwayStore()
    client = ConfigClient(store, start_timeout_s=20)
    client.put("greeting", "at last")
    with override_settings(VELTRIX={"CLIENT": client}, ROOT_URLCONF=URLS), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(get, "/config")
        assert store.asked.wait(20), "the request starts the client"
        store.there.set()
        assert answer.result(20).json()["greeting"] == "at last"
    client.close()


def test_the_first_request_under_asgi_waits_without_blocking_the_event_loop():
    store = AwayStore()
    client = ConfigClient(store, start_timeout_s=20)
    client.put("greeting", "at last")

    async def run() -> Any:
        answer = asyncio.create_task(AsyncClient().get("/config"))
        while not store.asked.is_set():
            await asyncio.sleep(0.005)  # the request is a task of this loop: it needs turns, and tells nobody
        store.there.set()  # a loop that was blocked would not come here in time
        return (await answer).json()

    with override_settings(VELTRIX={"CLIENT": client}, ROOT_URLCONF=URLS):
        assert asyncio.run(run())["greeting"] == "at last"
    client.close()


def test_nothing_on_the_way_of_a_request_blocks_the_event_loop(tmp_path):
    async def view(request: HttpRequest) -> JsonResponse:
        return JsonResponse({"greeting": request.config.get("greeting")})

    async def run() -> None:
        handler = ConfigMiddleware(view)
        for _ in range(2):  # the first starts the client
            response = await handler(RequestFactory().get("/"))
            assert response.status_code == 200

    with override_settings(VELTRIX={"URL": f"sqlite:///{tmp_path}/config.db"}):
        get_client().put("other", 1)
        with blockbuster_ctx():
            asyncio.run(run())
        assert get_client().ready


# The name that can be imported


def test_config_reads_like_the_view_it_stands_for(site, put):
    client = site(sync_view)
    put(client, "checkout/max_items", 7)
    put(client, "greeting", "hello")
    with client.pinned() as view:
        assert dict(config) == dict(view) == {"checkout/max_items": 7, "greeting": "hello"}
        assert (len(config), list(config), "greeting" in config, "other" in config) == (2, list(view), True, False)
        assert config.get("other", 3) == 3
        assert config.section("checkout/")["max_items"] == 7
        assert sorted(config.items()) == sorted(view.items())


def test_config_outside_a_request_raises_and_says_what_to_do(site):
    site(sync_view)
    with pytest.raises(NoCurrentView, match="pinned"):
        config["greeting"]


def test_config_can_be_looked_at_by_tools_outside_a_request(site):
    site(sync_view)
    assert not hasattr(config, "__wrapped__")
    assert not hasattr(config, "no_name_of_a_view")
    assert inspect.unwrap(config) is config
    assert "current request" in repr(config)


# Tests of apps


def test_override_config_decorates_test_classes_and_methods(site, put):
    put(site(sync_view), "greeting", "the store's")

    @override_config({"greeting": "the class's"})
    class Case(SimpleTestCase):
        def test_class(self) -> None:
            assert self.client.get("/").json()["greeting"] == "the class's"
            assert config["greeting"] == "the class's"

        @override_config({"greeting": "the method's"})
        def test_method(self) -> None:
            assert self.client.get("/").json()["greeting"] == "the method's"

        @override_config({"greeting": "the coroutine's"})
        async def test_coroutine(self) -> None:
            assert (await self.async_client.get("/")).json()["greeting"] == "the coroutine's"

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert (result.testsRun, result.errors, result.failures) == (3, [], [])
    assert get().json()["greeting"] == "the store's"


def test_all_names_what_is_public():
    assert django_veltrix.__all__ == ["ConfigMiddleware", "config", "get_client", "override_config"]


@pytest.fixture(autouse=True)
def _nothing_is_current() -> Iterator[None]:
    yield
    with pytest.raises(NoCurrentView):
        current_view()
