"""Strict classes and functions: pydantic checks them, and every failure is one clear line."""

from __future__ import annotations

import difflib
import inspect
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from functools import cache, wraps
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, get_args, get_type_hints

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticSerializationError, to_json

from adapter_twin.errors import AdapterTwinError

P = ParamSpec("P")
T = TypeVar("T")


def _plain(value: Any) -> Any:
    """Return a whole number of numpy's as Python's own."""
    return value.item() if hasattr(value, "dtype") and value.dtype.kind in "iu" else value


def _fits(value: int) -> int:
    if value >= 2**63:
        raise ValueError("must fit into 64 bits")
    return value


LONGEST_TOKENS = 1 << 28
"""No length is above this: sums of a few stay within 32 bits."""

_BITS = AfterValidator(_fits)

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=200)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_plain), _BITS]
Size = Annotated[int, Field(ge=1, le=2**20), BeforeValidator(_plain)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_plain), _BITS]
Tokens = Annotated[int, Field(ge=0, le=LONGEST_TOKENS)]
Integer = Annotated[int, Field(ge=-(2**31), lt=2**31), BeforeValidator(_plain)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Many = Annotated[tuple[T, ...], Strict(False)]
Some = Annotated[tuple[T, ...], Strict(False), Field(min_length=1)]
"""What fields hold; numbers are finite, `Many` and `Some` take a list as well.

A `Name` becomes a file, a flag or a field of Kubernetes; a `Size` is that of an array.
"""

keys = pydantic.with_config(ConfigDict(strict=True, allow_inf_nan=False))
"""The decorator of a typed dictionary: some of the keys of a file that others write."""

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from dataclasses import dataclass as dataclass

    Several = Sequence
else:
    Several = Some  # of an argument, which may be a list

    def dataclass(**options):
        """Make a dataclass whose fields are checked, in Python and by `read`."""

        def make(kind):
            checked = pydantic.dataclasses.dataclass(kind, config=CONFIG, **options)
            checked.__init__ = _in_one_line(checked.__init__, checked)
            return checked

        return make


def function(make: Callable[P, T]) -> Callable[P, T]:
    """Have a function's arguments checked against its annotations."""
    return _in_one_line(pydantic.validate_call(config=CONFIG)(make), make)


def _in_one_line(call: Callable[P, T], kind: Any) -> Callable[P, T]:
    @wraps(call)
    def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except ValidationError as error:
            raise AdapterTwinError(_explain(error, kind)) from None

    return translated


def read(kind: type[T], content: object, path: str = "") -> T:
    """Build a class from what a YAML or JSON file holds.

    Parameters
    ----------
    kind : type
        Made by `dataclass`.
    content : object
        Plain values; a mapping of the class's fields is expected.
    path : str
        Dotted path of the place, for messages; empty at the top.

    Raises
    ------
    AdapterTwinError
        Unknown or missing key, wrong type, or a value that the class refuses.
    """
    try:
        json = to_json(content, bytes_mode="base64")  # its lists and mappings count as ours
        built: T = _reader(kind).validate_json(json)
    except ValidationError as error:
        raise AdapterTwinError(_explain(error, kind, path)) from None
    except PydanticSerializationError:
        raise AdapterTwinError(f"{path or 'file'}: refers to itself; write it out") from None
    return built


_reader: Any = cache(TypeAdapter)


def suggestion(given: object, choices: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` for a near miss, the choices otherwise."""
    choices = list(choices)
    if not choices:
        return "; leave it out"
    near = difflib.get_close_matches(str(given), choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; use one of {', '.join(choices)}"


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_MAPPING = "expected a mapping of keys"
_REASONS = {
    "missing": "missing; add this key",
    "missing_argument": "missing; add this key",
    "extra_forbidden": "unknown key; leave it out",
    "finite_number": "must be finite",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must not be empty; give at least {min_length}",
    "string_too_short": "must not be empty",
    "string_too_long": "must not be longer than {max_length}",
    "string_pattern_mismatch": "use letters, digits, ., _ and -, and begin with one of the first",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number (not in quotes; 1.0e6, not 1e6)",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": _MAPPING,
    "dataclass_type": _MAPPING,
}


def _explain(error: ValidationError, kind: Any, path: str = "") -> str:
    """Say in one line what is wrong where: an unknown key, as another may miss it, or the first."""
    found = min(error.errors(include_url=False), key=lambda one: one["type"] not in _UNKNOWN)
    what, given, context = found["type"], found["input"], found.get("ctx", {})
    for depth, part in enumerate(found["loc"]):
        if isinstance(part, int) and depth == 0:  # an argument without its name
            part = list(inspect.signature(kind).parameters)[part]
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if isinstance(context.get("error"), AdapterTwinError):  # of several fields: it names one itself
        return f"{path}.{context['error']}" if path else str(context["error"])
    if what == "unexpected_keyword_argument":
        *owners, key = found["loc"]
        return f"{path}: unknown key{suggestion(key, _keys(kind, owners))}"
    if what == "literal_error":
        choices = suggestion(given, re.findall(r"'(.*?)'", context["expected"]))
        return f"{path}: got {_show(given)}{choices}"
    reason = _REASONS.get(what, found["msg"].removeprefix("Value error, ")).format(**context)
    got = "" if what.startswith(("missing", "extra")) else f", got {_show(given)}"
    return f"{path or 'file'}: {reason}{got}"


def _keys(kind: Any, owners: list[int | str]) -> Iterable[str]:
    """Return the keys that the class at a place within another one takes."""
    for owner in owners:
        if isinstance(owner, str):
            kind = get_type_hints(kind)[owner]
            while not is_dataclass(kind):
                kind = next(part for part in get_args(kind) if part is not NoneType)
    return inspect.signature(kind).parameters


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 40


def _show(value: object) -> str:
    text = "nothing" if value is None else _SHORT.repr(value)  # never the whole of a large one
    return text if len(text) <= 60 else f"{text[:57]}..."
