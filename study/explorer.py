"""The capacity explorer: the twin's answers for a menu of settings, for a page of the book.

``python -m study.explorer OUT.parquet`` predicts them afresh (minutes) as one table;
``python -m study.explorer OUT.js`` writes the recorded table as the page reads it.
"""

from __future__ import annotations

import base64
import json
import sys
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

from adapter_twin import __version__
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.parallel import track
from adapter_twin.plan.commands import vllm_args
from adapter_twin.plan.criterion import MARGIN, TIE, Criterion
from adapter_twin.plan.grid import GRID, STARVING_UTILISATION, evaluate, grid_runs, slot_rank
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.service.metrics import STARVATION_THRESHOLD
from adapter_twin.tables import datasets
from adapter_twin.tables.datasets import write_text
from adapter_twin.tables.schemas import (
    BOOL,
    MODELS,
    OPTIONAL,
    each,
    label,
    number,
    positive,
    table,
    whole,
)
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import parse_ranks, records, run_to_workload
from adapter_twin.workload.models import model_shape
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Workload

TABLE = datasets.REPOSITORY / "data" / "sweeps" / "explorer.parquet"

EXPLORER = table(
    "explorer",
    **each("model rates_per_adapter ranks", label()),
    **each("mean_input_tokens mean_requested_output_tokens", positive()),
    **each("served_adapters adapter_slots", whole(1)),
    **each("feasible_start simulated", BOOL),
    offered_tokens_per_s=number(0),
    **each("total_throughput mean_ttft_ms p99_ttft_ms mean_itl_ms", OPTIONAL),
)
"""The capacity explorer reads, besides its shares, a row per run, as in a sweep."""

DURATION_S, SEED = 3600.0, 0
"""Every run has these, as in `adapter_twin.plan.optimum.optimum`."""

RATES = (
    "0.003125",
    "0.0125",
    "0.025",
    "0.05",
    "0.1-0.05-0.025",
    "0.1",
    "0.4-0.1-0.025",
    "0.4",
    "1.6-0.4-0.1",
)
RANKS = ("8", "16", "32", "8-16-32")
LENGTHS = ((64.0, 50.0), (223.0, 200.0), (1024.0, 400.0))
"""Mean prompt and output tokens are the reference study's, and the ends of a wide range."""

TTFT_LIMITS_MS = (None, 200.0, 500.0, 2000.0, 10000.0)
ITL_LIMITS_MS = (None, 30.0, 50.0, 100.0)
"""SLOs have these limits; None is no limit."""

START = {
    "model": MODELS[0],
    "rates_per_adapter": "0.1-0.05-0.025",
    "ranks": "8-16-32",
    "lengths": LENGTHS[1],
    "ttft_ms": 2000.0,
    "itl_ms": 100.0,
    "percentile": 99.0,
}
"""The page opens with this setting."""

FIGURES = ("total_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms")
COLOURS = 64

OPTIMUM = (
    "adapter-twin optimum --model {model} \\\n"
    "  --rates {rates_per_adapter} --ranks {ranks} \\\n"
    "  --mean-input-tokens {mean_input_tokens} --mean-output-tokens {mean_output_tokens}"
)
"""This command simulates a setting of the page afresh, with the next line's SLO or without."""
WITH_SLO = "echo '{slo}' > slo.yaml\n{optimum} \\\n  --slo slo.yaml"
WITHOUT_SLO = "{optimum} \\\n  --slo none"


def workloads() -> list[dict[str, Any]]:
    """Return the traffic mixes, as `adapter_twin.plan.grid.grid_runs` takes them."""
    return [
        {
            "model": model,
            "rates_per_adapter": rates,
            "ranks": ranks,
            "mean_input_tokens": mean_input_tokens,
            "mean_requested_output_tokens": mean_output_tokens,
        }
        for model, rates, ranks, (mean_input_tokens, mean_output_tokens) in product(
            MODELS, RATES, RANKS, LENGTHS
        )
    ]


