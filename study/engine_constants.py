"""What holds for a version of vLLM and a GPU, fitted to the recorded measurements of both models.

``python -m study.engine_constants`` prints what the engine keeps of the memory, and the constants
of its steps, as ``data/engines`` and ``data/gpus`` have them. A calibration of a model starts from
these; their spreads there say how far it may go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapter_twin.calibrate.published_fit import TABLES, fitted_runs
from adapter_twin.calibrate.step_observations import simulate_copies, step_observations
from adapter_twin.calibrate.through_twin import Response
from adapter_twin.laws import list_calibrations, load_calibration
from adapter_twin.laws.roofline import OWN, Prior, RooflineLaw, fit_together
from adapter_twin.laws.slots import GIB, slots_gib
from adapter_twin.tables import datasets
from adapter_twin.workload.engine_versions import engine_version
from adapter_twin.workload.files import records, run_to_engine
from adapter_twin.workload.gpus import gpu_memory_gib
from adapter_twin.workload.models import model_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from adapter_twin.laws import Calibration

GPU, VERSION = "h100-64gb", "0.8.5"
CONSTANTS = ("logit_bytes", "intermediate_bytes", "hidden_bytes", "reserve_gib", "lora_reserve_gib")
"""The fields of `adapter_twin.workload.engine_versions.KeptMemory`."""

PHYSICAL: Prior = {
    "bandwidth_gb_s": (1800.0, 0.2),
    "kv_bandwidth_gb_s": (1900.0, 0.2),
    "compute_tflops": (730.0, 0.2),
    "knee": (2.2, 0.25),
    "layer_ms": (0.044, 0.5),
    "step_ms": (2.5, 0.5),
    "sequence_ms": (0.015, 0.7),
    "arrival_ms": (0.15, 1.0),
    "eager_layer_ms": (0.01, 1.5),
    "lora_layer_ms": (0.035, 0.7),
    "eager_lora_layer_ms": (0.03, 1.5),
    "few_adapter_ms": (0.007, 0.7),
    "many_adapter_ms": (0.007, 0.7),
    "adapter_reads": (3.0, 0.7),
    "idle_block_ns": (1.0, 1.5),
    "shrink_block_ns": (1.0, 1.5),
    "expand_block_ns": (1.0, 1.5),
    "activation_reads": (3.0, 1.5),
    "token_reads": (0.01, 1.5),
}
"""What is known of the constants before anything is measured: values, spreads of their logarithms.
Rates are three quarters to nine tenths of a data sheet's; a launch takes microseconds."""


def recorded_starts() -> pd.DataFrame:
    """Return the starts that succeeded: over slots and ranks, and over other flags."""
    import pandas as pd

    others = pd.read_csv(datasets.REPOSITORY / "data" / "engines" / f"vllm-{VERSION}-starts.csv")
    starts = pd.concat([datasets.load("memory"), others], ignore_index=True)
    return starts.dropna(subset=["kv_cache_tokens"])


def fit_constants(starts: pd.DataFrame) -> dict[str, float]:
    """Fit `CONSTANTS` to the relative errors in KV tokens.

    Parameters
    ----------
    starts : pandas.DataFrame
        See `recorded_starts`.

    Returns
    -------
    dict
        `CONSTANTS`, and ``mean_error`` and ``max_error`` in percent.
    """
    from scipy.optimize import least_squares

    version, total_gib = engine_version(VERSION), gpu_memory_gib(GPU)
    engines = [run_to_engine(row) for row in records(starts)]
    shapes = [model_shape(engine.model) for engine in engines]
    kv_gib = np.array([shape.kv_bytes_per_token() for shape in shapes]) / GIB
    pairs = list(zip(engines, shapes, strict=True))
    known_gib = np.array(
        [
            engine.gpu_memory_utilization * total_gib
            - shape.weights_bytes / GIB
            - (slots_gib(engine, shape, version) if engine.max_loras else 0.0)
            for engine, shape in pairs
        ]
    )
    sampler = np.array([shape.vocabulary * engine.max_num_seqs for engine, shape in pairs])
    budget = np.array([engine.max_num_batched_tokens for engine in engines])
    intermediate = budget * np.array([shape.intermediate for shape in shapes])
    hidden = budget * np.array([shape.hidden for shape in shapes])
    has_loras = np.array([engine.max_loras > 0 for engine in engines])
    measured = starts.kv_cache_tokens.to_numpy(float)

    def errors(constants: NDArray[np.float64]) -> NDArray[np.float64]:
        logit, per_intermediate, per_hidden, reserve, lora_reserve = constants
        forward = per_intermediate * intermediate + per_hidden * hidden
        used_gib = np.maximum(logit * sampler, forward) / GIB + reserve + lora_reserve * has_loras
        return np.asarray((known_gib - used_gib) / kv_gib / measured - 1)

    # robust: a few starts lie a block or two beside the others
    found = least_squares(errors, [14.0, 10.0, 24.0, 0.8, 0.2], loss="soft_l1", f_scale=1e-3)
    left = 100 * np.abs(errors(found.x))
    named = dict(zip(CONSTANTS, found.x.tolist(), strict=True))
    return {**named, "mean_error": float(left.mean()), "max_error": float(left.max())}


def fit_steps(
    calibrations: Sequence[Calibration],
    tables: Mapping[str, pd.DataFrame],
    responses: Sequence[Response],
    *,
    jobs: int = 1,
) -> dict[str, float]:
    """Fit the constants of steps to all models of one GPU and engine at once.

    Parameters
    ----------
    calibrations : sequence of Calibration
        One of each model; their other laws are taken as they are.
    tables : mapping
        `adapter_twin.calibrate.published_fit.TABLES`, by name.
    responses : sequence of Response
        Of the twin of each calibration, of its runs in the tables.
    jobs : int
        Processes.
    """
    laws = [RooflineLaw(one.memory.shape) for one in calibrations]
    runs = fitted_runs(tables["runs"])
    observed = [
        step_observations(
            *(tables, one.model, one.lengths, one.scheduling, one.memory),
            simulate_copies(one, runs[runs.model == one.model], jobs),
        )
        for one in calibrations
    ]
    fit_together(laws, observed, PHYSICAL, [one.errors for one in responses])
    return laws[0].constants_ | {OWN: float(np.mean([law.constants_[OWN] for law in laws]))}


if __name__ == "__main__":
    for name, value in fit_constants(recorded_starts()).items():
        print(f"{name:20s} {value:8.3f}")
    measured = {name: datasets.load(name) for name in TABLES}
    known = [
        load_calibration(name, name.split("@")[0]) for name in list_calibrations() if GPU in name
    ]
    moves = [
        Response.of(one, fitted_runs(measured["runs"].query("model == @one.model")), jobs=-1)
        for one in known
    ]
    for name, value in fit_steps(known, measured, moves, jobs=-1).items():
        print(f"{name:20s} {value:.4g}")
