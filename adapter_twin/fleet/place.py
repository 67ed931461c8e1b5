"""Placement of a demand: which adapters go to which GPU, of the fewest or of a given number."""

from typing import Any

import pandas as pd

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.fleet.hold import GPU_FIGURES, Held
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.placement import Placement
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
        ``advice``, where throughput hides long waits, or None; ``criterion`` and provenance. On a
        ``prior`` all is of cautious laws, see `adapter_twin.plan.steady_state.planned_on`.
    placement : Placement

    Raises
    ------
    AdapterTwinError
        An adapter that no GPU serves, no calibration, too few GPUs, or a placement that cannot be
        repaired.

    Examples
    --------
    >>> from adapter_twin.workload.scenario import Lengths, deal_adapters
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
    load_calibration(demand.calibration, demand.model).warn_if_prior()
    oracle = Oracle(demand, margin=margin, replicate_above=replicate_above)
    if gpus is None:
        held = place_and_hold(oracle, jobs=jobs)
    else:
        held = shortest_wait(oracle, gpus, jobs=jobs)
    answer = {
        "gpus": len(held.placement.replicas),
        "lower_bound": held.bound,
        "repaired": held.repaired,
        "traffic": described(demand.trace, demand.arrivals),
        "replicas": _replicas(held),
        "advice": _advice(demand, held.checked),
        "criterion": str(Criterion(margin=margin, slo=demand.slo)),
        "calibration": oracle.calibration.name,
        "prior": oracle.calibration.origin or None,
        "seed": demand.seed,
        "version": __version__,
        "config_hash": config_hash(demand),
    }
    return answer, held.placement


def _advice(demand: Demand, checked: pd.DataFrame) -> str | None:
    """Return a warning of long waits that throughput does not show."""
    longest_ms = float(checked.mean_ttft_ms.max())
    if demand.slo is not None or longest_ms <= NOTABLE_WAIT_MS:
        return None
    return (
        f"no GPU starves, but requests wait up to {longest_ms / 1e3:,.0f} s on average, which "
        "throughput does not show; give an slo with ttft_ms to rule that out"
    )


def _replicas(held: Held) -> list[dict[str, Any]]:
    """Return what the answer tells of each GPU."""
    rows, demand, calibration = [], held.oracle.demand, held.oracle.calibration
    served = zip(held.placement.replicas, held.checked.to_dict("records"), strict=True)
    for plan, service in served:
        slots, rank = plan.engine.max_loras, plan.engine.max_lora_rank
        own = [demand.adapters[i] for i in plan.adapters]
        rates = [share * one.request_rate for share, one in zip(plan.shares, own, strict=True)]
        known = held.oracle.table(rates, [plan.engine])
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
            }
        )
    return rows
