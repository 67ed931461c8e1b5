"""Constants of GPUs, distilled from the operator tables of the package ``aiconfigurator-core``.

``python -m tools.gpu_efficiencies FOLDER``, with the folder into which the package's wheel was
unpacked, writes ``steps`` into ``data/gpus``, and how well they do to ``data/expected``.

To the steps that the tables make of all `MODELS` (`tools.operator_tables`) the law's
`GPU_CONSTANTS` are fitted by relative errors. Batches of decodes are too small to tell the peak
rate; prefills tell it. ``layer_ms`` is the latency of five operators.

Values are of vLLM's tables. A spread has two parts, added as independent: the standard deviation
between vLLM and SGLang, and that between models, as the jackknife estimates it. TensorRT-LLM is
left out: on two GPUs its tables read up to half faster than the memory can, so from a cache.
Attention on a short KV cache is read from one in all tables; the robust fit gives it less weight.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from adapter_twin.laws.roofline import GPU_CONSTANTS
from adapter_twin.laws.step_time import Floats
from adapter_twin.tables import datasets
from adapter_twin.workload.gpus import SHARE_OF, data_sheet_steps, share_of_data_sheet
from adapter_twin.workload.shipped import facts
from tools.operator_tables import Steps, Tables

PACKAGE = "aiconfigurator_core"
GPUS = {
    "a100-80gb-sxm": "a100_sxm",
    "h100-80gb-sxm": "h100_sxm",
    "h200": "h200_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
    "b200": "b200_sxm",
    "gb200": "gb200",
}
"""GPUs of ``data/gpus``, and what the package calls them."""

ENGINES = ("vllm", "sglang")
"""The first gives the values, all of them the spreads."""

MODELS = (
    *("llama-3.2-3b", "qwen-2.5-7b", "llama-3.1-8b", "qwen-3-8b"),
    *("mistral-nemo-12b", "qwen-2.5-14b", "qwen-2.5-32b", "llama-3.1-70b"),
)

ROBUST = 0.05
"""Relative errors beyond this count less."""

FARTHEST = 2.5
"""Logarithms are sought within this of where the fit starts: no power overflows there."""

GPU_FILES = datasets.REPOSITORY / "data" / "gpus"
EXPECTED = datasets.REPOSITORY / "data" / "expected"


def fit(steps: Sequence[Steps], start: Mapping[str, float]) -> dict[str, float]:
    """Fit the constants of a GPU to steps of models.

    Parameters
    ----------
    steps : sequence of Steps
    start : mapping
        Constants to begin with.
    """

    def errors(logarithms: Floats) -> Floats:
        constants = dict(zip(GPU_CONSTANTS, np.exp(logarithms).tolist(), strict=True))
        return np.concatenate([one.errors(constants) for one in steps])

    first = np.log([start[name] for name in GPU_CONSTANTS])
    bounds = first - FARTHEST, first + FARTHEST
    found = least_squares(errors, first, bounds=bounds, loss="soft_l1", f_scale=ROBUST)
    return dict(zip(GPU_CONSTANTS, np.exp(found.x).tolist(), strict=True))


def start_of(gpu: str) -> dict[str, float]:
    """Return constants that are near those of any GPU."""
    usual = dict.fromkeys(GPU_CONSTANTS, 0.8) | {"knee": 2.0, "layer_ms": 0.03}
    return {name: value * share_of_data_sheet(gpu, name) for name, value in usual.items()}


def spreads(
    whole: Sequence[Mapping[str, float]], left_out: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Return how far the logarithms of a model's own constants may be from those of all.

    Parameters
    ----------
    whole : sequence of mapping
        Constants by each engine.
    left_out : sequence of mapping
        Constants by the first, from all models but one. Their jackknife's standard error, times the
        root of the number of models, is the standard deviation between models.
    """

    def logarithms(constants: Sequence[Mapping[str, float]]) -> Floats:
        return np.log([[one[name] for name in GPU_CONSTANTS] for one in constants])

    of_engines = logarithms(whole).std(axis=0, ddof=1)
    of_models = logarithms(left_out).std(axis=0) * np.sqrt((len(left_out) - 1) * len(left_out))
    return dict(zip(GPU_CONSTANTS, np.hypot(of_engines, of_models).tolist(), strict=True))


def rounded(constants: Mapping[str, float], digits: int = 4) -> dict[str, float]:
    """Return constants rounded to a number of digits."""
    return {name: float(f"{value:.{digits}g}") for name, value in constants.items()}


