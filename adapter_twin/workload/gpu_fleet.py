"""The GPUs that a fleet may be built of: their kinds, prices and numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.workload.strict import Count, Positive, Some, Text, dataclass

Copies = Annotated[Count, Field(le=100)]
Price = Annotated[Positive, Field(le=1e6)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKind:
    """GPUs of one kind.

    Attributes
    ----------
    calibration : str
        The laws of the model on this kind: a name, the path of a ``.json`` file, or ``auto``, those
        of the whole file.
    price_per_hour : float, optional
        Of one GPU, in any currency.
    available : int, optional
        GPUs that are to be had; left out, any number.
    """

    calibration: Text = "auto"
    price_per_hour: Price | None = None
    available: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFleet:
    """What a fleet may be built of, and what it shall be best in.

    Attributes
    ----------
    kinds : tuple of GpuKind
    objective : {"gpus", "price"}
        The fewest GPUs, or the lowest price per hour.
    copies : int
        Each adapter is on as many GPUs at least, in equal shares.

    Examples
    --------
    >>> GpuFleet(kinds=[GpuKind(calibration="auto@l40s")], objective="price")
    Traceback (most recent call last):
    adapter_twin.errors.AdapterTwinError: kinds[0].price_per_hour: missing, and the objective ...
    """

    kinds: Some[GpuKind] = (GpuKind(),)
    objective: Literal["gpus", "price"] = "gpus"
    copies: Copies = 1

    def __post_init__(self) -> None:
        names = [kind.calibration for kind in self.kinds]
        prices = [kind.price_per_hour for kind in self.kinds]
        needed = self.objective == "price" or any(price is not None for price in prices)
        for number, (name, price) in enumerate(zip(names, prices, strict=True)):
            where, first = f"kinds[{number}]", names.index(name)
            why = "the objective is price" if self.objective == "price" else "others have one"
            known = price is not None or not needed
            require(known, f"{where}.price_per_hour: missing, and {why}; add it")
            require(first == number, f"{where}: the same GPU as kinds[{first}]; leave one out")

    @property
    def is_priced(self) -> bool:
        """Whether prices are known."""
        return self.kinds[0].price_per_hour is not None
