"""The base of all laws: ``fit``, attributes that end in an underscore, and JSON.

They follow scikit-learn's conventions without its base class, whose import would slow down every
command.
"""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Annotated, Any, Self, get_type_hints

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

Fitted = Annotated[float, Field(ge=-1e9, le=1e9)]
NotBelow0 = Annotated[float, Field(ge=0, le=1e9)]
"""What files of laws hold; products of a few of them, and of batches, are finite."""


class Estimator:
    """A law, saved as its parameters and fitted attributes.

    The annotations of a class are what its file holds; those with a value may be left out.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return parameters and fitted attributes as plain values."""
        return {key: _plain(value) for key, value in vars(self).items()}

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic read a law from its saved form, each value as annotated."""
        saved = core_schema.typed_dict_schema(
            {
                name: core_schema.typed_dict_field(
                    handler.generate_schema(hint), required=not hasattr(cls, name)
                )
                for name, hint in get_type_hints(cls, include_extras=True).items()
            },
            extra_behavior="forbid",
            config=core_schema.CoreConfig(strict=True, allow_inf_nan=False),
        )
        return core_schema.json_or_python_schema(
            core_schema.no_info_after_validator_function(cls.from_dict, saved),
            core_schema.is_instance_schema(cls),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a fitted law."""
        law = cls.__new__(cls)
        vars(law).update(values)
        return law


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.tolist() if hasattr(value, "tolist") else value
