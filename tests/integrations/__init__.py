"""The adapters, one folder a framework."""
