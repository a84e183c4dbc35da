"""The Django project of these tests: configured in this process, and served by real servers."""
