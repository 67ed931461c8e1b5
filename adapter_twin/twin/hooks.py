"""Policies in compiled code: their parameters are numbers there, their methods functions.

A policy is a frozen dataclass. The scheduler calls its methods where policies may differ, as plain
Python or, compiled by numba, as functions chosen by the policy's type and compiled into one with
the scheduler.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import numba
from numba.core import cgutils
from numba.extending import (
    NativeValue,
    make_attribute_wrapper,
    models,
    overload_method,
    register_model,
    typeof_impl,
    unbox,
)

from adapter_twin.errors import require
from adapter_twin.twin.compiled import OPTIONS
from adapter_twin.workload.strict import suggestion


class Hooks:
    """A class whose public methods compiled code can call, and nothing else can be overridden.

    Raises
    ------
    AdapterTwinError
        A subclass that does not say ``new_hooks=True`` has a public method that none of its bases
        has, so nobody would call it, or one that takes other parameters.
    """

    def __init_subclass__(cls, *, new_hooks: bool = False) -> None:
        methods = {n: f for n, f in vars(cls).items() if inspect.isfunction(f) and n[0] != "_"}
        for name, method in methods.items():
            signature, inherited = inspect.signature(method), getattr(super(cls, cls), name, None)
            if inherited is not None:
                takes = ", ".join(inspect.signature(inherited).parameters)
                found = ", ".join(signature.parameters)
                require(takes == found, f"{cls.__name__}.{name}: takes ({takes}), not ({found})")
            else:
                hooks = [h for h in dir(cls) if h[0] != "_" and h not in methods]
                where = f"{cls.__name__}.{name}: no hook of that name"
                require(new_hooks, where + suggestion(name, hooks))
                _compile_calls_of(name, signature)


class PolicyType(numba.types.Type):
    """The type of a policy in compiled code: its class by name, and a digest of all sources.

    What numba keeps on disk is found by the types of the arguments, so what was compiled from other
    sources is never used. No object is part of it: the index of what is on disk can be read where
    the module of some policy is missing.
    """

    def __init__(self, name: str, fields: tuple[tuple[str, Any], ...]) -> None:
        self.fields = fields
        super().__init__(name)


@register_model(PolicyType)
class _Model(models.StructModel):
    def __init__(self, manager: Any, policy: PolicyType) -> None:
        super().__init__(manager, policy, list(policy.fields))


_CLASSES: dict[str, type] = {}
"""The class of each `PolicyType` of this process, by its name."""

_NUMBERS = {float: numba.float64, int: numba.int64, bool: numba.boolean}
_SCHEDULER = Path(__file__).parent


@typeof_impl.register(Hooks)
def _typeof(policy: Any, _: Any) -> PolicyType:
    return type_of(policy.__class__)


@cache
def type_of(cls: type[Any]) -> PolicyType:
    """Return the type of a policy class: a change of the scheduler or of its own file makes it new.

    Raises
    ------
    AdapterTwinError
        A parameter is no number.
    """
    own = {Path(inspect.getfile(base)) for base in cls.__mro__[:-1]}
    files = own | set(_SCHEDULER.rglob("*.py"))
    digest = hashlib.sha256(b"".join(sorted(path.read_bytes() for path in files))).hexdigest()
    name = f"{cls.__module__}.{cls.__qualname__} {digest[:16]}"
    hints = get_type_hints(cls)
    fields = []
    for field in inspect.signature(cls).parameters:
        known = hints[field] in _NUMBERS
        require(known, f"{cls.__name__}.{field}: a parameter is annotated int, float or bool")
        _compile_reads_of(field)
        fields.append((field, _NUMBERS[hints[field]]))
    _CLASSES[name] = cls
    return PolicyType(name, tuple(fields))


@unbox(PolicyType)
def _unbox(policy: PolicyType, value: Any, c: Any) -> Any:
    struct = cgutils.create_struct_proxy(policy)(c.context, c.builder)
    for name, number in policy.fields:
        attribute = c.pyapi.object_getattr_string(value, name)
        setattr(struct, name, c.unbox(number, attribute).value)
        c.pyapi.decref(attribute)
    failed = cgutils.is_not_null(c.builder, c.pyapi.err_occurred())
    return NativeValue(struct._getvalue(), is_error=failed)


@cache
def _compile_reads_of(field: str) -> None:
    make_attribute_wrapper(PolicyType, field, field)


def _compile_calls_of(name: str, signature: inspect.Signature) -> None:
    def choose(policy: PolicyType, *_: Any) -> Any:
        return getattr(_CLASSES[policy.name], name)

    choose.__signature__ = signature  # type: ignore[attr-defined]
    overload_method(PolicyType, name, strict=False, jit_options=OPTIONS)(choose)
