"""Tables of the chapter on vLLM's chain of evictions."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

import joblib
import numpy as np
import pandas as pd

from adapter_twin.laws import Calibration
from adapter_twin.laws.scheduling import GATED_SLOTS
from adapter_twin.service.metrics import adapter_loading, summarize
from adapter_twin.twin.policies import CostAware, Policy
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import parse_rates, records
from adapter_twin.workload.traffic import Lengths, Workload
from study.ch01_to_06 import CURVE_RATES, MEAN_INPUT_TOKENS, MEAN_OUTPUT_TOKENS

ONE_LINE = CostAware(frequency=0.0, recency=1.0, cost=0.0)
"""The changed line evicts the least recently used of the adapters that a step does not need."""

RULES: dict[str, Policy] = {"vLLM": Policy(), "one line changed": ONE_LINE}

SERVICE = ("total_throughput", "mean_itl_ms", "p99_ttft_ms")

SERVED = 128
"""The workload that shows what the chain costs has this number of adapters."""

TABLE_LENGTHS = Lengths(distribution="fixed", mean_input_tokens=251, mean_output_tokens=231)
"""Every request in the table ``scheduler_runs`` has these lengths."""

TABLE_DURATION_S = 600.0


class AdapterCaches:
    """vLLM's two adapter caches in plain Python.

    Parameters
    ----------
    max_loras, max_cpu_loras : int
        Places on the GPU and in host memory.
    pinned : iterable of int
        Adapters that are there from the start and never evicted.

    Examples
    --------
    Adapters 1 to 4 have all slots, and 3 has left the batch; 0 joins, first in the order.

    >>> caches = AdapterCaches(4, 8)
    >>> caches.touch([1, 2, 3, 4])
    ([1, 2, 3, 4], [1, 2, 3, 4])
    >>> caches.touch([0, 1, 2, 4])
    ([0, 1, 2], [0])
    """

    def __init__(self, max_loras: int, max_cpu_loras: int, pinned: Iterable[int] = ()) -> None:
        self.pinned = frozenset(pinned)
        # least recently touched first
        self.active: OrderedDict[int, None] = OrderedDict.fromkeys(self.pinned)
        self.registered: OrderedDict[int, None] = OrderedDict.fromkeys(self.pinned)
        self.max_loras, self.max_cpu_loras = max_loras, max_cpu_loras

    def touch(self, adapters: Sequence[int]) -> tuple[list[int], list[int]]:
        """Touch a step's adapters in the order given; return the ones copied and the ones read."""
        copied, read = [], []
        for adapter in adapters:
            if adapter not in self.registered:
                if len(self.registered) == self.max_cpu_loras:
                    self.active.pop(self._evict(self.registered), None)
                self.registered[adapter] = None
                read.append(adapter)
            self.registered.move_to_end(adapter)
            if adapter not in self.active:
                if len(self.active) == self.max_loras:
                    self._evict(self.active)
                self.active[adapter] = None
                copied.append(adapter)
            self.active.move_to_end(adapter)
        return copied, read

    def _evict(self, cache: OrderedDict[int, None]) -> int:
        victim = next(adapter for adapter in cache if adapter not in self.pinned)
        del cache[victim]
        return victim


def full_batches(slots: int, pinned: int = 0) -> Iterator[tuple[int | None, list[int]]]:
    """Yield who joins, and batches that take all slots, in the order in which steps touch them.

    In every step one adapter, drawn by chance, has left and another one has joined.
    """
    rng = np.random.default_rng(0)
    adapters = 3 * slots
    order = rng.permutation(adapters)
    batch, joins = set(range(slots)), None
    while True:
        yield joins, sorted(batch, key=order.__getitem__)
        leaves = int(rng.choice([adapter for adapter in batch if adapter >= pinned]))
        joins = int(rng.choice([adapter for adapter in range(adapters) if adapter not in batch]))
        batch.remove(leaves)
        batch.add(joins)