def met(ttft_ms: float | None, itl_ms: float | None) -> str:
    """Return the column of the requests that keep two limits.

    >>> met(500.0, None)
    'met_ttft_500_itl_none'
    """
    ttft, itl = ("none" if limit is None else f"{limit:g}" for limit in (ttft_ms, itl_ms))
    return f"met_ttft_{ttft}_itl_{itl}"


SLOS = {
    met(*limits): Slo(ttft_ms=limits[0], itl_ms=limits[1])
    for limits in product(TTFT_LIMITS_MS, ITL_LIMITS_MS)
    if limits != (None, None)
}


def explore(jobs: int = -1) -> pd.DataFrame:
    """Predict the service of every workload on every configuration.

    Returns
    -------
    pandas.DataFrame
        `EXPLORER`, in the order of `workloads`.
    """
    calibrations = {model: warmed_up(load_calibration("auto", model)) for model in MODELS}
    tasks = [
        joblib.delayed(_predict)(workload, calibrations[workload["model"]])
        for workload in workloads()
    ]
    parts = joblib.Parallel(jobs, return_as="generator")(tasks)
    shown = track(parts, "workloads of the explorer", len(tasks))
    whole: pd.DataFrame = pd.concat(shown, ignore_index=True)
    return whole


def _predict(workload: Mapping[str, Any], calibration: Calibration) -> pd.DataFrame:
    runs = grid_runs(workload, GRID, GRID, DURATION_S, calibration.version)
    runs = evaluate(runs, calibration, seed=SEED, slo=SLOS)
    return runs.assign(**{name: hundredths(runs[name]) for name in SLOS})[
        [*EXPLORER.columns, *SLOS]
    ]


def hundredths(share: pd.Series[float]) -> pd.Series[int]:
    """Return shares in hundredths of a percent, rounded down, none where there is no share.

    At least 9950 of them is the same as a share of at least 99.5 %: no verdict is lost.
    """
    return (1e4 * share.fillna(0) + 1e-9).astype("uint16")  # cuts


