"""Django: request.config under WSGI and ASGI."""
