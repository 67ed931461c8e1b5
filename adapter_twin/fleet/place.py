"""Placement of a demand: which adapters go to which GPU, of the fewest or of a given number."""

from typing import Any

import pandas as pd

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.fleet.hold import GPU_FIGURES, Held
from adapter_twin.fleet.kinds import Kinds, on_kind
from adapter_twin.fleet.placement import Placement
from adapter_twin.fleet.spare import spare
from adapter_twin.fleet.strategies import place_and_hold, shortest_wait
from adapter_twin.laws import load_calibration
from adapter_twin.plan.commands import vllm_args
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.explanation import NOTABLE_WAIT_MS
from adapter_twin.plan.logged import described
from adapter_twin.workload.scenario import config_hash

SERVICE = (*GPU_FIGURES, "slo_attainment")
"""The answer tells these figures of each GPU."""

MOST_ADAPTERS = 20_000
"""As many are placed in minutes and a gigabyte; ten times as many would take hours."""


def place(
    demand: Demand,
    *,
    gpus: int | None = None,
    margin: float = MARGIN,
    replicate_above: float = 1.0,
    jobs: int = -1,
) -> tuple[dict[str, Any], Placement]:
    """Place a demand's adapters on as few GPUs as possible, or on a given number; all serve.

    Parameters
    ----------
    demand : Demand
    gpus : int, optional
        Use this many, for the shortest waits.
    margin : float
        See `adapter_twin.plan.criterion.Criterion`.
    replicate_above : float
        See `adapter_twin.fleet.oracle.Oracle`.
    jobs : int
        Processes of the check; -1 is one per core.

    Returns
    -------
    answer : dict
        ``gpus``; ``lower_bound``, with fewer no placement is accepted by the capacity model, see
        `adapter_twin.fleet.proof.bound`; ``repaired`` GPUs after the check; ``replicas``, for each
        GPU the names of its ``adapters`` and their ``shares``, ``adapter_slots``,
        ``max_lora_rank``, ``kv_cache_tokens``, ``utilisation`` of the analytic capacity, the
        service of a simulated hour, or of the log, and ``vllm_args``; ``traffic`` in words;
        ``advice``, where throughput hides long waits, or None; ``criterion`` and provenance. Of
        several kinds of GPU, or with prices, also ``objective``, ``price_per_hour`` of all GPUs,
        ``price_lower_bound_per_hour``, the ``gap`` to the bound by the objective, relative, and of
        each replica its ``gpu``, ``calibration`` and ``price_per_hour``; of these, and with copies,
        ``spare``, see `adapter_twin.fleet.spare.spare`. On a
        ``prior`` all is of cautious laws, see `adapter_twin.plan.steady_state.planned_on`.
    placement : Placement

    Raises
    ------
    AdapterTwinError
        An adapter that no GPU serves, no calibration, too few GPUs, or a placement that cannot be
        repaired.

    Examples
    --------
    >>> from adapter_twin import Lengths, deal_adapters
    >>> adapters = deal_adapters(96, [0.4], [16])
    >>> lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    >>> demand = Demand(model="llama-3.1-8b-instruct", adapters=adapters, lengths=lengths)
    >>> answer, placement = place(demand, jobs=1)
    >>> answer["gpus"], answer["lower_bound"]
    (2, 2)
    """
    count = len(demand.adapters)
    require(
        count <= MOST_ADAPTERS,
        f"adapters: {count:,} are more than can be placed in minutes; place up to "
        f"{MOST_ADAPTERS:,} at a time, a fair share of the traffic each",
    )
    require(
        not demand.is_closed_loop,
        "arrivals.max_concurrency: a client's places are not those of one GPU or another; ask "
        "`recommend` about one GPU with its share of the places",
    )
    for kind in demand.fleet.kinds:
        load_calibration(on_kind(demand, kind).calibration, demand.model).warn_if_prior()
    kinds = Kinds.of(demand, margin=margin, replicate_above=replicate_above)
    if gpus is None:
        held = place_and_hold(kinds, jobs=jobs)
    else:
        held = shortest_wait(kinds, gpus, jobs=jobs)
    laws = [oracle.calibration for oracle in kinds.oracles]
    answer = {
        "gpus": held.gpus,
        "lower_bound": held.bound.gpus,
        "repaired": held.repaired,
        "traffic": described(demand.trace, demand.arrivals),
        "replicas": _replicas(held),
        "advice": _advice(demand, held.checked),
        "criterion": str(Criterion(margin=margin, slo=demand.slo)),
        "calibration": ", ".join(one.name for one in laws),
        "prior": "; ".join(one.origin for one in laws if one.origin) or None,
        "seed": demand.seed,
        "version": __version__,
        "config_hash": config_hash(demand if kinds.are_told else kinds.oracles[0].demand),
    }
    if kinds.are_told:
        answer |= _priced(held)
    if kinds.are_told or demand.fleet.copies > 1:
        answer["spare"] = spare(held)
    return answer, held.placement


def _priced(held: Held) -> dict[str, Any]:
    """Return what the answer tells of kinds of GPU."""
    return {
        "objective": held.kinds.demand.fleet.objective,
        "price_per_hour": held.price_per_hour,
        "price_lower_bound_per_hour": held.bound.price_per_hour,
        "gap": held.cost / held.least_cost - 1,
    }


def _advice(demand: Demand, checked: pd.DataFrame) -> str | None:
    """Return a warning of long waits that throughput does not show."""
    longest_ms = float(checked.mean_ttft_ms.max())
    if demand.slo is not None or longest_ms <= NOTABLE_WAIT_MS:
        return None
    return (
        f"no GPU starves, but requests wait up to {longest_ms / 1e3:,.0f} s on average, which "
        "throughput does not show; give an slo with ttft_ms to rule that out"
    )


def _kind(kinds: Kinds, kind: int) -> dict[str, Any]:
    """Return what the answer tells of the kind of one GPU."""
    calibration, price = kinds.oracles[kind].calibration, kinds.offers[kind].price_per_hour
    told = {"gpu": calibration.gpu, "calibration": calibration.name}
    return told if price is None else told | {"price_per_hour": price}


def _replicas(held: Held) -> list[dict[str, Any]]:
    """Return what the answer tells of each GPU."""
    rows, demand, kinds = [], held.kinds.demand, held.kinds
    served = zip(held.placement.replicas, held.checked.to_dict("records"), strict=True)
    for plan, service in served:
        oracle = kinds.oracles[plan.kind]
        calibration = oracle.calibration
        slots, rank = plan.engine.max_loras, plan.engine.max_lora_rank
        own = [demand.adapters[i] for i in plan.adapters]
        rates = [share * one.request_rate for share, one in zip(plan.shares, own, strict=True)]
        known = oracle.table(rates, [plan.engine])
        rows.append(
            {
                "adapters": [adapter.name for adapter in own],
                "shares": list(plan.shares),
                "adapter_slots": slots,
                "max_lora_rank": rank,
                "kv_cache_tokens": calibration.memory.kv_cache_tokens(plan.engine),
                "utilisation": float(known.utilisation.iloc[0]),
                **{str(k): v for k, v in service.items() if k in SERVICE},
                "vllm_args": vllm_args(plan.engine, calibration, own),
                **(_kind(kinds, plan.kind) if kinds.are_told else {}),
            }
        )
    return rows
