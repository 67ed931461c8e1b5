"""A log is replayed by every plan: what is told is what its replay gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.place import place
from adapter_twin.laws import load_calibration
from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.plan.logged import (
    ANSWERED_S,
    BLOCKS,
    BUSY_S,
    DAY_S,
    busiest_hours,
    span_s,
    stretch,
)
from adapter_twin.plan.recommend import recommend
from adapter_twin.plan.steady_state import CYCLES, WARM_UP_S, draw_traffic, warmed_up
from adapter_twin.service.metrics import service, service_of
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.request_log import BASE_MODEL
from adapter_twin.workload.trace import Trace
from adapter_twin.workload.traffic import Arrivals, Workload

LLAMA = "llama-3.1-8b-instruct"

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Demand]:
    def call(log: pd.DataFrame, **content: Any) -> Demand:
        log.to_csv(tmp_path / "log.csv", index=False)
        told = {"model": LLAMA, "request_log": "log.csv", "slo": "none"} | content
        (tmp_path / "workload.yaml").write_text(yaml.safe_dump(told))
        return load_demand(tmp_path / "workload.yaml")

    return call


def bursty(names: str = "abcd", bursts: int = 6, each: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    n = bursts * each
    return pd.DataFrame(
        {
            "arrival_s": np.sort(np.repeat(600.0 * np.arange(bursts), each) + rng.uniform(0, 3, n)),
            "adapter": rng.choice(list(names), n),
            "prompt_tokens": rng.integers(150, 300, n),
            "output_tokens": rng.integers(100, 300, n),
        }
    )


def listed(names: str = "abcd") -> list[dict[str, Any]]:
    return [{"name": name, "rank": 16} for name in names]


def trace_at(arrival_s: list[float]) -> Trace:
    n = len(arrival_s)
    ones = np.ones(n, np.int32)
    return Trace(np.array(arrival_s), np.arange(n, dtype=np.int32), ones, ones)


def test_recommend_and_place_tell_what_the_replay_gives(
    load: Callable[..., Demand], tmp_path: Path
) -> None:
    demand = load(bursty(), adapters=listed())
    answer = recommend(demand)
    workload = Workload(
        adapters=demand.adapters,
        duration_s=span_s(demand.trace) + ANSWERED_S,
        lengths=demand.lengths,
        arrivals=Arrivals(process="trace", path=str(tmp_path / "log.csv")),
    )
    calibration = warmed_up(load_calibration("auto", LLAMA))
    run = simulate(workload, demand.engine_with(answer["adapter_slots"]), calibration)
    replayed = service(run.records, run.gaps, span_s(demand.trace))
    expected = answer["expected"]
    assert replayed["p99_ttft_ms"] > 4 * replayed["mean_itl_ms"], "bursts queue"
    for name in ("total_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "p99_itl_ms"):
        assert expected[name]["value"] == pytest.approx(replayed[name], rel=1e-3), name
    own = place(demand, jobs=1)[0]["replicas"]
    assert len(own) == 1
    assert own[0]["p99_ttft_ms"] == pytest.approx(expected["p99_ttft_ms"]["value"])
    assert answer["traffic"] == f"a log of {span_s(demand.trace):,.0f} s, replayed"


def test_an_slo_that_bursts_break_is_refused(load: Callable[..., Demand]) -> None:
    slo = {"ttft_ms": 100, "percentile": 95}
    with pytest.raises(AdapterTwinError, match=r"^slo: no number of slots meets it; the best"):
        recommend(load(bursty(), adapters=listed(), slo=slo))
    even = bursty().assign(arrival_s=lambda log: np.linspace(0, 3600, len(log)))
    assert recommend(load(even, adapters=listed(), slo=slo))["expected"]["slo_attainment"]["value"]


def test_a_higher_load_plays_the_log_faster(load: Callable[..., Demand]) -> None:
    demand = load(bursty(), adapters=listed())
    calibration = load_calibration("auto", LLAMA)
    once, twice = (draw_traffic(demand, calibration, seed=0, load=by) for by in (1, 2))
    assert twice.workload.duration_s - ANSWERED_S == (once.workload.duration_s - ANSWERED_S) / 2
    np.testing.assert_array_equal(twice.trace.arrival_s, once.trace.arrival_s / 2)
    rates = twice.workload.offered_request_rate / once.workload.offered_request_rate
    assert rates == pytest.approx(2)


def test_other_logs_that_might_have_come_are_made_of_its_pieces() -> None:
    rng = np.random.default_rng(0)
    trace = trace_at(np.sort(rng.uniform(0, 3600, 2000)).tolist())
    whole_s = span_s(trace)
    drawn, duration_s, warm_up_s = stretch(trace, 1, lead_in_s=300.0)
    again, *_ = stretch(trace, 1, lead_in_s=300.0)
    other, *_ = stretch(trace, 2, lead_in_s=300.0)
    assert (duration_s, warm_up_s) == (whole_s, 0.0)
    np.testing.assert_array_equal(drawn.arrival_s, again.arrival_s)
    assert len(other) != len(drawn) or not np.array_equal(other.adapter, drawn.adapter)
    assert (np.diff(drawn.arrival_s) >= 0).all()
    assert drawn.arrival_s[0] >= 0
    assert drawn.arrival_s[-1] < whole_s
    # a request keeps its gaps within a piece: there are no more breaks than pieces and wraps
    breaks = np.abs(np.diff(trace.arrival_s[drawn.adapter]) - np.diff(drawn.arrival_s)) > 1e-6
    assert breaks.sum() <= 2 * BLOCKS
    assert len(drawn) == pytest.approx(len(trace), rel=0.2)


@pytest.mark.parametrize(("days", "apart_s"), [(2, BUSY_S), (9, DAY_S)])
def test_of_a_long_log_the_busiest_hours_are_replayed(days: int, apart_s: float) -> None:
    rng = np.random.default_rng(0)
    quiet = rng.uniform(0, days * DAY_S, 2000)
    peaks = [(day + 0.5) * DAY_S + rng.uniform(0, 1800, 300 + 50 * day) for day in range(days)]
    trace = trace_at(np.sort(np.concatenate([quiet, *peaks])).tolist())
    starts = busiest_hours(trace)
    assert len(starts) == 5
    assert min(abs(a - b) for a in starts for b in starts if a != b) >= apart_s
    assert abs(starts[0] - (days - 0.5) * DAY_S) < BUSY_S
    part, duration_s, warm_up_s = stretch(trace, 0, lead_in_s=300.0)
    assert (duration_s, warm_up_s) == (BUSY_S + 300.0, 300.0)
    assert len(part) > 300 + 50 * (days - 1)
    assert part.arrival_s[0] >= 0
    assert part.arrival_s[-1] <= duration_s


def test_a_log_without_adapters_is_dealt_by_their_rates(load: Callable[..., Demand]) -> None:
    log = bursty().drop(columns="adapter")
    with pytest.warns(UserWarning, match="names no adapters; its requests are dealt"):
        even = load(log, adapters=listed())
    each = len(log) / span_s(even.trace) / 4
    assert [a.request_rate for a in even.adapters] == pytest.approx([each] * 4, rel=0.2)
    zipf = {"count": 4, "total_request_rate": 1.0, "zipf_exponent": 2.0, "ranks": [8]}
    with pytest.warns(UserWarning, match="names no adapters"):
        skewed = load(log, adapters=zipf)
    rates = [a.request_rate for a in skewed.adapters]
    assert rates[0] > 3 * rates[1] > 3 * rates[3]
    assert sum(rates) == pytest.approx(sum(a.request_rate for a in even.adapters))


def test_a_subset_of_a_log_has_the_requests_of_its_adapters(load: Callable[..., Demand]) -> None:
    log = bursty()
    log.loc[::5, "adapter"] = ""
    demand = load(log, adapters=listed())
    half = demand.subset(2)
    kept = [demand.adapters.index(adapter) for adapter in half.adapters]
    for place_of, number in enumerate(kept):
        mine, theirs = half.trace.adapter == place_of, demand.trace.adapter == number
        np.testing.assert_array_equal(half.trace.arrival_s[mine], demand.trace.arrival_s[theirs])
    base = [(one.trace.adapter == BASE_MODEL).sum() for one in (half, demand)]
    assert base[0] == base[1] // 2
    assert len(half.trace) == base[0] + sum((demand.trace.adapter == i).sum() for i in kept)


def test_a_log_that_changes_changes_the_hash(load: Callable[..., Demand]) -> None:
    hashes = {
        recommend(load(log, adapters=listed()))["config_hash"]
        for log in (bursty(), bursty().assign(adapter=lambda log: log.adapter[::-1].to_numpy()))
    }
    assert len(hashes) == 2


def synthetic(seed: int) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Bursts, a trend, sessions or adapters on and off, over adapters of unlike popularity."""
    rng = np.random.default_rng(seed)
    span, rate, n = rng.uniform(1200, 3600), rng.uniform(0.5, 5), int(rng.integers(4, 24))
    share = rng.dirichlet(np.full(n, 0.5))
    adapter = None
    if seed % 4 == 0:
        starts = rng.uniform(0, span, rng.integers(4, 20))
        each = int(rate * span / len(starts))
        arrival_s = np.concatenate([s + rng.exponential(30, each) for s in starts])
    elif seed % 4 == 1:
        arrival_s = span * np.sqrt(rng.uniform(0, 1, int(rate * span)))
    elif seed % 4 == 2:
        starts = rng.uniform(0, span, int(rate * span / 6))
        turns = [np.cumsum(rng.exponential(20, rng.integers(1, 12))) for _ in starts]
        arrival_s = np.concatenate([s + own for s, own in zip(starts, turns, strict=True)])
    else:
        parts, on_s, off_s = [], rng.uniform(5, 60), rng.uniform(5, 200)
        for own in share:
            off, on = rng.exponential([[off_s], [on_s]], (2, 800))
            begins = np.cumsum(off) + np.cumsum(on) - on
            counts = rng.poisson(own * rate * (on_s + off_s) / on_s * on)
            since = np.repeat(on, counts) * rng.random(counts.sum())
            parts.append(np.repeat(begins, counts) + since)
        arrival_s = np.concatenate(parts)
        adapter = np.repeat(np.arange(n), [len(part) for part in parts])
    if adapter is None:
        adapter = rng.choice(n, len(arrival_s), p=share)
    order = np.argsort(arrival_s)
    order = order[arrival_s[order] < span]
    arrival_s, adapter = arrival_s[order], adapter[order]
    log = pd.DataFrame(
        {
            "arrival_s": arrival_s,
            "adapter": [f"a{i}" for i in adapter],
            "prompt_tokens": 1 + rng.lognormal(5.2, 0.9, len(arrival_s)).astype(int),
            "output_tokens": 1 + rng.lognormal(4.8, 0.8, len(arrival_s)).astype(int),
        }
    )
    ranks = rng.choice([8, 16, 32], n).tolist()
    return log, [{"name": f"a{i}", "rank": rank} for i, rank in enumerate(ranks)]


