"""The kinds of columns that the schemas are made of."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from pandera.pandas import Check, Column

from adapter_twin.workload.scenario import LORA_RANKS


def number(low: float | None = None, high: float | None = None, **options: Any) -> Column:
    """Return a finite float between bounds."""
    checks = [Check(lambda x: x.abs() != float("inf"), error="must be finite")]
    if low is not None:
        checks.append(Check.ge(low, error=f"must be at least {low:g}"))
    if high is not None:
        checks.append(Check.le(high, error=f"must be at most {high:g}"))
    return Column(**{"dtype": float, "checks": checks, "coerce": True, **options})


def positive(**options: Any) -> Column:
    """Return a finite float above zero."""
    checks = [Check.gt(0, error="must be above 0"), Check.lt(float("inf"), error="must be finite")]
    return Column(float, checks, coerce=True, **options)


def whole(low: int) -> Column:
    """Return a whole number of at least `low`."""
    return Column("int64", Check.ge(low, error=f"must be at least {low}"), coerce=True)


def text(pattern: str = r".+", example: str = "", **options: Any) -> Column:
    """Return a text that matches a pattern."""
    error = f"must look like {example}" if example else "must not be empty"
    return Column(str, Check.str_matches(rf"^(?:{pattern})$", error=error), coerce=True, **options)


def choice(allowed: Iterable[Any], dtype: Any = str, **options: Any) -> Column:
    """Return one of some values."""
    values = list(allowed)
    error = f"must be one of {', '.join(map(str, values))}"
    return Column(dtype, Check.isin(values, error=error), coerce=True, **options)


def label(*allowed: str) -> Column:
    """Return a category, one of some names or any."""
    # Names repeat over many rows; categories keep the long tables small.
    return choice(allowed, "category") if allowed else Column("category", coerce=True)


def each(names: str, column: Column) -> dict[str, Column]:
    """Return the same column under several names, written as one text."""
    return {name: copy.deepcopy(column) for name in names.split()}


BOOL = Column(bool)
RANK = choice(LORA_RANKS, "int64")
OPTIONAL = number(0, nullable=True)
THROUGHPUTS = each("input_throughput output_throughput total_throughput", OPTIONAL)
TTFT = each("mean_ttft_ms median_ttft_ms p99_ttft_ms", OPTIONAL)
TPOT = each("mean_tpot_ms median_tpot_ms p99_tpot_ms", OPTIONAL)
ITL = each("mean_itl_ms median_itl_ms p99_itl_ms", OPTIONAL)
