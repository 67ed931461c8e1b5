"""The rule that picks a configuration from a table of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from adapter_twin.service.metrics import STARVATION_THRESHOLD, is_starved
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.strict import dataclass

if TYPE_CHECKING:
    import pandas as pd

TIE = 0.01
"""Throughputs this close to the best one, relatively, are as good."""

MARGIN = 0.02
"""This safety margin of a pick costs little throughput, and keeps picks from starving."""

DEFAULT_SLO = Slo(ttft_ms=2000.0, itl_ms=100.0, percentile=99.0)
"""Plans meet this one where none is told: throughput alone lets requests wait for minutes."""

SIMILAR_TTFT = 1.1
"""Mean TTFTs within this ratio differ by less than the twin errs by."""

RESERVE_LOAD = 1.25
"""Of candidates with similar mean TTFTs, the one with the lowest at this load is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """When a configuration serves well enough, and which one is best.

    Attributes
    ----------
    margin : float
        Added to the share of the offered load at which starvation begins: a prediction that close
        to the edge may starve in truth.
    slo : Slo, optional
        Must be met, too.

    Examples
    --------
    >>> import pandas as pd
    >>> runs = pd.DataFrame(
    ...     {
    ...         "adapter_slots": [8, 16, 32],
    ...         "feasible_start": True,
    ...         "offered_tokens_per_s": 1000.0,
    ...         "total_throughput": [850.0, 999.0, 995.0],
    ...         "mean_ttft_ms": [9000.0, 90.0, 70.0],
    ...     }
    ... )
    >>> Criterion().ranked(runs)[["adapter_slots", "mean_ttft_ms", "tied"]]
       adapter_slots  mean_ttft_ms  tied
    2             32          70.0  True
    1             16          90.0  True
    """

    margin: Annotated[float, Field(ge=0, lt=1 - STARVATION_THRESHOLD)] = 0.0
    slo: Slo | None = None

    def feasible(self, runs: pd.DataFrame) -> pd.Series[bool]:
        """Return which runs start, do not starve, and meet the SLO.

        Parameters
        ----------
        runs : pandas.DataFrame
            ``feasible_start``, ``total_throughput``, ``offered_tokens_per_s`` (tokens/s) and, with
            an SLO, ``slo_attainment``. A run without figures is not feasible.
        """
        threshold = STARVATION_THRESHOLD + self.margin
        starved = is_starved(runs.total_throughput, runs.offered_tokens_per_s, threshold)
        feasible: pd.Series[bool] = runs.feasible_start & ~starved
        if self.slo is not None:
            feasible &= runs.slo_attainment >= self.slo.percentile / 100
        return feasible

    def ranked(self, runs: pd.DataFrame, within: Sequence[str] = ()) -> pd.DataFrame:
        """Return the feasible runs, the best first.

        Highest throughput first; those within `TIE` of the best are ranked by mean TTFT, and marked
        in the column ``tied``. Empty if no run is feasible: there is no second-best rule.

        Parameters
        ----------
        runs : pandas.DataFrame
            As for `feasible`, and ``mean_ttft_ms``.
        within : sequence of str
            Columns that tell apart the workloads of which each gets its own ranking.
        """
        served = runs[self.feasible(runs)]
        throughput = served.total_throughput
        highest: Any = throughput.max()
        if within:
            groups = served.groupby(list(within), observed=True, sort=False)
            highest = groups.total_throughput.transform("max")
        tied = throughput >= (1 - TIE) * highest
        return (
            served.assign(tied=tied, by=served.mean_ttft_ms.where(tied, -throughput))
            .sort_values([*within, "tied", "by"], ascending=[*[True] * len(within), False, True])
            .drop(columns="by")
        )

    def __str__(self) -> str:
        share = 100 * (STARVATION_THRESHOLD + self.margin)
        slo = "" if self.slo is None else f" and {slo_met(self.slo)}"
        return (
            f"highest throughput with {share:g} % of the offered load served{slo}; ties within "
            f"{100 * TIE:g} % by mean TTFT, of similar ones by that at {RESERVE_LOAD:g} times the "
            "load"
        )


def slo_met(slo: Slo) -> str:
    """Say in words that an SLO is met.

    >>> slo_met(DEFAULT_SLO)
    'an SLO (TTFT 2,000 ms, ITL 100 ms) met by 99 % of requests'
    """
    limits = {"TTFT": slo.ttft_ms, "ITL": slo.itl_ms}
    told = ", ".join(f"{name} {ms:,.6g} ms" for name, ms in limits.items() if ms is not None)
    return f"an SLO ({told}) met by {slo.percentile:g} % of requests"
