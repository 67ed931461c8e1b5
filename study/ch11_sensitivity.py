"""Sobol indices of the twin's answers over its laws and over the traffic.

A factor's first-order index is the share of an answer's variance that it explains alone, its total
index what it explains with others, too. Points that differ in laws or lengths meet the very same
arrivals. The indices of rates, skew and burstiness hold the noise of an hour's traffic as well.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import joblib
import numpy as np

from adapter_twin.capacity.analytic import analyse
from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.laws.estimator import Estimator
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.laws.step_time import Floats, Number
from adapter_twin.plan.criterion import MARGIN
from adapter_twin.plan.grid import grid_runs
from adapter_twin.service.metrics import STARVATION_THRESHOLD, summarize
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import parse_ranks, parse_rates, records, run_to_workload
from adapter_twin.workload.strict import suggestion
from adapter_twin.workload.traffic import Workload

if TYPE_CHECKING:
    import pandas as pd

Law = TypeVar("Law", bound=Estimator)
Mix = Mapping[str, Any]
Point = Mapping[str, float]

DURATION_S = 3600.0
OFF_BY_A_TENTH = (0.9, 1.1)

FACTORS: dict[str, tuple[float, float]] = {
    "step_time_base": OFF_BY_A_TENTH,  # what a step costs without adapters
    "step_time_adapters": OFF_BY_A_TENTH,  # what slots, ranks and adapters add
    "kv_memory": OFF_BY_A_TENTH,  # shared by slots and KV cache
    "loading": OFF_BY_A_TENTH,
    "scheduling": OFF_BY_A_TENTH,
    "front_end": OFF_BY_A_TENTH,
    "request_rates": OFF_BY_A_TENTH,
    "input_tokens": OFF_BY_A_TENTH,
    "output_tokens": OFF_BY_A_TENTH,
    "zipf_exponent": (0.0, 1.0),
    "arrival_cv": (1.0, 3.0),
}
"""Each factor varies evenly between its bounds: multipliers of laws, then the traffic's."""

DEALS: list[int] = [0, *np.unique(np.geomspace(1, 1024, 100).round().astype(int)).tolist()]
"""The capacity is searched for among these rounds of dealing out rates and ranks."""

SLOTS: list[int] = (4 * 2 ** (np.arange(28) / 4)).round().astype(int).tolist()
"""The capacity takes the best of these numbers of slots."""


class StepsOff(RooflineLaw):
    """A step-time law that is off: what a step costs without adapters, and what these add.

    Attributes
    ----------
    base, adapters : float
        Multipliers.
    """

    base: float
    adapters: float

    @property
    def arrival_ms(self) -> float:
        """What a request costs the engine's process when it arrives."""
        return self.base * super().arrival_ms

    def for_engine(self, max_loras: Number, max_lora_rank: Number) -> Floats:
        """Return the coefficients in ms for an engine, shape (regimes, features)."""
        without = super().for_engine(0, 0)
        whole = super().for_engine(max_loras, max_lora_rank)
        return self.adapters * whole + (self.base - self.adapters) * without


def perturbed(calibration: Calibration, factors: Point) -> Calibration:
    """Return a copy of a calibration whose laws are multiplied.

    Parameters
    ----------
    calibration : Calibration
    factors : mapping
        By name, as in `FACTORS`. Those left out are 1; the traffic's change nothing here.
    """
    for name in factors:
        require(name in FACTORS, f"factors: {name!r} is unknown{suggestion(name, FACTORS)}")
    off = dict.fromkeys(FACTORS, 1.0) | dict(factors)
    parts = {"base": off["step_time_base"], "adapters": off["step_time_adapters"]}
    return replace(
        calibration,
        step_time=StepsOff.from_dict(vars(calibration.step_time) | parts),
        memory=_with_memory(calibration.memory, off["kv_memory"]),
        loading=_scaled(calibration.loading, "_ms_", off["loading"]),
        scheduling=_scaled(calibration.scheduling, "_ms_", off["scheduling"]),
        front_end=_scaled(calibration.front_end, "_ms_", off["front_end"]),
    )


def _with_memory(law: MemoryLaw, factor: float) -> MemoryLaw:
    """Return a copy of a law with more or less memory for slots and KV cache."""
    engine = EngineConfig(model="any", max_loras=1)
    less_gib = (1 - factor) * law.shared_gib(engine)
    return type(law).from_dict(vars(law) | {"reserve_gib_": law.reserve_gib_ + less_gib})


def _scaled(law: Law, unit: str, factor: float) -> Law:
    """Return a copy of a law with its attributes of a unit, not their intervals, multiplied."""
    own = vars(law)
    scaled = {k: factor * v for k, v in own.items() if unit in k and isinstance(v, int | float)}
    return type(law).from_dict(own | scaled)


def answer(
    workload: Mix, laws: Calibration, configuration: tuple[int, int], point: Point, *, seed: int = 0
) -> dict[str, float]:
    """Return the twin's answers at one point of the factors; see `sobol_indices`."""
    laws = perturbed(laws, point)
    engine, traffic = _scenario(workload, *configuration, point)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of extrapolations
        run = simulate(traffic, engine, laws, seed=seed)
    service = summarize(run.records, run.gaps, DURATION_S)
    asked = int(run.records.prompt_tokens.sum() + run.records.output_tokens.sum())
    return {
        "capacity_adapters": _capacity_adapters(workload, laws, point),
        "served_share": service["total_throughput"] * DURATION_S / asked,
        "log10_mean_ttft_ms": math.log10(service["mean_ttft_ms"]),
        "mean_itl_ms": service["mean_itl_ms"],
    }