@pytest.mark.slow
def test_what_is_expected_covers_a_replay_with_first_uses(
    load: Callable[..., Demand], tmp_path: Path
) -> None:
    within = []
    for seed in range(20):
        log, adapters = synthetic(seed)
        demand = load(log, adapters=adapters)
        answer = recommend(demand)
        workload = Workload(
            adapters=demand.adapters,
            duration_s=float(log.arrival_s.max()) + 1e-3,
            lengths=demand.lengths,
            arrivals=Arrivals(process="trace", path=str(tmp_path / "log.csv")),
        )
        engine = demand.engine_with(answer["adapter_slots"])
        replayed = service_of(simulate(workload, engine, load_calibration("auto", LLAMA)))
        within += [
            figure["low"] <= replayed[name] <= figure["high"]
            for name, figure in answer["expected"].items()
        ]
    assert np.mean(within) >= 0.9


TRAFFIC: dict[str, Any] = {
    "adapters": {"count": 8, "request_rates": [0.05], "ranks": [16]},
    "lengths": {"mean_input_tokens": 223, "mean_output_tokens": 198},
}


def drawn(tmp_path: Path, **content: Any) -> Demand:
    path = tmp_path / "workload.yaml"
    path.write_text(yaml.safe_dump({"model": LLAMA, "slo": "none", **TRAFFIC, **content}))
    return load_demand(path)


