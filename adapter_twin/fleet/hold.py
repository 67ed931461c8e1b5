"""Make a placement hold in the twin: a GPU that starves gives adapters away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.check import check_placement
from adapter_twin.fleet.oracle import Oracle, Spread
from adapter_twin.fleet.packing import Groups
from adapter_twin.fleet.placement import Placement

if TYPE_CHECKING:
    import pandas as pd

ROUNDS = 8

MOST_STARVING = 0.5
"""Share of the GPUs: where more do not serve, the oracle is at fault, and moving does not help."""

SHED = 0.05
"""Share of its load that a GPU which starves gives away in a round, the lightest adapters first."""

SURER = 1.5
"""Factor to the deviation of the number of adapters with requests, where waits break the SLO."""

NEAR = 0.97
"""Of a limit: from there on it is what is missed, or one of both."""


class NotServed(AdapterTwinError):
    """GPUs of a placement do not serve in the twin, and moving adapters does not help.

    Attributes
    ----------
    placement : Placement
    checked : pandas.DataFrame
    """

    def __init__(self, placement: Placement, checked: pd.DataFrame) -> None:
        self.placement, self.checked = placement, checked
        starving = int((~checked.serves).sum())
        super().__init__(
            f"placement: {starving} of {len(checked)} GPUs do not serve in the twin, and moving "
            "adapters does not help; relax the slo or give a larger margin"
        )


def hold(
    oracle: Oracle,
    groups: Groups,
    *,
    jobs: int = -1,
) -> tuple[Placement, pd.DataFrame, int]:
    """Check a placement in the twin and repair what does not serve, until all of it does.

    Parameters
    ----------
    oracle : Oracle
        Its demand has to be served; it decides which sets are tried.
    groups : list of list of int
        Indices into ``oracle.parts``, one list per GPU.
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    placement : Placement
    checked : pandas.DataFrame
        See `adapter_twin.fleet.check.check_placement`; every GPU serves.
    repairs : int
        GPUs that were changed.

    Raises
    ------
    NotServed
        More than `MOST_STARVING` do not serve, or some still do not after `ROUNDS` rounds.
    """
    demand, changed = oracle.demand, set[int]()
    groups = [list(group) for group in groups]
    for _ in range(ROUNDS):
        placement = oracle.place(groups)
        checked = check_placement(
            demand, placement, oracle.calibration, seed=demand.seed, jobs=jobs
        )
        starving = checked.index[~checked.serves].tolist()
        if not starving:
            return placement, checked, len(changed)
        if len(starving) > MOST_STARVING * len(groups):
            break
        changed.update(starving)
        shed = [part for k in starving for part in _lightest(oracle, groups[k])]
        _take_in(oracle, groups, shed, exclude=set(starving))
    raise NotServed(placement, checked)


def learn_spread(oracle: Oracle, missed: NotServed) -> Oracle:
    """Return an oracle that knows better what an SLO's percentile is by what the model tells.

    ITL at the percentile is so many times the mean of the model: the upper quartile of the GPUs
    whose ITL misses the SLO; single ones are repaired. Where TTFT is missed, more adapters than
    expected have requests at a time.
    """
    demand, slo, spread = oracle.demand, oracle.demand.slo, oracle.spread
    assert slo is not None
    ratios, late = list[float](), False
    for plan, service in zip(
        missed.placement.replicas, missed.checked.to_dict("records"), strict=True
    ):
        verdict = oracle.serve_plan(plan)
        if service["serves"] or verdict is None:
            continue
        late |= slo.ttft_ms is not None and service["slo_ttft_ms"] > NEAR * slo.ttft_ms
        if slo.itl_ms is not None and service["slo_itl_ms"] > NEAR * slo.itl_ms:
            ratios.append(service["slo_itl_ms"] / verdict.mean_itl_ms)
    learned = Spread(
        itl=max(float(np.quantile(ratios, 0.75)), spread.itl) if ratios else spread.itl,
        active=spread.active * (SURER if late or not ratios else 1.0),
    )
    return Oracle(
        demand,
        oracle.calibration,
        margin=oracle.criterion.margin,
        spread=learned,
        replicate_above=oracle.replicate_above,
    )


def _lightest(oracle: Oracle, group: list[int]) -> list[int]:
    """Take the lightest parts out of a group: `SHED` of its load, one at least."""
    rate = oracle.parts.rate
    group.sort(key=lambda part: -float(rate[part]))
    asked, taken = SHED * float(rate[group].sum()), list[int]()
    while len(group) > 1 and (not taken or float(rate[taken].sum()) < asked):
        taken.append(group.pop())
    return taken


def _take_in(oracle: Oracle, groups: Groups, parts: list[int], exclude: set[int]) -> None:
    """Put parts on the GPUs with the most room, or on a new one."""
    rate = oracle.parts.rate
    for part in sorted(parts, key=lambda part: -float(rate[part])):
        others = [group for k, group in enumerate(groups) if k not in exclude]
        for group in sorted(others, key=lambda group: float(rate[group].sum())):
            if oracle.serve([*group, part]) is not None:
                group.append(part)
                break
        else:
            groups.append([part])
