"""The service of one replica once it is warm: simulated windows, cut after a warm-up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from adapter_twin.laws import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.service.metrics import slo_attainment, weighted_percentile
from adapter_twin.twin.records import Records, Simulation
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.scenario import EngineConfig, Slo, Workload
from adapter_twin.workload.trace import Trace, generate, generators

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

FIGURES = (
    "offered_tokens_per_s",
    "total_throughput",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_itl_ms",
    "p99_itl_ms",
)
"""What is told of a window; of TTFT and ITL over all requests."""

WARM_UP_S = 300.0
"""Batches have filled by then, and adapters without a slot have begun to wait."""

WINDOW_S = 900.0
ENOUGH_REQUESTS = 1000
LONG_WINDOW_S = 4 * 3600.0
FEWEST_REQUESTS = 100
"""Slow traffic gets a longer window, so that percentiles and shares mean something: until there are
enough requests, or the window is long and there are a few."""

TWIN_ERROR = {
    "total_throughput": 0.026,
    "mean_ttft_ms": 0.287,
    "p99_ttft_ms": 0.287,
    "mean_itl_ms": 0.1,
    "p99_itl_ms": 0.467,
}
"""The twin's own error, relative, meant for 95 % of the runs: the errors on measured runs that the
fit had not seen (``data/expected/bars_left_out.csv``, the worse of two models), taken as normal, so
2.46 times a mean and 2.91 times a median. A mean TTFT is given the error of the percentile. Errors
have heavier tails, so that fewer runs are within (``data/expected/coverage_left_out.csv``)."""


@dataclass(frozen=True, slots=True)
class WindowTraffic:
    """The requests of one window, which several engines may share.

    Attributes
    ----------
    workload : Workload
        Over warm-up and window.
    slo : Slo, optional
    seed : int
    trace : Trace
    offered_tokens_per_s : float
        Input plus requested output tokens per second that arrive in the window: with few requests
        chance moves it, and what is served with it.
    """

    workload: Workload
    slo: Slo | None
    seed: int
    trace: Trace
    offered_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Service:
    """How one engine served a window.

    Attributes
    ----------
    figures : dict
        `FIGURES`, and ``slo_attainment`` with an SLO.
    records : Records
        Of the requests that arrived after the warm-up.
    ttft_ms : float64, shape (requests,)
        Their time to first token; what still waits counts with its wait so far.
    duration_s : float
    """

    figures: dict[str, float]
    records: Records
    ttft_ms: Floats
    duration_s: float


def warmed_up(calibration: Calibration) -> Calibration:
    """Return the laws of a server on which each adapter has been used before.

    A first use reads the adapter from disk and, on vLLM 0.8.5, stops the front end. It happens once
    in a server's life and, where an adapter has few requests, long after the start.
    """
    front_end, loading = copy(calibration.front_end), copy(calibration.loading)
    front_end.first_use_ms_ = loading.read_ms_ = loading.read_ms_per_rank_ = 0.0
    return replace(calibration, front_end=front_end, loading=loading)


def first_uses_s(demand: Demand, calibration: Calibration) -> float:
    """Return how long first uses of all adapters take together, in s."""
    ranks = np.array([adapter.rank for adapter in demand.adapters])
    pauses_s = 1e-3 * calibration.front_end.first_use_ms_ * len(ranks)
    return float(pauses_s + calibration.loading.read_s(ranks).sum())


def draw_traffic(
    demand: Demand, calibration: Calibration, *, seed: int, load: float = 1.0
) -> WindowTraffic:
    """Draw the requests of one window."""
    workload = demand.workload(WARM_UP_S + WINDOW_S, load)
    rate = workload.offered_request_rate
    window_s = max(WINDOW_S, min(ENOUGH_REQUESTS / rate, LONG_WINDOW_S), FEWEST_REQUESTS / rate)
    workload = replace(workload, duration_s=WARM_UP_S + window_s)
    # `adapter_twin.twin.simulate.draw_requests`, but the offered load counts what is requested
    traffic, stops, _ = generators(seed)
    requested = generate(workload, traffic, calibration.lengths.marginals)
    emitted = calibration.early_stop.apply(requested.output_tokens, stops)
    first = np.searchsorted(requested.arrival_s, WARM_UP_S)
    tokens = requested.prompt_tokens[first:].sum() + requested.output_tokens[first:].sum()
    return WindowTraffic(
        workload=workload,
        slo=demand.slo,
        seed=seed,
        trace=replace(requested, output_tokens=emitted),
        offered_tokens_per_s=float(tokens / window_s),
    )


def serve(traffic: WindowTraffic, engine: EngineConfig, calibration: Calibration) -> Service:
    """Simulate an engine on one window's requests.

    Throughput counts what completes in the window. TTFT and SLO attainment are of the requests that
    arrive in it. Inter-token latencies are the steps' intervals, each counted once per request that
    it kept waiting; gaps of preempted requests are left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller warns of extrapolations, once
        run = simulate(
            traffic.workload, engine, calibration, seed=traffic.seed, trace=traffic.trace
        )
    records = arrived_after(run.records, WARM_UP_S)
    started = np.isfinite(records.first_token_s)
    told_s = np.where(started, records.first_token_s, run.duration_s)
    ttft_ms = 1e3 * (told_s - records.arrival_s)
    figures = {
        "offered_tokens_per_s": traffic.offered_tokens_per_s,
        "total_throughput": _throughput(run),
        "mean_ttft_ms": float(ttft_ms.mean()),
        "p99_ttft_ms": float(np.percentile(ttft_ms, 99)),
        **_itl_ms(run),
    }
    if traffic.slo is not None:
        figures["slo_attainment"] = slo_attainment(records, traffic.slo, run.duration_s)
    return Service(figures, records, ttft_ms, run.duration_s)