def exchange(
    slots: int, *, steps: int = 1000, pinned: int = 0, max_cpu_loras: int | None = None
) -> tuple[float, float]:
    """Return the mean copies and reads of an exchange where the batch takes all slots.

    Parameters
    ----------
    slots, pinned : int
        Pinned adapters are in every batch.
    steps : int
        Exchanges.
    max_cpu_loras : int, optional
        Left out, host memory holds all adapters.
    """
    caches = AdapterCaches(slots, max_cpu_loras or 3 * slots, range(pinned))
    counts = [
        [len(moved) for moved in caches.touch(batch)]
        for _, batch in islice(full_batches(slots, pinned), steps + 1)
    ]
    copies, reads = np.mean(counts[1:], axis=0)  # the first step fills the slots
    return float(copies), float(reads)


def walk(slots: int, steps: int) -> pd.DataFrame:
    """Return who is copied as steps walk over batches that take all slots.

    Returns
    -------
    pandas.DataFrame
        A row per step and adapter of its batch: ``step``, ``place`` in the batch, and ``what``:
        touched, copied again, or joins (and so is copied).
    """
    caches, rows = AdapterCaches(slots, 3 * slots), []
    for step, (joins, batch) in enumerate(islice(full_batches(slots), steps + 1)):
        copied, _ = caches.touch(batch)
        for place, adapter in enumerate(batch):
            what = "copied again" if adapter in copied else "touched"
            rows.append((step, place, "joins" if adapter == joins else what))
    table = pd.DataFrame(rows, columns=["step", "place", "what"])
    return table[table.step > 0]