def test_sessions_are_drawn_once_and_replayed(tmp_path: Path) -> None:
    demand = drawn(tmp_path, sessions={"turns": 4, "mean_think_s": 10})
    openings = 8 * 0.05 * 3600
    assert len(demand.trace) == pytest.approx(4 * openings, rel=0.15)
    rate = sum(adapter.request_rate for adapter in demand.adapters)
    assert rate == pytest.approx(len(demand.trace) / span_s(demand.trace))
    assert demand.lengths.mean_input_tokens > 2 * 223, "prompts repeat what was before"
    answer = recommend(demand)
    assert "--enable-prefix-caching" in answer["vllm_args"]
    assert place(demand, jobs=1)[0]["gpus"] == 1
    plain = drawn(tmp_path)
    assert plain.trace is None
    samples = drawn(tmp_path, samples=4)
    assert len(samples.trace) == pytest.approx(4 * openings, rel=0.15)


def test_a_rate_that_follows_a_sine_is_planned_for_with_its_peak(tmp_path: Path) -> None:
    adapters = {"count": 8, "request_rates": [1.5], "ranks": [16]}
    sine = {"period_s": 1800, "amplitude": 1.0}
    even, peaked = (
        recommend(drawn(tmp_path, adapters=adapters, **arrivals))["expected"]
        for arrivals in ({}, {"arrivals": sine})
    )
    for name in ("mean_itl_ms", "p99_itl_ms", "p99_ttft_ms"):
        assert peaked[name]["value"] > 1.1 * even[name]["value"]
    assert peaked["total_throughput"]["value"] == pytest.approx(
        even["total_throughput"]["value"], rel=0.05
    )


def test_adapters_that_are_on_and_off_are_planned_for_with_their_bursts(tmp_path: Path) -> None:
    on_off = {"process": "on_off", "on_s": 60, "off_s": 240}
    even, bursts = (
        drawn(tmp_path, adapters={"count": 8, "request_rates": [1.5], "ranks": [16]}, **arrivals)
        for arrivals in ({}, {"arrivals": on_off})
    )
    calibration = load_calibration("auto", LLAMA)
    window = draw_traffic(bursts, calibration, seed=0).workload
    assert window.duration_s - WARM_UP_S == CYCLES * 300
    poisson, bursty = (recommend(demand)["expected"] for demand in (even, bursts))
    for name in ("mean_itl_ms", "p99_itl_ms", "p99_ttft_ms"):
        assert bursty[name]["value"] > 1.05 * poisson[name]["value"], name
    throughput = bursty["total_throughput"]
    assert throughput["low"] < poisson["total_throughput"]["value"] < throughput["high"]
