"""One page, and the same as JSON."""

import os

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path

from django_veltrix import config


def page(request: HttpRequest) -> HttpResponse:
    return render(request, "page.html")


def as_json(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"pid": os.getpid(), "revision": config.revision, "max_items": config["checkout/max_items"]})


urlpatterns = [path("", page), path("config", as_json)]
