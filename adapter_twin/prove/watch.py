"""A running server's metrics, and beside them what the twin expects of the same load."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw
from adapter_twin.measure import metrics_page as vllm
from adapter_twin.measure.metrics_page import Bounded, MetricsPage, Stretch
from adapter_twin.plan.steady_state import (
    LONG_WINDOW_S,
    TWIN_ERROR,
    WARM_UP_S,
    predict_window,
    warmed_up,
)
from adapter_twin.service.intervals import representatives
from adapter_twin.service.metrics import service_of, shown, statistics, ttft_s
from adapter_twin.service.validate import KV_TOKENS_BAR
from adapter_twin.twin.policies import make_policy
from adapter_twin.twin.records import Simulation
from adapter_twin.twin.simulate import draw_requests, simulate
from adapter_twin.workload.scenario import Scenario
from adapter_twin.workload.traffic import Workload

EVERY_S = 10.0
WINDOWS = 8
"""The twin's expectation, and what chance does to it, come from n windows like the server's."""

FEWEST_REQUESTS = 30
"""Fewer finished requests say too little of a mean."""

CHANCE = 1.96
"""95 % of normal errors are within n standard deviations."""

SAMPLE_REQUESTS = 10_000
"""How much planned lengths vary is taken from n requests."""

UNNOTICED = 0.5
"""Means of running or of waiting requests that differ by less are taken as the same."""

FLAGS = ("max_loras", "block_size", "enable_prefix_caching")
LOAD = ("offered_requests_per_s", "mean_prompt_tokens", "mean_output_tokens")
JUDGED_BY = {
    "mean_running_requests": "mean_itl_ms",
    "mean_waiting_requests": "mean_ttft_ms",
    "mean_itl_ms": "mean_itl_ms",
    "median_itl_ms": "mean_itl_ms",
    "p99_itl_ms": "p99_itl_ms",
    "mean_ttft_ms": "mean_ttft_ms",
    "median_ttft_ms": "mean_ttft_ms",
    "p99_ttft_ms": "p99_ttft_ms",
    "total_throughput": "total_throughput",
}
"""Each figure of service, causes first, and that of `TWIN_ERROR` whose error it is granted. By
Little's law running requests are their rate times their time in the engine, tokens times ITL."""

REASONS = {
    **dict.fromkeys(FLAGS, "the server was started otherwise"),
    "kv_cache_tokens": "the server has another memory or share of it, or other flags",
    **dict.fromkeys(LOAD, "the load is not what was planned"),
    "mean_running_requests": "steps take another time than calibrated, which the ITL shows",
    "mean_waiting_requests": "requests wait for slots, for KV cache, or in bursts of arrivals",
    "itl": "steps take another time than calibrated: another GPU or version, or others use it",
    "ttft": "requests wait in bursts, for an adapter's first use, or for a busy front end",
    "total_throughput": "the server falls behind its load, or requests were broken off",
}
"""Why a figure may disagree; those of latency share theirs."""


