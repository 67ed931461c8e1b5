"""The service of one warm replica: simulated windows, cut after a warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from adapter_twin.laws import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import simulate_quietly
from adapter_twin.plan.logged import ANSWERED_S, LONGEST_REPLAY_S, stretch
from adapter_twin.service.intervals import cautious
from adapter_twin.service.metrics import service, slo_attainment, waits_ms, worst_served
from adapter_twin.twin.records import Records
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.trace import Trace
from adapter_twin.workload.traffic import Workload

Floats = NDArray[np.float64]

FIGURES = (
    *("offered_tokens_per_s", "total_throughput"),
    *("mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "p99_itl_ms"),
)
"""These figures of `adapter_twin.service.metrics.service_of` are told of a window."""

WARM_UP_S = 300.0
"""By this time batches have filled, and adapters without a slot have begun to wait."""

WINDOW_S = 900.0
ENOUGH_REQUESTS = 1000
LONG_WINDOW_S = 4 * 3600.0
FEWEST_REQUESTS = 100
"""Slow traffic gets a longer window, so that percentiles and shares mean something: one with enough
requests, or a long one with the fewest that will do."""

CYCLES = 20
"""Adapters that are on and off are so this often in a window, or for the time of a long one."""

TWIN_ERROR = {
    "total_throughput": 0.025,
    "mean_ttft_ms": 0.206,
    "p99_ttft_ms": 0.206,
    "mean_itl_ms": 0.076,
    "p99_itl_ms": 0.251,
}
"""The twin's own relative error on 95 % of the runs, were errors normal: 2.46 times the mean, or
2.91 times the median, of the errors on measured runs that the fit had not seen, for the worse of
two models (``data/expected/bars_left_out.csv``). A mean TTFT is given the error of the percentile.
Errors have heavier tails, so fewer runs are within (``data/expected/coverage_left_out.csv``)."""

ERROR_QUANTILES = 20
"""The twin's error is represented by this number of its quantiles."""


@dataclass(frozen=True, slots=True)
class WindowTraffic:
    """The requests of one window, which several engines may share.

    Attributes
    ----------
    workload : Workload
        Over warm-up and window, and the time to answer what came last.
    slo : Slo, optional
    seed : int
    trace : Trace
    warm_up_s, answered_s : float
        Of the workload's duration, before the window and after it.
    """

    workload: Workload
    slo: Slo | None
    seed: int
    trace: Trace
    warm_up_s: float = WARM_UP_S
    answered_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """The service that one engine gave in a window.

    Attributes
    ----------
    figures : dict
        `FIGURES`, and ``slo_attainment`` with an SLO.
    records : Records
        Of the requests that arrived in it, after the warm-up.
    duration_s : float
        When the window ended.
    """

    figures: dict[str, float]
    records: Records
    duration_s: float


def warmed_up(calibration: Calibration) -> Calibration:
    """Return the laws of a server on which each adapter has been used before.

    A first use reads the adapter from disk and, on vLLM 0.8.5, stops the front end. It happens once
    in a server's life and, where an adapter has few requests, long after the start.
    """
    front_end, loading = copy(calibration.front_end), copy(calibration.loading)
    front_end.first_use_ms_ = loading.read_ms_ = loading.read_ms_per_rank_ = 0.0
    return replace(calibration, front_end=front_end, loading=loading)


def planned_on(calibration: Calibration) -> Calibration:
    """Return the laws of a warm server that a plan is to hold on; of a prior, cautious ones."""
    return warmed_up(cautious(calibration))


def first_uses_s(demand: Demand, calibration: Calibration) -> float:
    """Return how long first uses of all adapters take together, in s."""
    pauses_s = 1e-3 * calibration.front_end.first_use_ms_ * len(demand.adapters)
    if demand.engine.lora_modules == "all":  # read at the start
        return float(pauses_s)
    _, read_s = calibration.load_times_s(demand.engine_with(1), demand.adapters)
    return float(pauses_s + read_s.sum())


