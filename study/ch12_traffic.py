"""What the chapter on fleets tabulates of traffic that changes, and of policies of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import joblib
import pandas as pd

from adapter_twin.laws import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.service.metrics import service_of
from adapter_twin.twin.policies import CostAware, Drain, Merge, Policy, UnifiedPool
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.scenario import EngineConfig, Workload, zipf_adapters
from study.ch12_fleets import LENGTHS, over_seeds
from study.drift import Drift, place_again
from study.placement_scenarios import MODEL

ADAPTERS, GPUS = 400, 4

KINDS: dict[str, Drift] = {
    "steady": Drift(churn=0.0),
    "diurnal": Drift(churn=0.0, swing=0.3),
    "bursty adapters": Drift(churn=0.0, burst_cv=1.0),
    "drifting popularity": Drift(churn=0.2),
    "all together": Drift(churn=0.2, swing=0.3, burst_cv=1.0),
}
"""Traffic of the same mean; an epoch is five minutes, the swing's period an hour."""

POLICIES: dict[str, Policy] = {
    "vLLM": Policy(),
    "drain (SGLang)": Drain(max_wait_s=2.0),
    "cost-aware eviction (Chameleon)": CostAware(),
    "shared pool (S-LoRA)": UnifiedPool(),
    "merged execution (dLoRA)": Merge(),
}


def how_often(
    laws: Calibration,
    kinds: Mapping[str, Drift],
    every_s: Sequence[float | None],
    seeds: Sequence[int],
    *,
    gpus: int = GPUS,
    rate: float = 75.0,
    duration_s: float = 3600.0,
) -> pd.DataFrame:
    """Serve traffic that changes, with homes chosen anew every so often.

    Returns
    -------
    pandas.DataFrame
        A row per kind of ``traffic`` and interval ``every_s`` (NaN: never): means over seeds of
        `study.drift.place_again`, ``low`` and ``high`` of the p99 TTFT over them.
    """
    asked = Demand(model=MODEL, adapters=zipf_adapters(ADAPTERS, rate, 1.2, [16]), lengths=LENGTHS)
    engine = EngineConfig(model=MODEL, max_loras=48, max_cpu_loras=ADAPTERS // 2, max_lora_rank=16)
    tasks = [(kind, every, seed) for kind in kinds for every in every_s for seed in seeds]
    found = joblib.Parallel(-1)(
        joblib.delayed(place_again)(
            asked, engine, gpus, laws, kinds[kind], every_s=every, duration_s=duration_s, seed=seed
        )
        for kind, every, seed in tasks
    )
    rows = [
        {"traffic": kind, "every_s": float("nan") if every is None else every} | row
        for (kind, every, _), row in zip(tasks, found, strict=True)
    ]
    return over_seeds(rows, ["traffic", "every_s"])


def compare_policies(
    laws: Calibration, seeds: Sequence[int], duration_s: float, *, adapters: int = 240
) -> pd.DataFrame:
    """Serve a long tail of adapters on one GPU with too few slots for it, by every policy.

    Returns
    -------
    pandas.DataFrame
        A row per policy: means over seeds of ``served`` (percent of the tokens), ``mean_itl_ms``,
        ``mean_ttft_ms``, ``p99_ttft_ms``, ``worst_ttft_ms``, the longest mean TTFT of an adapter,
        and ``loads`` per 100 requests; ``low`` and ``high`` of the p99 TTFT.
    """
    workload = Workload(
        adapters=zipf_adapters(adapters, 18.0, 0.9, [16]), duration_s=duration_s, lengths=LENGTHS
    )
    engine = EngineConfig(model=MODEL, max_loras=24, max_cpu_loras=adapters, max_lora_rank=16)
    tasks = [(name, seed) for name in POLICIES for seed in seeds]
    rows = joblib.Parallel(-1)(
        joblib.delayed(_under)(name, workload, engine, laws, seed) for name, seed in tasks
    )
    return over_seeds(rows, ["policy"])


def _under(
    name: str, workload: Workload, engine: EngineConfig, laws: Calibration, seed: int
) -> dict[str, Any]:
    run = simulate(workload, engine, laws, seed=seed, policy=POLICIES[name])
    service = service_of(run)
    return {
        "policy": name,
        "served": 100 * service["total_throughput"] / service["offered_tokens_per_s"],
        **{key: service[key] for key in ("mean_itl_ms", "mean_ttft_ms", "p99_ttft_ms")},
        "worst_ttft_ms": service["worst_adapter_mean_ttft_ms"],
        "loads": 100 * run.steps.loads.sum() / service["arrived_requests"],
    }
