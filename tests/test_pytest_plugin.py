"""The pytest plugin, in test runs of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

pytest_plugins = ["pytester"]

# Where the library is installed the entry point loads the plugin; loaded twice it would be an error.
INSTALLED = any(point.value == "veltrix_mw.pytest_plugin" for point in entry_points(group="pytest11"))
LOADED = [] if INSTALLED else ["-p", "veltrix_mw.pytest_plugin"]

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    def run(source: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess(*LOADED, "-W", "error", "-p", "no:cacheprovider", *options)

    return run


def test_config_override_fixes_values_until_the_test_ends(run: Run) -> None:
    run(
        """
        import pytest
        from veltrix_mw import NoCurrentView, current_view

        def test_fixed(config_override):
            config_override({"k": 1, "other": 1})
            config_override({"k": 2})
            assert dict(current_view()) == {"k": 2, "other": 1}

        def test_it_fails_and_leaves_nothing(config_override):
            config_override({"k": 3})
            assert current_view()["k"] == 4

        def test_not_here(config_override):
            with pytest.raises(NoCurrentView):
                current_view()

        def test_wrong(config_override):
            with pytest.raises(ValueError):
                config_override({"a//b": 1})
            with pytest.raises(NoCurrentView):
                current_view()
        """
    ).assert_outcomes(passed=3, failed=1)


def test_config_client_is_a_started_client_on_an_empty_store_of_its_own(run: Run) -> None:
    run(
        """
        import pytest
        from veltrix_mw import ConfigClient

        seen = []

        @pytest.mark.parametrize("number", [1, 2])
        def test_it(config_client, number):
            assert isinstance(config_client, ConfigClient)
            assert config_client.status().ready
            assert config_client.status().tiers[0].state == "following"
            assert len(config_client.snapshot) == 0
            config_client.wait_for(config_client.put("k", number))
            assert config_client.view()["k"] == number
            seen.append(config_client)

        def test_they_are_closed():
            assert len({id(client) for client in seen}) == 2
            assert [client.status().tiers[0].state for client in seen] == ["stopped", "stopped"]

        def test_both(config_client, config_override):
            config_override({"k": "fixed"})
            config_client.wait_for(config_client.put("k", 1))
            assert config_client.view()["k"] == "fixed"
        """
    ).assert_outcomes(passed=4)


def test_decorated_tests_and_fixtures_are_found_with_their_arguments(run: Run) -> None:
    run(
        """
        import unittest
        import pytest
        from veltrix_mw import current_view, override_config

        @pytest.fixture
        @override_config({"from/fixture": 1})
        def fixed():
            yield current_view()["from/fixture"]

        @pytest.mark.parametrize("number", [1, 2])
        @override_config({"k": 1})
        def test_function(number, fixed, tmp_path):
            assert (current_view()["k"], current_view()["from/fixture"], fixed) == (1, 1, 1)
            assert number in {1, 2}

        @override_config({"k": 2})
        class TestIt:
            @pytest.mark.parametrize("number", [1, 2])
            def test_method(self, number, fixed):
                assert current_view()["k"] == 2

            @staticmethod
            def test_static(fixed):
                assert current_view()["k"] == 2

        @override_config({"k": 3})
        class Case(unittest.TestCase):
            def test_it(self):
                assert current_view()["k"] == 3
        """
    ).assert_outcomes(passed=6)


def test_the_fixtures_are_listed_with_what_they_do(run: Run) -> None:
    result = run("", "--fixtures")
    result.stdout.re_match_lines([r"config_override .*", r".*fixes values until the test ends\."])
    result.stdout.re_match_lines([r"config_client .*", r".*on an empty in-memory store of its own.*"])


def test_the_plugin_loads_no_store_driver_or_framework(run: Run) -> None:
    run(
        """
        import sys

        def test_it(request):
            assert request.config.pluginmanager.has_plugin("veltrix_mw") or request.config.pluginmanager.has_plugin(
                "veltrix_mw.pytest_plugin"
            )
            for name in ("sqlite3", "msgspec", "pydantic", "flask", "django", "starlette", "veltrix_mw.stores.memory"):
                assert name not in sys.modules, name
        """
    ).assert_outcomes(passed=1)
