"""The smallest project: no database, three lines for config."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).parent
DEBUG = os.environ.get("DJANGO_DEBUG") == "1"
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "an example keeps no secrets")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "urls"
WSGI_APPLICATION = "wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "OPTIONS": {"context_processors": ["django_veltrix.context_processors.config"]},
    }
]

INSTALLED_APPS = ["django_veltrix"]
MIDDLEWARE = ["django_veltrix.ConfigMiddleware"]
VELTRIX = {
    "URL": os.environ.get("VELTRIX_URL", f"sqlite:///{BASE_DIR}/config.db"),
    "DEFAULTS": {"shop/title": "A shop", "checkout/max_items": 50},
}
