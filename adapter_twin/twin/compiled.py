"""The decorators that compile the policy; with NUMBA_DISABLE_JIT=1 they leave it plain Python."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = sorted(Path(__file__).parent.rglob("*.py"))
_VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()

# Without `_nrt` no reference is counted. The functions pass some forty arrays among them and
# allocate none (numba refuses to compile one that would), and counting took 80 % of their time.
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "_nrt": False,
    "forceinline": True,
}


def _compile(function: Function, **options: bool) -> Function:
    njit: Any = numba.njit  # its type hints lack half of the options
    dispatcher = njit(**_OPTIONS, **options)(function)
    if dispatcher is not function:  # the JIT is on
        # numba stamps what it caches with the function's own file; the code compiled into it comes
        # from several.
        dispatcher._cache._cache_file._source_stamp = _VERSION
    return cast(Function, dispatcher)


def entry(function: Function) -> Function:
    """Compile a function that Python calls."""
    return _compile(function)


def helper(function: Function) -> Function:
    """Compile a function that only compiled code may call (half the time to compile)."""
    return _compile(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)
