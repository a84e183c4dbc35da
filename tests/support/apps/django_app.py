"""A Django project in one file, which takes its stores from the environment."""

from __future__ import annotations

import os
import sys

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

from tests.support.apps.answers import report

settings.configure(
    SECRET_KEY="for tests",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=sys.modules[__name__],
    INSTALLED_APPS=["django_veltrix"],
    MIDDLEWARE=["django_veltrix.ConfigMiddleware"],
    VELTRIX={"URL": os.environ["VELTRIX_URL"], "MIRROR_URL": os.environ["VELTRIX_MIRROR_URL"]},
)


def config(request: HttpRequest) -> JsonResponse:
    return JsonResponse(report(request.config))


urlpatterns = [path("config", config)]
app = get_wsgi_application()
