"""Studies, run: this machine is calibrated, plans are made, every choice is served for real."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from joblib.externals.loky import get_reusable_executor

from adapter_twin.calibrate.from_tables import calibrate_tables, device_name
from adapter_twin.errors import require
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.learn.slots_tree import learn_slots
from adapter_twin.measure.engine_flags import (
    EngineFlags,
    describe_machine,
    is_cpu_build,
    require_engine,
)
from adapter_twin.measure.pieces import Piece, ServingPiece
from adapter_twin.measure.run_campaign import WorkSession, run_campaign
from adapter_twin.measure.store import Store, Summary
from adapter_twin.plan.demand import Demand
from adapter_twin.prove import rivals
from adapter_twin.prove.rivals import CALIBRATION, PLAN, Study
from adapter_twin.tables.datasets import write_text

log = logging.getLogger(__name__)

CAMPAIGN = "campaign"
SWEEP = "sweep"


def run_study(file: Path, engine: Literal["cpu", "cuda"], out: Path) -> Summary:
    """Measure what a study asks and is not in `out` yet.

    Parameters
    ----------
    file : pathlib.Path
        A study (`adapter_twin.prove.rivals.Study`), or a workload alone.
    engine : {"cpu", "cuda"}
        The build of vLLM that is expected here.
    out : pathlib.Path
        Gets ``plan.json``, made before anything is served, and the tables ``runs``, ``requests``
        and ``series`` of `adapter_twin.tables.campaign_schemas`; the study's campaign goes to
        ``campaign/`` and its calibration to ``calibration.json``. A later call goes on.

    Returns
    -------
    Summary
        Of the serving runs; of the campaign, where the time ended within it.

    Raises
    ------
    AdapterTwinError
        A file is wrong, there is no such engine, the calibration is of another machine or engine,
        or `out` holds another study.
    """
    study = rivals.load_study(file)
    require_engine()
    here = "cpu" if is_cpu_build() else "cuda"
    require(engine == here, f"engine: the vLLM installed here is for {here}; use --engine {here}")
    demands = study.demands()
    first = next(iter(demands.values()))
    if study.campaign is not None:
        summary = run_campaign(Path(study.campaign), out / CAMPAIGN)
        if summary.stopped is not None:
            return summary
    calibration = _calibration(study, first, out)
    machine = describe_machine(engine_flags(study, first, calibration, 1))
    check_calibration(calibration, machine)
    store = Store(out)
    store.open(yaml.safe_dump(study.asked(), sort_keys=False), machine, file)
    own = out / CALIBRATION  # what was planned with lies beside what was measured
    write_text(own, calibration.to_json())
    demands = {name: replace(demand, calibration=str(own)) for name, demand in demands.items()}
    planned = _plan(study, demands, out)
    model = study.model_folder or first.model
    session = WorkSession(study.name, model, study.adapters, study.budget_s, store)
    return session.measure(pieces(study, demands, calibration, planned))


def check_calibration(calibration: Calibration, machine: Mapping[str, Any]) -> None:
    """Raise `AdapterTwinError` if a calibration was measured with another device or vLLM."""
    measured_on = calibration.provenance["source"].get("machine")
    if calibration.origin and device_name(dict(machine)) == calibration.gpu:
        measured_on = machine["device"]  # a prior is of a kind of device
    version = str(machine["vllm"]).split("+")[0]
    told = ("device", measured_on, machine["device"]), ("vllm", calibration.memory.version, version)
    for what, of_calibration, here in told:
        require(
            of_calibration == here,
            f"calibration: {calibration.name} is of {what} {of_calibration}, this is {here}; "
            "measure this machine with `adapter-twin profile` and `calibrate`, or name a campaign",
        )


def _calibration(study: Study, demand: Demand, out: Path) -> Calibration:
    """Return the calibration that is there, fit the campaign's, or load what a demand names."""
    path = out / CALIBRATION
    if path.is_file():
        return Calibration.from_json(path)
    if study.campaign is not None:
        return calibrate_tables(out / CAMPAIGN, jobs=-1)
    return load_calibration(demand.calibration, demand.model)


def _plan(study: Study, demands: Mapping[str, Demand], out: Path) -> dict[str, Any]:
    """Return the plan that is there, or make it: what was said before is not said anew."""
    path = out / PLAN
    if not path.is_file():
        others = {}
        if study.design is not None:
            calibration = next(iter(demands.values())).calibration
            others[rivals.TREE] = learn_slots(Path(study.design), out / SWEEP, calibration)
        workloads = {}
        for name, demand in demands.items():
            log.info("planning %s", name)
            planned = rivals.plan(demand, others, study.methods or rivals.METHODS)
            workloads[name] = {"demand": rivals.plain(demand), **planned}
        get_reusable_executor().shutdown()  # idle processes of the sweep would still wake up
        write_text(path, json.dumps({"workloads": workloads}, indent=1) + "\n")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def pieces(
    study: Study,
    demands: Mapping[str, Demand],
    calibration: Calibration,
    planned: Mapping[str, Any],
) -> list[list[Piece]]:
    """Return the serving runs, each with a server of its own, repeat by repeat in random order.

    A randomised complete block design: every repeat holds every configuration once, so that a
    machine that drifts meets all of them alike, and a study that is cut short has whole repeats.

    Parameters
    ----------
    study : Study
    demands : mapping of str to Demand
        By workload.
    calibration : Calibration
    planned : mapping
        Content of ``plan.json``.
    """
    rng = np.random.default_rng(study.seed)
    arms = [
        (name, slots)
        for name in demands
        for slots in sorted({g for g in planned["workloads"][name]["picks"].values() if g})
    ]
    return [
        [
            ServingPiece(
                campaign=study.name,
                piece_id=f"{name}-{slots:03d}-{repeat}",
                flags=engine_flags(study, demands[name], calibration, slots),
                workload=demands[name].workload(study.duration_s),
                rates=[adapter.request_rate for adapter in demands[name].adapters],
                ranks=[adapter.rank for adapter in demands[name].adapters],
                seed=study.seed + repeat,
                told={
                    "model": demands[name].model,
                    "arrival_cv": demands[name].arrivals.cv,
                    "held_out": True,
                    "repeat": repeat,
                    "source_path": name,
                },
            )
        ]
        for repeat in range(study.repeats)
        for name, slots in (arms[place] for place in rng.permutation(len(arms)))
    ]


def engine_flags(study: Study, demand: Demand, calibration: Calibration, slots: int) -> EngineFlags:
    """Return the flags of a server that serves a demand as it was planned.

    A CPU's KV cache gets what the calibration says that the slots leave; where that is nothing, a
    block, so that the engine itself refuses.

    Parameters
    ----------
    study : Study
    demand : Demand
    calibration : Calibration
    slots : int
    """
    engine, memory = demand.engine_with(slots), calibration.memory
    left_gib, block_gib = memory.kv_cache_gib(engine), memory.block_gib(engine)
    return EngineFlags(
        max_loras=slots,
        max_lora_rank=engine.max_lora_rank,
        max_cpu_loras=engine.max_cpu_loras,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=memory.max_model_len(engine),
        block_size=engine.block_size,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        cpu_kv_cache_gib=max(left_gib, block_gib),
        load_format="dummy" if study.model_folder is None else "auto",
    )
