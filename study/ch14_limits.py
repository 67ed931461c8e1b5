"""Tables of the chapter on limits: where predictions stop being right, and by how much."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice, product
from typing import Any

import joblib
import numpy as np
import pandas as pd

from adapter_twin.calibrate.campaign_fit import calibrate_campaign
from adapter_twin.calibrate.published_fit import fitted_runs, without_copies
from adapter_twin.calibrate.step_observations import step_observations
from adapter_twin.capacity.analytic import predict_analytic
from adapter_twin.laws import Calibration, list_calibrations, load_calibration
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.parallel import workers
from adapter_twin.plan.steady_state import TWIN_ERROR
from adapter_twin.service.predict import predict
from adapter_twin.service.validate import error_measures, pair_runs
from adapter_twin.workload.models import model_shape
from study.ch01_to_06 import configurations
from study.ch07_campaign import FIGURES as SERVICE
from study.engine_constants import PHYSICAL

Cut = tuple[str, int]
"""A fit is given these columns of the configuration up to these values."""

CUTS: tuple[Cut, ...] = (("adapter_slots", 32), ("adapter_slots", 96), ("max_lora_rank", 16))


def valid_ranges() -> pd.DataFrame:
    """Return what each calibration was measured on: lowest and highest value of each column."""
    rows = []
    for name in list_calibrations():
        calibration = load_calibration(name, name.split("@")[0])
        for column, (low, high) in calibration.valid_range.items():
            rows.append({"calibration": name, "column": column, "low": low, "high": high})
    return pd.DataFrame(rows)


def refit_below(
    calibration: Calibration, tables: Mapping[str, pd.DataFrame], cut: Cut
) -> Calibration:
    """Fit the laws of step time and memory again, without what was measured beyond a cut.

    Parameters
    ----------
    calibration : Calibration
        Its other laws, which know neither slots nor ranks, are kept.
    tables : mapping
        `adapter_twin.calibrate.published_fit.TABLES`, by name.
    cut : Cut
    """
    column, highest = cut
    kept = {
        name: table[table[column] <= highest] if column in table else table
        for name, table in tables.items()
    }
    known = calibration.memory
    memory = MemoryLaw(known.shape, known.version, known.total_gib).fit(
        kept["memory"][kept["memory"].model == calibration.model]
    )
    observed = step_observations(
        kept, calibration.model, calibration.lengths, calibration.scheduling, memory
    )
    step_time = RooflineLaw(known.shape).fit(observed, PHYSICAL)
    refitted = replace(calibration, step_time=step_time, memory=memory)
    runs = fitted_runs(kept["runs"])
    runs = runs[runs.model == calibration.model]
    return without_copies(refitted, kept, runs, jobs=1, prior=PHYSICAL)


def extrapolation(
    tables: Mapping[str, pd.DataFrame],
    runs: pd.DataFrame,
    seen: pd.DataFrame,
    cuts: Sequence[Cut] = CUTS,
    *,
    jobs: int = -1,
) -> pd.DataFrame:
    """Predict runs beyond a cut with laws that have not seen anything beyond it.

    Parameters
    ----------
    tables : mapping
        As for `refit_below`.
    runs : pandas.DataFrame
        Completed runs whose client did not collapse.
    seen : pandas.DataFrame
        Their predictions by the calibrations that come with the package.
    cuts : sequence of Cut
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    pandas.DataFrame
        ``model, column, highest, value, times`` (value by highest), ``figure``; ``n_runs``; median
        absolute errors ``seen`` and ``left_out`` in percent.
    """
    tasks = product(runs.groupby("model"), cuts)
    with workers(None):
        parts = joblib.Parallel(jobs)(
            joblib.delayed(_extrapolate)(
                tables, own, seen, load_calibration("auto", str(model)), cut
            )
            for (model, own), cut in tasks
        )
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return table


def _extrapolate(
    tables: Mapping[str, pd.DataFrame],
    runs: pd.DataFrame,
    seen: pd.DataFrame,
    calibration: Calibration,
    cut: Cut,
) -> pd.DataFrame:
    column, highest = cut
    beyond = runs[runs[column] > highest]
    left_out = predict(beyond, refit_below(calibration, tables, cut), jobs=1)
    by = ["model", "column", "highest", "value", "times", "figure"]
    errors = []
    for predictions in (seen, left_out):
        pairs = pair_runs(beyond, predictions)
        pairs = pairs[pairs.figure.isin(SERVICE)].merge(beyond[["run_id", column]], on="run_id")
        pairs = pairs.rename(columns={column: "value"}).assign(column=column, highest=highest)
        pairs = pairs.assign(times=pairs.value / highest, error=pairs.error.abs())
        errors.append(pairs.groupby(by).error)
    table = pd.DataFrame(
        {"n_runs": errors[0].size(), "seen": errors[0].median(), "left_out": errors[1].median()}
    )
    return table.reset_index()


def seed_spread(
    model: str, adapters: int, loads: Sequence[float], seeds: Sequence[int]
) -> pd.DataFrame:
    """Return how much the TTFT of one hour says of another's, by distance from the knee.

    Parameters
    ----------
    model : str
    adapters : int
        All alike, of rank 16, each with a slot.
    loads : sequence of float
        Offered load by the capacity that the analytic model gives this traffic.
    seeds : sequence of int
        One simulated hour each.

    Returns
    -------
    pandas.DataFrame
        A row per load: ``utilisation``; of the ``median_ttft_ms`` over the seeds the tenth
        percentile, median and ninetieth (``low``, ``middle``, ``high``), and the ``spread``, the
        highest by the lowest; ``starved``, percent of the ``seeds``.
    """
    one = configurations(model, [adapters], [adapters], rates="1", ranks="16")
    full_rate = 1 / predict_analytic(one).utilisation.iloc[0]
    runs = pd.concat(
        [
            one.assign(rates_per_adapter=f"{load * full_rate:.5f}", run_id=f"{load}")
            for load in loads
        ]
    )
    hours = [predict(runs, seed=seed, observer=False) for seed in seeds]
    ttft_ms = np.array([hour.median_ttft_ms for hour in hours])
    low, middle, high = np.percentile(ttft_ms, [10, 50, 90], axis=0)
    return pd.DataFrame(
        {
            "utilisation": predict_analytic(runs.reset_index(drop=True)).utilisation,
            "low": low,
            "middle": middle,
            "high": high,
            "spread": ttft_ms.max(axis=0) / ttft_ms.min(axis=0),
            "starved": 100 * np.mean([hour.starved for hour in hours], axis=0),
            "seeds": len(hours),
        }
    )


def errors_by_regime(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the errors of every figure in every regime, the collapsed clients' included.

    Returns
    -------
    pandas.DataFrame
        ``figure``, ``regime``, ``n_runs``; ``median_error`` with ``low`` and ``high`` (95 %
        interval over whole workloads), and ``within_25``, in percent.
    """
    rows = []
    for (figure, regime), part in pair_runs(runs, predictions).groupby(["figure", "regime"]):
        scored = {row["measure"]: row for row in error_measures(part)}
        median = scored["median_error"]
        rows.append(
            {
                "figure": figure,
                "regime": regime,
                "n_runs": len(part),
                "median_error": median["value"],
                "low": median["low"],
                "high": median["high"],
                "within_25": scored["within_25"]["value"],
            }
        )
    return pd.DataFrame(rows)


