"""How few GPUs for all adapters: place, prove a bound, check in the twin, repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapter_twin import __version__
from adapter_twin.calibration import load_calibration
from adapter_twin.config import Slo, config_hash
from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.bound import certificate, gpus_for
from adapter_twin.fleet.capacity import Oracle
from adapter_twin.fleet.check import FIGURES
from adapter_twin.fleet.envelope import levels_of
from adapter_twin.fleet.greedy import Groups, best_greedy
from adapter_twin.fleet.local_search import improve
from adapter_twin.fleet.placement import Placement
from adapter_twin.fleet.repair import NotServed, hold
from adapter_twin.planning.choice import MARGIN
from adapter_twin.planning.demand import Demand
from adapter_twin.planning.recommend import NOTABLE_WAIT_MS, vllm_args
from adapter_twin.planning.steady_state import warmed_up

if TYPE_CHECKING:
    import pandas as pd

TIGHTER = (0.8, 0.65, 0.5, 0.4, 0.3)
"""Shares of an SLO's limits that the capacity model's means are tried to be kept within."""

Tell = Callable[[int, int, str], None]


def place(
    demand: Demand,
    *,
    margin: float = MARGIN,
    jobs: int = -1,
    tell: Tell = lambda done, total, text: None,
) -> tuple[dict[str, Any], Placement]:
    """Place a demand's adapters on as few GPUs as possible so that none starves.

    Parameters
    ----------
    demand : Demand
    margin : float
        See `adapter_twin.planning.choice.Criterion`.
    jobs : int
        Processes of the check; -1 is one per core.
    tell : callable

    Returns
    -------
    answer : dict
        ``gpus``; ``lower_bound``, with fewer no placement is accepted by the capacity model, see
        `adapter_twin.fleet.bound`; ``repaired`` GPUs after the check; ``replicas``, for each GPU
        the names of its ``adapters`` and their ``shares``, ``adapter_slots``, ``max_lora_rank``,
        ``kv_cache_tokens``, ``utilisation`` of the analytic capacity, the service of a simulated
        hour and ``vllm_args``; ``advice``, where throughput hides long waits, or None;
        ``criterion`` and provenance.
    placement : Placement

    Raises
    ------
    AdapterTwinError
        An adapter that no GPU serves, no calibration, or a placement that cannot be repaired.
    """
    calibration = warmed_up(load_calibration(demand.calibration, demand.model))
    tell(0, 1, f"placing {len(demand.adapters)} adapters")
    oracle = Oracle(demand, calibration, margin=margin)
    groups, bound = fewest(oracle)
    oracle, placement, checked, repairs = _hold(oracle, groups, jobs, tell)
    answer = {
        "gpus": len(placement.replicas),
        "lower_bound": bound,
        "repaired": repairs,
        "replicas": _replicas(demand, placement, checked, oracle),
        "advice": _advice(demand, checked),
        "criterion": str(oracle.criterion),
        "calibration": calibration.name,
        "seed": demand.seed,
        "version": __version__,
        "config_hash": config_hash(demand),
    }
    return answer, placement


def fewest(oracle: Oracle) -> tuple[Groups, int]:
    """Return the placement on the fewest GPUs that is found in little time, and a lower bound.

    The best greedy placement, improved by local search with the prices that prove the bound.
    """
    parts = oracle.parts
    prices = certificate(oracle, levels_of(oracle)).prices(parts.rate, parts.rank)
    bound = gpus_for(prices)
    return improve(oracle, best_greedy(oracle), prices, enough=bound), bound


def _hold(
    oracle: Oracle, groups: Groups, jobs: int, tell: Tell
) -> tuple[Oracle, Placement, pd.DataFrame, int]:
    """Have the twin agree; where it does not, place anew by an oracle that asks for more."""
    demand = oracle.demand
    try:
        return oracle, *hold(demand, oracle, groups, jobs=jobs, tell=tell)
    except NotServed:
        for stricter in _stricter(oracle):
            with suppress(NotServed):
                placed = fewest(stricter)[0]
                return stricter, *hold(demand, stricter, placed, jobs=jobs, tell=tell)
        raise


def _stricter(oracle: Oracle) -> Iterator[Oracle]:
    """Yield oracles that ask for more and more: they know means, an SLO is of percentiles.

    They end where an adapter alone cannot have it; without an SLO there are none.
    """
    demand, slo = oracle.demand, oracle.demand.slo
    if slo is None:
        return
    for share in TIGHTER:
        tighter = replace(demand, slo=_tighter(slo, share))
        try:
            yield Oracle(tighter, oracle.calibration, margin=oracle.criterion.margin)
        except AdapterTwinError:
            return


def _tighter(slo: Slo, share: float) -> Slo:
    limits = {"ttft_ms": slo.ttft_ms, "itl_ms": slo.itl_ms}
    given = {name: share * limit for name, limit in limits.items() if limit is not None}
    return replace(slo, **given)


def _advice(demand: Demand, checked: pd.DataFrame) -> str | None:
    longest_ms = float(checked.mean_ttft_ms.max())
    if demand.slo is not None or longest_ms <= NOTABLE_WAIT_MS:
        return None
    return (
        f"no GPU starves, but requests wait up to {longest_ms / 1e3:,.0f} s on average, which "
        "throughput does not show; give an slo with ttft_ms to rule that out"
    )


def _replicas(
    demand: Demand, placement: Placement, checked: pd.DataFrame, oracle: Oracle
) -> list[dict[str, Any]]:
    rows = []
    for plan, service in zip(placement.replicas, checked.to_dict("records"), strict=True):
        engine, verdict = plan.engine, oracle.serve_plan(plan)
        assert verdict is not None  # the oracle has accepted it
        rows.append(
            {
                "adapters": [demand.adapters[i].name for i in plan.adapters],
                "shares": list(plan.shares),
                "adapter_slots": engine.max_loras,
                "max_lora_rank": engine.max_lora_rank,
                "kv_cache_tokens": int(
                    oracle.calibration.memory.kv_cache_tokens(
                        engine.max_loras, engine.max_lora_rank
                    )
                ),
                "utilisation": verdict.utilisation,
                **{str(k): v for k, v in service.items() if k in _SERVICE},
                "vllm_args": vllm_args(engine),
            }
        )
    return rows


_SERVICE = ("offered_tokens_per_s", *FIGURES, "slo_attainment")
