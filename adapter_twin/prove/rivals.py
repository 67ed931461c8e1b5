"""A study: workloads whose recommended configuration is measured, beside its rivals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.workload.files import read_yaml
from adapter_twin.workload.models import MODEL_CONFIGS
from adapter_twin.workload.strict import (
    Count,
    Many,
    Positive,
    Some,
    Text,
    Whole,
    dataclass,
    read,
    require,
)

TWIN, TREE = "twin", "tree"
Method = Literal[
    "twin",
    "analytic",
    "tree",
    "G = N",
    "G = 8",
    "G = N/4",
    "largest that starts",
    "fewer slots",
    "more slots",
]
METHODS: tuple[Method, ...] = get_args(Method)
"""Ways to choose slots: `recommend`, the analytic model, a tree that learned from the twin, rules
of thumb, and the twin's choice moved by one candidate."""

PATHS = ("campaign", "model_folder", "adapters", "design")
"""Keys of a study that name a file or a folder, beside its workloads."""

PLAN = "plan.json"
CALIBRATION = "calibration.json"
"""In a study's folder: what was recommended and will be measured, and what that rests on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The content of a study file; paths are relative to it.

    Attributes
    ----------
    name : str
    workloads : tuple of str
        Files as ``adapter-twin recommend`` takes them.
    campaign : str, optional
        Campaign of ``adapter-twin profile`` that is measured first and calibrated from; left out,
        each workload names its calibration.
    model_folder, adapters : str, optional
        Folder of the model, and one of PEFT adapters; left out, the model is a shape of
        `adapter_twin.workload.models.MODEL_CONFIGS` with random weights, and so are the adapters.
    design : str, optional
        Design of a sweep with that calibration, from which a tree learns to choose slots.
    methods : tuple of str, optional
        Methods whose choices are run, the twin among them; left out, all of them.
    duration_s : float
        Window of a run.
    repeats : int
        Times that every configuration is run, with other requests each time.
    budget_s : float
        Time for the serving runs of one call; the next one goes on where it stopped.
    seed : int
        Of the order of the runs; repeat i serves the requests of seed + i.
    """

    name: Text
    workloads: Some[str]
    campaign: str | None = None
    model_folder: str | None = None
    adapters: str | None = None
    design: str | None = None
    methods: Many[Method] | None = None
    duration_s: Positive = 60.0
    repeats: Count = 2
    budget_s: Positive = 3600.0
    seed: Whole = 0

    def __post_init__(self) -> None:
        named = self.methods is None or TWIN in self.methods
        require(named, f"methods: add {TWIN}: the others are compared with it")
        names = [Path(workload).stem for workload in self.workloads]
        require(len(set(names)) == len(names), "workloads: their file names must differ")

    def demands(self) -> dict[str, Demand]:
        """Read the workloads, by the names of their files.

        Raises
        ------
        AdapterTwinError
            A file is wrong, or the workloads differ in model or calibration.
        """
        demands = {Path(path).stem: load_demand(path) for path in self.workloads}
        for field in ("model", "calibration"):
            named = sorted({getattr(demand, field) for demand in demands.values()})
            require(
                len(named) == 1, f"workloads: all must name one {field}, not {', '.join(named)}"
            )
        model = next(iter(demands.values())).model
        require(
            model in MODEL_CONFIGS or self.model_folder is not None,
            f"model: {model} has no shape of random weights here; give a study's model_folder",
        )
        return demands

    def asked(self) -> dict[str, Any]:
        """Return all that decides what is measured, workloads included, as plain values.

        Of files only the names: a study may move.
        """
        return {
            **asdict(self),
            **{key: path and Path(path).name for key, path in self._paths().items()},
            "workloads": {name: plain(demand) for name, demand in self.demands().items()},
        }

    def _paths(self) -> dict[str, str | None]:
        return {name: getattr(self, name) for name in PATHS}


def plain(demand: Demand) -> dict[str, Any]:
    """Return a demand as plain values that build it again, without the place of its calibration."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(demand)))  # lists in place of tuples
    return content | {"calibration": Path(demand.calibration).name}


def load_study(path: str | Path) -> Study:
    """Read a study, or take a workload for one.

    Raises
    ------
    AdapterTwinError
        The file cannot be read, or has an unknown, missing or wrong key.
    """
    file = Path(path)
    content = read_yaml(file)
    if isinstance(content, dict) and "workloads" not in content and "adapters" in content:
        return Study(name=file.stem, workloads=(str(file),))
    study = read(Study, content)
    beside: dict[str, Any] = {
        name: str(file.parent / path) for name, path in study._paths().items() if path
    }
    beside["workloads"] = tuple(str(file.parent / name) for name in study.workloads)
    return replace(study, **beside)
