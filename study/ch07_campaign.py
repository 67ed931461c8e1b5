"""Tables of the chapter on a campaign: laws, predictions and repeats against measurements."""

from __future__ import annotations

import numpy as np
import pandas as pd

from adapter_twin.calibrate.campaign_fit import median_steps, observations
from adapter_twin.laws import Calibration
from adapter_twin.service.validate import HELD_OUT, HELD_OUT_BARS, Validation, pair_runs

FIGURES = [figure for figure, _, _ in HELD_OUT_BARS]


def step_fit(calibration: Calibration, steps: pd.DataFrame) -> pd.DataFrame:
    """Return measured and predicted step times of the micro-profiles.

    Parameters
    ----------
    calibration : Calibration
    steps : pandas.DataFrame
        Table ``micro_steps``.

    Returns
    -------
    pandas.DataFrame
        A row per batch: ``figure`` (what kind of batch), ``measured`` and ``predicted`` in ms
        without scheduling, ``error`` in percent, ``spread`` (interquartile range over steps and
        repeats by median, in percent), ``max_lora_rank``.
    """
    batches = median_steps(steps)
    observed = observations(batches)
    predicted = calibration.step_time.expected_ms(observed)
    kinds = [batches.prompts > 0, batches.distinct_adapters > 0]
    return pd.DataFrame(
        {
            "figure": np.select(kinds, ["with a prompt (ms)", "decodes (ms)"], "base model (ms)"),
            "measured": observed.step_ms,
            "predicted": predicted,
            "error": 100 * (predicted / observed.step_ms - 1),
            "spread": 100 * batches.spread,
            "max_lora_rank": batches.max_lora_rank,
        }
    )


def served(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return measured and predicted service, a row per run and figure that is scored.

    ``runs`` says whether a run was held out.
    """
    pairs = pair_runs(runs, predictions)
    held_out = pairs["campaign"].str.endswith(HELD_OUT)
    pairs = pairs.assign(runs=np.where(held_out, "held out", "fitted"))
    return pairs[pairs["figure"].isin(FIGURES)]


def repeat_spread(runs: pd.DataFrame) -> pd.Series[float]:
    """Return how far two runs of the very same traffic are apart on average, in percent."""
    repeated = runs[runs.duplicated("source_path", keep=False)]
    groups = repeated.groupby("source_path")[FIGURES]
    return 100 * ((groups.max() - groups.min()) / groups.mean()).mean()


def service_errors(checked: Validation, runs: pd.DataFrame) -> pd.DataFrame:
    """Return MAPE on fitted and held-out runs, what was asked, and the repeats' spread.

    Returns
    -------
    pandas.DataFrame
        A row per figure; ``low`` and ``high`` are the 95 % interval on held-out runs.
    """
    mape = checked.errors.query("measure == 'mape' and regime == 'all' and campaign != 'all'")
    is_held_out = mape["campaign"].str.endswith(HELD_OUT)
    held_out = mape[is_held_out].set_index("figure").reindex(FIGURES)
    fitted = mape[~is_held_out].set_index("figure").reindex(FIGURES)
    return pd.DataFrame(
        {
            "figure": FIGURES,
            "held out": held_out["value"].to_numpy(),
            "low": held_out["low"].to_numpy(),
            "high": held_out["high"].to_numpy(),
            "asked": [bar for _, _, bar in HELD_OUT_BARS],
            "fitted": fitted["value"].to_numpy(),
            "repeats": repeat_spread(runs)[FIGURES].to_numpy(),
            "held-out runs": held_out["n_runs"].to_numpy(),
        }
    )
