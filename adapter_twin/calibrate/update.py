"""Updates: the step-time law of a prior, moved by a few batches measured at its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.calibrate.campaign_fit import median_steps, observations
from adapter_twin.calibrate.from_tables import device_name, read_machine
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.roofline import CONSTANTS, Prior, RooflineLaw, known_constants
from adapter_twin.tables import datasets

FEWEST = 20
"""An update needs this number of different batches."""

APART = 5
"""One batch in so many is kept apart, to judge the update by."""

LEAST_SPREAD = 0.02
"""No constant is taken to be surer than this, by the logarithm."""


def update(prior: Calibration, folder: Path) -> Calibration:
    """Fit a prior's step-time law to measured batches, as far from it as they ask for.

    Some batches are kept apart at first. Where the law predicts them worse after the update than
    before, it is refused; else all of them are fitted.

    Parameters
    ----------
    prior : Calibration
        Its laws of all else stay as they are.
    folder : pathlib.Path
        Of a campaign, with its ``micro_steps`` (`adapter_twin.tables.campaign_schemas`).

    Returns
    -------
    Calibration

    Raises
    ------
    AdapterTwinError
        The batches are of another model, GPU or version of vLLM, too few, or make the law worse.
    """
    law = prior.step_time
    if not isinstance(law, RooflineLaw):
        raise AdapterTwinError(f"from: {prior.name} is no prior of a GPU; leave --from out")
    measured = datasets.read_campaign(folder)
    require("micro_steps" in measured, f"{folder}: micro_steps.parquet is missing; measure them")
    steps = measured["micro_steps"]
    _require_same_place(prior, steps, read_machine(folder))
    batches = median_steps(steps)
    require(
        len(batches) >= FEWEST,
        f"micro_steps: of {len(batches)} different batches; an update needs {FEWEST}: add levels "
        "to the campaign's plan",
    )
    apart = batches.index % APART == APART // 2
    known = _known(prior, law)
    trial = RooflineLaw(law.shape).fit(observations(batches[~apart]), known)
    before, after = (_mean_error(one, batches[apart]) for one in (law, trial))
    require(
        after <= before,
        f"micro_steps: batches kept apart are predicted worse after the update (by {after:.1%}) "
        f"than before ({before:.1%}); measure more batches, or use the prior as it is",
    )
    fitted = RooflineLaw(law.shape).fit(observations(batches), known)
    source = prior.provenance["source"] | {"batches": len(batches)}
    return replace(prior, step_time=fitted, provenance=prior.provenance | {"source": source})


def _require_same_place(prior: Calibration, steps: pd.DataFrame, machine: dict[str, Any]) -> None:
    models = ", ".join(map(str, steps["model"].unique()))
    require(models == prior.model, f"model: the campaign measured {models}, not {prior.model}")
    device, version = device_name(machine), str(machine["vllm"]).split("+")[0]
    require(device != "cpu", "micro_steps: of a CPU, where priors are none; leave --from out")
    here = device == prior.gpu
    require(here, f"gpu: the campaign ran on {machine['device']}, {prior.name} is of another")
    same = version == prior.memory.version
    require(same, f"engine: the campaign ran vLLM {version}, {prior.name} is of another")


def _known(prior: Calibration, law: RooflineLaw) -> Prior:
    """Return a law's constants and how far each spreads; of those it lacks, what others had."""
    guessed = known_constants(prior.gpu, prior.memory.version)
    told = {
        name: (value, max(float(np.log(law.draws_[name]).std()), LEAST_SPREAD))
        for name, value in law.constants_.items()
    }
    return {name: told.get(name, guessed[name]) for name in CONSTANTS}


def _mean_error(law: RooflineLaw, batches: pd.DataFrame) -> float:
    observed = observations(batches)
    return float(np.abs(law.expected_ms(observed) / observed.step_ms - 1).mean())