def watch(
    source: str, scenario: Scenario, *, every_s: float | None = None, span_s: float | None = None
) -> dict[str, Any]:
    """Compare a vLLM server's metrics with what the twin expects of its load.

    Parameters
    ----------
    source : str
        URL of a server, whose metrics are read twice, or a file with a page of them, which tells
        of the time since the server's start.
    scenario : Scenario
        The engine as it should run, and its traffic, which is given the server's load: all rates
        are multiplied by one factor, and mean lengths replaced. The server's time is the duration.
    every_s : float, optional
        Time between the two reads of a URL in s, 10 if left out.
    span_s : float, optional
        Time from the server's start to a saved page in s; left out, from when it began to count to
        when the file was written.

    Returns
    -------
    dict
        ``span_s``; ``finished_requests``; ``load_factor``, on the rates; ``adapters_in_use``;
        ``figures``, each with ``server``, ``twin``, the bounds ``_low`` and ``_high`` of both, and
        ``agrees``: whether these overlap, or None where the twin states no error;
        ``first_disagreement`` in order of cause; ``conclusion``; provenance. The server's
        percentiles are interpolated within buckets of histograms, whose edges are the bounds. The
        twin's bounds are a 95 % interval for one such window by chance and
        `adapter_twin.plan.steady_state.TWIN_ERROR`; for the load they are what was planned, and
        chance. TTFT is of requests whose first token came in the window; means of running and
        waiting requests are the times so spent by those that finished in it, over its length.

    Raises
    ------
    AdapterTwinError
        The metrics cannot be read or tell of too few requests, or the twin cannot take the load.
    """
    require(scenario.fleet is None, "fleet: one engine is watched; leave it out")
    require(scenario.slo is None, "slo: metrics tell of no request by itself; leave it out")
    stretch = read_stretch(source, every_s, span_s)
    policy, engine = make_policy(scenario.policy, "engine.policy"), scenario.engine
    laws = load_calibration(scenario.calibration, engine.model)
    kv_tokens = laws.require_start(engine, slots=policy.reserves_slots)
    workload, factor = with_load_of(stretch, scenario.workload)
    warm_up_s = WARM_UP_S if stretch.begin and stretch.begin.in_flight else 0.0
    workload = replace(workload, duration_s=warm_up_s + min(stretch.span_s, LONG_WINDOW_S))
    allowed = representatives(laws, WINDOWS) or [laws] * WINDOWS
    never = EarlyStopLaw.never()  # lengths are told as emitted
    emitting = [replace(one, early_stop=never) for one in allowed]
    runs = [
        simulate(
            workload,
            engine,
            warmed_up(emitting[k]) if stretch.begin else emitting[k],
            seed=scenario.seed + k,
            observer=scenario.observer,
            policy=policy,
        )
        for k in range(WINDOWS)
    ]
    figures = [
        *_configuration(stretch.end, scenario, kv_tokens),
        *_load(stretch, scenario, laws),
        *_service(stretch, [figures_of(run, warm_up_s) for run in runs]),
    ]
    failing = [figure for figure in figures if figure["agrees"] is False]
    labels = stretch.end.labels.get(vllm.LORA, {})
    in_use = ",".join(labels.get(f"{what}_lora_adapters", "") for what in ("running", "waiting"))
    return {
        "source": source,
        "span_s": stretch.span_s,
        "finished_requests": int(stretch.counted(vllm.FINISHED)),
        "load_factor": factor,
        # vLLM 0.32 lists each adapter that has a request as running and as waiting
        "adapters_in_use": sorted(set(in_use.split(",")) - {""}),
        "figures": figures,
        "first_disagreement": failing[0]["figure"] if failing else None,
        "conclusion": _conclusion(failing),
        **runs[0].provenance,
    }


def read_stretch(source: str, every_s: float | None, span_s: float | None) -> Stretch:
    """Read what `watch` compares: a URL twice, or a file."""
    if "://" in source:
        require(span_s is None, "span_s: only for a saved page; give --every, or leave it out")
        url = f"{source.rstrip('/').removesuffix('/metrics')}/metrics"
        first, first_s = vllm.fetch(url), time.monotonic()
        begin = MetricsPage.parse(first, url)
        time.sleep(EVERY_S if every_s is None else every_s)
        last, last_s = vllm.fetch(url), time.monotonic()
        stretch = Stretch(last_s - first_s, MetricsPage.parse(last, url), begin)
    else:
        require(every_s is None, "every: only for a URL; give --span-s, or leave it out")
        try:
            page = MetricsPage.parse(Path(source).read_text(encoding="utf-8"), source)
            written_s = Path(source).stat().st_mtime
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterTwinError(f"{source}: cannot be read ({error}); give a page") from None
        if span_s is None:
            told = (page.values[name] for name in vllm.STARTED_S if name in page.values)
            span_s = written_s - next(told, math.inf)
        require(span_s > 0, f"span_s: {source} does not tell since when it counts; give --span-s")
        stretch = Stretch(span_s, page)
    finished, engines = stretch.counted(vllm.FINISHED), len(stretch.end.engines)
    require(engines == 1, f"metrics: {source} tells of {engines} engines; one is watched")
    require(
        finished >= FEWEST_REQUESTS,
        f"metrics: {finished:.0f} requests finished in {stretch.span_s:.0f} s; it takes "
        f"{FEWEST_REQUESTS} to compare, so wait or read further apart (--every)",
    )
    return stretch