def _capacity_adapters(workload: Mix, laws: Calibration, point: Point) -> float:
    """Return the served adapters, interpolated, of whose load the best slots serve just enough."""
    rates, ranks = parse_rates(workload["rates_per_adapter"]), parse_ranks(workload["ranks"])
    dealt = math.lcm(len(rates), len(ranks))
    enough = STARVATION_THRESHOLD + MARGIN

    @cache
    def share(deals: int) -> float:
        if deals == 0:
            return 1.0
        served = dealt * deals
        engine, traffic = _scenario(workload, served, served, point)
        slots = {min(most, served) for most in SLOTS}
        runs = analyse(traffic, [replace(engine, max_loras=some) for some in slots], laws)
        shares = runs.total_throughput / runs.offered_tokens_per_s
        return float(shares.where(runs.feasible_start, 0.0).max())

    first = bisect_left(DEALS, True, key=lambda deals: share(deals) < enough)
    require(first < len(DEALS), "rates_per_adapter: too low to find where one GPU is full")
    low, high = DEALS[first - 1 : first + 1]
    return dealt * (low + (high - low) * (share(low) - enough) / (share(low) - share(high)))


def _scenario(
    workload: Mix, served: int, slots: int, point: Point
) -> tuple[EngineConfig, Workload]:
    """Return the engine of a configuration and its traffic at a point."""
    row = records(grid_runs(workload, [served], [slots], DURATION_S))[0]
    row["arrival_cv"] = point.get("arrival_cv", row.get("arrival_cv", 1.0))
    engine, traffic = run_to_workload(row)
    rates = np.array([adapter.request_rate for adapter in traffic.adapters])
    skewed = rates * np.arange(1.0, served + 1) ** -point.get("zipf_exponent", 0.0)
    skewed *= point.get("request_rates", 1.0) * rates.sum() / skewed.sum()
    own = zip(traffic.adapters, skewed.tolist(), strict=True)
    lengths = replace(
        traffic.lengths,
        mean_input_tokens=traffic.lengths.mean_input_tokens * point.get("input_tokens", 1.0),
        mean_output_tokens=traffic.lengths.mean_output_tokens * point.get("output_tokens", 1.0),
    )
    adapters = tuple(replace(adapter, request_rate=rate) for adapter, rate in own)
    return engine, replace(traffic, adapters=adapters, lengths=lengths)


def sobol_indices(
    workload: Mix,
    calibration: Calibration,
    configuration: tuple[int, int],
    *,
    samples: int = 64,
    seed: int = 0,
    jobs: int = 1,
) -> pd.DataFrame:
    """Return the Sobol indices of the twin's answers over `FACTORS`.

    Parameters
    ----------
    workload : mapping
        ``model``, ``rates_per_adapter``, ``ranks`` and lengths, as in a runs table. At the same
        total, skew multiplies the rate of the k-th adapter by k^-exponent.
    calibration : Calibration
    configuration : tuple of int
        Served adapters and adapter slots of a simulated hour.
    samples : int
        A power of two; each takes as many evaluations as there are factors, and two.
    seed : int
        Of the traffic, the points and the intervals.
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    pandas.DataFrame
        Per ``answer`` and ``factor`` the ``first``-order and ``total`` index, half their 95 %
        bootstrap intervals (``first_conf``, ``total_conf``), and the answer's ``mean`` and ``sd``.
        Answers: ``capacity_adapters``, the most that the best number of slots serves, by the
        analytic model, which knows neither burstiness nor front end; ``served_share`` of the tokens
        that the simulated hour asks for, its ``log10_mean_ttft_ms`` and ``mean_itl_ms``.
    """
    import pandas as pd
    from SALib.analyze.sobol import analyze
    from SALib.sample.sobol import sample

    power_of_two = samples >= 2 and samples & (samples - 1) == 0
    require(power_of_two, f"samples: give a power of two from 2 on, got {samples}")
    least = perturbed(calibration, {"kv_memory": FACTORS["kv_memory"][0]})
    least.require_start(_scenario(workload, *configuration, {})[0])
    problem = {"num_vars": len(FACTORS), "names": [*FACTORS], "bounds": [*FACTORS.values()]}
    points = sample(problem, samples, calc_second_order=False, seed=seed).tolist()
    ask = joblib.delayed(partial(answer, workload, calibration, configuration, seed=seed))
    tasks = (ask(dict(zip(FACTORS, point, strict=True))) for point in points)
    answers = pd.DataFrame(joblib.Parallel(n_jobs=jobs)(tasks))
    columns = {"S1": "first", "S1_conf": "first_conf", "ST": "total", "ST_conf": "total_conf"}
    tables = {}
    for name, values in answers.items():
        with np.errstate(invalid="ignore"):  # a constant answer has indices of zero
            # seed + 1: SALib takes 0 for no seed
            found = analyze(problem, values.to_numpy(), calc_second_order=False, seed=seed + 1)
        table = pd.DataFrame(dict(found), index=[*FACTORS]).rename(columns=columns)
        tables[name] = table.assign(mean=values.mean(), sd=values.std())
    return pd.concat(tables, names=["answer", "factor"]).reset_index()
