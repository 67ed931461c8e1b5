"""The design of a sweep: which workloads, on which numbers of served adapters and slots.

A ``DESIGN.yaml`` holds the keys of `Design`. Its workloads are a factorial of rates and ranks, a
space-filling sample (scrambled Sobol points), or both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_twin.plan.grid import GRID, MAX_NUM_SEQS, check_grid, slot_rank
from adapter_twin.workload.files import (
    DEFAULT_BATCHED_TOKENS,
    DEFAULT_BLOCK_TOKENS,
    parse_ranks,
    read_yaml,
)
from adapter_twin.workload.models import model_shape
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.strict import build, require, require_positive

if TYPE_CHECKING:
    import pandas as pd


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

    rate_values: tuple[float, ...]
    rates_per_workload: int
    ranks: tuple[str, ...]
    mean_input_tokens: float = 223.0
    mean_output_tokens: float = 200.0

    def __post_init__(self) -> None:
        require(bool(self.rate_values), "rate_values: give at least one rate")
        require(min(self.rate_values) > 0, "rate_values: rates must be above zero")
        require(
            1 <= self.rates_per_workload <= len(set(self.rate_values)),
            f"rates_per_workload: got {self.rates_per_workload}, there are "
            f"{len(set(self.rate_values))} different rate_values",
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

    workloads: int
    mean_rate: tuple[float, ...]
    mean_input_tokens: tuple[float, ...]
    mean_output_tokens: tuple[float, ...]
    zipf_exponent: tuple[float, ...]
    arrival_cv: tuple[float, ...]
    ranks: tuple[str, ...]

    def __post_init__(self) -> None:
        require_positive(self, "workloads")
        for name in _RANGES:
            low_high = getattr(self, name)
            require(
                len(low_high) == 2 and 0 <= low_high[0] <= low_high[1] < math.inf,
                f"{name}: give [low, high], none below zero",
            )
            is_log = name in _LOGARITHMIC or name == "arrival_cv"
            require(low_high[0] > 0 or not is_log, f"{name}: low must be above zero")
        _check_ranks(self.ranks)

    def draw(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the columns that describe a workload."""
        from scipy.stats import qmc

        points = qmc.Sobol(len(_RANGES) + 1, seed=seed).random_base2(
            max(math.ceil(math.log2(self.workloads)), 0)
        )
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
_RANGES = (*_LOGARITHMIC, "zipf_exponent", "arrival_cv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What a sweep runs: each workload on every pair of served adapters N and slots G <= N.

    Attributes
    ----------
    name : str
    models : tuple of str
    served_adapters, adapter_slots : tuple of int
        The grid.
    max_num_seqs, max_num_batched_tokens, block_size : int
        As in `adapter_twin.workload.scenario.EngineConfig`.
    length_distribution : str
    length_cv : float
        As `distribution` and `cv` of `adapter_twin.workload.scenario.Lengths`.
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

    name: str
    models: tuple[str, ...]
    served_adapters: tuple[int, ...] = GRID
    adapter_slots: tuple[int, ...] = GRID
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS
    block_size: int = DEFAULT_BLOCK_TOKENS
    length_distribution: str = "sharegpt"
    length_cv: float = 1.0
    duration_s: float = 3600.0
    slo: Slo | None = None
    factorial: Factorial | None = None
    space_filling: SpaceFilling | None = None
    seed: int = 0
    replications: int = 1

    def __post_init__(self) -> None:
        require(bool(self.models), "models: give at least one")
        for model in self.models:
            model_shape(model)
        check_grid("served_adapters", self.served_adapters)
        check_grid("adapter_slots", self.adapter_slots)
        require(
            min(self.adapter_slots) <= max(self.served_adapters),
            "adapter_slots: all are above served_adapters; slots may not exceed served adapters",
        )
        require_positive(self, "duration_s", "replications")
        require(self.seed >= 0, f"seed: must be zero or more, got {self.seed}")
        has_workloads = self.factorial is not None or self.space_filling is not None
        require(has_workloads, "factorial: give factorial or space_filling workloads, or both")

    def workloads(self) -> pd.DataFrame:
        """Return one row per workload: ``workload_id`` and the configuration but N and G."""
        import pandas as pd

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
    return build(Design, read_yaml(Path(path)), "")


def _check_ranks(mixes: Sequence[str]) -> None:
    require(len(mixes) > 0, "ranks: give at least one mix")
    for mix in mixes:
        slot_rank(parse_ranks(mix))
