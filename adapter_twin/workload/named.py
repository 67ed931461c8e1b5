"""Objects that a configuration or an option names: policies and routers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.workload.strict import read, suggestion

T = TypeVar("T")


def make_named(given: object, known: Mapping[str, type[T]], base: type[T], path: str) -> T:
    """Make what a name and parameters stand for.

    Parameters
    ----------
    given : object
        ``{name: ..., parameter: ...}``, or the name alone.
    known : mapping
        Classes by name. Any other name is the import path of a class of the user's own,
        ``module:Class``. Python looks for the module where it looks for all (PYTHONPATH), never
        beside a configuration, and runs it.
    base : type
        What such a class must inherit from.
    path : str
        Of the key, for messages.

    Raises
    ------
    AdapterTwinError
        Unknown name or parameter, or a module that cannot be imported.
    """
    parameters = dict(given) if isinstance(given, Mapping) else {"name": given}
    name: Any = parameters.pop("name", None)
    require(isinstance(name, str), f"{path}.name: give one of {', '.join(known)}, or module:Class")
    if ":" in name:
        return read(_import(name, base, path), parameters, path)
    if name not in known:
        raise AdapterTwinError(f"{path}.name: unknown name {name!r}{suggestion(name, known)}")
    return read(known[name], parameters, path)


def parse_named(text: str) -> dict[str, Any]:
    """Parse what an option says.

    >>> parse_named("drain max_wait_s=5 tolerance=0")
    {'name': 'drain', 'max_wait_s': 5, 'tolerance': 0}
    """
    name, *pairs = text.split() or [""]
    parameters = (pair.partition("=") for pair in pairs)
    return {"name": name, **{key: yaml.safe_load(value) for key, _, value in parameters}}


def _import(name: str, base: type[T], path: str) -> type[T]:
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        hint = "; put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise AdapterTwinError(f"{path}.name: {name}: {one_line(error)}{hint}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise AdapterTwinError(f"{path}.name: {name} does not inherit from {base.__name__}")
    is_own = "__dataclass_fields__" in vars(found)
    require(is_own, f"{path}.name: {name} is no dataclass; decorate the class with @dataclass")
    return found