def compact(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table that packs small, still exact enough for the rule of choice."""
    kinds = {"category": "category", "float64": "float32", "int64": "int16"}
    types = {name: str(column.dtype) for name, column in EXPLORER.columns.items()}
    return table.astype({name: kinds[kind] for name, kind in types.items() if kind in kinds})


def runs_of(
    table: pd.DataFrame, workload: Mapping[str, Any], slo: Slo | None = None
) -> pd.DataFrame:
    """Return one workload's runs as `adapter_twin.plan.criterion.Criterion` takes them."""
    runs = table[(table[[*workload]] == pd.Series(workload)).all(axis=1)]
    if slo is None:
        return runs
    # In two steps, as a percentile is divided: one division may differ in the last bit.
    return runs.assign(slo_attainment=runs[met(slo.ttft_ms, slo.itl_ms)] / 100 / 100)


def page_data(table: pd.DataFrame) -> dict[str, Any]:
    """Return what the page shows: the table packed, and every name and number it speaks of.

    Arrays are the bytes of little-endian numbers in base64: ``state`` of every run, ``offered``
    load of every workload and number of served adapters, and, of the simulated runs in the table's
    order, the figures and the shares of requests that keep ``met[i][j]``, the i-th limit on the
    TTFT and the j-th one on the ITL.
    """
    simulated = table[table.simulated]
    state = np.where(table.feasible_start, np.where(table.simulated, 2, 1), 0)
    traffic = table.drop_duplicates([*workloads()[0], "served_adapters"])
    return {
        "version": __version__,
        "window_s": DURATION_S,
        "seed": SEED,
        "calibrations": {model: load_calibration("auto", model).name for model in MODELS},
        "threshold": {
            "starvation": STARVATION_THRESHOLD,
            "margin": MARGIN,
            "tie": TIE,
            "hopeless": STARVING_UTILISATION,
        },
        "criterion": _criterion_templates(),
        "choices": {
            "model": MODELS,
            "rates_per_adapter": RATES,
            "ranks": RANKS,
            "lengths": LENGTHS,
        },
        "limits": {"ttft_ms": TTFT_LIMITS_MS, "itl_ms": ITL_LIMITS_MS},
        "start": START,
        "grid": GRID,
        "configurations": [(n, g) for n, g in product(GRID, GRID) if g <= n],
        "states": ["refused", "hopeless", "simulated"],
        "state": _packed(state, "u1"),
        "offered": _packed(traffic.offered_tokens_per_s, "<f4"),
        "figures": {
            name: _label(name) | {"values": _packed(simulated[name], "<f4")} for name in FIGURES
        },
        "met": [
            [_packed(simulated.get(met(ttft, itl), []), "<u2") for itl in ITL_LIMITS_MS]
            for ttft in TTFT_LIMITS_MS
        ],
        "extrapolations": [
            _extrapolations(mix) for mix in workloads() if mix["rates_per_adapter"] == RATES[0]
        ],
        "max_lora_rank": [slot_rank(parse_ranks(ranks)) for ranks in RANKS],
        "max_model_len": [model_shape(model).max_model_len for model in MODELS],
        "vllm": _vllm_template(),
        "optimum": OPTIMUM,
        "with_slo": WITH_SLO,
        "without_slo": WITHOUT_SLO,
        "colours": _colours(),
    }


def write_page_data(table: pd.DataFrame, path: Path) -> None:
    """Write `page_data` as the script that the page loads: it has to open without a server."""
    content = json.dumps(page_data(table), separators=(",", ":"), allow_nan=False)
    write_text(path, f"const EXPLORER = {content};\n")


def _packed(values: Any, kind: str) -> str:
    return base64.b64encode(np.asarray(values, kind).tobytes()).decode()


def _label(figure: str) -> dict[str, str]:
    """Return the name and the unit of a figure, as the book's plots label it."""
    from study.figures.style import split_label

    return dict(zip(("label", "unit"), split_label(figure), strict=True))


def _smallest(workload: Mapping[str, Any]) -> tuple[EngineConfig, Workload]:
    return run_to_workload(records(grid_runs(workload, GRID[:1], GRID[:1], DURATION_S))[0])


def _extrapolations(workload: Mapping[str, Any]) -> list[str]:
    """Say in which ways a workload lies outside what the calibration was measured on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_calibration("auto", workload["model"]).warn_outside_range(*_smallest(workload))
    return [str(warning.message) for warning in caught]


def _criterion_templates() -> dict[str, str]:
    """Return the rule of choice in words, with a name in place of an SLO's percentile."""
    with_slo = str(Criterion(margin=MARGIN, slo=Slo(ttft_ms=1.0, percentile=99.0)))
    return {
        "plain": str(Criterion(margin=MARGIN)),
        "slo": with_slo.replace("TTFT 1 ms", "{limits}").replace("by 99 %", "by {percentile} %"),
    }


def _vllm_template() -> str:
    """Return the command that starts the engine, with names in place of what settings change."""
    engine, _ = _smallest(workloads()[0])
    args = vllm_args(engine, load_calibration("auto", engine.model))
    for flag, name in (
        ("--max-loras", "adapter_slots"),
        ("--max-cpu-loras", "served_adapters"),
        ("--max-lora-rank", "max_lora_rank"),
        ("--max-model-len", "max_model_len"),
    ):
        args[args.index(flag) + 1] = f"{{{name}}}"
    return "vllm serve MODEL " + " ".join(args).replace(" --", " \\\n  --")


def _colours() -> list[str]:
    """Return a colour map that those who do not tell colours apart can read, darkest first."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 1, COLOURS))]


def main(out: Path) -> None:
    """Write the table afresh, or the recorded one for the page, by the suffix of `out`."""
    if out.suffix == ".js":
        write_page_data(datasets.read_table(TABLE, EXPLORER), out)
        return
    datasets.write_table(compact(explore()), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
