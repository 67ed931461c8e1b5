"""Priors: what is known of a model before any of its steps is measured."""

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adapter_twin import load_calibration, simulate
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import Calibration
from adapter_twin.laws.prior import prior_calibration
from adapter_twin.laws.roofline import DRAWS
from adapter_twin.service.predict import predict
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.models import model_config
from adapter_twin.workload.traffic import Lengths, Workload
from study.ch01_to_06 import configurations

LLAMA, QWEN, MISTRAL = "llama-3.1-8b-instruct", "qwen-2.5-7b-instruct", "mistralai/Mistral-7B-v0.3"
PLACE = ("h100-64gb", "0.8.5")


def test_a_measured_model_is_told_almost_as_it_was_measured() -> None:
    prior, measured = prior_calibration(LLAMA, *PLACE), load_calibration("auto", LLAMA)
    engine = EngineConfig(model=LLAMA, max_loras=32, max_cpu_loras=64, max_lora_rank=16)
    tokens = [law.memory.kv_cache_tokens(engine) for law in (prior, measured)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.02)
    workload = Workload(
        adapters=deal_adapters(64, [0.1], [16]),
        duration_s=300.0,
        lengths=Lengths(mean_input_tokens=223, mean_output_tokens=197),
    )
    with pytest.warns(
        UserWarning,
        match="is a prior: llama.* was not measured on h100-64gb with vLLM 0.8.5; .* from qwen",
    ):
        run = simulate(workload, engine, prior)
    itl_ms = [
        1e3 * np.average(one.gaps.gap_s, weights=one.gaps.count)
        for one in (run, simulate(workload, engine, measured))
    ]
    assert itl_ms[0] == pytest.approx(itl_ms[1], rel=0.1)


def test_it_follows_the_other_models_only() -> None:
    prior, other = prior_calibration(LLAMA, *PLACE), load_calibration("auto", QWEN)
    assert prior.provenance["source"]["prior"] == [other.name]
    both = prior_calibration(MISTRAL, *PLACE)
    assert len(both.provenance["source"]["prior"]) == 2


def test_copies_take_time_by_tensors_and_reads_by_weights() -> None:
    prior, other = prior_calibration(LLAMA, *PLACE), load_calibration("auto", QWEN)
    tensors = prior.memory.shape.layers / other.memory.shape.layers
    assert prior.loading.full_slot_ms_ == pytest.approx(tensors * other.loading.full_slot_ms_)
    small, large = (
        prior_calibration(model, *PLACE).loading for model in ("qwen-2.5-0.5b", "llama-3.1-70b")
    )
    assert large.full_slot_ms_ == pytest.approx(80 / 24 * small.full_slot_ms_)
    assert large.read_ms_per_rank_ > 10 * small.read_ms_per_rank_


def test_a_model_of_the_same_shape_is_the_models_own() -> None:
    base, measured = prior_calibration("llama-3.1-8b", *PLACE), load_calibration("auto", LLAMA)
    assert base.provenance["source"]["prior"] == [measured.name]
    assert base.step_time.constants_["sequence_ms"] == measured.step_time.constants_["sequence_ms"]
    assert base.loading.full_slot_ms_ == pytest.approx(measured.loading.full_slot_ms_)


def test_the_less_was_measured_the_less_sure_it_is() -> None:
    spreads = [
        np.log(prior_calibration(MISTRAL, gpu, "0.8.5").step_time.draws_["bandwidth_gb_s"]).std()
        for gpu in ("h100-64gb", "l40s", "l4")
    ]
    assert spreads == sorted(spreads)


def test_those_that_stand_for_all_are_as_slow_on_average() -> None:
    law = prior_calibration(MISTRAL, "rtx-pro-6000", "0.8.5").step_time
    few = [one.typical_ms() for one in law.representatives(5)]
    all_ = [one.typical_ms() for one in law.in_order()]
    assert np.mean(few) == pytest.approx(np.mean(all_), rel=0.02)
    assert law.cautious().typical_ms() == pytest.approx(np.quantile(all_, 0.9), rel=0.03)


def test_a_larger_model_is_slower(tmp_path: Path) -> None:
    config = dict(model_config(MISTRAL)) | {"num_hidden_layers": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    small, large = (
        prior_calibration(model, *PLACE).step_time.for_engine(0, 0)
        for model in (MISTRAL, str(tmp_path))
    )
    assert large[0, 0] > 1.6 * small[0, 0]  # twice the weights to read, but one engine
    assert (large[:, 1] > small[:, 1]).all()


def test_it_is_a_calibration_like_others(tmp_path: Path) -> None:
    path = tmp_path / "prior.json"
    prior = prior_calibration(MISTRAL, *PLACE)
    path.write_text(prior.to_json())
    again = load_calibration(str(path), MISTRAL)
    assert isinstance(again, Calibration)
    assert again.to_json() == prior.to_json()
    assert pd.Series(again.step_time.draws_["step_ms"]).std() > 0.05


def test_the_time_to_capture_graphs_is_that_of_the_version() -> None:
    """That of 0.8.5 grows with the slots, that of later versions does not (vLLM #23777)."""
    engine = EngineConfig(model=MISTRAL, max_loras=352, max_lora_rank=8)
    assert prior_calibration(MISTRAL, *PLACE).memory.startup_s(engine) > 1000
    assert prior_calibration(MISTRAL, "h100-64gb", "0.19.0").memory.startup_s(engine) < 20


@pytest.mark.filterwarnings("ignore:.*is a prior", "ignore:.*an extrapolation")
def test_its_intervals_are_those_of_its_draws() -> None:
    prior = prior_calibration(MISTRAL, "l40s", "0.8.5")
    runs = configurations(MISTRAL, [16], [16], rates="0.1", ranks="16", duration_s=300.0)
    told = predict(runs, prior, jobs=1, intervals=True).iloc[0]
    width = np.log(told.mean_itl_ms_high / told.mean_itl_ms)
    spread = np.log([prior.step_time.drawn(i).typical_ms() for i in range(DRAWS)]).std()
    assert 0.5 * spread < width / 1.645 < 3 * spread
    surer = copy(prior.step_time)
    surer.draws_ = {name: [1.0] * DRAWS for name in surer.draws_}
    least = predict(runs, replace(prior, step_time=surer), jobs=1, intervals=True).iloc[0]
    assert np.log(least.mean_itl_ms_high / least.mean_itl_ms) < width


@pytest.mark.parametrize(
    ("model", "place", "message"),
    [
        (MISTRAL, ("mi300x", "0.8.5"), r"gpu: steps of AMD Instinct MI300X were not measured"),
        (MISTRAL, ("rtx-5090", "0.8.5"), r"gpu: 'rtx-5090' has no bf16_tflops"),
        (MISTRAL, ("h100-64gb", "0.32.0"), r"engine: what a step of vLLM 0\.32\.0 takes was not"),
        (MISTRAL, ("h100-64gb", "0.9.1"), r"engine: what a step of vLLM 0\.9\.1 takes was not"),
        (MISTRAL, ("h200x", "0.8.5"), r"gpu: 'h200x' is unknown; did you mean 'h200'\?"),
        ("mistralai/Mixtral-8x7B-v0.1", PLACE, "model: steps of experts or of quantised weights"),
        ("none/of-these", PLACE, "model: 'none/of-these'"),
    ],
)
def test_what_was_not_measured_is_refused(model: str, place: tuple[str, str], message: str) -> None:
    with pytest.raises(AdapterTwinError, match=message):
        prior_calibration(model, *place)