def mean_lengths(stretch: Stretch) -> tuple[float, float]:
    """Return the mean prompt and output tokens of the requests that finished."""
    prompt, output = (stretch.statistics(name, name)[f"mean_{name}"][0] for name in vllm.LENGTHS)
    return prompt, output


def with_load_of(stretch: Stretch, workload: Workload) -> tuple[Workload, float]:
    """Return a workload at the server's rate and mean lengths, and the factor on its rates."""
    lengths, (prompt, output) = workload.lengths, mean_lengths(stretch)
    prompt -= lengths.shared_prefix_tokens
    require(
        workload.arrivals.process != "trace",
        "arrivals.process: a trace cannot be given the server's load; give rates and lengths",
    )
    plain = workload.sessions is None and workload.samples == 1 and workload.arrivals.is_steady
    require(
        plain,
        "sessions, samples, arrivals: metrics tell of single requests; give their rates alone",
    )
    require(workload.offered_request_rate > 0, "adapters: none of them has requests")
    require(stretch.arrived > 0, "metrics: no request arrived; read further apart (--every)")
    require(prompt >= 1, "lengths.shared_prefix_tokens: longer than the server's prompts; lower it")
    if lengths.distribution == "fixed":
        prompt, output = float(round(prompt)), float(round(output))
    factor = stretch.arrived / stretch.span_s / workload.offered_request_rate
    return replace(
        workload,
        adapters=tuple(replace(a, request_rate=factor * a.request_rate) for a in workload.adapters),
        base_model_request_rate=factor * workload.base_model_request_rate,
        lengths=replace(lengths, mean_input_tokens=prompt, mean_output_tokens=output),
    ), factor


def figures_of(run: Simulation, warm_up_s: float) -> dict[str, float]:
    """Return a simulated run's figures as a server's metrics tell them."""
    records, span_s = run.records, run.duration_s - warm_up_s
    done, service = records[records.end_s >= warm_up_s], service_of(run, warm_up_s=warm_up_s)
    begun = records[records.first_token_s >= warm_up_s]
    return {
        **{name: service[name] for name in JUDGED_BY if name in service},
        **statistics("ttft_ms", 1e3 * ttft_s(begun)),
        "mean_running_requests": float((done.end_s - done.scheduled_s).sum() / span_s),
        "mean_waiting_requests": float((done.scheduled_s - done.arrival_s).sum() / span_s),
        "prefix_hit_rate": service.get("prefix_hit_rate", math.nan),
        "preemptions_per_s": float(records.preemptions.sum() / run.duration_s),
    }


def _configuration(page: MetricsPage, scenario: Scenario, kv_tokens: int) -> Iterator[Any]:
    """Yield the server's configuration beside the engine's."""
    engine, nan = scenario.engine, math.nan
    cache, lora = (page.labels.get(name, {}) for name in (vllm.CACHE, vllm.LORA))
    caches = {"True": 1.0, "False": 0.0}.get(cache.get("enable_prefix_caching", ""), nan)
    kept = engine.enable_prefix_caching  # left out, it is of no account without shared prefixes
    shares = 1.0 if scenario.workload.lengths.shared_prefix_tokens else nan
    kv = page.kv_cache()
    for name, server, expected, error in (
        ("max_loras", float(lora.get("max_lora", nan)), engine.max_loras, 0.0),
        ("block_size", kv["block_size"], engine.block_size, 0.0),
        ("enable_prefix_caching", caches, shares if kept is None else float(kept), 0.0),
        ("kv_cache_tokens", kv["kv_cache_tokens"], kv_tokens, KV_TOKENS_BAR / 100 * kv_tokens),
    ):
        within = expected - error, expected + error
        yield _figure(name, _exact(server), float(expected), within)


