"""Tests of `flask_veltrix`."""
