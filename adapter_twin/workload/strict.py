"""Strict checks and strict construction from plain mappings; every failure is one clear line."""

from __future__ import annotations

import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from adapter_twin.errors import AdapterTwinError

T = TypeVar("T")


def require(holds: bool, message: str) -> None:
    """Raise `AdapterTwinError` with `message` unless the condition holds."""
    if not holds:
        raise AdapterTwinError(message)


def require_positive(owner: object, *names: str) -> None:
    """Check that the named attributes are finite and above zero."""
    for name in names:
        value = getattr(owner, name)
        require(math.isfinite(value) and value > 0, f"{name}: must be positive, got {value}")


def require_rate(owner: object, name: str) -> None:
    """Check that the named attribute is a finite rate of zero or more requests/s."""
    value = getattr(owner, name)
    require(math.isfinite(value) and value >= 0, f"{name}: must be zero or more, got {value}")


def require_choice(owner: object, name: str) -> None:
    """Check that the named attribute is one of the choices of its Literal annotation."""
    kind: Any = type(owner)
    value, choices = getattr(owner, name), _choices(kind, name)
    if value not in choices:
        raise AdapterTwinError(f"{name}: got {_show(value)}{suggestion(value, choices)}")


@cache
def _choices(owner: Any, name: str) -> tuple[str, ...]:
    return get_args(get_type_hints(owner)[name])


def suggestion(given: object, choices: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` for a near miss, the choices otherwise."""
    choices = list(choices)
    near = difflib.get_close_matches(str(given), choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; use one of {', '.join(choices)}"


def build(make: Callable[..., T], given: object, path: str) -> T:
    """Call `make` (a dataclass or a function) with the keys of a plain mapping as its arguments.

    Keys are checked against the parameters, values against their annotations, and a complaint of
    `make` itself is prefixed with the path: every error names the key as the user wrote it.

    Parameters
    ----------
    make : callable
        Annotated with str, int, float, bool, Literal, ``X | None``, ``tuple[X, ...]``,
        ``Sequence[X]`` or further dataclasses.
    given : object
        What the file holds at this place; a mapping is expected.
    path : str
        Dotted path of the place, for messages; empty at the top.

    Raises
    ------
    AdapterTwinError
        Unknown or missing key, wrong type, or a value that `make` refuses.
    """
    if not isinstance(given, Mapping):
        raise AdapterTwinError(f"{path or 'file'}: expected a mapping of keys, got {_show(given)}")
    parameters, hints = _signature(make)
    for key in given:
        if key not in parameters:
            raise AdapterTwinError(f"{_join(path, key)}: unknown key{suggestion(key, parameters)}")
    for name, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        require(name in given or not needed, f"{_join(path, name)}: missing; add this key")
    arguments = {key: convert(hints[key], value, _join(path, key)) for key, value in given.items()}
    try:
        return make(**arguments)
    except AdapterTwinError as error:
        raise AdapterTwinError(_join(path, str(error))) from None


@lru_cache
def _signature(
    make: Callable[..., Any],
) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, Any]]:
    return inspect.signature(make).parameters, get_type_hints(make)


def convert(hint: Any, value: object, path: str) -> Any:
    """Return `value` as the annotation `hint` asks, or raise `AdapterTwinError` naming `path`."""
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else convert(arguments[0], value, path)
    if origin is Literal:  # the class checks its own choices
        return value
    if origin in (tuple, Sequence):
        if not isinstance(value, list):
            raise AdapterTwinError(f"{path}: expected a list, got {_show(value)}")
        return tuple(convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint in (str, bool, int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number if hint is float else type(value) is hint
        require(fits, f"{path}: expected {_TYPE_NAMES[hint]}, got {_show(value)}")
        return hint(value)
    return build(hint, value, path)


_TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number (not in quotes; 1.0e6, not 1e6)",
}


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
