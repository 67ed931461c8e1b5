"""What fewer and smaller adapters gain: slots and KV cache of a GPU, and the service on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from adapter_twin.errors import require
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.explanation import why_not
from adapter_twin.plan.grid import slot_rank
from adapter_twin.plan.search import Refusal, search
from adapter_twin.plan.steady_state import expect
from adapter_twin.plan.what_fits import what_fits
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_versions import engine_version


class AdapterSet(NamedTuple):
    """A set of adapters: rank by name, and, of the merged ones, whose requests they get."""

    name: str
    ranks: Mapping[str, int]
    members: Mapping[str, tuple[str, ...]] = {}


def gains(
    steps: Sequence[AdapterSet],
    gpu: str | None,
    model: str | None,
    max_model_len: int | None,
    demand: Demand | None,
) -> list[dict[str, Any]]:
    """Return what each step takes of a GPU's memory, and the service that it gets.

    Parameters
    ----------
    steps : sequence of AdapterSet
        The first is what there is now.
    gpu, model : str, optional
    max_model_len : int, optional
    demand : Demand, optional
        Traffic of the adapters of the first step, see `require_same`.

    Returns
    -------
    list of dict
        By step: its name, the number of ``adapters`` and the ``max_lora_rank`` that vLLM must
        have; with a GPU, ``memory``: ``slot_mib``, the ``largest_max_loras`` that start, and
        ``kv_cache_tokens`` with ``adapter_slots``, the same for all steps as far as there are
        adapters, 0 where that does not start; with a demand, ``service``: whether one GPU
        ``serves`` it, if not the ``reason``, and the slots, throughput and waits of the best
        number of slots, as `adapter_twin.plan.recommend.recommend` finds them.

    Raises
    ------
    AdapterTwinError
        The GPU or the model is not known.
    """
    sizes = engine_version(None)
    slots = None
    told = []
    for step in steps:
        rank, count = slot_rank(list(step.ranks.values()), sizes), len(step.ranks)
        about: dict[str, Any] = {"step": step.name, "adapters": count, "max_lora_rank": rank}
        about |= {"memory": None, "service": None}
        if gpu is not None:
            require(model is not None, "model: the adapters do not tell theirs; give it")
            flags = {"max_lora_rank": rank, "max_model_len": max_model_len}
            most = what_fits(str(model), gpu, flags)["largest_max_loras"]
            slots = slots or max(min(count, most), 1)
            about["memory"] = _memory(str(model), gpu, flags, min(slots, count))
        if demand is not None:
            about["service"] = _service(_asked(step, demand))
        told.append(about)
    return told


def _memory(model: str, gpu: str, flags: Mapping[str, Any], slots: int) -> dict[str, Any]:
    found = what_fits(model, gpu, {**flags, "max_loras": slots, "max_cpu_loras": slots})
    return {
        "slot_mib": found["slot_mib"],
        "largest_max_loras": found["largest_max_loras"],
        "adapter_slots": slots,
        "kv_cache_tokens": found["kv_cache_tokens"] if found["starts"] else 0,
    }


def _service(demand: Demand) -> dict[str, Any]:
    found = search(demand)
    if isinstance(found, Refusal):
        return {"serves": False, "reason": why_not(found)}
    expected = expect(found.windows, demand)
    figures = {name: one["value"] for name, one in expected.items() if name != "slo_attainment"}
    slots, tokens = int(found.best.adapter_slots), int(found.best.kv_cache_tokens)
    about = {"serves": True, "reason": None, "adapter_slots": slots, "kv_cache_tokens": tokens}
    return {**about, **figures}


def require_same(step: AdapterSet, demand: Demand) -> None:
    """Raise `AdapterTwinError` where a demand is of other adapters, or of other ranks."""
    ranks = {adapter.name: adapter.rank for adapter in demand.adapters}
    for name in {*ranks} ^ {*step.ranks}:
        where = "the folders" if name in ranks else "the workload"
        require(False, f"workload.adapters: {name!r} is not in {where}; leave it out, or add it")
    for name, rank in ranks.items():
        told = f"{name!r} has rank {rank}, its folder {step.ranks[name]}"
        require(rank == step.ranks[name], f"workload.adapters: {told}; correct it")


def _asked(step: AdapterSet, demand: Demand) -> Demand:
    """Return a demand of a step's adapters; merged ones get the requests of all their members."""
    by_name = {adapter.name: adapter for adapter in demand.adapters}
    require(
        not step.members or demand.trace is None,
        "workload: the requests of a log, of sessions or samples cannot be merged; give rates",
    )

    def asked(name: str) -> Adapter:
        whose = [by_name[member] for member in step.members.get(name, (name,))]
        targets = [one.target_modules for one in whose]
        layers = {one.layers for one in whose}
        return replace(
            whose[0],
            name=name,
            rank=step.ranks[name],
            request_rate=math.fsum(one.request_rate for one in whose),
            target_modules=None
            if None in targets
            else tuple(sorted({module for one in targets for module in one or ()})),
            layers=layers.pop() if len(layers) == 1 else None,
            path=None,
        )

    adapters = tuple(map(asked, step.ranks))
    slots = demand.slots and tuple(size for size in demand.slots if size <= len(adapters))
    return replace(demand, adapters=adapters, slots=demand.slots and (slots or (len(adapters),)))
