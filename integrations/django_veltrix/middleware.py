"""The middleware: a view pinned to each request, under WSGI and ASGI.

Owns `request.config` and its time as the current view; streamed bodies are `streaming`'s.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any, ClassVar, cast

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponseBadRequest
from django.http.response import HttpResponseBase

from django_veltrix.project import Project, current_project
from django_veltrix.streaming import carry, is_streamed
from veltrix_mw import InvalidKey, NoCurrentView, Pinned, SettingsError, View, current_view
from veltrix_mw.request_layers import BAD_LAYER, InvalidLayerPolicy
from veltrix_mw.wsgi import VIEW_KEY

__all__ = ["ConfigMiddleware"]


class ConfigMiddleware:
    """Gives each request a view pinned to one snapshot: `request.config`, and `django_veltrix.config`.

    Hybrid: in a synchronous chain it is called, in an asynchronous one awaited, without a thread in between. Put it
    after OpenTelemetry's middleware and before whatever reads config. A request keeps its view in whatever it calls,
    in error pages and in a streamed body to its last byte. It never raises on its own, except at start-up for wrong
    settings (`SettingsError`), and never blocks an event loop, whatever the stores do.
    """

    sync_capable: ClassVar[bool] = True
    async_capable: ClassVar[bool] = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        current_project()  # wrong settings end the server when it starts, not its first request

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._is_async:
            return self._respond_async(request)
        return self._respond(request)

    def _respond(self, request: HttpRequest) -> HttpResponseBase:
        if _is_pinned(request):
            return cast("HttpResponseBase", self.get_response(request))
        project = current_project()
        client = project.client
        if not client.begun:
            client.view()  # whoever takes a view starts it
            client.wait_start()
        layers: Any = () if project.request_layers is None else project.request_layers(request)
        if isawaitable(layers):
            layers = async_to_sync(_awaited)(layers)
        try:
            pinned = _pin(project, request, layers)
            if client.lazy:
                keys: Any = () if project.request_prefetch is None else project.request_prefetch(request)
                if isawaitable(keys):
                    keys = async_to_sync(_awaited)(keys)
                pinned.load(_listed(keys, "PREFETCH", "keys"), on_invalid_key=_policy(project))
        except InvalidKey:
            return _refusal()
        request.config = pinned.view  # type: ignore[attr-defined]
        pinned.__enter__()
        try:
            response: HttpResponseBase = self.get_response(request)
        except BaseException:
            pinned.report()
            raise
        finally:
            pinned.leave()
        return _finish(response, pinned, project)

    async def _respond_async(self, request: HttpRequest) -> HttpResponseBase:
        if _is_pinned(request):
            return cast("HttpResponseBase", await self.get_response(request))
        project = current_project()
        client = project.client
        if not client.begun:
            client.view()
            await client.await_start()
        layers: Any = () if project.request_layers is None else project.request_layers(request)
        if isawaitable(layers):
            layers = await layers
        try:
            pinned = _pin(project, request, layers)
            if client.lazy:
                keys: Any = () if project.request_prefetch is None else project.request_prefetch(request)
                if isawaitable(keys):
                    keys = await keys
                await pinned.aload(_listed(keys, "PREFETCH", "keys"), on_invalid_key=_policy(project))
        except InvalidKey:
            return _refusal()
        request.config = pinned.view  # type: ignore[attr-defined]
        pinned.__enter__()
        try:
            response: HttpResponseBase = await self.get_response(request)
        except BaseException:
            pinned.report()
            raise
        finally:
            pinned.leave()
        return _finish(response, pinned, project)


def _is_pinned(request: HttpRequest) -> bool:
    """Whether this middleware is around the request already: it was listed twice.

    A view that the request merely carries does not count: tests send one request object again and again.
    """
    view = getattr(request, "config", None)
    if not isinstance(view, View):
        return False
    try:
        return current_view() is view
    except NoCurrentView:
        return False


async def _awaited(given: Awaitable[Any]) -> Any:
    return await given


def _policy(project: Project) -> InvalidLayerPolicy:
    return "ignore" if project.ignore_invalid_layer else "reject"


def _listed(given: Any, name: str, what: str) -> tuple[Any, ...]:
    """What a function of the request gave; a str would be taken for as many as it has letters."""
    if isinstance(given, str):
        example = "tenants/acme/" if what == "prefixes" else "tenants/acme/limit"
        raise SettingsError(f"settings.VELTRIX['REQUEST_{name}'] gives a list of {what}, like [{example!r}]")
    return tuple(given)


def _pin(project: Project, request: HttpRequest, layers: Any) -> Pinned:
    """The request's pin with its layers. Raises `InvalidKey` if one of them is invalid and is to be refused."""
    view = project.client.view()
    if VIEW_KEY in getattr(request, "scope", request.META):
        # A WSGI or ASGI middleware around Django has pinned this request: it is to see one revision.
        view = Pinned.prefer_current(view)
    pinned = Pinned(view)
    if layers:
        pinned.lay(_listed(layers, "LAYERS", "prefixes"), on_invalid_layer=_policy(project))
    return pinned


def _refusal() -> HttpResponseBase:
    return HttpResponseBadRequest(BAD_LAYER, content_type="text/plain; charset=utf-8")


def _finish(response: HttpResponseBase, pinned: Pinned, project: Project) -> HttpResponseBase:
    if project.revision_header:
        response.headers["X-Config-Revision"] = str(pinned.view.revision)
    if is_streamed(response):
        # A span that Django's own instrumentation made ends before the body does: it is told what is known by now.
        pinned.annotate()
        carry(response, pinned)
    else:
        pinned.report()
    return response
