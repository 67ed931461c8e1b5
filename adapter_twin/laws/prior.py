"""Priors: calibrations of a model, GPU and engine that were not measured together.

Memory follows from the model's files, step times from the constants of GPU and engine and the
model's shape. What neither tells, copies of adapters and the front end, is taken from models that
were measured, elsewhere perhaps, and so are the lengths and early ends of outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw
from adapter_twin.laws.estimator import Estimator
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.roofline import DRAWS, OWN, Prior, RooflineLaw
from adapter_twin.workload.calibration_files import FOLDER, list_calibrations
from adapter_twin.workload.engine_versions import engine_version
from adapter_twin.workload.gpus import (
    data_sheet_steps,
    gpu_key,
    gpu_memory_gib,
    gpu_steps,
    steps_from,
)
from adapter_twin.workload.models import model_shape, same_model
from adapter_twin.workload.shipped import facts

Law = TypeVar("Law", bound=Estimator)

SUFFIX = "-prior"
"""The name of a prior ends so: every answer that rests on it says it."""

SPEEDS = {"runs": "runs on it", "operators": "single operators", "": "its data sheet"}
"""What the constants of a GPU are fitted to, by `adapter_twin.workload.gpus.steps_from`."""

MODEL_SPREAD = 0.15
"""The logarithm of a constant that a model has for itself spreads by this much between places."""


def prior_calibration(
    model: str, gpu: str, version: str, constants: Prior | None = None
) -> Calibration:
    """Return a calibration of a model that was not measured on a GPU and engine.

    Parameters
    ----------
    model : str
        A name, or a folder with a ``config.json``.
    gpu : str
        A name of ``data/gpus``.
    version : str
        Of vLLM, one of ``data/engines`` that has ``steps``.
    constants : mapping, optional
        Of the steps, and their spreads; left out, what is known of GPU and version.

    Raises
    ------
    AdapterTwinError
        Nothing is known of the steps of the GPU or of the version, the model's shape cannot be
        told, or its steps are of a kind that was not measured.

    Examples
    --------
    >>> one = prior_calibration("mistralai/Mistral-7B-v0.3", "h100-64gb", "0.8.5")
    >>> one.name, round(float(one.step_time.for_engine(0, 0)[0, 0]), 1)
    ('mistralai-mistral-7b-v0.3@h100-64gb-vllm0.8.5-prior', 12.3)
    """
    shape = model_shape(model)
    plain = not shape.experts and shape.linear_bits == 16
    require(plain, f"model: steps of experts or of quantised weights were not measured; {model}")
    place = f"@{gpu_key(gpu)}-vllm{version}"
    others = _measured(model, place)
    first = others[0]
    constants = dict(constants or prior_constants(gpu, version))
    known = first.step_time if first.memory.version == version else None
    if same_model(first.model, model) and isinstance(known, RooflineLaw):
        constants[OWN] = known.constants_[OWN], MODEL_SPREAD
    memory, about = MemoryLaw(shape, version, gpu_memory_gib(gpu)), engine_version(version)
    # the time to capture graphs is a version's: no other's holds
    alike = [one.memory for one in others if engine_version(one.memory.version) == about]
    if alike:
        memory.capture_s_, memory.capture_s_per_slot_ = np.mean(
            [[one.capture_s_, one.capture_s_per_slot_] for one in alike], axis=0
        ).tolist()
    return Calibration(
        name=f"{model.strip('/').replace('/', '-').lower()}{place}{SUFFIX}",
        model=model,
        gpu=gpu_key(gpu),
        memory=memory,
        step_time=_step_time(RooflineLaw(shape), constants),
        loading=_mean_law([one.loading for one in others], model=model),
        scheduling=_mean_law([one.scheduling for one in others]),
        front_end=_mean_law([one.front_end for one in others]),
        early_stop=first.early_stop if same_model(first.model, model) else EarlyStopLaw.never(),
        lengths=first.lengths,
        measurement=_mean_law([one.measurement for one in others]),
        valid_range=first.valid_range,
        provenance={
            "source": {"prior": [one.name for one in others], "speeds": SPEEDS[steps_from(gpu)]},
            "date": datetime.now(UTC).date().isoformat(),
            "version": __version__,
        },
    )


def _measured(model: str, place: str) -> list[Calibration]:
    """Return the model's own calibrations of other places, or else those of other models."""
    on_gpus = [name for name in list_calibrations() if "@cpu" not in name]
    own = {name for name in on_gpus if same_model(name.split("@")[0], model)}
    chosen = [name for name in own if not name.endswith(place)] or sorted({*on_gpus} - own)
    return [Calibration.from_json(FOLDER / f"{name}.json") for name in chosen]


def prior_constants(gpu: str, version: str) -> Prior:
    """Return what is known of the constants of steps, without guesses.

    Parameters
    ----------
    gpu : str
        A name of ``data/gpus``.
    version : str

    Raises
    ------
    AdapterTwinError
        Of one of the two nothing is known.
    """
    engine = engine_version(version)
    known = [one["version"] for one in facts("engines").values() if one.get("steps")]
    require(
        engine.version == version and bool(engine.steps),
        f"engine: what a step of vLLM {version} takes was not measured; measure yours "
        f"(adapter-twin profile), or ask for one of {', '.join(sorted(known))}",
    )
    return (gpu_steps(gpu) or data_sheet_steps(gpu)) | engine.steps


def _step_time(law: RooflineLaw, constants: Prior) -> RooflineLaw:
    """Set a law's constants, and draws of them as far as they spread between models."""
    rng = np.random.default_rng(0)
    law.constants_ = {name: value for name, (value, _) in constants.items()}
    law.draws_ = {
        name: np.round(np.exp(spread * rng.standard_normal(DRAWS)), 4).tolist()
        for name, (_, spread) in constants.items()
    }
    return law


def _mean_law(laws: Sequence[Law], **own: object) -> Law:
    """Return a law with the geometric means of the numbers of some laws of its kind."""
    numbers = {
        name: float(np.exp(np.mean([np.log(max(vars(law)[name], 1e-9)) for law in laws])))
        for name, value in vars(laws[0]).items()
        if name.endswith("_") and isinstance(value, float)
    }
    return type(laws[0]).from_dict({**vars(laws[0]), **numbers, **own})
