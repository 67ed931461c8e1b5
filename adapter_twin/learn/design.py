"""The design of a sweep: its workloads, and its numbers of served adapters and slots.

A ``DESIGN.yaml`` holds the keys of `Design`. Its workloads are a factorial of rates and ranks, a
space-filling sample (scrambled Sobol points), or both.
"""

import math
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, Strict

from adapter_twin.errors import require
from adapter_twin.plan.grid import GRID, Grid, slot_rank
from adapter_twin.workload.adapters import Rate
from adapter_twin.workload.engine_config import ServeFlags
from adapter_twin.workload.files import parse_ranks, read_yaml
from adapter_twin.workload.models import model_shape
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.strict import (
    Count,
    Name,
    NotNegative,
    Size,
    Some,
    Text,
    Whole,
    dataclass,
    read,
)
from adapter_twin.workload.traffic import Duration, LengthDistribution, MeanTokens, Variation

Range = Annotated[tuple[NotNegative, NotNegative], Strict(False)]
Means = Annotated[tuple[MeanTokens, MeanTokens], Strict(False)]
PositiveRate = Annotated[Rate, Field(gt=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factorial:
    """Every choice of `rates_per_workload` distinct rates, with every mix of ranks.

    Attributes
    ----------
    rate_values : tuple of float
        Requests/s of one adapter.
    rates_per_workload : int
        Rates dealt over the adapters of one workload, the largest first.
    ranks : tuple of str
        As in a runs table: ``"8-16-32"``.
    mean_input_tokens, mean_output_tokens : float
    """

    rate_values: Some[PositiveRate]
    rates_per_workload: Count
    ranks: Some[str]
    mean_input_tokens: MeanTokens = 223.0
    mean_output_tokens: MeanTokens = 200.0

    def __post_init__(self) -> None:
        different = len(set(self.rate_values))
        require(
            self.rates_per_workload <= different,
            f"rates_per_workload: got {self.rates_per_workload}, there are {different} different "
            "rate_values",
        )
        _check_ranks(self.ranks)

    def draw(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the columns that describe a workload; `seed` changes nothing."""
        values = sorted(set(self.rate_values), reverse=True)
        for rates, ranks in product(combinations(values, self.rates_per_workload), self.ranks):
            yield {
                "rates_per_adapter": "-".join(np.format_float_positional(rate) for rate in rates),
                "ranks": ranks,
                "mean_input_tokens": self.mean_input_tokens,
                "mean_requested_output_tokens": self.mean_output_tokens,
                "zipf_exponent": 0.0,
                "arrival_cv": 1.0,
            }


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceFilling:
    """Scrambled Sobol points in the traffic's dimensions; each range is ``[low, high]``.

    Attributes
    ----------
    workloads : int
        Number of points.
    mean_rate : tuple of float
        Requests/s of an adapter on average; evenly spread over its logarithm, as are the lengths.
    mean_input_tokens, mean_output_tokens : tuple of float
    zipf_exponent : tuple of float
        Skew of the adapters' popularity: the k-th gets a share of k^-exponent.
    arrival_cv : tuple of float
        Burstiness: coefficient of variation of the gaps between an adapter's requests.
    ranks : tuple of str
        Each mix is as likely.
    """

    workloads: Annotated[Size, Field(le=100_000)]
    mean_rate: Annotated[tuple[PositiveRate, PositiveRate], Strict(False)]
    mean_input_tokens: Means
    mean_output_tokens: Means
    zipf_exponent: Range
    arrival_cv: Annotated[tuple[Variation, Variation], Strict(False)]
    ranks: Some[str]

    def __post_init__(self) -> None:
        for name in _RANGES:
            low, high = getattr(self, name)
            require(low <= high, f"{name}: give [low, high], got {low:g} above {high:g}")
        _check_ranks(self.ranks)

    def draw(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the columns that describe a workload."""
        from scipy.stats import qmc

        power = math.ceil(math.log2(self.workloads))
        points = qmc.Sobol(len(_RANGES) + 1, seed=seed).random_base2(power)
        for point in points[: self.workloads]:
            value = {name: self._scale(name, u) for name, u in zip(_RANGES, point, strict=False)}
            yield {
                "rates_per_adapter": f"{value['mean_rate']:.6f}",
                "ranks": self.ranks[int(point[-1] * len(self.ranks))],
                "mean_input_tokens": value["mean_input_tokens"],
                "mean_requested_output_tokens": value["mean_output_tokens"],
                "zipf_exponent": value["zipf_exponent"],
                "arrival_cv": value["arrival_cv"],
            }

    def _scale(self, name: str, u: float) -> float:
        low, high = getattr(self, name)
        value = low * (high / low) ** u if name in _LOGARITHMIC else low + (high - low) * u
        return float(f"{value:.4g}")


_LOGARITHMIC = ("mean_rate", "mean_input_tokens", "mean_output_tokens")
_FLAGS = ServeFlags()
_RANGES = (*_LOGARITHMIC, "zipf_exponent", "arrival_cv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A sweep of each workload on every pair of served adapters N and slots G <= N.

    Attributes
    ----------
    name : str
    models : tuple of str
    served_adapters, adapter_slots : tuple of int
        The grid.
    max_num_seqs, max_num_batched_tokens, block_size : int
        As in `adapter_twin.workload.engine_config.EngineConfig`.
    length_distribution : str
    length_cv : float
        As `distribution` and `cv` of `adapter_twin.workload.traffic.Lengths`.
    duration_s : float
        Window of every run.
    slo : Slo, optional
        Adds the share of requests that meet it.
    factorial : Factorial, optional
    space_filling : SpaceFilling, optional
    seed : int
        Of the traffic: all runs draw from it, so that configurations meet the same requests.
    replications : int
        Runs of each configuration, at `seed`, `seed` + 1, ...
    """

    name: Name
    models: Some[Text]
    served_adapters: Grid = GRID
    adapter_slots: Grid = GRID
    max_num_seqs: Size = _FLAGS.max_num_seqs
    max_num_batched_tokens: Size = _FLAGS.max_num_batched_tokens
    block_size: Size = _FLAGS.block_size
    length_distribution: LengthDistribution = "sharegpt"
    length_cv: Variation = 1.0
    duration_s: Duration = 3600.0
    slo: Slo | None = None
    factorial: Factorial | None = None
    space_filling: SpaceFilling | None = None
    seed: Whole = 0
    replications: Count = 1

    def __post_init__(self) -> None:
        for model in self.models:
            model_shape(model)
        require(
            min(self.adapter_slots) <= max(self.served_adapters),
            "adapter_slots: all are above served_adapters; slots may not exceed served adapters",
        )
        has_workloads = self.factorial is not None or self.space_filling is not None
        require(has_workloads, "factorial: give factorial or space_filling workloads, or both")

    def workloads(self) -> pd.DataFrame:
        """Return one row per workload: ``workload_id`` and the configuration but N and G."""
        rows: list[dict[str, Any]] = []
        for part in (self.factorial, self.space_filling):
            rows += part.draw(self.seed) if part is not None else []
        table = pd.concat([pd.DataFrame(rows).assign(model=model) for model in self.models])
        ids = [f"{self.name}-{i:05d}" for i in range(len(table))]
        return table.assign(
            workload_id=ids,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            length_distribution=self.length_distribution,
            length_cv=self.length_cv,
        ).reset_index(drop=True)


def load_design(path: str | Path) -> Design:
    """Read a ``DESIGN.yaml``.

    Raises
    ------
    AdapterTwinError
        The file cannot be read, or has an unknown, missing or wrong key, named by its path.
    """
    return read(Design, read_yaml(Path(path)))


def _check_ranks(mixes: tuple[str, ...]) -> None:
    for mix in mixes:
        slot_rank(parse_ranks(mix))
