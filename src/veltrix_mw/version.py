"""The version, in one place: the distribution's metadata is made from it.

A constant, not read from the metadata at run time: that takes 30 ms, reads files, and would do so on an event loop.
"""

__version__ = "0.1.0"
