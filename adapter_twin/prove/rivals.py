"""Studies: workloads whose recommended configuration is measured, and its rivals."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.plan.candidates import Candidates, candidate_slots
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.plan.recommend import recommend
from adapter_twin.workload.files import read_yaml
from adapter_twin.workload.models import shipped_models
from adapter_twin.workload.strict import Count, Many, Positive, Some, Text, Whole, dataclass, read

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
"""Slots are chosen by `recommend`, by the analytic model, by a tree that learned from the twin, by
rules of thumb, and by moving the twin's choice to the next candidate."""

PATHS = ("campaign", "model_folder", "adapters", "design")
"""These keys of a study name a file or a folder, and so do its workloads."""

PLAN = "plan.json"
CALIBRATION = "calibration.json"
"""These files of a study's folder hold what was recommended and will be measured, and what that
rests on."""


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
        `adapter_twin.workload.models.shipped_models` with random weights, and so are the adapters.
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
        for name, demand in demands.items():
            require(
                not demand.is_closed_loop,
                f"workloads: {name} has max_concurrency, and a study's client waits for no answer; "
                "leave it out",
            )
        model = next(iter(demands.values())).model
        require(
            model in shipped_models() or self.model_folder is not None,
            f"model: {model} has no shape of random weights here; give a study's model_folder",
        )
        return demands

    def asked(self) -> dict[str, Any]:
        """Return all that decides what is measured, workloads included, as plain values.

        Of files only the names: a study may move.
        """
        paths = {key: Path(path).name for key in PATHS if (path := getattr(self, key))}
        demands = {name: plain(demand) for name, demand in self.demands().items()}
        return asdict(self) | paths | {"workloads": demands}


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
    paths = {name: str(file.parent / path) for name in PATHS if (path := getattr(study, name))}
    workloads = tuple(str(file.parent / name) for name in study.workloads)
    return replace(study, workloads=workloads, **paths)  # type: ignore[arg-type]


Chooser = Callable[[Demand], int]
"""A method that was trained elsewhere chooses the slots for a demand."""

KEPT = (
    *("adapter_slots", "expected", "worst_served", "utilisation", "headroom", "binds", "reason"),
    *("kv_cache_tokens", "vllm_args", "criterion", "calibration", "version"),
    "slo_met_probability",
)
"""A study keeps these keys of a recommendation."""


def plan(
    demand: Demand, others: Mapping[str, Chooser], methods: Collection[str] = METHODS
) -> dict[str, Any]:
    """Return what is recommended for a demand, and what every method would choose.

    Parameters
    ----------
    demand : Demand
    others : mapping of str to callable
        Further methods by name.
    methods : collection of str
        Of `METHODS`, those that are asked.

    Returns
    -------
    dict
        ``picks``: adapter slots by method, none where a method finds no configuration that serves;
        ``recommended``: `KEPT` of `adapter_twin.plan.recommend.recommend`, or ``refused``: why
        it cannot recommend any.
    """
    candidates, slots = Candidates.of(demand), None
    answer: dict[str, Any]
    try:
        told = recommend(demand)
        slots = told["adapter_slots"]
        answer = {"recommended": {name: told[name] for name in KEPT}}
    except AdapterTwinError as error:
        answer = {"refused": str(error)}
    picks = {
        TWIN: slots,
        "analytic": analytic_slots(candidates),
        **{name: choose(demand) for name, choose in others.items()},
        **rules_of_thumb(demand, candidates.calibration.memory),
        **neighbours(demand, slots),
    }
    return {"picks": {name: picks[name] for name in picks if name in methods}, **answer}


def analytic_slots(candidates: Candidates) -> int | None:
    """Return what the analytic model chooses; it knows no percentiles, so no SLO."""
    bounds = candidates.bounds().rename(columns=lambda name: name.removeprefix("analytic_"))
    ranked = Criterion(margin=MARGIN).ranked(bounds)
    return None if ranked.empty else int(ranked.adapter_slots.iloc[0])


def rules_of_thumb(demand: Demand, memory: MemoryLaw) -> dict[str, int]:
    """Return the rules that operators use: all adapters, eight, a quarter, what memory holds."""
    count = len(demand.adapters)
    starting = [slots for slots in range(1, count + 1) if memory.starts(demand.engine_with(slots))]
    return {
        "G = N": count,
        "G = 8": min(8, count),
        "G = N/4": max(count // 4, 1),
        "largest that starts": max(starting, default=1),
    }


def neighbours(demand: Demand, slots: int | None) -> dict[str, int]:
    """Return the next candidates below and above the twin's choice, as far as there are any."""
    candidates = candidate_slots(demand)
    if slots is None:
        return {}
    place = candidates.index(slots)
    near = {"fewer slots": place - 1, "more slots": place + 1}
    return {name: candidates[at] for name, at in near.items() if 0 <= at < len(candidates)}