def coverage(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return how often measured figures lie within the twin's own error, as `recommend` states it.

    Returns
    -------
    pandas.DataFrame
        ``figure``, ``regime`` (or ``all``), ``covered`` in percent; ``needed``, the error in
        percent that 95 % of the runs stay within; ``n_runs``.
    """
    pairs = pair_runs(runs, predictions)
    pairs = pairs[pairs.figure.isin(TWIN_ERROR)]
    error = np.expm1(np.abs(np.log(pairs.predicted / pairs.measured)))
    pairs = pairs.assign(error=100 * error, inside=error <= pairs.figure.map(TWIN_ERROR))
    both = pd.concat([pairs.assign(regime="all"), pairs])
    groups = both.groupby(["figure", "regime"], sort=False)
    return pd.DataFrame(
        {
            "covered": 100 * groups.inside.mean(),
            "needed": groups.error.quantile(0.95),
            "n_runs": groups.size(),
        }
    ).reset_index()


def learning_curve(
    measured: Mapping[str, pd.DataFrame], shares: Sequence[float], draws: int
) -> pd.DataFrame:
    """Calibrate on parts of a campaign's micro-profiles, and predict its held-out runs.

    Parameters
    ----------
    measured : mapping
        Tables of a campaign, see `adapter_twin.tables.datasets.read_campaign`.
    shares : sequence of float
        Of the batches of every engine that are kept, in turn; besides, engines are left out whole.
        Serving runs are kept, of which only the light ones are fitted to.
    draws : int
        Of what is kept.

    Returns
    -------
    pandas.DataFrame
        ``part`` (``batches`` or ``engines``), ``share``, ``steps`` (micro-profiled), ``form`` of
        the step-time law, and mean absolute errors in percent by figure, a row per draw.
    """
    steps = measured["micro_steps"]
    batches = steps[["engine_id", "point"]].drop_duplicates()
    parts: list[tuple[str, float, pd.DataFrame]] = [("batches", 1.0, steps)]
    for share, draw in product(shares, range(draws)):
        kept = batches.groupby("engine_id", observed=True).sample(frac=share, random_state=draw)
        parts.append(("batches", share, steps.merge(kept, on=["engine_id", "point"])))
    engines = sorted(steps.engine_id.unique())
    for count in range(2, len(engines)):
        every = math.ceil(math.comb(len(engines), count) / draws)
        for chosen in islice(combinations(engines, count), 0, None, every):
            kept = steps[steps.engine_id.isin(chosen)]
            parts.append(("engines", count / len(engines), kept))
    with workers(None):
        rows = joblib.Parallel(-1)(
            joblib.delayed(_calibrate_on)(measured, kept) for _, _, kept in parts
        )
    about = pd.DataFrame(
        {"part": part, "share": share, "steps": len(kept)} for part, share, kept in parts
    )
    return about.join(pd.DataFrame(rows))


def _calibrate_on(measured: Mapping[str, pd.DataFrame], steps: pd.DataFrame) -> dict[str, Any]:
    import statsmodels.api  # noqa: F401  # imported later, it would show its warnings again

    model = str(measured["runs"]["model"].iloc[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few batches for some laws' intervals
        calibration = calibrate_campaign(
            {**measured, "micro_steps": steps},
            model,
            model_shape(model),
            gpu="cpu",
            engine_version="0.32.0",
            memory_gib=0.0,
            source={},
        )
    runs = measured["runs"].query("status == 'ok' and held_out")
    pairs = pair_runs(runs, predict(runs, calibration, jobs=1))
    errors = pairs.assign(error=pairs.error.abs()).groupby("figure").error.mean()
    form = vars(calibration.step_time)["form_"]
    return {"form": form, **{name: errors[name] for name in SERVICE}}
