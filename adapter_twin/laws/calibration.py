"""A calibration: all laws of one model on one GPU and engine version, kept as JSON."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.emitted_lengths import EarlyStopLaw, LengthLaw
from adapter_twin.laws.estimator import Estimator
from adapter_twin.laws.front_end import FrontEndLaw, MeasurementLaw
from adapter_twin.laws.loading import LoadingLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.scheduling import SchedulingLaw
from adapter_twin.laws.step_time import StepTimeLaw
from adapter_twin.tables import datasets
from adapter_twin.workload.models import model_shape
from adapter_twin.workload.scenario import EngineConfig, Workload
from adapter_twin.workload.strict import dataclass, read

FOLDER = datasets.SHIPPED / "calibrations"
"""The calibrations that come with the package lie in this folder."""

RANGE_MARGIN = 1.25
"""Values up to this factor outside the measured range give no warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The laws that the twin runs on.

    Attributes
    ----------
    name : str
        ``<model>@<gpu>-vllm<version>``.
    model, gpu, engine_version : str
        What the laws hold for.
    memory, step_time, loading, scheduling, front_end, early_stop, lengths, measurement
        Fitted laws.
    valid_range : dict
        Lowest and highest value of each configuration column that the fit has seen.
    provenance : dict
        Where the measurements come from, rows used, date, package version.
    """

    name: str
    model: str
    gpu: str
    engine_version: str
    memory: MemoryLaw
    step_time: StepTimeLaw
    loading: LoadingLaw
    scheduling: SchedulingLaw
    front_end: FrontEndLaw
    early_stop: EarlyStopLaw
    lengths: LengthLaw
    measurement: MeasurementLaw
    valid_range: dict[str, list[int | float]]
    provenance: dict[str, Any]

    @property
    def reserves_prompts(self) -> bool:
        """Whether this engine admits a prompt only when KV blocks for all of it are free.

        vLLM's ``scheduler_reserve_full_isl``, which is on since 0.19.
        """
        release = re.findall(r"\d+", self.engine_version)[:2]
        return tuple(map(int, release)) >= (0, 19)

    def warn_outside_range(self, engine: EngineConfig, workload: Workload) -> None:
        """Warn of what lies outside the range of the measurements."""
        asked = {
            "adapter_slots": engine.max_loras,
            "served_adapters": len(workload.adapters),
            "max_lora_rank": engine.max_lora_rank,
            "mean_input_tokens": workload.lengths.mean_input_tokens,
            "mean_requested_output_tokens": workload.lengths.mean_output_tokens,
        }
        for column, value in asked.items():
            low, high = self.valid_range[column]
            if not low / RANGE_MARGIN <= value <= high * RANGE_MARGIN:
                warnings.warn(
                    f"{self.name} was measured with {column} from {low:g} to {high:g}; "
                    f"{value:g} is an extrapolation",
                    stacklevel=3,
                )

    def to_json(self) -> str:
        """Return the calibration as JSON text."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v.to_dict() if isinstance(v, Estimator) else v for k, v in values.items()}
        return json.dumps(plain, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Calibration:
        """Read a calibration; raise `AdapterTwinError` if the file or one of its fields is bad."""
        try:
            return read(cls, json.loads(path.read_text()))
        except OSError as error:
            raise AdapterTwinError(
                f"calibration: {path} cannot be read ({error.strerror})"
            ) from None
        except ValueError as error:
            raise AdapterTwinError(
                f"calibration: {path} is no calibration ({error}); run adapter-twin calibrate"
            ) from None


def list_calibrations() -> list[str]:
    """Return the names of the calibrations that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_calibration(name: str, model: str) -> Calibration:
    """Load a calibration for a model.

    Parameters
    ----------
    name : str
        A name, the path of a ``.json`` file, or ``auto``: the first one of the model.
    model : str

    Raises
    ------
    AdapterTwinError
        There is none, or it is one of another model.

    Examples
    --------
    >>> load_calibration("auto", "llama-3.1-8b-instruct").name
    'llama-3.1-8b-instruct@h100-64gb-vllm0.8.5'
    """
    model_shape(model)
    names = list_calibrations()
    known = ", ".join(names)
    if name == "auto":
        name = next((known for known in names if known.startswith(f"{model}@")), "")
        require(bool(name), f"calibration: none for {model}; there are {known}")
    is_file = name.endswith(".json")
    require(is_file or name in names, f"calibration: {name!r} is unknown; use auto or {known}")
    calibration = Calibration.from_json(Path(name) if is_file else FOLDER / f"{name}.json")
    of = calibration.model
    require(of == model, f"calibration: {calibration.name} is of {of}, not of {model}; use auto")
    return calibration
