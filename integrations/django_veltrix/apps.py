"""The Django app: registers the system checks and starts nothing.

`ready()` also runs in management commands and in the autoreloader's parent, where no follower belongs.
"""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks

__all__ = ["VeltrixConfig"]


class VeltrixConfig(AppConfig):
    """The app `django_veltrix`: no models, no database.

    Getting ready opens no connection and starts no thread.
    """

    name = "django_veltrix"
    label = "django_veltrix"
    verbose_name = "Veltrix configuration"

    def ready(self) -> None:
        """Register the system checks."""
        from django_veltrix.checks import check_deployment, check_middleware, check_settings

        checks.register(check_settings, "veltrix")
        checks.register(check_middleware, "veltrix")
        checks.register(check_deployment, "veltrix", deploy=True)
