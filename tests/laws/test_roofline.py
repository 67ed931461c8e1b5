"""The law of a GPU's steps: where it may jump, what it must grow with, and what a fit finds."""

from collections.abc import Collection
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from adapter_twin.laws import list_calibrations, load_calibration
from adapter_twin.laws.prior import UNKNOWN, known_constants
from adapter_twin.laws.roofline import (
    ADAPTER_CONSTANTS,
    CONSTANTS,
    ENGINE_CONSTANTS,
    GPU_CONSTANTS,
    LEAVES_GRAPHS,
    MOST_TOKENS,
    SWITCHES_TILING,
    TOKEN_BREAKS,
    Prior,
    RooflineLaw,
)
from adapter_twin.laws.step_time import FEATURES, Floats, StepObservations, batch_features
from adapter_twin.twin.wiring import step_law
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.models import model_shape

GPU, VERSION, LLAMA = "h100-64gb", "0.8.5", "llama-3.1-8b-instruct"
JUMPS = (SWITCHES_TILING, LEAVES_GRAPHS)
TOKENS = np.arange(1.0, MOST_TOKENS + 100)
SLOTS, RANKS, ADAPTERS, CONTEXT = (0, 1, 8, 32, 128, 384), (8, 16, 32, 64), (0, 1, 8, 32), (0, 1e5)


@pytest.fixture(params=[name for name in list_calibrations() if GPU in name])
def law(request: pytest.FixtureRequest) -> RooflineLaw:
    fitted = load_calibration(request.param, request.param.split("@")[0]).step_time
    assert isinstance(fitted, RooflineLaw)
    return fitted


def step_ms(
    law: RooflineLaw, slots: int, rank: int, adapters: float, context_tokens: float
) -> Floats:
    """Return the time of a step of `TOKENS`, half of them of decoding requests."""
    columns = (TOKENS, TOKENS / 2, np.array(context_tokens), np.array(adapters))
    regime = np.searchsorted(TOKEN_BREAKS, TOKENS)
    return (batch_features(*columns) * law.for_engine(slots, rank)[regime]).sum(axis=1)


def test_a_step_is_continuous_in_its_tokens_but_at_two_sizes(law: RooflineLaw) -> None:
    for slots, rank, adapters, context in product(SLOTS, RANKS, ADAPTERS, CONTEXT):
        at = np.array(TOKEN_BREAKS)
        batches = batch_features(at, at / 2, np.array(context), np.array(min(adapters, slots)))
        coefficients = law.for_engine(slots, rank)
        below, above = ((batches * c).sum(axis=1) for c in (coefficients[:-1], coefficients[1:]))
        jumps = at[np.abs(above / below - 1) > 1e-9]
        assert jumps.tolist() == list(JUMPS if slots else JUMPS[1:])


def test_more_tokens_never_make_a_step_shorter_but_at_two_sizes(law: RooflineLaw) -> None:
    smooth = ~np.isin(TOKENS[:-1], JUMPS)
    for point in product(SLOTS, RANKS, ADAPTERS, CONTEXT):
        assert (np.diff(step_ms(law, *point))[smooth] > 0).all()


def test_a_step_grows_with_slots_rank_adapters_and_context(law: RooflineLaw) -> None:
    levels = (SLOTS[1:], RANKS, ADAPTERS, CONTEXT)
    steps = np.array([step_ms(law, *point) for point in product(*levels)])
    table = steps.reshape(*map(len, levels), len(TOKENS))
    for axis in range(len(levels)):
        assert (np.diff(table, axis=axis) > 0).all()


def test_without_slots_no_adapter_kernels_run(law: RooflineLaw) -> None:
    none, one = law.for_engine(0, 16), law.for_engine(1, 16)
    assert (none == law.for_engine(0, 0)).all()
    assert (none[:, FEATURES.index("adapters") :] == 0).all()
    assert (one[:, :2] > none[:, :2]).all()


def test_the_twin_is_told_what_an_arrival_costs() -> None:
    calibration = load_calibration("auto", LLAMA)
    told = step_law(calibration, EngineConfig(model=LLAMA, max_loras=8))
    assert told.per_arrival == pytest.approx(1e-3 * calibration.step_time.arrival_ms)


def observations(law: RooflineLaw) -> StepObservations:
    """Return batches of all sizes on several engines, with the times that a law gives them."""
    rng, n = np.random.default_rng(0), 600
    tokens = np.exp(rng.uniform(np.log(4), np.log(MOST_TOKENS), n))
    decodes = tokens * rng.uniform(0, 1, n)
    slots = rng.choice(np.array(SLOTS), n)
    adapters = np.minimum(rng.integers(0, 64, n), slots)
    batches = batch_features(tokens, decodes, 300 * decodes, adapters.astype(float))
    observed = StepObservations(
        step_ms=np.ones(n),
        arrivals_per_s=rng.uniform(0, 20, n),
        batches=batches[:, None, :],
        slots=slots.astype(float),
        rank=rng.choice(np.array(RANKS), n).astype(float),
        group=np.repeat([f"{i}" for i in range(20)], n // 20),
        decides=np.ones(n, bool),
        weight=np.ones(n),
    )
    return replace(observed, step_ms=law.expected_ms(observed))


@pytest.fixture(scope="module")
def truth() -> RooflineLaw:
    law = RooflineLaw(model_shape(LLAMA))
    law.constants_ = {name: value for name, (value, _) in known_constants(GPU, VERSION).items()}
    return law


def off_by_a_fifth(law: RooflineLaw, spread: float) -> Prior:
    """Return a prior whose values are too high and too low in turn."""
    factors = np.resize([1.2, 1 / 1.2], len(CONSTANTS))
    return {
        name: (factor * law.constants_[name], spread)
        for name, factor in zip(CONSTANTS, factors, strict=True)
    }


def test_a_fit_finds_the_law_that_made_the_step_times(truth: RooflineLaw) -> None:
    observed, prior = observations(truth), off_by_a_fifth(truth, 0.3)
    fitted = RooflineLaw(truth.shape).fit(observed, prior)
    assert fitted.expected_ms(observed) == pytest.approx(observed.step_ms, rel=0.01)
    start = RooflineLaw(truth.shape)
    start.constants_ = {name: value for name, (value, _) in prior.items()}
    assert np.abs(start.expected_ms(observed) / observed.step_ms - 1).max() > 0.1


def test_a_fit_keeps_what_is_known_for_sure(truth: RooflineLaw) -> None:
    prior = off_by_a_fifth(truth, 1e-6)
    fitted = RooflineLaw(truth.shape).fit(observations(truth), prior)
    assert fitted.constants_ == pytest.approx(
        {name: prior[name][0] for name in CONSTANTS}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("gpu", "version", "unknown"),
    [
        (GPU, VERSION, ()),
        ("another", VERSION, GPU_CONSTANTS),
        (GPU, "0.32.0", {**ENGINE_CONSTANTS, **ADAPTER_CONSTANTS}),
        ("another", "0.32.0", CONSTANTS),
    ],
)
def test_constants_that_nobody_measured_are_anyones_guess(
    gpu: str, version: str, unknown: Collection[str]
) -> None:
    measured, known = known_constants(GPU, VERSION), known_constants(gpu, version)
    assert {*known} == {*CONSTANTS}
    for name, (value, spread) in known.items():
        assert (value, spread) == (
            measured[name][0],
            UNKNOWN if name in unknown else measured[name][1],
        )
