"""What a version of vLLM keeps of a GPU's memory, fitted to recorded starts of both models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapter_twin.laws.memory import GIB, slots_gib
from adapter_twin.tables import datasets
from adapter_twin.workload.engine_versions import engine_version
from adapter_twin.workload.files import records, run_to_engine
from adapter_twin.workload.gpus import gpu_memory_gib
from adapter_twin.workload.models import model_shape

if TYPE_CHECKING:
    import pandas as pd

GPU, VERSION = "h100-64gb", "0.8.5"
CONSTANTS = ("logit_bytes", "intermediate_bytes", "hidden_bytes", "reserve_gib", "lora_reserve_gib")
"""The fields of `adapter_twin.workload.engine_versions.KeptMemory`."""


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


if __name__ == "__main__":
    for name, value in fit_constants(recorded_starts()).items():
        print(f"{name:20s} {value:8.3f}")
