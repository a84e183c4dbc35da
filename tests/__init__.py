"""The tests: they mirror src, and `support` holds what several of them need."""
