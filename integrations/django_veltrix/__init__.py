"""Django: `request.config`, one pinned view a request, under WSGI and ASGI.

`"django_veltrix"` in INSTALLED_APPS, `"django_veltrix.ConfigMiddleware"` in MIDDLEWARE, `VELTRIX = {"URL": ...}`.
Owns nothing but the public names; importing it reads no settings and needs no app registry.
"""

from django_veltrix.current import config
from django_veltrix.middleware import ConfigMiddleware
from django_veltrix.project import get_client
from veltrix_mw import override_config

__all__ = ["ConfigMiddleware", "config", "get_client", "override_config"]
