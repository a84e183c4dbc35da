"""Apps that tests serve with real servers. `GET /config` answers as `tests.support.serving` wants it.

`GET /stream?fifo=<path>` sends one line of JSON, waits until someone writes to the FIFO, and sends another.
All read `$VELTRIX_URL`.
"""
