"""The reference study's overheads, tabulated from its published runs.

Their numbers are those of the paper (arXiv 2508.08343). Figures 1 to 3 were measured with Llama 2
on vLLM 0.5.0: they show why the question matters, and no law of this book is fitted to them.
"""

from __future__ import annotations

import pandas as pd

from adapter_twin.laws import Calibration
from adapter_twin.plan.grid import simulate_quietly
from adapter_twin.service.metrics import is_starved, summarize
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.traffic import Lengths, Workload

PUBLISHED = {"throughput_error": 5.1, "configuration_error": 7.2, "sweep_hours": 767}
"""The paper's text has these: halved SMAPE of the twin's throughput and of the configuration, in
percent (abstract), and the time that its twin took for the training grid."""

REQUEST_TOKENS = {"small": (23, 27), "medium": (250, 231), "large": (423, 358)}
"""Prompt and output tokens of the paper's three sizes of requests."""

DATASETS = dict(zip(("p25", "mean", "p75"), REQUEST_TOKENS, strict=True))
"""The published runs name a size by a quantile of ShareGPT's lengths."""

SHOWN_SLOTS = (12, 96, 120, 256, 320)
"""Figure 1's panel on slots shows these."""

VARIED = ("rank", "output tokens", "request rate (1/s)", "adapter slots")
"""Each panel of Figure 1 varies one of these."""