def draw_traffic(
    demand: Demand, calibration: Calibration, *, seed: int, load: float = 1.0
) -> WindowTraffic:
    """Draw the requests of one window, or replay a stretch of the demand's log.

    Of a log, the demand's own seed is the log itself, see `adapter_twin.plan.logged.stretch`. Of
    numbered prompts the window is from the first one to the last answer.

    Parameters
    ----------
    demand : Demand
    calibration : Calibration
    seed : int
    load : float
        Factor on all rates, and on the places of a closed loop: a log runs as much faster.
    """
    if demand.trace is not None:
        trace, duration_s, warm_up_s = stretch(demand.trace, seed - demand.seed, WARM_UP_S)
        workload = demand.workload(duration_s / load + ANSWERED_S, load)
        places = workload.arrivals.max_concurrency
        trace = replace(trace, arrival_s=trace.arrival_s / load, max_concurrency=places)
        return WindowTraffic(workload, demand.slo, seed, trace, warm_up_s / load, ANSWERED_S)
    if demand.arrivals.num_prompts is not None:
        workload = demand.workload(LONGEST_REPLAY_S, load)
        trace = draw_requests(workload, calibration, seed=seed)
        return WindowTraffic(workload, demand.slo, seed, trace, warm_up_s=0.0)
    workload = demand.workload(WARM_UP_S + WINDOW_S, load)
    rate = workload.offered_request_rate
    cycle_s = (demand.arrivals.on_s or 0.0) + (demand.arrivals.off_s or 0.0)
    enough_s = min(max(ENOUGH_REQUESTS / rate, CYCLES * cycle_s), LONG_WINDOW_S)
    window_s = max(WINDOW_S, enough_s, FEWEST_REQUESTS / rate)
    workload = replace(workload, duration_s=WARM_UP_S + window_s)
    trace = draw_requests(workload, calibration, seed=seed)
    return WindowTraffic(workload=workload, slo=demand.slo, seed=seed, trace=trace)


def serve(traffic: WindowTraffic, engine: EngineConfig, calibration: Calibration) -> Window:
    """Simulate an engine on one window's requests; the caller warns of extrapolations, once.

    Parameters
    ----------
    traffic : WindowTraffic
    engine : EngineConfig
    calibration : Calibration
    """
    run = simulate_quietly(traffic.workload, engine, calibration, traffic.seed, traffic.trace)
    end_s = run.duration_s - traffic.answered_s
    told = service(run.records, run.gaps, end_s, slo=traffic.slo, warm_up_s=traffic.warm_up_s)
    names = FIGURES if traffic.slo is None else (*FIGURES, "slo_attainment")
    arrival_s = run.records.arrival_s
    own = run.records[(arrival_s >= traffic.warm_up_s) & (arrival_s <= end_s)]
    return Window({name: told[name] for name in names}, own, end_s)


def expect(windows: Sequence[Window], demand: Demand) -> dict[str, dict[str, float]]:
    """Return each figure with a 95 % prediction interval, from several windows.

    The interval is that of one more window: it holds the chance in arrivals and lengths (Student's
    t over the windows) and, added in quadrature on a logarithmic scale, `TWIN_ERROR`. It does not
    hold the error in the rates and lengths that were asked about. The SLO's attainment is computed
    anew with limits that are tighter and wider by the twin's error.

    Returns
    -------
    dict
        Figure to ``value``, see `typical`, ``low`` and ``high``.
    """
    values = {name: [window.figures[name] for window in windows] for name in TWIN_ERROR}
    expected = {
        name: predict_window(values[name], error, typical(values[name], demand))
        for name, error in TWIN_ERROR.items()
    }
    slo = demand.slo
    if slo is not None:
        chance = _chance(len(windows))
        share, tight, wide = (_attained(windows, slo, scale) for scale in (0, -1, 1))
        low = typical(tight, demand) - chance * float(tight.std(ddof=1))
        high = typical(wide, demand) + chance * float(wide.std(ddof=1))
        expected["slo_attainment"] = {
            "value": typical(share, demand),
            "low": max(low, 0.0),
            "high": min(high, 1.0),
        }
    return expected


