"""The stores: one backend a file, each behind the protocols of `veltrix_mw.protocols`.

Owns what a backend is spoken to with, and the translation of its driver's errors. Knows nothing of replicas, views
or requests, and imports no backend until it is asked for.
"""