def write(gpu: str, steps: Mapping[str, tuple[float, float]], source: str) -> None:
    """Put the constants of steps, and their source, into a GPU's file."""
    path = GPU_FILES / f"{gpu}.json"
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    sources = about.pop("sources") | {"steps": source}
    about |= {"steps": dict(steps), "steps_from": "operators", "sources": sources}
    text = json.dumps(about, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^][]+?),\s+([^][]+?)\s+\]", r"[\1, \2]", text)  # a pair is a line
    path.write_text(text + "\n", encoding="utf-8")


def percent(errors: Floats) -> float:
    """Return the mean of errors without their signs."""
    return round(100 * float(np.abs(errors).mean()), 2)


def of_phases(
    steps: Sequence[Steps], constants: Mapping[str, float], prefix: str = ""
) -> dict[str, float]:
    """Return mean errors of decodes and of prefills, in percent."""
    errors = np.concatenate([one.errors(constants) for one in steps])
    decodes = np.concatenate([one.context > 0 for one in steps])
    return {
        f"{prefix}decode_error": percent(errors[decodes]),
        f"{prefix}prefill_error": percent(errors[~decodes]),
    }


def fit_gpu(gpu: str, data: Path, release: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit a GPU and write its file.

    Parameters
    ----------
    gpu : str
        One of `GPUS`.
    data : pathlib.Path
        The package's tables.
    release : str
        Of the package.

    Returns
    -------
    engines : pandas.DataFrame
        A row for each of `ENGINES`; column ``measured`` has its `Steps`.
    models : pandas.DataFrame
        A row for each of `MODELS`: errors of the first engine's constants, and of those fitted to
        the other models.
    """
    tables = [Tables.read(data / GPUS[gpu], engine) for engine in ENGINES]
    measured = [[one.steps(model) for model in MODELS] for one in tables]
    fitted = [rounded(fit(steps, start_of(gpu))) for steps in measured]
    first, steps = fitted[0], measured[0]
    left_out = [fit([*steps[:i], *steps[i + 1 :]], first) for i in range(len(MODELS))]
    spread = rounded(spreads(fitted, left_out), 2)
    source = (
        f"fitted to the operator tables of {PACKAGE.replace('_', '-')} {release} (PyPI, NVIDIA, "
        f"Apache-2.0): {GPUS[gpu]}, vLLM {tables[0].version}, gemm and generation_attention in "
        "bf16 (tools/gpu_efficiencies.py)"
    )
    write(gpu, {name: (value, spread[name]) for name, value in first.items()}, source)
    engines = [
        {"gpu": gpu, "engine": engine, "version": one.version, **constants, "measured": its}
        for engine, one, constants, its in zip(ENGINES, tables, fitted, measured, strict=True)
    ]
    models = [
        {
            "gpu": gpu,
            "model": model,
            "mean_error": percent(one.errors(first)),
            "left_out_error": percent(one.errors(others)),
        }
        for model, one, others in zip(MODELS, steps, left_out, strict=True)
    ]
    return pd.DataFrame(engines), pd.DataFrame(models)


def with_errors(row: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's row with shares of the data sheet, and with errors in percent.

    Those left out are of the data sheet times the shares that the other GPUs' files hold.
    """
    gpu, steps = row["gpu"], row.pop("measured")
    sheet = {name: value for name, (value, _) in data_sheet_steps(gpu).items()}
    shares = {
        f"{name}_share": round(row[name] / share_of_data_sheet(gpu, name), 4)
        for name, keys in SHARE_OF.items()
        if keys
    }
    return {
        **row,
        **shares,
        "steps": sum(len(one.ms) for one in steps),
        **of_phases(steps, {name: row[name] for name in GPU_CONSTANTS}),
        **of_phases(steps, sheet, "left_out_"),
    }


def main(folder: Path) -> None:
    """Fit all GPUs, write their files, and record the errors.

    Parameters
    ----------
    folder : pathlib.Path
        Of the unpacked wheel.
    """
    about = sorted(folder.glob(f"{PACKAGE}-*.dist-info"))
    if not about:
        raise SystemExit(f"{folder}: no {PACKAGE}-*.dist-info here; unpack the wheel into it")
    release = about[0].stem.removeprefix(f"{PACKAGE}-")
    data = folder / PACKAGE / "systems" / "data"
    engines, models = zip(*(fit_gpu(gpu, data, release) for gpu in GPUS), strict=True)
    facts.cache_clear()
    rows = pd.concat(engines).to_dict("records")
    recorded = {
        "gpu_efficiencies": pd.DataFrame([with_errors({**row}) for row in rows]),
        "gpu_models_left_out": pd.concat(models),
    }
    for name, table in recorded.items():
        table.to_csv(EXPECTED / f"{name}.csv", index=False)
        print(table.to_string(index=False), end="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
