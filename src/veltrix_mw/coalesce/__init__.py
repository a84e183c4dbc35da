"""Coalescing: many callers who want the same thing cost one call."""
