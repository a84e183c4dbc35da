"""`override_config`: what it overrides, for whom, and for how long."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import unittest
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest

from veltrix_mw import (
    ConfigClient,
    InvalidKey,
    InvalidValue,
    KeyMissing,
    NoCurrentView,
    current_view,
    override_config,
    overrides,
    testing,
)

WITHIN_S = 10.0


def seen(key: str = "k") -> Any:
    """What code under test reads, without a client; `None` when nothing is overridden."""
    try:
        return current_view().get(key)
    except NoCurrentView:
        return None


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    assert seen() is None
    yield
    with pytest.raises(NoCurrentView):
        current_view()


def test_it_is_the_public_name() -> None:
    assert testing.__all__ == ["override_config"]
    assert testing.override_config is override_config


# As a context manager


def test_without_a_client_the_current_view_has_the_overrides_alone() -> None:
    with override_config({"checkout/max_items": 3, "checkout/open": {"days": [1, 2]}}):
        view = current_view()
        assert dict(view) == {"checkout/max_items": 3, "checkout/open": {"days": (1, 2)}}
        assert dict(view.section("checkout/")) == {"max_items": 3, "open": {"days": (1, 2)}}
        assert view.renew()["checkout/max_items"] == 3
        with pytest.raises(KeyMissing):
            view["absent"]
        with pytest.raises(TypeError, match="frozen"):
            view["checkout/open"]["days"] = ()
    # A view that was taken stays what it was.
    assert view["checkout/max_items"] == 3


def test_with_a_client_every_view_taken_meanwhile_sees_them_over_layers_base_and_defaults() -> None:
    with ConfigClient("memory://", layers=("env/",), defaults={"d": 1}, telemetry="off") as client:
        client.wait_for(client.put("k", "base"))
        client.wait_for(client.put("env/k", "layer"))
        before = client.view()
        with override_config({"k": "fixed", "d": 2}):
            for view in (client.view(), client.view(("other/",)), client.view((), {"k": "own"})):
                assert view["d"] == 2
            assert client.view()["k"] == client.view(("other/",))["k"] == "fixed"
            with client.pinned() as pinned:
                assert pinned["k"] == current_view()["k"] == "fixed"
            assert client.snapshot["k"] == "base"
            client.wait_for(client.put("env/k", "changed"))
            assert client.view()["k"] == "fixed"
            assert before["k"] == "layer"
        assert client.view()["k"] == "changed"
        assert client.view()["d"] == 1


def test_a_client_made_while_it_is_active_serves_the_overrides_and_then_no_longer() -> None:
    with override_config({"k": "fixed"}):
        client = ConfigClient("memory://", defaults={"k": 1}, telemetry="off")
        assert client.view()["k"] == "fixed"
    assert client.view()["k"] == 1
    client.close()


def test_overrides_nest_and_the_innermost_wins() -> None:
    with override_config({"k": 1, "outer": 1}):
        with override_config({"k": 2, "inner": 2}):
            assert (seen("k"), seen("outer"), seen("inner")) == (2, 1, 2)
            with override_config({"k": None}):
                assert "k" in current_view()
                assert current_view()["k"] is None
            assert seen() == 2
        assert (seen("k"), seen("outer"), seen("inner")) == (1, 1, None)


def test_they_end_with_an_exception_too() -> None:
    with pytest.raises(ZeroDivisionError), override_config({"k": 1}):
        _ = 1 / 0
    assert seen() is None


def test_they_may_end_in_any_order() -> None:
    first, second, third = (override_config({"k": number, f"k{number}": number}) for number in (1, 2, 3))
    for override in (first, second, third):
        override.__enter__()
    second.__exit__(None, None, None)
    assert (seen(), seen("k2")) == (3, None)
    third.__exit__(None, None, None)
    assert (seen(), seen("k3")) == (1, None)
    first.__exit__(None, None, None)


def test_equal_overrides_of_two_owners_end_one_by_one() -> None:
    one, other = override_config({"k": 1}), override_config({"k": 1})
    with one:
        other.__enter__()
    assert seen() == 1
    other.__exit__(None, None, None)


def test_one_object_may_be_entered_again_while_it_is_entered_and_afterwards() -> None:
    override = override_config({"k": 1})
    for _ in range(2):
        with override:
            with override:
                assert seen() == 1
            assert seen() == 1
        assert seen() is None


def test_every_thread_sees_them_and_the_one_that_leaves_need_not_be_the_one_that_entered() -> None:
    found: list[Any] = []
    stack = ExitStack()
    entering = threading.Thread(target=lambda: stack.enter_context(override_config({"k": 1})))
    entering.start()
    entering.join(WITHIN_S)
    looking = threading.Thread(target=lambda: found.append(seen()))
    looking.start()
    looking.join(WITHIN_S)
    assert found == [1]
    assert seen() == 1
    stack.close()
    assert seen() is None


def test_threads_that_enter_the_same_object_leave_nothing_behind() -> None:
    override = override_config({"k": 1})
    begin = threading.Barrier(4)
    wrong: list[Any] = []

    def work() -> None:
        begin.wait(WITHIN_S)
        for _ in range(100):
            with override:
                if seen() != 1:
                    wrong.append(seen())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    assert wrong == []


@pytest.mark.parametrize(
    ("values", "error"),
    [({"a//b": 1}, InvalidKey), ({"": 1}, InvalidKey), ({3: 1}, InvalidKey), ({"k": {1}}, InvalidValue)],
)
def test_what_no_store_could_hold_is_refused_and_nothing_is_overridden(values: Any, error: type[Exception]) -> None:
    with pytest.raises(error), override_config({"k": 1, **values}):
        raise AssertionError("it was entered")

    @override_config({"k": 1, **values})
    def test() -> None:
        raise AssertionError("it was called")

    with pytest.raises(error):
        test()


def test_what_the_caller_does_to_the_values_later_changes_nothing() -> None:
    values: dict[str, Any] = {"k": [1]}
    with override_config(values):
        values["k"].append(2)
        values["other"] = 1
        assert seen() == (1,)
        assert seen("other") is None


# As a decorator


def test_a_function_runs_with_them_and_keeps_its_name_signature_and_result() -> None:
    @override_config({"k": 1})
    def read(one: int, *, two: int = 2) -> tuple[int, int, Any]:
        """Reads."""
        return one, two, seen()

    assert read(1, two=3) == (1, 3, 1)
    assert seen() is None
    assert (read.__name__, read.__doc__) == ("read", "Reads.")
    assert list(inspect.signature(read).parameters) == ["one", "two"]


def test_a_function_may_call_itself_and_others_that_are_decorated() -> None:
    override = override_config({"k": 1})

    @override
    def down(left: int) -> list[Any]:
        return [seen(), *(down(left - 1) if left else inner()), seen()]

    @override_config({"k": 2})
    def inner() -> list[Any]:
        return [seen()]

    assert down(2) == [1, 1, 1, 2, 1, 1, 1]


def test_decorators_on_top_of_each_other_nest_from_the_outside_in() -> None:
    @override_config({"k": 1, "outer": 1})
    @override_config({"k": 2})
    def read() -> tuple[Any, Any]:
        return seen(), seen("outer")

    assert read() == (2, 1)


def test_a_coroutine_function_runs_with_them_to_its_end() -> None:
    @override_config({"k": 1})
    async def read() -> list[Any]:
        before = seen()
        await asyncio.sleep(0)
        return [before, seen()]

    async def main() -> None:
        call = read()
        assert seen() is None  # not before it runs
        assert await call == [1, 1]
        assert seen() is None

    assert inspect.iscoroutinefunction(read)
    asyncio.run(main())


def test_a_generator_runs_with_them_from_its_first_item_to_its_last() -> None:
    @override_config({"k": 1})
    def items() -> Iterator[Any]:
        got = yield seen()
        yield got
        yield seen()

    assert inspect.isgeneratorfunction(items)  # pytest asks this of a fixture
    made: Any = items()
    assert seen() is None
    assert (next(made), made.send("sent"), next(made)) == (1, "sent", 1)
    assert next(made, "end") == "end"
    assert seen() is None
    made = items()
    next(made)
    made.close()


def test_a_context_manager_made_of_a_generator_runs_with_them() -> None:
    @contextmanager
    @override_config({"k": 1})
    def fixed() -> Iterator[None]:
        try:
            yield
        except ZeroDivisionError:
            assert seen() == 1

    with fixed():
        assert seen() == 1
        _ = 1 / 0


def test_an_async_generator_runs_with_them_from_its_first_item_to_its_last() -> None:
    ended: list[Any] = []

    @override_config({"k": 1})
    async def items() -> AsyncIterator[Any]:
        try:
            yield seen()
            await asyncio.sleep(0)
            yield seen()
        finally:
            ended.append(seen())

    async def main() -> None:
        assert [item async for item in items()] == [1, 1]
        made: Any = items()
        assert seen() is None
        assert await anext(made) == 1
        await made.aclose()
        async with asynccontextmanager(items)() as first:
            assert (first, seen()) == (1, 1)
            with pytest.raises(StopAsyncIteration):
                raise StopAsyncIteration

    assert inspect.isasyncgenfunction(items)
    with pytest.raises(RuntimeError, match="didn't stop"):
        asyncio.run(main())
    assert ended == [1, 1, 1]


# On classes


def run(case: type[unittest.TestCase]) -> unittest.TestResult:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    return result


def test_every_test_method_of_a_class_runs_with_them_and_nothing_else_does() -> None:
    @override_config({"k": 1})
    class TestIt:
        test_data = "not a method"

        class test_inner:
            pass

        def test_plain(self) -> Any:
            return type(self).__name__, seen()

        async def test_async(self) -> Any:
            await asyncio.sleep(0)
            return seen()

        @staticmethod
        def test_static(given: int) -> Any:
            return given, seen()

        @classmethod
        def test_class(cls) -> Any:
            return cls.__name__, seen()

        def helper(self) -> Any:
            return seen()

    it = TestIt()
    assert it.test_plain() == ("TestIt", 1)
    assert asyncio.run(it.test_async()) == 1
    assert it.test_static(7) == TestIt.test_static(7) == (7, 1)
    assert it.test_class() == TestIt.test_class() == ("TestIt", 1)
    assert it.helper() is None
    assert it.test_data == "not a method"
    assert isinstance(TestIt.test_inner, type)
    assert isinstance(inspect.getattr_static(TestIt, "test_static"), staticmethod)
    assert isinstance(inspect.getattr_static(TestIt, "test_class"), classmethod)


def test_unittest_s_test_cases_run_with_them() -> None:
    found: list[Any] = []

    @override_config({"k": 1})
    class Case(unittest.TestCase):
        def test_it(self) -> None:
            found.append(seen())

        @unittest.skip("to see that it stays skipped")
        def test_skipped(self) -> None:
            found.append("ran")

    @override_config({"k": 2})
    class AsyncCase(unittest.IsolatedAsyncioTestCase):
        async def test_it(self) -> None:
            await asyncio.sleep(0)
            found.append(seen())

    for case, skipped in ((Case, 1), (AsyncCase, 0)):
        result = run(case)
        assert result.wasSuccessful(), result.errors + result.failures
        assert len(result.skipped) == skipped
    assert found == [1, 2]


def test_inherited_tests_run_with_them_in_the_decorated_class_alone() -> None:
    class Base:
        def test_it(self) -> Any:
            return seen()

    @override_config({"k": 1})
    class Child(Base):
        def test_it(self) -> Any:
            return super().test_it(), "child"

    @override_config({"k": 2})
    class Other(Base):
        pass

    assert Base().test_it() is None
    assert Child().test_it() == (1, "child")
    assert Other().test_it() == 2


def test_a_class_s_values_win_over_those_of_the_class_it_inherits_from() -> None:
    @override_config({"k": "base", "only/base": 1})
    class Base:
        def test_it(self) -> tuple[Any, Any, Any]:
            return seen(), seen("only/base"), seen("only/child")

        @override_config({"k": "method"})
        def test_own(self) -> Any:
            return seen()

    @override_config({"k": "child", "only/child": 2})
    class Child(Base):
        pass

    class Between(Base):
        test_it = staticmethod(lambda: (seen(), "between", None))  # type: ignore[assignment]

    @override_config({"k": "grandchild"})
    class Grandchild(Child):
        pass

    @override_config({"k": "last"})
    class Last(Between):
        pass

    assert Base().test_it() == ("base", 1, None)
    assert Child().test_it() == ("child", 1, 2)
    assert Grandchild().test_it() == ("grandchild", 1, 2)
    assert Last().test_it() == ("last", "between", None)
    # What stands closest to the test wins.
    assert Base().test_own() == Child().test_own() == Grandchild().test_own() == "method"


def test_a_wrapper_that_someone_put_around_an_inherited_test_is_kept() -> None:
    import functools

    @override_config({"k": "base"})
    class Base:
        def test_it(self) -> Any:
            return seen()

    def doubled(method: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(method)(lambda self: [method(self)] * 2)

    class Middle(Base):
        test_it = doubled(Base.test_it)

    @override_config({"k": "child"})
    class Child(Middle):
        pass

    assert len(Child().test_it()) == 2


def test_a_class_decorated_twice_is_decorated_from_the_outside_in() -> None:
    @override_config({"k": 1, "outer": 1})
    @override_config({"k": 2})
    class It:
        def test_it(self) -> Any:
            return seen(), seen("outer")

    assert It().test_it() == (2, 1)


def test_a_child_forked_while_another_thread_overrides_can_override_and_make_clients() -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with overrides._process_lock:
            held.set()
            release.wait(WITHIN_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(WITHIN_S)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads: that is the test
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(int(WITHIN_S))  # ends a child that waits for ever
            with override_config({"k": 1}):
                os.write(writing, str(ConfigClient("memory://").view()["k"]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "1"
    os.waitpid(pid, 0)
    release.set()
    holder.join()
