"""Tag libraries: `{% load veltrix %}`."""
