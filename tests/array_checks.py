"""The type checker behind `conftest`'s import hook."""

from collections.abc import Callable

import beartype


def check_signature(function: Callable) -> Callable:
    """Checks a function's annotations at run time, but not constructors'.

    Those of dataclasses that are pytrees run whenever jax rebuilds one: of numpy arrays, shapes, shardings.
    """
    return function if function.__name__ == "__init__" else beartype.beartype(function)
