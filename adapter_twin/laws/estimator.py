"""What the laws have in common: ``fit``, attributes that end in an underscore, and JSON.

They follow scikit-learn's conventions without its base class, whose import would slow down every
command.
"""

from __future__ import annotations

from typing import Any, Self


class Estimator:
    """A law, saved as its parameters and fitted attributes."""

    def to_dict(self) -> dict[str, Any]:
        """Return parameters and fitted attributes as plain values."""
        return {key: _plain(value) for key, value in vars(self).items()}

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
    return value.tolist() if hasattr(value, "tolist") else value
