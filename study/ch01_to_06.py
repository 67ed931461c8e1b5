"""Tables of chapters 1 to 6: sweeps of the twin, and aggregates of the measured tables."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.calibrate.published_fit import fitted_runs
from adapter_twin.calibrate.step_observations import simulate_copies, step_observations
from adapter_twin.laws import Calibration
from adapter_twin.laws.roofline import (
    ADAPTER_CONSTANTS,
    ENGINE_CONSTANTS,
    GPU_CONSTANTS,
    LEAVES_GRAPHS,
    SWITCHES_TILING,
)
from adapter_twin.laws.step_time import FEATURES, batch_features
from adapter_twin.service.metrics import is_starved, per_adapter
from adapter_twin.service.predict import predict
from adapter_twin.twin.records import Simulation
from adapter_twin.twin.simulate import simulate
from adapter_twin.twin.wiring import step_law
from adapter_twin.workload.adapters import deal_adapters, zipf_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import generators
from adapter_twin.workload.traffic import Lengths, Workload
from study.plain_engine import PlainEngine, PlainRequest, serve

MEAN_INPUT_TOKENS, MEAN_OUTPUT_TOKENS = 223.0, 200.0
"""The traffic of the study's examples has the mean lengths of the reference measurements."""

BENCHMARKS = (
    (16, 16, "3.2-1.6-0.8", "8"),
    (96, 16, "0.1-0.05-0.025", "8-16-16"),
    (128, 128, "0.4-0.1-0.05", "8-16-32"),
    (128, 32, "1.6-0.8-0.4", "8-16"),
)
"""The twin's speed is quoted on these: served adapters, slots, rates and ranks."""

TAIL: Any = {"adapters": 64, "requests_per_s": 10.0, "exponent": 1.0}
"""The chapter on how vLLM serves has this Zipf-distributed traffic."""

CURVE_RATES = "0.1-0.05-0.025"
CURVES = {"llama-3.1-8b-instruct": "8-16", "qwen-2.5-7b-instruct": "8-16-32"}
"""The workloads of these ranks were measured over the whole range of served adapters."""


def configurations(
    model: str,
    served: Sequence[int],
    slots: Sequence[int],
    *,
    rates: str = CURVE_RATES,
    ranks: str = "8-16-16",
    duration_s: float = 3600.0,
) -> pd.DataFrame:
    """Return a table of runs: all pairs G <= N."""
    pairs = [(n, g) for n, g in product(served, slots) if g <= n]
    # The calibrations know slots of rank 16 and up: the reference study measured no others.
    rank = max(16, *(int(rank) for rank in ranks.split("-")))
    return pd.DataFrame(
        {
            "run_id": [f"{model} N={n} G={g} {rates} {ranks}" for n, g in pairs],
            "model": model,
            "rates_per_adapter": rates,
            "ranks": ranks,
            "served_adapters": [n for n, _ in pairs],
            "adapter_slots": [g for _, g in pairs],
            "max_lora_rank": rank,
            "max_num_seqs": 2048,
            "duration_s": duration_s,
            "mean_input_tokens": MEAN_INPUT_TOKENS,
            "mean_requested_output_tokens": MEAN_OUTPUT_TOKENS,
        }
    )


def offered_tokens_per_s(runs: pd.DataFrame) -> pd.Series[float]:
    """Return the offered load of runs whose rates are dealt round-robin."""
    rates = [
        np.resize([float(rate) for rate in text.split("-")], count).sum()
        for text, count in zip(runs["rates_per_adapter"], runs["served_adapters"], strict=True)
    ]
    return rates * (runs["mean_input_tokens"] + runs["mean_requested_output_tokens"])


def sweep(runs: pd.DataFrame, *, jobs: int = 2) -> pd.DataFrame:
    """Return the configurations with their predicted service, without any measurement's effect."""
    predicted = predict(runs, observer=False, jobs=jobs).drop(columns="run_id")
    swept = pd.concat([runs.reset_index(drop=True), predicted], axis=1)
    return swept.assign(offered_tokens_per_s=offered_tokens_per_s(swept).to_numpy())


def small_example(calibration: Calibration, duration_s: float = 6.0) -> Simulation:
    """Simulate a few seconds of five adapters on two slots."""
    workload = Workload(
        adapters=deal_adapters(5, [1.0, 0.6], [16]),
        duration_s=duration_s,
        lengths=Lengths(distribution="fixed", mean_input_tokens=223, mean_output_tokens=60),
    )
    engine = EngineConfig(model=calibration.model, max_loras=2, max_cpu_loras=5, max_lora_rank=16)
    with warnings.catch_warnings():
        # An illustration: so few slots were never measured.
        warnings.simplefilter("ignore")
        return simulate(workload, engine, calibration)