def _load(stretch: Stretch, scenario: Scenario, laws: Calibration) -> Iterator[Any]:
    """Yield the server's load beside what was planned, which may differ by chance."""
    workload, rate = scenario.workload, scenario.workload.offered_request_rate
    sample = replace(workload, duration_s=SAMPLE_REQUESTS / rate)
    trace = draw_requests(sample, laws, seed=scenario.seed)
    finished = stretch.counted(vllm.FINISHED)
    rates = [
        *(adapter.request_rate for adapter in workload.adapters),
        workload.base_model_request_rate,
    ]
    variance = math.fsum(each * workload.arrivals.dispersion(each) for each in rates)
    planned = [(rate, math.sqrt(variance / stretch.span_s))] + [
        (float(tokens.mean()), float(tokens.std()) / math.sqrt(finished))
        for tokens in (trace.prompt_tokens, trace.output_tokens)
    ]
    server = (stretch.arrived / stretch.span_s, *mean_lengths(stretch))
    for name, value, (mean, deviation) in zip(LOAD, server, planned, strict=True):
        within = mean - CHANCE * deviation, mean + CHANCE * deviation
        yield _figure(name, _exact(value), mean, within)


def _service(stretch: Stretch, windows: Sequence[dict[str, float]]) -> Iterator[Any]:
    """Yield the server's figures of service beside the twin's of several windows."""
    tokens = sum(stretch.counted(f"{name}_sum") for name in vllm.LENGTHS)
    server = {
        "mean_running_requests": _exact(stretch.counted(vllm.IN_ENGINE_S) / stretch.span_s),
        "mean_waiting_requests": _exact(stretch.counted(vllm.QUEUED_S) / stretch.span_s),
        **stretch.statistics("itl_ms", *vllm.ITL, scale=1e3),
        **stretch.statistics("ttft_ms", *vllm.TTFT, scale=1e3),
        "total_throughput": _exact(tokens / stretch.span_s),
    }
    twin = {name: [figures[name] for figures in windows] for name in windows[0]}
    for name, error in JUDGED_BY.items():
        least, most = min(twin[name]), max(twin[name])
        if least > 0:  # else there is no logarithmic scale for the error
            expected = predict_window(twin[name], TWIN_ERROR[error])
            least, most = expected["low"], expected["high"]
        if name.endswith("_requests"):
            least, most = max(least - UNNOTICED, 0.0), most + UNNOTICED
        yield _figure(name, server[name], float(np.mean(twin[name])), (least, most))
    queries, hits = stretch.counted(*vllm.PREFIX_QUERIES), stretch.counted(*vllm.PREFIX_HITS)
    preempted, end = stretch.counted(vllm.PREEMPTED) / stretch.span_s, stretch.end
    for name, value in (
        ("prefix_hit_rate", hits / queries if queries else math.nan),
        ("preemptions_per_s", preempted),
        ("running_requests_now", end.value(vllm.RUNNING)),
        ("waiting_requests_now", end.value(vllm.WAITING)),
        ("kv_cache_usage_now", end.value(*vllm.KV_USAGE)),
    ):
        yield _figure(name, _exact(value), float(np.mean(twin.get(name, math.nan))))


def _exact(value: float) -> Bounded:
    return value, value, value


def _figure(
    name: str, server: Bounded, twin: float, within: tuple[float, float] = (math.nan, math.nan)
) -> dict[str, Any]:
    value, low, high = server
    known = not any(map(math.isnan, (value, *within)))
    return {
        "figure": name,
        "server": value,
        "server_low": low,
        "server_high": high,
        "twin": twin,
        "twin_low": within[0],
        "twin_high": within[1],
        "agrees": low <= within[1] and within[0] <= high if known else None,
    }


def _conclusion(failing: Sequence[dict[str, Any]]) -> str:
    """Return in one sentence which figure disagrees first, and the likely reason."""
    if not failing:
        return "Every figure that can be judged agrees, within the twin's error and chance."
    said = f"The first figure that disagrees is {_shown(failing[0])}"
    if failing[0]["figure"] in LOAD:
        others = [figure for figure in failing if figure["figure"] not in LOAD]
        rest = f"{_shown(others[0])} is the next" if others else "all that follows agrees"
        said += f"; under the server's own load {rest}"
    return f"{said}."


def _shown(figure: dict[str, Any]) -> str:
    name = figure["figure"]
    reason = REASONS[next((kind for kind in ("itl", "ttft") if f"_{kind}_" in name), name)]
    server, twin = shown(figure["server"]), shown(figure["twin"])
    return f"{name}, {server} on the server and {twin} expected ({reason})"
