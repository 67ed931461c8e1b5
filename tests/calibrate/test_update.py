"""A prior that a few measured batches move, or that is better left alone."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adapter_twin.calibrate.campaign_fit import median_steps, observations
from adapter_twin.calibrate.update import APART, FEWEST, update
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.laws.prior import prior_calibration
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.tables.campaign_schemas import CAMPAIGN_TABLES

MODEL, GPU, VERSION = "mistralai/Mistral-7B-v0.3", "l40s", "0.8.5"
ENGINES = ((8, 16), (32, 16), (32, 64), (96, 32))


def batches(count: int, seed: int) -> pd.DataFrame:
    """Return a table ``micro_steps`` of different batches, without their times."""
    rng = np.random.default_rng(seed)
    engine = rng.integers(len(ENGINES), size=count)
    slots, ranks = np.array(ENGINES)[engine].T
    decodes = 2 ** rng.integers(0, 8, count)
    prefill = rng.choice([0, 0, 64, 256, 1024], count)
    return pd.DataFrame(
        {
            "engine_id": [f"e{i}" for i in engine],
            "model": MODEL,
            "adapter_slots": slots,
            "max_lora_rank": ranks,
            "rank": ranks,
            "repeat": 0,
            "point": np.arange(count),
            "step": 0,
            "batched_tokens": decodes + prefill,
            "decodes": decodes,
            "prompts": (prefill > 0).astype(int),
            "prefill_tokens": prefill,
            "context_tokens": decodes * rng.choice([128, 512], count) + np.arange(count),
            "distinct_adapters": np.minimum(rng.integers(0, slots + 1), decodes),
            "running": decodes,
            "waiting": 0,
            "loads": 0,
            "step_ms": 1.0,
            "schedule_ms": 0.2,
            "output_ms": 0.0,
        }
    )


def timed(steps: pd.DataFrame, law: RooflineLaw, noise: float) -> pd.DataFrame:
    step_ms = law.expected_ms(observations(steps)) + steps["schedule_ms"]
    factor = np.exp(noise * np.random.default_rng(1).standard_normal(len(steps)))
    return steps.assign(step_ms=step_ms * factor)


@pytest.fixture(scope="module")
def prior() -> Calibration:
    return prior_calibration(MODEL, GPU, VERSION)


@pytest.fixture
def campaign(tmp_path: Path) -> Callable[..., Path]:
    def write(steps: pd.DataFrame, **machine: object) -> Path:
        schema = CAMPAIGN_TABLES["micro_steps"]
        schema.validate(steps).to_parquet(tmp_path / "micro_steps.parquet")
        about = {"device": "NVIDIA L40S", "vllm": VERSION, "gpus": [{"memory.total": "46068 MiB"}]}
        (tmp_path / "machine.json").write_text(json.dumps(about | machine))
        return tmp_path

    return write


def error(law: RooflineLaw, steps: pd.DataFrame) -> float:
    observed = observations(steps)
    return float(np.abs(law.expected_ms(observed) / observed.step_ms - 1).mean())


def test_fifty_batches_mend_a_wrong_prior(
    prior: Calibration, campaign: Callable[..., Path], tmp_path: Path
) -> None:
    truth = RooflineLaw(prior.step_time.shape)
    rng = np.random.default_rng(3)
    truth.constants_ = {
        name: value * float(np.exp(0.4 * rng.standard_normal()))
        for name, value in prior.step_time.constants_.items()
    }
    unseen = timed(batches(300, seed=7), truth, noise=0.0)
    moved = update(prior, campaign(timed(batches(50, seed=5), truth, noise=0.03)))
    assert error(prior.step_time, unseen) > 0.15
    assert error(moved.step_time, unseen) < 0.06
    assert "; updated by 50 batches measured there" in moved.origin
    assert moved.memory is prior.memory
    spreads = [np.log(one.step_time.draws_["bandwidth_gb_s"]).std() for one in (moved, prior)]
    assert spreads[0] < spreads[1] or spreads[1] < 0.03
    (tmp_path / "moved.json").write_text(moved.to_json())
    assert load_calibration(str(tmp_path / "moved.json"), MODEL).to_json() == moved.to_json()


def test_an_update_that_makes_it_worse_is_refused(
    prior: Calibration, campaign: Callable[..., Path]
) -> None:
    steps = timed(batches(50, seed=5), prior.step_time, noise=0.0)
    apart = median_steps(steps).iloc[APART // 2 :: APART]["context_tokens"]
    # those apart are as the prior has them; contexts differ, so they tell batches apart
    steps["step_ms"] *= np.where(steps["context_tokens"].isin(apart), 1.0, 1.3)
    with pytest.raises(AdapterTwinError, match=r"kept apart are predicted worse .*than before"):
        update(prior, campaign(steps))


@pytest.mark.parametrize(
    ("change", "machine", "message"),
    [
        ({"model": "qwen-2.5-7b-instruct"}, {}, "model: the campaign measured qwen"),
        ({}, {"device": "NVIDIA L4"}, "gpu: the campaign ran on NVIDIA L4"),
        ({}, {"device": "Xeon", "gpus": []}, "micro_steps: of a CPU, where priors are none"),
        ({"few": True}, {}, f"micro_steps: of {FEWEST - 1} different batches"),
    ],
)
def test_batches_of_another_place_or_too_few_are_refused(
    prior: Calibration,
    campaign: Callable[..., Path],
    change: dict[str, object],
    machine: dict[str, object],
    message: str,
) -> None:
    steps = timed(batches(FEWEST - 1 if change.pop("few", False) else 50, 5), prior.step_time, 0.0)
    with pytest.raises(AdapterTwinError, match=message):
        update(prior, campaign(steps.assign(**change), **machine))


@pytest.mark.parametrize("model", ["small", "llama-3.1-8b-instruct"])
def test_what_was_measured_is_not_updated(model: str, campaign: Callable[..., Path]) -> None:
    with pytest.raises(AdapterTwinError, match="is no prior; make one with calibrate --prior"):
        update(load_calibration("auto", model), campaign(batches(50, 5)))


def test_batches_of_a_newer_vllm_may_move_the_engines_constants_far(
    prior: Calibration, campaign: Callable[..., Path]
) -> None:
    truth = RooflineLaw(prior.step_time.shape)
    truth.constants_ = prior.step_time.constants_ | {
        name: prior.step_time.constants_[name] / 3 for name in ("step_ms", "few_adapter_ms")
    }
    steps = timed(batches(50, seed=5), truth, noise=0.02).assign(model="Mistral-7B-v0.3")
    moved = update(prior, campaign(steps, vllm="0.32.0+cu129"))
    assert moved.memory.version == "0.32.0"
    assert moved.name == "mistral-7b-v0.3@l40s-vllm0.32.0-prior"
    assert error(moved.step_time, timed(batches(300, seed=7), truth, noise=0.0)) < 0.04
    assert moved.step_time.constants_["step_ms"] < 0.75 * prior.step_time.constants_["step_ms"]
