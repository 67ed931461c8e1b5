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
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.prior import UNKNOWN, known_constants
from adapter_twin.laws.roofline import CONSTANTS, GPU_CONSTANTS, Prior, RooflineLaw
from adapter_twin.tables import datasets
from adapter_twin.workload.models import same_model

FEWEST = 20
"""An update needs this number of different batches."""

APART = 5
"""One batch of each n is kept apart, to judge the update by."""

LEAST_SPREAD = 0.02
"""No constant is taken to be surer than this, by the logarithm."""


def update(prior: Calibration, folder: Path) -> Calibration:
    """Fit a prior's step-time law to measured batches, as far from it as they ask for.

    Some batches are kept apart at first. Where the law predicts them worse after the update than
    before, it is refused; else all of them are fitted. Measured with another version of vLLM, they
    may move the constants of the engine far.

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
        The batches are of another model or GPU, too few, or make the law worse.
    """
    law = prior.step_time
    if not prior.origin or not isinstance(law, RooflineLaw):
        raise AdapterTwinError(f"from: {prior.name} is no prior; make one with calibrate --prior")
    measured = datasets.read_campaign(folder)
    require("micro_steps" in measured, f"{folder}: micro_steps.parquet is missing; measure them")
    steps = measured["micro_steps"]
    version = _version_there(prior, steps, read_machine(folder))
    batches = median_steps(steps)
    require(
        len(batches) >= FEWEST,
        f"micro_steps: of {len(batches)} different batches; an update needs {FEWEST}: add levels "
        "to the campaign's plan",
    )
    apart = batches.index % APART == APART // 2
    known = _known(prior, law, version)
    trial = RooflineLaw(law.shape).fit(observations(batches[~apart]), known)
    before, after = (_mean_error(one, batches[apart]) for one in (law, trial))
    require(
        after <= before,
        f"micro_steps: batches kept apart are predicted worse after the update (by {after:.1%}) "
        f"than before ({before:.1%}); measure more batches, or use the prior as it is",
    )
    fitted = RooflineLaw(law.shape).fit(observations(batches), known)
    source = prior.provenance["source"] | {"batches": len(batches)}
    moved = replace(prior, step_time=fitted, provenance=prior.provenance | {"source": source})
    if version == prior.memory.version:
        return moved
    of_prior, _, there = prior.name.partition(prior.memory.version)
    memory = MemoryLaw(prior.memory.shape, version, prior.memory.total_gib)
    return replace(moved, name=f"{of_prior}{version}{there}", memory=memory)


def _version_there(prior: Calibration, steps: pd.DataFrame, machine: dict[str, Any]) -> str:
    """Return the version of vLLM that was measured; raise unless all else is as of the prior."""
    models, wanted = ", ".join(map(str, steps["model"].unique())), Path(prior.model).name
    same = same_model(models, wanted)
    require(same, f"model: the campaign measured {models}, the prior is of {wanted}")
    device = device_name(machine)
    require(device != "cpu", "micro_steps: of a CPU, where priors are none; leave --from out")
    there = device == prior.gpu
    require(there, f"gpu: the campaign ran on {machine['device']}, the prior is of {prior.gpu}")
    return str(machine["vllm"]).split("+")[0]


def _known(prior: Calibration, law: RooflineLaw, version: str) -> Prior:
    """Return a law's constants and how far each spreads; of another version all may differ."""
    guessed, is_same = known_constants(prior.gpu, version), version == prior.memory.version
    told = {}
    for name, value in law.constants_.items():
        spread = max(float(np.log(law.draws_[name]).std()), LEAST_SPREAD)
        told[name] = value, spread if is_same or name in GPU_CONSTANTS else UNKNOWN
    return {name: told.get(name, guessed[name]) for name in CONSTANTS}


def _mean_error(law: RooflineLaw, batches: pd.DataFrame) -> float:
    observed = observations(batches)
    return float(np.abs(law.expected_ms(observed) / observed.step_ms - 1).mean())
