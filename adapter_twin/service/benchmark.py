"""Results of ``vllm bench serve`` beside the twin's prediction of the same benchmark.

The client sends its requests and waits for all of them: its window ends with the last answer, and
its figures are `adapter_twin.service.metrics.summarize` over it. The server is told by a file; of
the result only what was asked, and the lengths, reach the twin.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.service.metrics import summarize
from adapter_twin.twin.policies import make_policy
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.benchmark_clients import (
    Benchmark,
    read_benchmark,
    read_results,
    vllm_requests,
)
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.lengths import draw_lengths
from adapter_twin.workload.scenario import Scenario, config_hash
from adapter_twin.workload.trace import BASE_MODEL, Trace, generators

FIGURES = {
    "duration_s": "duration",
    "request_throughput": "request_throughput",
    "output_throughput": "output_throughput",
    "total_throughput": "total_token_throughput",
} | {
    name: name
    for kind in ("ttft_ms", "tpot_ms", "itl_ms")
    for name in (f"mean_{kind}", f"median_{kind}", f"p99_{kind}")
}
"""What is compared, and vLLM's names of it; a result has those that its version saves."""


def compare_benchmarks(
    path: str | Path, config: str | Path, calibration: str = "auto", *, seed: int = 0
) -> pd.DataFrame:
    """Predict the benchmarks of a file, and compare.

    Parameters
    ----------
    path : path-like
        What ``--save-result`` or ``--append-result`` wrote. Requests saved one by one
        (``--save-detailed``) are replayed as they were sent.
    config : path-like
        A ``CONFIG.yaml`` of the server, see `adapter_twin.workload.files.load_scenario`. Of the
        ``workload`` it has the adapters that the client was told, without rates, and the
        ``lengths`` without means; these are left out where requests are saved one by one.
    calibration : str
        In place of the file's, unless ``auto``.
    seed : int

    Returns
    -------
    pandas.DataFrame
        ``benchmark``, its place in the file from 0; ``figure``, of `FIGURES`; ``measured``,
        ``predicted`` and ``error``, signed, in percent. ``attrs`` holds provenance.

    Raises
    ------
    AdapterTwinError
        A field is missing or wrong, or the client sent ever more requests, which the twin does not.
    """
    rows = []
    provenance: dict[str, Any] = {"seed": seed, "version": __version__}
    for place, content in enumerate(read_results(path)):
        asked = read_benchmark(content, path)
        if failed := asked.num_prompts - asked.completed:
            warnings.warn(f"{path}: {failed} requests failed; they are left out", stacklevel=2)
        scenario = load_scenario(config, benchmark=asked, calibration=calibration)
        for key in ("fleet", "slo", "observer", "seed"):
            unused = not getattr(scenario, key)
            require(unused, f"{key}: counts for nothing beside a benchmark; leave it out")
        laws = load_calibration(scenario.calibration, scenario.engine.model)
        predicted = _predict(_requests(content, asked, scenario, laws, seed), scenario, laws, seed)
        for figure, key in FIGURES.items():
            measured = content.get(key)
            if isinstance(measured, (int, float)) and measured > 0:
                error = 100 * (predicted[figure] / measured - 1)
                rows.append((place, figure, float(measured), float(predicted[figure]), error))
        provenance |= {"calibration": laws.name, "config_hash": config_hash(scenario)}
    table = pd.DataFrame(rows, columns=["benchmark", "figure", "measured", "predicted", "error"])
    table.attrs.update(provenance)
    return table


def _requests(
    content: Mapping[str, Any], asked: Benchmark, scenario: Scenario, laws: Calibration, seed: int
) -> Trace:
    """Return the benchmark's requests: as they were saved, or drawn as the client draws them."""
    workload, (rng, *_) = scenario.workload, generators(seed)
    if asked.detailed:
        saved = vllm_requests(content, "benchmark")
        saved = saved[saved["output_tokens"] > 0].sort_values("arrival_s", kind="stable")
        arrival_s = saved["arrival_s"].to_numpy(float)
        prompt, output = (saved[name].to_numpy() for name in ("prompt_tokens", "output_tokens"))
    else:
        gaps = rng.gamma(asked.burstiness, size=asked.completed)
        # the client stretches its gaps so that the last one ends when it shall
        arrival_s = np.cumsum(gaps) * (asked.sending_s / gaps.sum())
        prompt, output = draw_lengths(workload.lengths, len(gaps), rng, laws.lengths.marginals)
    adapter = np.full(len(arrival_s), BASE_MODEL, np.int32)
    if workload.adapters:  # the client chooses one by chance
        adapter = rng.integers(len(workload.adapters), size=len(arrival_s), dtype=np.int32)
    requests = Trace(arrival_s, adapter, prompt.astype(np.int32), output.astype(np.int32))
    # those saved one by one are told as they were sent, when there was room
    return requests if asked.detailed else replace(requests, max_concurrency=asked.max_concurrency)


def _predict(requests: Trace, scenario: Scenario, laws: Calibration, seed: int) -> dict[str, float]:
    """Return the client's figures once the last request has its answer."""
    policy = make_policy(scenario.policy, "engine.policy")
    run = simulate(
        scenario.workload, scenario.engine, laws, seed=seed, trace=requests, policy=policy
    )
    duration_s = float(np.nanmax(run.records.end_s))
    return {"duration_s": duration_s, **summarize(run.records, run.gaps, duration_s)}