def arrived_after(records: Records, time_s: float) -> Records:
    """Return the requests that arrive after a warm-up."""
    first = np.searchsorted(records.arrival_s, time_s)
    return Records(*(getattr(records, column.name)[first:] for column in fields(records)))


def _throughput(run: Simulation) -> float:
    """Return the tokens/s of the requests that complete after the warm-up, whenever they came."""
    records = run.records
    done = records.end_s >= WARM_UP_S  # false for those without an end
    tokens = records.prompt_tokens[done].sum() + records.output_tokens[done].sum()
    return float(tokens / (run.duration_s - WARM_UP_S))


def _itl_ms(run: Simulation) -> dict[str, float]:
    first = max(int(np.searchsorted(run.steps.end_s, WARM_UP_S)), 1)
    gap_ms = 1e3 * np.diff(run.steps.end_s[first - 1 :])
    count = run.steps.decodes[first:].astype(np.int64)
    gaps = int(count.sum())  # none where outputs are of one token
    return {
        "mean_itl_ms": float((gap_ms * count).sum()) / gaps if gaps else math.nan,
        "p99_itl_ms": float(weighted_percentile(gap_ms, count, [99.0])[0]),
    }


def expect(services: Sequence[Service], slo: Slo | None) -> dict[str, dict[str, float]]:
    """Return each figure with a 95 % prediction interval, from independent windows.

    The interval is that of one more window: it holds the chance in arrivals and lengths (Student's
    t over the windows) and, added in quadrature on a logarithmic scale, `TWIN_ERROR`. It does not
    hold the error in the rates and lengths that were asked about. The SLO's attainment is computed
    anew with limits that are tighter and wider by the twin's error.

    Returns
    -------
    dict
        Figure to ``value`` (mean over the windows), ``low`` and ``high``.
    """
    chance = float(stdtrit(len(services) - 1, 0.975)) * math.sqrt(1 + 1 / len(services))
    expected = {}
    for name, error in TWIN_ERROR.items():
        values = np.array([service.figures[name] for service in services])
        spread = chance * float(np.log(values).std(ddof=1))
        factor = math.exp(math.hypot(spread, math.log1p(error)))
        mean = float(values.mean())
        expected[name] = {"value": mean, "low": mean / factor, "high": mean * factor}
    if slo is not None:
        share, tight, wide = (_attained(services, slo, scale) for scale in (0, -1, 1))
        expected["slo_attainment"] = {
            "value": float(share.mean()),
            "low": max(float(tight.mean() - chance * tight.std(ddof=1)), 0.0),
            "high": min(float(wide.mean() + chance * wide.std(ddof=1)), 1.0),
        }
    return expected


def _attained(services: Sequence[Service], slo: Slo, scale: int) -> Floats:
    """Return the attainment in each window with limits moved by `scale` times the twin's error."""

    def moved(limit_ms: float | None, figure: str) -> float | None:
        return None if limit_ms is None else limit_ms * (1 + TWIN_ERROR[figure]) ** scale

    limits = replace(
        slo,
        ttft_ms=moved(slo.ttft_ms, "p99_ttft_ms"),
        itl_ms=moved(slo.itl_ms, "mean_itl_ms"),
    )
    return np.array([slo_attainment(s.records, limits, s.duration_s) for s in services])


def worst_served(demand: Demand, services: Sequence[Service]) -> dict[str, Any] | None:
    """Return the adapter with the longest p99 TTFT, over all windows together.

    An adapter without a slot is passed over by the requests of those that have one, so means over
    all requests hide it.
    """
    import pandas as pd

    requests: pd.DataFrame = pd.concat(
        [pd.DataFrame({"adapter": s.records.adapter, "ttft_ms": s.ttft_ms}) for s in services]
    )
    groups = requests[requests.adapter >= 0].groupby("adapter").ttft_ms
    p99 = groups.quantile(0.99)
    if p99.empty:
        return None
    worst = int(p99.index.to_numpy()[p99.argmax()])
    adapter = demand.adapters[worst]
    return {
        "name": adapter.name,
        "rank": adapter.rank,
        "request_rate": adapter.request_rate,
        "p99_ttft_ms": float(p99[worst]),
        "requests": int(groups.count()[worst]),
    }


def mean_figures(services: Sequence[Service]) -> Mapping[str, float]:
    """Return the means of the figures over several windows."""
    names = services[0].figures
    return {name: float(np.mean([s.figures[name] for s in services])) for name in names}
