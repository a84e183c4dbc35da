"""Management commands: `manage.py veltrix`."""
