"""Priors: calibrations of models of which no step was measured, on a GPU and engine that were.

Memory follows from the model's files, step times from the constants of GPU and engine and the
model's shape. What neither tells, copies of adapters and the front end, is taken from the models
that were measured there, and outputs are taken to end where they are asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.laws.calibration import Calibration, load_calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw
from adapter_twin.laws.estimator import Estimator
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.roofline import DRAWS, Prior, RooflineLaw, known_constants
from adapter_twin.workload.calibration_files import list_calibrations
from adapter_twin.workload.gpus import gpu_memory_gib
from adapter_twin.workload.models import model_shape, same_model
from adapter_twin.workload.strict import suggestion

Law = TypeVar("Law", bound=Estimator)


def prior_calibration(
    model: str, gpu: str, version: str, constants: Prior | None = None
) -> Calibration:
    """Return a calibration of a model of which nothing was measured.

    Parameters
    ----------
    model : str
        A name, or a folder with a ``config.json``.
    gpu, version : str
        Of vLLM. Steps of other models were measured on both together.
    constants : mapping, optional
        Of the steps, and their spreads; left out, what all models measured there give.

    Raises
    ------
    AdapterTwinError
        No step was measured there, the model's shape cannot be told, or its steps are of a kind
        that was not measured.

    Examples
    --------
    >>> one = prior_calibration("mistralai/Mistral-7B-v0.3", "h100-64gb", "0.8.5")
    >>> one.name, round(float(one.step_time.for_engine(0, 0)[0, 0]), 1)
    ('mistralai-mistral-7b-v0.3@h100-64gb-vllm0.8.5', 12.3)
    """
    shape = model_shape(model)
    plain = not shape.experts and shape.linear_bits == 16
    require(plain, f"model: steps of experts or of quantised weights were not measured; {model}")
    place = f"@{gpu}-vllm{version}"
    known = [name for name in list_calibrations() if name.endswith(place)]
    measured = [load_calibration(name, name.split("@")[0]) for name in known]
    others = [one for one in measured if not same_model(one.model, model)]
    places = {name.partition("@")[2] for name in list_calibrations() if "@cpu" not in name}
    require(
        bool(others),
        f"gpu: no model was measured on {gpu} with vLLM {version}{suggestion(place[1:], places)}",
    )
    constants = constants or known_constants(gpu, version)
    memory = MemoryLaw(shape, version, gpu_memory_gib(gpu))
    memory.capture_s_, memory.capture_s_per_slot_ = np.mean(
        [[one.memory.capture_s_, one.memory.capture_s_per_slot_] for one in others], axis=0
    ).tolist()
    first = others[0]
    return Calibration(
        name=f"{model.strip('/').replace('/', '-').lower()}{place}",
        model=model,
        gpu=gpu,
        memory=memory,
        step_time=_step_time(RooflineLaw(shape), constants),
        loading=_mean_law([one.loading for one in others], model=model),
        scheduling=_mean_law([one.scheduling for one in others]),
        front_end=_mean_law([one.front_end for one in others]),
        early_stop=EarlyStopLaw.never(),
        lengths=first.lengths,
        measurement=_mean_law([one.measurement for one in others]),
        valid_range=first.valid_range,
        provenance={
            "source": {"prior": [one.name for one in others]},
            "date": datetime.now(UTC).date().isoformat(),
            "version": __version__,
        },
    )


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
