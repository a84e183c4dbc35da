"""Tests of `veltrix_mw.coalesce`."""
