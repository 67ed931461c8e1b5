"""Which numbers of slots the methods choose for a demand: the twin's, and those of its rivals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.plan.candidates import Candidates, candidate_slots
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.recommend import recommend
from adapter_twin.prove.rivals import METHODS, TWIN

Chooser = Callable[[Demand], int]
"""A method that was trained elsewhere."""

KEPT = (
    *("adapter_slots", "expected", "worst_served", "utilisation", "headroom", "binds", "reason"),
    *("kv_cache_tokens", "vllm_args", "criterion", "calibration", "version"),
)
"""What a study keeps of a recommendation."""


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
    replica = Candidates.of(demand)
    answer: dict[str, Any]
    try:
        answer = {"recommended": _kept(recommend(demand))}
        slots = answer["recommended"]["adapter_slots"]
    except AdapterTwinError as error:
        answer, slots = {"refused": str(error)}, None
    picks = {TWIN: slots, "analytic": analytic_slots(replica)}
    picks |= {name: choose(demand) for name, choose in others.items()}
    picks |= rules_of_thumb(demand, replica.calibration.memory)
    picks |= neighbours(demand, slots)
    return {"picks": {name: picks[name] for name in picks if name in methods}, **answer}


def _kept(recommended: Mapping[str, Any]) -> dict[str, Any]:
    return {name: recommended[name] for name in KEPT}


def analytic_slots(replica: Candidates) -> int | None:
    """Return what the analytic model chooses; it knows no percentiles, so no SLO."""
    bounds = replica.bounds()
    names = map(str, bounds.columns)
    told = {name: name.removeprefix("analytic_") for name in names if "analytic_" in name}
    ranked = Criterion(margin=MARGIN).ranked(bounds.rename(columns=told))
    return None if ranked.empty else int(ranked.adapter_slots.iloc[0])


def rules_of_thumb(demand: Demand, memory: MemoryLaw) -> dict[str, int]:
    """Return the rules that operators use: all adapters, eight, a quarter, what memory holds."""
    count, rank = len(demand.adapters), demand.max_lora_rank
    starting = [slots for slots in range(1, count + 1) if memory.starts(slots, rank)]
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