def measured_copies(runs: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """Simulate the runs whose copies were measured, by both rules.

    Parameters
    ----------
    runs : pandas.DataFrame
        Table ``scheduler_runs``; those with fewer slots than adapters, and requests that waited,
        are kept.
    calibration : Calibration

    Returns
    -------
    pandas.DataFrame
        A row per run and ``rule``: ``gpu_loras``; ``ratio`` of the simulated copies to the measured
        ones; mean adapters of a batch, ``measured_adapters`` and the twin's ``adapters``.
    """
    gated = runs[(runs.gpu_loras < runs.cpu_loras) & (runs.avg_waiting_queue > 1)]
    memory = calibration.memory
    started = [row for row in records(gated) if memory.starts(_engine(row, calibration))]
    tasks = [(row, rule) for row in started for rule in RULES]
    rows = joblib.Parallel(-1)(
        joblib.delayed(_beside_measured)(row, rule, calibration) for row, rule in tasks
    )
    return pd.DataFrame(rows)


def _engine(row: Mapping[str, Any], calibration: Calibration) -> EngineConfig:
    return EngineConfig(
        model=calibration.model,
        max_loras=int(row["gpu_loras"]),
        max_cpu_loras=int(row["cpu_loras"]),
        max_lora_rank=int(row["rank"]),
    )


def _beside_measured(row: dict[str, Any], rule: str, calibration: Calibration) -> dict[str, Any]:
    served = int(row["cpu_loras"])
    workload = Workload(
        adapters=deal_adapters(served, [row["adapter_rates"]], [int(row["rank"])]),
        duration_s=TABLE_DURATION_S,
        lengths=TABLE_LENGTHS,
    )
    engine = _engine(row, calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 8 is below the calibration's range
        run = simulate(workload, engine, calibration, policy=RULES[rule])
    return {
        "rule": rule,
        "gpu_loras": int(row["gpu_loras"]),
        "measured_adapters": row["mean_loras_by_batch"],
        "ratio": run.steps.loads.sum() / row["max_lora_loads_from_memory"],
        "adapters": float(run.steps.adapters.mean()),
    }


def copies_by_slots(beside: pd.DataFrame) -> pd.DataFrame:
    """Return how near the twin's copies come to the measured ones, by rule and slots.

    Returns
    -------
    pandas.DataFrame
        ``rule``, ``slots`` (``8 to 64`` for these together), ``runs``; the median ``ratio`` of
        simulated to measured copies and ``within``, the percent of the runs within a factor of 1.5;
        median ``adapters`` of a batch, measured and in the twin.
    """
    short = beside.gpu_loras <= GATED_SLOTS
    together = beside[short].assign(slots=f"8 to {GATED_SLOTS}")
    both = pd.concat([together, beside.assign(slots=beside.gpu_loras.astype(str))])
    both["within"] = 100.0 * both.ratio.between(1 / 1.5, 1.5)
    groups = both.groupby(["rule", "slots"], sort=False)
    return groups.agg(
        runs=("ratio", "size"),
        ratio=("ratio", "median"),
        within=("within", "mean"),
        measured_adapters=("measured_adapters", "median"),
        adapters=("adapters", "median"),
    ).reset_index()


def offered_tokens_per_s() -> float:
    """Return the offered load of the workload at load 1."""
    return _workload(1.0, 1.0).offered_tokens_per_s


def cost(
    calibration: Calibration,
    slots: Sequence[int],
    loads: Sequence[float],
    *,
    seeds: int,
    duration_s: float,
) -> pd.DataFrame:
    """Serve one workload on several numbers of slots and at several loads, by both rules.

    Returns
    -------
    pandas.DataFrame
        ``rule, adapter_slots, load``; means over seeds of the figures of
        `adapter_twin.service.metrics.adapter_loading` and of ``total_throughput, mean_itl_ms,
        p99_ttft_ms``.
    """
    tasks = list(product(RULES, slots, loads, range(seeds)))
    rows = joblib.Parallel(-1)(
        joblib.delayed(_serve)(
            calibration, {"adapter_slots": g, "load": load}, rule, seed, duration_s
        )
        for rule, g, load, seed in tasks
    )
    return _over_seeds(rows, ["rule", "adapter_slots", "load"])


def settings(
    calibration: Calibration, *, load: float, seeds: int, duration_s: float
) -> pd.DataFrame:
    """Serve one workload with settings that shorten the chain, and with the one that lengthens it.

    Returns
    -------
    pandas.DataFrame
        As `cost`, by ``adapter_slots`` and ``max_cpu_loras``.
    """
    cases = [(32, 32), (32, 33), (32, 36), (32, SERVED), (64, SERVED), (SERVED, SERVED)]
    rows = joblib.Parallel(-1)(
        joblib.delayed(_serve)(
            calibration,
            {"adapter_slots": slots, "load": load, "max_cpu_loras": host},
            "vLLM",
            seed,
            duration_s,
        )
        for (slots, host), seed in product(cases, range(seeds))
    )
    return _over_seeds(rows, ["adapter_slots", "max_cpu_loras"])


def _serve(
    calibration: Calibration, case: dict[str, Any], rule: str, seed: int, duration_s: float
) -> dict[str, Any]:
    workload = _workload(case["load"], duration_s)
    engine = EngineConfig(
        model=calibration.model,
        max_loras=case["adapter_slots"],
        max_cpu_loras=case.get("max_cpu_loras", SERVED),
        max_lora_rank=16,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a host cache too small, which is what is asked
        run = simulate(workload, engine, calibration, seed=seed, policy=RULES[rule])
    service = summarize(run.records, run.gaps, run.duration_s)
    return {
        **case,
        "rule": rule,
        **adapter_loading(run.steps, run.duration_s),
        **{name: service[name] for name in SERVICE},
    }


def _workload(load: float, duration_s: float) -> Workload:
    rates = [load * rate for rate in parse_rates(CURVE_RATES)]
    return Workload(
        adapters=deal_adapters(SERVED, rates, [8, 16]),
        duration_s=duration_s,
        lengths=Lengths(mean_input_tokens=MEAN_INPUT_TOKENS, mean_output_tokens=MEAN_OUTPUT_TOKENS),
    )


def _over_seeds(rows: list[dict[str, Any]], keys: list[str]) -> pd.DataFrame:
    numbers = pd.DataFrame(rows).groupby(keys, sort=False)
    return numbers.mean(numeric_only=True).reset_index()