def caching_problem(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the points of Figure 1: throughput over adapters, one thing varied at a time.

    Parameters
    ----------
    runs : pandas.DataFrame
        The table ``overhead_runs_vllm050``.

    Returns
    -------
    pandas.DataFrame
        ``varied`` (one of `VARIED`), ``level``, ``adapters``, ``total_throughput`` and
        ``offered_tokens_per_s``, one row per measured run.
    """
    runs = runs[(runs["model"] == "llama-2-7b") & (runs["status"] == "ok")]
    runs = runs.assign(
        group=runs["group"].str.removeprefix("llama-2-7b/"),
        output_tokens=(runs["total_output_tokens"] / runs["completed"]).round(),
    )
    rate = pd.to_numeric(runs["request_rate_by_lora"])
    tokens = REQUEST_TOKENS["medium"][0] + runs["output_tokens"]
    plain = runs.assign(adapters=runs["slots_max_loras"])
    plain["offered_tokens_per_s"] = rate * plain["adapters"] * tokens
    slotted = runs.assign(
        adapters=runs["served_max_cpu_loras"],
        offered_tokens_per_s=runs["offered_rate_req_s"] * tokens,
    )
    slotted = slotted[slotted["slots_max_loras"].isin(SHOWN_SLOTS)]
    start = plain["group"] == "initial_point"
    parts = (
        plain[start | (plain["group"] == "varying_adapter_size")].assign(level=runs.max_lora_rank),
        plain[start | (plain["group"] == "varying_output_length")].assign(level=runs.output_tokens),
        plain[start | (plain["group"] == "varying_arrival_rate")].assign(level=rate),
        slotted[slotted["group"] == "loaded_adapters_rate_0.0125"].assign(
            level=runs.slots_max_loras
        ),
    )
    points = pd.concat([part.assign(varied=name) for name, part in zip(VARIED, parts, strict=True)])
    columns = ["varied", "level", "adapters", "total_throughput", "offered_tokens_per_s"]
    return points[columns].sort_values(["varied", "level", "adapters"], ignore_index=True)


def most_served(points: pd.DataFrame) -> pd.DataFrame:
    """Return the last point of each line of `caching_problem` up to which none starves."""
    served = ~is_starved(points["total_throughput"], points["offered_tokens_per_s"])
    lines = points.assign(served=served).groupby(["varied", "level"])
    before = points[lines["served"].cummin()]
    return before.groupby(["varied", "level"]).tail(1).reset_index(drop=True)


def share_of_best(best: pd.DataFrame) -> pd.DataFrame:
    """Return the points of `most_served`, in place of throughputs their shares of the highest.

    Returns
    -------
    pandas.DataFrame
        ``varied``, ``level``, ``adapters``; ``share_of_best``, of the same thing varied.
    """
    highest = best.groupby("varied")["total_throughput"].transform("max")
    shares = best.assign(share_of_best=best["total_throughput"] / highest)
    return shares[["varied", "level", "adapters", "share_of_best"]]


def memory_overhead(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the points of Figure 2: throughput and running requests over slots, without adapters.

    Returns
    -------
    pandas.DataFrame
        ``model``, ``requests`` (a key of `REQUEST_TOKENS`), ``max_lora_rank``, ``adapter_slots``,
        ``total_throughput`` and ``running``.
    """
    return _measured(
        runs, "memory_overhead", {"slots_max_loras": "adapter_slots", "running_mean": "running"}
    )


def compute_overhead(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the points of Figure 3: throughput and ITL over the adapters that requests name.

    Returns
    -------
    pandas.DataFrame
        ``model``, ``requests``, ``max_lora_rank``, ``adapters`` (0: the base model only),
        ``total_throughput`` and ``mean_itl_ms``.
    """
    return _measured(
        runs, "compute_overhead", {"restrict_loras": "adapters", "mean_itl_ms": "mean_itl_ms"}
    )


def slowdown(points: pd.DataFrame) -> pd.DataFrame:
    """Return what adapters take of the throughput of medium requests, from `compute_overhead`.

    Returns
    -------
    pandas.DataFrame
        ``max_lora_rank``; ``first``, by the first adapter, and ``all`` of them, in percent.
    """
    own = points[points["requests"] == "medium"].set_index(["max_lora_rank", "adapters"])
    served = own["total_throughput"].unstack()
    lost = {"first": served[1], "all": served.ffill(axis=1).iloc[:, -1]}
    return pd.DataFrame({k: 100 * (1 - v / served[0]) for k, v in lost.items()}).reset_index()


def _measured(runs: pd.DataFrame, source: str, columns: dict[str, str]) -> pd.DataFrame:
    """Return the completed runs of one part of the study: throughput, and some columns renamed."""
    own = runs[(runs["source"] == source) & (runs["status"] == "ok")].rename(columns=columns)
    size = own["dataset"].str.extract(r"_([a-z0-9]+)\.json$")[0].map(DATASETS)
    x, value = columns.values()
    by = ["model", "requests", "max_lora_rank", x]
    own = own.assign(requests=size).dropna(subset=by)
    return own[[*by, "total_throughput", value]].sort_values(by, ignore_index=True)


def load_impact(loads: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """Return the figures behind Figure 4: an adapter's load by the decoding time of its request.

    Parameters
    ----------
    loads : pandas.DataFrame
        ``model``, ``source`` (disk or memory), ``rank`` and ``median`` load time in ms
        (`study.ch01_to_06.load_quantiles`).
    calibration : Calibration
        Gives the time of a request that is alone on the GPU.

    Returns
    -------
    pandas.DataFrame
        ``source``, ``rank``, ``requests`` and ``impact``, in percent.
    """
    own = loads[loads["model"] == calibration.model]
    parts = []
    for size in REQUEST_TOKENS:
        alone_ms = own["rank"].map(lambda rank, size=size: _alone_ms(calibration, size, rank))
        part = own[["source", "rank"]].assign(requests=size, impact=100 * own["median"] / alone_ms)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _alone_ms(calibration: Calibration, size: str, rank: int) -> float:
    """Return how long a request that is alone decodes."""
    prompt, output = REQUEST_TOKENS[size]
    lengths = Lengths(distribution="fixed", mean_input_tokens=prompt, mean_output_tokens=output)
    workload = Workload(
        adapters=deal_adapters(1, [0.01], [rank]), duration_s=3600.0, lengths=lengths
    )
    engine = EngineConfig(model=calibration.model, max_loras=1, max_cpu_loras=1, max_lora_rank=rank)
    run = simulate_quietly(workload, engine, calibration, seed=0)
    return summarize(run.records, run.gaps, run.duration_s)["mean_tpot_ms"] * (output - 1)
