"""For tests of apps that read config: fixed values, without a store.

Owns `override_config`; the pytest fixtures are in `pytest_plugin`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from veltrix_mw.overrides import override_process

__all__ = ["override_config"]

F = TypeVar("F", bound=Callable[..., Any])

# What decorated classes put around a test method, by what came of it: the values, and the method.
_on_classes: Final[WeakKeyDictionary[Callable[..., Any], tuple[Mapping[str, Any], Callable[..., Any]]]] = (
    WeakKeyDictionary()
)


class override_config:
    """Fix config values for the whole process, as a context manager or a decorator; needs no client.

    `with override_config({"checkout/max_items": 3}): ...`, and the same on functions, coroutine functions, generators
    (from their first item to their last) and test classes (each test method, also inherited ones; a class's values
    win over those of the class that it inherits from). Overrides nest; the innermost wins. Every view taken meanwhile
    sees them, in every thread. Values are what JSON can carry; raises `InvalidKey` or `InvalidValue` for others.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        # One object may be entered several times, and left in another thread: which of its ends is called does not
        # matter, as they all end the same values.
        self._ends: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._ends.append(override_process(self._values))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ends.pop()()

    def __call__(self, target: F) -> F:
        if inspect.isclass(target):
            self._on_class(target)
            return target  # type: ignore[return-value, unused-ignore]  # pyright: ignore[reportReturnType]
        run = _wrapper(target)(self._values, target)
        return functools.wraps(target)(run)  # type: ignore[return-value]

    def _on_class(self, target: type[Any]) -> None:
        """Decorate what a test runner calls: methods named `test*`, also inherited ones."""
        for name in dir(target):
            if not name.startswith("test"):
                continue
            found = inspect.getattr_static(target, name)
            kind = type(found) if isinstance(found, (staticmethod, classmethod)) else None
            method = found if kind is None else found.__func__
            if inspect.isfunction(method):
                values: Mapping[str, Any] = self._values
                plain: Callable[..., Any] = method
                if name not in vars(target) and method in _on_classes:
                    # Around the values of a class that it inherits from ours would lose to them: the innermost wins.
                    inherited, plain = _on_classes[method]
                    values = {**inherited, **values}
                run = override_config(values)(plain)
                _on_classes[run] = (values, plain)
                setattr(target, name, run if kind is None else kind(run))


def _wrapper(target: Callable[..., Any]) -> Callable[[Mapping[str, Any], Callable[..., Any]], Callable[..., Any]]:
    """The way of wrapping that suits what kind of function `target` is."""
    if inspect.iscoroutinefunction(target):
        return _coroutine
    if inspect.isasyncgenfunction(target):
        return _async_generator
    return _generator if inspect.isgeneratorfunction(target) else _function


def _function(values: Mapping[str, Any], target: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with override_config(values):
            return target(*args, **kwargs)

    return run


def _generator(values: Mapping[str, Any], target: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with override_config(values):
            return (yield from target(*args, **kwargs))

    return run


def _coroutine(values: Mapping[str, Any], target: Callable[..., Any]) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        with override_config(values):
            return await target(*args, **kwargs)

    return run


def _async_generator(values: Mapping[str, Any], target: Callable[..., Any]) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        with override_config(values):
            async with aclosing(target(*args, **kwargs)) as items:
                async for item in items:
                    yield item

    return run
