"""The decorators that compile the scheduler; with NUMBA_DISABLE_JIT=1 they leave plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False, "forceinline": True}
"""numba's options: without ``_nrt``, of which it has no public name, no reference is counted.

The functions pass some forty arrays among them and allocate none (numba refuses to compile one that
would), and counting took 80 % of their time.
"""


def _compile(function: Function, **options: bool) -> Function:
    return cast(Function, numba.njit(**OPTIONS, **options)(function))


def entry(function: Function) -> Function:
    """Compile a function that Python calls with a policy.

    numba keeps the result on disk, by the argument types; `adapter_twin.twin.hooks` sees to it that
    the policy's type tells the sources apart.
    """
    return _compile(function, cache=True)


def helper(function: Function) -> Function:
    """Compile a function that only compiled code may call (half the time to compile)."""
    return _compile(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def for_arguments(function: Function, arguments: Sequence[Any]) -> Function:
    """Return what an `entry` runs for arguments of these types, and does not look at them again."""
    if numba.config.DISABLE_JIT:
        return function
    types: Any = tuple(map(numba.typeof, arguments))
    compiled: Any = function
    compiled.compile(types)
    return cast(Function, compiled.get_overload(types))
