"""The calibration that a name stands for: one that was measured, a file, or a prior."""

from __future__ import annotations

from functools import cache

from adapter_twin.errors import require
from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.prior import prior_calibration
from adapter_twin.workload.calibration_files import Place, calibration_path
from adapter_twin.workload.engine_versions import EngineVersion
from adapter_twin.workload.models import same_model


@cache
def version_of(name: str, model: str) -> EngineVersion:
    """Return the engine version of a calibration; parameters are those of `load_calibration`."""
    return load_calibration(name, model).version


def load_calibration(name: str, model: str) -> Calibration:
    """Load a calibration for a model.

    Parameters
    ----------
    name : str
        A name; the path of a ``.json`` file; ``auto``, the first one of the model; or
        ``auto@GPU`` or ``auto@GPU-vllmVERSION``, the one that was measured there, or else
        `adapter_twin.laws.prior.prior_calibration`.
    model : str

    Raises
    ------
    AdapterTwinError
        There is none, or it is one of another model.

    Examples
    --------
    >>> load_calibration("auto", "llama-3.1-8b-instruct").name
    'llama-3.1-8b-instruct@h100-64gb-vllm0.8.5'
    >>> load_calibration("auto@l40s", "llama-3.1-8b-instruct").name
    'llama-3.1-8b-instruct@l40s-vllm0.8.5-prior'
    """
    found = calibration_path(name, model)
    if isinstance(found, Place):
        return prior_calibration(model, *found)
    calibration = Calibration.from_json(found)
    of = calibration.model
    same = same_model(of, model)
    require(same, f"calibration: {calibration.name} is of {of}, not of {model}; use auto")
    return calibration