def offered_tokens_per_s(windows: Sequence[Window], demand: Demand) -> float:
    """Return the load: what the rates ask for, but of a closed loop what its client sends."""
    if not demand.is_closed_loop:
        return demand.workload(WINDOW_S).offered_tokens_per_s
    return typical([window.figures["offered_tokens_per_s"] for window in windows], demand)


def slo_met_probability(windows: Sequence[Window], demand: Demand) -> float | None:
    """Return the probability that one more window meets the demand's SLO; none without one.

    It is the share of windows that do, over the chance in arrivals and lengths, and over the twin's
    error (`TWIN_ERROR`, as if normal): limits are as much tighter or wider.

    Parameters
    ----------
    windows : sequence of Window
    demand : Demand
    """
    slo = demand.slo
    if slo is None:
        return None
    scales = ndtri((np.arange(ERROR_QUANTILES) + 0.5) / ERROR_QUANTILES) / ndtri(0.975)
    attained = np.array([_attained(windows, slo, scale) for scale in scales])
    return float((attained >= slo.percentile / 100).mean())


def typical(values: Sequence[float] | Floats, demand: Demand) -> float:
    """Return what is told of a figure: its mean over drawn windows, but of a log that of itself."""
    return float(np.mean(values) if demand.trace is None else values[0])


def predict_window(
    values: Sequence[float], error: float, value: float | None = None
) -> dict[str, float]:
    """Return a figure's 95 % prediction interval for one more window.

    Parameters
    ----------
    values : sequence of float
        The figure in several windows, positive.
    error : float
        Of the twin, relative; one of `TWIN_ERROR`.
    value : float, optional
        In the middle of it; left out, their mean.
    """
    # of a window in which nothing was served the logarithm is none, and so is the interval
    logs = np.log(values) if min(values) > 0 else np.full(len(values), np.nan)
    spread = _chance(len(values)) * float(logs.std(ddof=1))
    factor = math.exp(math.hypot(spread, math.log1p(error)))
    middle = float(np.mean(values)) if value is None else value
    return {"value": middle, "low": middle / factor, "high": middle * factor}


def _chance(windows: int) -> float:
    """Return how many standard deviations one more window may be off (Student's t)."""
    return float(stdtrit(windows - 1, 0.975)) * math.sqrt(1 + 1 / windows)


def _attained(windows: Sequence[Window], slo: Slo, scale: float) -> Floats:
    """Return the attainment in each window with limits moved by `scale` times the twin's error."""

    def moved(limit_ms: float | None, figure: str) -> float | None:
        return None if limit_ms is None else limit_ms * (1 + TWIN_ERROR[figure]) ** scale

    limits = replace(
        slo,
        ttft_ms=moved(slo.ttft_ms, "p99_ttft_ms"),
        itl_ms=moved(slo.itl_ms, "mean_itl_ms"),
    )
    return np.array([slo_attainment(w.records, limits, w.duration_s) for w in windows])


def worst_adapter(demand: Demand, windows: Sequence[Window]) -> dict[str, Any] | None:
    """Return the worst-served adapter of all drawn windows, or of a log, and its service."""
    windows = windows if demand.trace is None else windows[:1]
    adapter = np.concatenate([window.records.adapter for window in windows])
    ttft_ms = np.concatenate([waits_ms(window.records, window.duration_s) for window in windows])
    worst = worst_served(adapter, ttft_ms)
    if worst is None:
        return None
    own_ms, known = ttft_ms[adapter == worst], demand.adapters[worst]
    return {
        "name": known.name,
        "rank": known.rank,
        "request_rate": known.request_rate,
        "mean_ttft_ms": float(own_ms.mean()),
        "p99_ttft_ms": float(np.percentile(own_ms, 99)),
        "requests": len(own_ms),
    }


def typical_figures(windows: Sequence[Window], demand: Demand) -> Mapping[str, float]:
    """Return `typical` values of all figures."""
    names = windows[0].figures
    return {name: typical([window.figures[name] for window in windows], demand) for name in names}
