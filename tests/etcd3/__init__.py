"""Tests with the package `etcd3`, in its own environment: `.venvs/etcd3/bin/python -m pytest tests/etcd3`."""
