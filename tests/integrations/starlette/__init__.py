"""Starlette and FastAPI, in this process and under real servers."""
