"""Settings of the tests' project: no database, no sessions; a store in memory unless the environment names one."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).parent
SECRET_KEY = "for tests"
ALLOWED_HOSTS = ["*"]
DEBUG = False
USE_TZ = True
LOGGING_CONFIG = None  # the process's logging is pytest's
DATABASES: dict[str, object] = {}
ROOT_URLCONF = "tests.integrations.django.project.urls"
INSTALLED_APPS = ["django_veltrix"]
MIDDLEWARE = ["django_veltrix.ConfigMiddleware"]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "OPTIONS": {"context_processors": ["django_veltrix.context_processors.config"]},
    }
]
VELTRIX = {"URL": os.environ.get("TESTS_CONFIG_URL", "memory://")}