def plain_steps(run: Simulation, calibration: Calibration) -> pd.DataFrame:
    """Serve a run's requests by the scheduler over plain lists.

    Parameters
    ----------
    run : Simulation
        With `calibration`, that of a server on which every adapter has been used.

    Returns
    -------
    pandas.DataFrame
        One row per step, `study.plain_engine.PlainStep`.
    """
    engine, records = run.engine, run.records
    ranks = np.array([adapter.rank for adapter in run.workload.adapters])
    plain = PlainEngine(
        config=engine,
        kv_blocks=calibration.require_start(engine) // engine.block_size - 1,
        law=step_law(calibration, engine),
        load_s=calibration.loading.load_s(ranks, engine.max_lora_rank),
        read_s=calibration.loading.read_s(ranks),
        places=generators(run.seed)[2].permutation(len(ranks)),
        reserves_prompts=calibration.version.reserves_prompts,
    )
    columns = records.arrival_s, records.adapter, records.prompt_tokens, records.output_tokens
    requests = [PlainRequest(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    serve(plain, requests, run.duration_s)
    return pd.DataFrame(plain.steps)


def long_tail(calibration: Calibration, slots: Sequence[int], duration_s: float) -> pd.DataFrame:
    """Return per-adapter service of a long tail of adapters (`TAIL`), by slots."""
    workload = Workload(
        adapters=zipf_adapters(TAIL["adapters"], TAIL["requests_per_s"], TAIL["exponent"], [16]),
        duration_s=duration_s,
        lengths=Lengths(mean_input_tokens=MEAN_INPUT_TOKENS, mean_output_tokens=MEAN_OUTPUT_TOKENS),
    )
    tables = []
    for max_loras in slots:
        engine = EngineConfig(
            model=calibration.model,
            max_loras=max_loras,
            max_cpu_loras=TAIL["adapters"],
            max_lora_rank=16,
        )
        run = simulate(workload, engine, calibration)
        table = per_adapter(run.records, duration_s).reset_index()
        tables.append(table.assign(adapter_slots=max_loras))
    return pd.concat(tables, ignore_index=True)


def step_time_bins(windows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return median step times of windows by model, slots and batched tokens."""
    steady = windows[
        ~windows["run_id"].isin(runs.loc[runs["client_collapsed"], "run_id"])
        & (windows["win"] >= 4)
        & (windows["running_sd"] < 0.3 * windows["running"] + 3)
    ]
    tokens = steady["tok_per_step"].clip(lower=1)
    centre = 2.0 ** ((np.log2(tokens) * 2).round() / 2)  # two bins per doubling
    return _quantiles(steady.assign(tokens=centre), ["model", "adapter_slots", "tokens"], "step_ms")


def load_quantiles(loads: pd.DataFrame) -> pd.DataFrame:
    """Return quartiles of the load times by model, source and rank."""
    return _quantiles(loads, ["model", "source", "rank"], "load_ms")


def scheduling_bins(runs: pd.DataFrame) -> pd.DataFrame:
    """Return median scheduling times by slots and waiting requests."""
    waiting = runs["avg_waiting_queue"].clip(lower=1)
    bins = runs.assign(waiting=2.0 ** np.log2(waiting).round())
    return _quantiles(bins, ["gpu_loras", "waiting"], "sched_ms_per_step")


def _quantiles(rows: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Return quartiles of a column by group, groups of fewer than five rows left out."""
    groups = rows.groupby(by, observed=True)[column]
    table = groups.quantile(np.array([0.25, 0.5, 0.75])).unstack()
    table.columns = ["low", "median", "high"]
    return table.assign(n=groups.size()).query("n >= 5").reset_index()


def step_residuals(calibration: Calibration, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return quartiles of the step-time law's errors, in percent, by batched tokens.

    Parameters
    ----------
    calibration : Calibration
    tables : dict of DataFrame
        ``runs``, ``series``, ``windows``, ``steps`` and ``base_steps``.
    """
    runs = tables["runs"]
    runs = fitted_runs(runs[runs.model == calibration.model])
    observed = step_observations(
        tables,
        calibration.model,
        calibration.lengths,
        calibration.scheduling,
        calibration.memory,
        simulate_copies(calibration, runs, jobs=1),
    )
    expected_ms = calibration.step_time.expected_ms(observed)
    tokens = observed.batches[:, :, FEATURES.index("tokens")].mean(axis=1).clip(min=1)
    rows = pd.DataFrame(
        {
            "model": calibration.model,
            "source": np.where(observed.group == "", "calibration steps", "one-hour runs"),
            "tokens": 2.0 ** np.log2(tokens).round(),
            "error": 100 * (expected_ms / observed.step_ms - 1),
        }
    )
    return _quantiles(rows, ["model", "source", "tokens"], "error")


COSTED_REQUESTS, COSTED_CONTEXT, COSTED_ADAPTERS = 256.0, 360.0, 24.0


def step_costs(calibration: Calibration, max_loras: int, max_lora_rank: int) -> pd.DataFrame:
    """Return what the parts of a step cost by the law, over the tokens in its batch, in ms.

    The batches decode up to `COSTED_REQUESTS` of `COSTED_CONTEXT` tokens each, and hold
    `COSTED_ADAPTERS`.

    Parameters
    ----------
    calibration : Calibration
        Of a GPU.
    max_loras, max_lora_rank : int

    Returns
    -------
    pandas.DataFrame
        ``model``, ``tokens``, ``part``, ``cost``.
    """
    law, jumps = calibration.step_time, np.array([SWITCHES_TILING, LEAVES_GRAPHS])
    tokens = np.unique([*np.geomspace(32, 2048, 49).round(), *jumps, *jumps + 1])
    decodes = np.minimum(tokens, COSTED_REQUESTS)
    batches = batch_features(tokens, decodes, COSTED_CONTEXT * decodes, np.array(COSTED_ADAPTERS))
    regime = np.searchsorted(law.token_breaks_, tokens)
    without = law.for_engine(0, 0)
    added = batches * (law.for_engine(max_loras, max_lora_rank) - without)[regime]
    of_step = dict(zip(FEATURES, (batches * without[regime]).T, strict=True))
    of_adapters = dict(zip(FEATURES, added.T, strict=True))
    parts = {
        "engine and weights": of_step["launch"] + of_step["tokens"],
        "running requests": of_step["decodes"],
        "KV cache": of_step["context_tokens"],
        "slots": of_adapters["launch"] + of_adapters["tokens"],
        "adapters in the batch": of_adapters["adapters"] + of_adapters["adapters_tokens"],
    }
    table = pd.DataFrame({"model": calibration.model, "tokens": tokens, **parts})
    return table.melt(["model", "tokens"], var_name="part", value_name="cost")


def step_constants(calibrations: Sequence[Calibration]) -> pd.DataFrame:
    """Return the constants of the step-time laws of GPUs, a row each and a column per model."""
    named = {"GPU": GPU_CONSTANTS, "engine": {**ENGINE_CONSTANTS, **ADAPTER_CONSTANTS}}
    values = {c.model: vars(c.step_time)["constants_"] for c in calibrations}
    return pd.DataFrame(
        {
            "of the": owner,
            "constant": name,
            "for": about.replace("`SWITCHES_TILING`", f"{SWITCHES_TILING:g}"),
            **{model: constants[name] for model, constants in values.items()},
        }
        for owner, constants_of in named.items()
        for name, about in constants_of.items()
    )


def beside(runs: pd.DataFrame, ours: pd.DataFrame, authors: pd.DataFrame) -> pd.DataFrame:
    """Stack measured runs and both twins' predictions of them, with a column ``twin``."""
    configuration = ["run_id", "model", "rates_per_adapter", "ranks", "served_adapters"]
    keys = runs[[*configuration, "adapter_slots"]]
    figures = ["run_id", "total_throughput", "mean_itl_ms", "median_ttft_ms"]
    once = authors.sort_values("mode").drop_duplicates("run_id")
    parts = {"measured": runs, "ours": ours, "authors": once}
    tables = [
        keys.merge(part[[name for name in figures if name in part]], on="run_id").assign(twin=twin)
        for twin, part in parts.items()
    ]
    return pd.concat(tables, ignore_index=True)


def starvation_counts(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Count the runs that were measured and predicted to starve; collapsed clients are left out."""
    runs = runs[(runs["status"] == "ok") & ~runs["client_collapsed"].astype(bool)]
    starves = predictions.set_index("run_id").loc[runs["run_id"], "starved"].to_numpy(bool)
    ratio = runs["total_throughput"] / offered_tokens_per_s(runs)
    counts = pd.DataFrame({"measured": is_starved(ratio, 1.0).to_numpy(), "predicted": starves})
    return counts.value_counts().rename("runs").reset_index().sort_values(["measured", "predicted"])


def on_curves(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs are of the workload that the validation chapter draws."""
    workload = runs["rates_per_adapter"] == CURVE_RATES
    return workload & (runs["ranks"] == runs["model"].map(CURVES)) & (runs["adapter_slots"] <= 64)


def subsample(runs: pd.DataFrame, every: int, collapsed_every: int) -> pd.DataFrame:
    """Return every n-th run, client-collapsed ones more sparsely, and one of the drawn curves."""
    ordered = runs.sort_values(["model", "run_id"], ignore_index=True)
    collapsed = ordered["client_collapsed"].astype(bool)
    kept = on_curves(ordered) & (ordered["adapter_slots"] == 16) & ~collapsed
    kept |= ordered.index.isin(ordered.index[~collapsed][::every])
    kept |= ordered.index.isin(ordered.index[collapsed][::collapsed_every])
    return ordered[kept].reset_index(drop=True)
