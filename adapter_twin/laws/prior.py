"""Priors: calibrations of a model, GPU and engine that were not measured together.

Memory follows from the model's files, step times from the constants of GPU and engine and the
model's shape. What neither tells, copies of adapters and the front end, is taken from models that
were measured, elsewhere perhaps, and so are the lengths and early ends of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw
from adapter_twin.laws.estimator import Estimator
from adapter_twin.laws.loading import LoadingLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.roofline import CONSTANTS, DRAWS, OWN, Prior, RooflineLaw, adapted_widths
from adapter_twin.workload.calibration_files import FOLDER, list_calibrations
from adapter_twin.workload.engine_versions import WITH_ADAPTERS, engine_version
from adapter_twin.workload.gpus import (
    data_sheet_steps,
    gpu_key,
    gpu_memory_gib,
    gpu_steps,
    steps_from,
)
from adapter_twin.workload.models import ModelShape, model_shape, same_model
from adapter_twin.workload.shipped import facts

Law = TypeVar("Law", bound=Estimator)

SPEEDS = {"runs": "runs on it", "operators": "single operators", "": "its data sheet"}
"""What the constants of a GPU are fitted to, by `adapter_twin.workload.gpus.steps_from`."""

ELSEWHERE = 0.15
"""The logarithm of a constant spreads by this much, besides, where no engine was run: those of a
GPU known by operators or data sheet, and a model's own on another GPU."""

MEASURED_GPU = "h100-64gb"
"""Constants of this GPU were measured in steps with adapters."""

UNKNOWN = 0.7
"""The logarithm of a constant that was not measured spreads by this much around another's."""


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
    ('mistral-7b-v0.3@h100-64gb-vllm0.8.5-prior', 12.3)
    """
    shape = model_shape(model)
    plain = not shape.experts and shape.linear_bits == 16
    require(plain, f"model: steps of experts or of quantised weights were not measured; {model}")
    place = f"@{gpu_key(gpu)}-vllm{version}"
    others, is_own = _measured(model, shape, place)
    first = others[0]
    constants = dict(constants or prior_constants(gpu, version))
    known = first.step_time if is_own and first.memory.version == version else None
    if isinstance(known, RooflineLaw):
        constants[OWN] = known.constants_[OWN], ELSEWHERE
    memory, about = MemoryLaw(shape, version, gpu_memory_gib(gpu)), engine_version(version)
    # the time to capture graphs is a version's: no other's holds
    alike = [one.memory for one in others if engine_version(one.memory.version) == about]
    if alike:
        memory.capture_s_, memory.capture_s_per_slot_ = np.mean(
            [[one.capture_s_, one.capture_s_per_slot_] for one in alike], axis=0
        ).tolist()
    return Calibration(
        name=f"{Path(model).name.lower()}{place}-prior",
        model=model,
        gpu=gpu_key(gpu),
        memory=memory,
        step_time=_step_time(RooflineLaw(shape), constants),
        loading=_mean_law([_loading(one, shape) for one in others], model=model),
        scheduling=_mean_law([one.scheduling for one in others]),
        front_end=_mean_law([one.front_end for one in others]),
        early_stop=first.early_stop if is_own else EarlyStopLaw.never(),
        lengths=first.lengths,
        measurement=_mean_law([one.measurement for one in others]),
        valid_range=first.valid_range,
        provenance={
            "source": {"prior": [one.name for one in others], "speeds": SPEEDS[steps_from(gpu)]},
            "date": datetime.now(UTC).date().isoformat(),
            "version": __version__,
        },
    )


def _measured(model: str, shape: ModelShape, place: str) -> tuple[list[Calibration], bool]:
    """Return calibrations to follow: the model's own of other places, or those of other models.

    One of the same shape is the model's own. The second value tells which they are.
    """
    measured = {name: name.split("@")[0] for name in list_calibrations() if "@cpu" not in name}
    own = [n for n, of in measured.items() if same_model(of, model) or model_shape(of) == shape]
    here = [n for n in own if n.endswith(place) and same_model(measured[n], model)]
    elsewhere = [name for name in own if name not in here]
    chosen = elsewhere or [name for name in measured if name not in own]
    return [Calibration.from_json(FOLDER / f"{name}.json") for name in chosen], bool(elsewhere)


def prior_constants(gpu: str, version: str) -> Prior:
    """Return what is known of the constants of steps: values, spreads of their logarithms.

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
    return {**_of_gpu(gpu), **engine.steps}


def known_constants(gpu: str, version: str) -> Prior:
    """Return the same for any GPU and version, for a fit to begin with.

    What is not known of them is that of others, with wide spreads.

    Parameters
    ----------
    gpu, version : str

    Examples
    --------
    >>> value, spread = known_constants("h100-64gb", "0.8.5")["bandwidth_gb_s"]
    >>> 1500 < value < 2100
    True
    """
    engine = engine_version(version)
    known = dict(engine.steps) if engine.version == version else {}
    with suppress(AdapterTwinError):
        known |= _of_gpu(gpu)
    others = gpu_steps(MEASURED_GPU) | engine_version(WITH_ADAPTERS).steps
    return {name: known.get(name, (others[name][0], UNKNOWN)) for name in CONSTANTS}


def _of_gpu(gpu: str) -> Prior:
    """Return the constants of a GPU; where no engine was run on it, they are less sure."""
    known = gpu_steps(gpu) or data_sheet_steps(gpu)
    besides = 0.0 if steps_from(gpu) == "runs" else ELSEWHERE
    return {name: (value, math.hypot(spread, besides)) for name, (value, spread) in known.items()}


def _loading(measured: Calibration, shape: ModelShape) -> LoadingLaw:
    """Return the load times of a model of another shape: copies by tensors, reads by weights."""
    law, of = copy(measured.loading), measured.memory.shape
    tensors = shape.layers / of.layers
    weights = tensors * sum(adapted_widths(shape)) / sum(adapted_widths(of))
    law.full_slot_ms_ *= tensors
    law.padded_slot_ms_ *= tensors
    law.read_ms_per_rank_ *= weights
    return law


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
    """Return a law with the geometric means of the numbers of some laws, without intervals."""
    numbers = {
        name: float(np.exp(np.mean([np.log(max(vars(law)[name], 1e-9)) for law in laws])))
        for name, value in vars(laws[0]).items()
        if name.endswith("_") and isinstance(value, float)
    }
    others = {**vars(laws[0]), **({"interval_": {}} if hasattr(laws[0], "interval_") else {})}
    return type(laws[0]).from_dict({**others, **numbers, **own})
