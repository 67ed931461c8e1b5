"""Back tests: recorded predictions come out again, digit for digit.

A change of the twin or of a calibration that is meant shows here as a difference;
``python tests/service/test_back.py`` then records the new figures, to be looked at in the diff.
"""

from pathlib import Path

import pandas as pd
import pytest

from adapter_twin.service.predict import predict
from study.ch01_to_06 import configurations
from study.results import rounded

RECORDED = Path(__file__).parent / "recorded" / "predictions.csv"


def predictions() -> pd.DataFrame:
    """Predict ten minutes of light, gated, starved and refused configurations of both models."""
    runs = pd.concat(
        [
            configurations(model, served, slots, rates=rates, ranks=ranks, duration_s=600.0)
            for model in ("llama-3.1-8b-instruct", "qwen-2.5-7b-instruct")
            for served, slots, rates, ranks in (
                ([16], [16], "3.2-1.6-0.8", "8"),
                ([96], [8, 96], "0.1-0.05-0.025", "8-16-16"),
                ([320], [16, 320], "0.1-0.05-0.025", "8-16-32"),
            )
        ],
        ignore_index=True,
    )
    parts = [
        predict(runs, observer=observer, jobs=1).assign(observer=observer)
        for observer in (True, False)
    ]
    return rounded(pd.concat(parts, ignore_index=True).drop(columns="wall_s"))


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_recorded_predictions_come_out_again() -> None:
    pd.testing.assert_frame_equal(predictions(), pd.read_csv(RECORDED), check_exact=True)


def test_recorded_predictions_cover_starved_refused_and_light_runs() -> None:
    recorded = pd.read_csv(RECORDED)
    assert set(recorded["starved"]) == set(recorded["feasible_start"]) == {True, False}
    assert (recorded["median_ttft_ms"] < 100).any()


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    predictions().to_csv(RECORDED, index=False)
