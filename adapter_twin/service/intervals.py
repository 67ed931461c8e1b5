"""Intervals of predictions, which nine measured runs in ten are to lie in.

A measured figure differs from the twin's by chance, by what the fitted laws leave open, and by what
no law holds. The first two are simulated: a few replications of the run, each with other requests
and with one of the draws of the step-time law. Their spread is the run's own unit. How many of
these units the twin is off was counted on workloads that its laws had not seen: these multiples, by
the regime that is predicted, are a calibration's ``off_by``. A prior has none: what it does not
know is in its draws, and its intervals are those of a normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.service.validate import LIGHT, NEAR_SATURATION, STARVED

LEAST_SPREAD = {
    "total_throughput": 0.003,
    "mean_itl_ms": 0.02,
    "median_ttft_ms": 0.03,
    "p99_itl_ms": 0.08,
}
"""Intervals are given of these figures; on a logarithmic scale, none is surer than this."""

COVERED = 0.9

REPLICATIONS = 8

QUEUE_MS = 50.0
"""Where a request waits this much longer for its first token, on average, the run is no longer
light."""


def replication(calibration: Calibration, number: int) -> Calibration:
    """Return the laws with one draw of the step-time law's constants.

    Parameters
    ----------
    calibration : Calibration
    number : int
        Of the replication.
    """
    law = calibration.step_time
    drawn = law.drawn(number) if isinstance(law, RooflineLaw) else law
    return replace(calibration, step_time=drawn)


def cautious(calibration: Calibration) -> Calibration:
    """Return a prior with laws that are slower than most which it allows; others as they are."""
    law = calibration.step_time
    if not calibration.origin or not isinstance(law, RooflineLaw):
        return calibration
    return replace(calibration, step_time=law.cautious())


def representatives(calibration: Calibration, count: int) -> list[Calibration]:
    """Return a number of laws that stand for all that a prior allows; none of others."""
    law = calibration.step_time
    if not calibration.origin or not isinstance(law, RooflineLaw):
        return []
    return [replace(calibration, step_time=one) for one in law.representatives(count)]


def spread_of(prediction: Mapping[str, Any], replications: pd.DataFrame) -> dict[str, float]:
    """Return the spread of each figure's logarithm around the prediction, over replications.

    Parameters
    ----------
    prediction : mapping
        A row of `adapter_twin.tables.schemas.PREDICTIONS`.
    replications : DataFrame
        Predictions of the same run.
    """
    spreads = {}
    for figure, least in LEAST_SPREAD.items():
        apart = np.log(replications[figure].to_numpy(float) / prediction[figure])
        apart = apart[np.isfinite(apart)]
        chance = math.sqrt(float((apart**2).mean())) if len(apart) else 0.0
        spreads[figure] = math.hypot(least, chance)
    return spreads


def regime_of(prediction: Mapping[str, Any]) -> str:
    """Return the regime that a prediction is in, as `adapter_twin.service.validate` names them."""
    if prediction["starved"]:
        return STARVED
    waits = prediction["mean_ttft_ms"] - prediction["median_itl_ms"] > QUEUE_MS
    return NEAR_SATURATION if waits else LIGHT


def interval(
    prediction: Mapping[str, Any], replications: pd.DataFrame, calibration: Calibration
) -> dict[str, float]:
    """Return ``<figure>_low`` and ``<figure>_high`` of a prediction.

    Parameters
    ----------
    prediction : mapping
    replications : DataFrame
        See `spread_of`.
    calibration : Calibration

    Raises
    ------
    AdapterTwinError
        Nothing is known of its errors.
    """
    off_by = calibration.off_by.get(regime_of(prediction), {})
    if calibration.origin:  # what a prior does not know is in its draws
        off_by = dict.fromkeys(LEAST_SPREAD, float(ndtri((1 + COVERED) / 2))) | off_by
    ends = {}
    for figure, spread in spread_of(prediction, replications).items():
        require(
            figure in off_by,
            f"intervals: how far {calibration.name} is off was not measured; leave them out",
        )
        factor = math.exp(off_by[figure] * spread)
        ends[f"{figure}_low"] = prediction[figure] / factor
        ends[f"{figure}_high"] = prediction[figure] * factor
    return ends


def multiples(scores: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return `Calibration.off_by`: the `COVERED` quantile of scores by regime and figure.

    Workloads count alike, however many runs they have, and one more stands for those to come
    (split conformal prediction with the workload as the unit).

    Parameters
    ----------
    scores : DataFrame
        A row per run, of workloads that the laws had not seen: ``workload``, ``regime`` and for
        each figure how many spreads the prediction is off.
    """
    found: dict[str, dict[str, float]] = {}
    for regime, rows in scores.groupby("regime"):
        runs_alike = rows.groupby("workload")["workload"].transform("size")
        workloads = rows["workload"].nunique()
        level = min(COVERED * (1 + 1 / workloads), 1.0)
        found[str(regime)] = {}
        for figure in LEAST_SPREAD:
            ordered = rows[[figure]].assign(weight=1 / runs_alike).dropna().sort_values(figure)
            share = ordered["weight"].cumsum() / ordered["weight"].sum()
            place = min(int(np.searchsorted(share, level)), len(ordered) - 1)
            found[str(regime)][figure] = round(float(ordered[figure].iloc[place]), 3)
    return found
