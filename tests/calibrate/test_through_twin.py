"""A step-time law is fitted to what runs served, too, by how the twin's figures move with it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from adapter_twin.calibrate.through_twin import FIGURES, TOLERANCES, Response
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.laws.roofline import CONSTANTS, RooflineLaw
from adapter_twin.laws.step_time import StepObservations, batch_features
from adapter_twin.service.predict import predict_run
from study.ch01_to_06 import configurations

LLAMA = "llama-3.1-8b-instruct"
SHORTER = 0.95

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


@pytest.fixture(scope="module")
def shipped() -> Calibration:
    return load_calibration("auto", LLAMA)


@pytest.fixture(scope="module")
def response(shipped: Calibration) -> Response:
    """Two runs: one as the twin predicts it, the other with a shorter ITL."""
    asked = configurations(LLAMA, [32], [16, 32], rates="0.4-0.2", ranks="8-16", duration_s=120.0)
    served = pd.DataFrame(
        predict_run(row, shipped, seed=0, observer=True)[0] for row in asked.to_dict("records")
    )
    runs = asked.assign(**{name: served[name] for name in FIGURES})
    runs["mean_itl_ms"] *= [1.0, SHORTER]
    return Response.of(shipped, runs, jobs=1)


def test_a_run_misses_by_what_was_measured_otherwise(response: Response) -> None:
    itl, whole = FIGURES.index("mean_itl_ms"), -np.log(SHORTER)
    expected = np.zeros((len(FIGURES), 2))
    expected[itl, 1] = whole
    assert response.missed == pytest.approx(expected)
    errors = response.errors
    assert len(errors.group) == response.missed.size
    in_tolerances = errors.of(response.at).reshape(response.missed.shape)
    assert (in_tolerances[expected == 0] == 0).all()
    # far away it counts less
    assert 0.8 * whole / TOLERANCES[itl] < in_tolerances[itl, 1] < whole / TOLERANCES[itl]


def test_tokens_are_further_apart_where_steps_cost_more(response: Response) -> None:
    itl = dict(zip(CONSTANTS, response.slopes[FIGURES.index("mean_itl_ms")].T, strict=True))
    for name, sign in {"step_ms": 1, "bandwidth_gb_s": -1}.items():
        assert (np.sign(itl[name]) == sign).all(), name


def test_some_of_the_runs_are_some_of_the_errors(response: Response) -> None:
    one = response.of_runs(pd.Series(response.run_id[1:]))
    both, alone = (of.errors.of(response.at + 0.01) for of in (response, one))
    assert alone == pytest.approx(both.reshape(response.missed.shape)[:, 1])


def test_a_fit_goes_where_the_runs_ask_for(shipped: Calibration, response: Response) -> None:
    law = shipped.step_time
    assert isinstance(law, RooflineLaw)
    tokens = np.array([16.0, 64.0, 256.0])
    batches = batch_features(tokens, tokens, 300 * tokens, np.array(8.0))[:, None, :]
    n = len(tokens)
    observed = StepObservations(
        step_ms=np.ones(n),
        arrivals_per_s=np.zeros(n),
        batches=batches,
        slots=np.full(n, 32.0),
        rank=np.full(n, 16.0),
        group=np.array(["a", "b", "c"]),
        decides=np.ones(n, bool),
        weight=np.full(n, 1e-6),  # next to nothing
    )
    observed = replace(observed, step_ms=law.expected_ms(observed))
    prior = {name: (law.constants_[name], 0.15) for name in CONSTANTS}
    kept = RooflineLaw(law.shape).fit(observed, prior)
    shorter = response.of_runs(pd.Series(response.run_id[1:]))
    moved = RooflineLaw(law.shape).fit(observed, prior, shorter.errors)
    assert kept.expected_ms(observed) == pytest.approx(observed.step_ms, rel=1e-6)
    assert (moved.expected_ms(observed) < 0.995 * observed.step_ms).all()
