"""Sobol indices of the twin's answers: what is multiplied, and what decides what."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.grid import grid_runs
from adapter_twin.service.metrics import summarize
from adapter_twin.twin.simulate import simulate_run
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import records
from study import ch11_sensitivity
from study.ch11_sensitivity import FACTORS, answer, perturbed, sobol_indices

LLAMA = "llama-3.1-8b-instruct"
MIX: dict[str, Any] = {
    "model": LLAMA,
    "rates_per_adapter": "1.6-0.8",  # so high that few adapters fill a GPU
    "ranks": "8-16",
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 200.0,
}
LIGHT, OVERLOADED = (8, 8), (64, 64)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return load_calibration("auto", LLAMA)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search a coarser grid for the capacity: faster."""
    monkeypatch.setattr(ch11_sensitivity, "DEALS", [0, 2, 4, 6, 8, 12, 16, 24, 32])
    monkeypatch.setattr(ch11_sensitivity, "SLOTS", [4, 8, 16, 32])


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten what a calibration saves."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in items for k, v in numbers(item, f"{path}/{key}").items()}


@pytest.mark.parametrize(
    ("factor", "multiplied"),
    [
        (
            "loading",
            "loading/full_slot_ms_ loading/padded_slot_ms_ loading/read_ms_ "
            "loading/read_ms_per_rank_",
        ),
        (
            "scheduling",
            "scheduling/base_ms_ scheduling/per_running_ms_ scheduling/per_scanned_ms_",
        ),
        (
            "front_end",
            "front_end/first_use_ms_ front_end/overhead_ms_ front_end/overhead_per_running_ms_",
        ),
        ("request_rates", ""),
    ],
)
def test_a_factor_multiplies_its_law_and_nothing_else(
    calibration: Calibration, factor: str, multiplied: str
) -> None:
    saved = calibration.to_json()
    before, after = (
        numbers(json.loads(law.to_json()))
        for law in (calibration, perturbed(calibration, {factor: 1.25}))
    )
    changed = [name for name in before if before[name] != after[name]]
    assert sorted(changed) == [f"/{name}" for name in multiplied.split()]
    assert all(after[name] == pytest.approx(1.25 * before[name]) for name in changed)
    assert calibration.to_json() == saved


def test_step_times_split_into_base_and_adapters(calibration: Calibration) -> None:
    saved = calibration.to_json()
    law, slots_and_rank = calibration.step_time, (32, 16)
    base, adapters = (
        perturbed(calibration, {f"step_time_{other}": 0.0}).step_time
        for other in ("adapters", "base")
    )
    assert (base.for_engine(*slots_and_rank) == law.for_engine(0, 0)).all()
    assert (adapters.for_engine(0, 0) == 0).all()
    both = base.for_engine(*slots_and_rank) + adapters.for_engine(*slots_and_rank)
    assert both == pytest.approx(law.for_engine(*slots_and_rank))
    assert (base.arrival_ms, adapters.arrival_ms) == (law.arrival_ms, 0.0)
    assert calibration.to_json() == saved


@pytest.mark.usefixtures("coarse")
def test_factors_of_one_answer_as_the_plain_twin_does(calibration: Calibration) -> None:
    laws = dict.fromkeys(list(FACTORS)[:9], 1.0)
    same = perturbed(calibration, laws)
    assert replace(same, step_time=calibration.step_time).to_json() == calibration.to_json()
    for engine in ((0, 0), (8, 16)):
        ours, theirs = (one.step_time.for_engine(*engine) for one in (same, calibration))
        assert (ours == theirs).all()
    row = records(grid_runs(MIX, [8], [8], 3600.0))[0]
    run = simulate_run(row, calibration, seed=3, observer=False)
    service = summarize(run.records, run.gaps, run.duration_s)
    point = laws | {"zipf_exponent": 0.0, "arrival_cv": 1.0}
    answers = answer(MIX, calibration, LIGHT, point, seed=3)
    assert answers == answer(MIX, calibration, LIGHT, {}, seed=3)
    assert answers["mean_itl_ms"] == service["mean_itl_ms"]
    assert 10 ** answers["log10_mean_ttft_ms"] == pytest.approx(service["mean_ttft_ms"])


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("factor", "configuration", "signs"),
    [
        ("step_time_base", LIGHT, {"mean_itl_ms": 1, "capacity_adapters": -1}),
        ("step_time_adapters", LIGHT, {"mean_itl_ms": 1, "capacity_adapters": -1}),
        ("kv_memory", OVERLOADED, {"served_share": 1}),
        ("front_end", LIGHT, {"log10_mean_ttft_ms": 1}),
        ("request_rates", LIGHT, {"mean_itl_ms": 1}),
        ("output_tokens", LIGHT, {"capacity_adapters": -1}),
        ("zipf_exponent", (24, 4), {"served_share": 1}),  # popular adapters keep their slots
    ],
)
def test_answers_move_as_they_must(
    calibration: Calibration, factor: str, configuration: tuple[int, int], signs: dict[str, int]
) -> None:
    low, high = (answer(MIX, calibration, configuration, {factor: end}) for end in FACTORS[factor])
    assert {name: np.sign(high[name] - low[name]) for name in signs} == signs


def test_indices_of_a_known_function(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = {"step_time_base": 30.0, "zipf_exponent": 4.0, "arrival_cv": 1.0}

    def known(*arguments: Any, seed: int) -> dict[str, float]:
        point = arguments[-1]
        return {
            "additive": sum(slope * point[name] for name, slope in slopes.items()),
            "product": (point["zipf_exponent"] - 0.5) * (point["arrival_cv"] - 2),
            "constant": 1.0,
        }

    monkeypatch.setattr(ch11_sensitivity, "answer", known)
    table = sobol_indices(MIX, calibration, LIGHT, samples=512)
    found = table.set_index(["answer", "factor"])
    variance = {name: (slope * np.ptp(FACTORS[name])) ** 2 for name, slope in slopes.items()}
    for name in FACTORS:
        exact = variance.get(name, 0.0) / sum(variance.values())
        both = found.loc[("additive", name), ["first", "total"]]
        assert both.to_numpy(float) == pytest.approx(exact, abs=0.05)
    for name in ("zipf_exponent", "arrival_cv"):
        assert found.loc[("product", name), "first"] == pytest.approx(0, abs=0.1)
        assert found.loc[("product", name), "total"] == pytest.approx(1, abs=0.1)
    constant = found.loc["constant", ["first", "first_conf", "total", "total_conf", "sd"]]
    assert (constant == 0).all(axis=None)
    again = sobol_indices(MIX, calibration, LIGHT, samples=512)
    pd.testing.assert_frame_equal(again, table)


@pytest.mark.usefixtures("coarse")
def test_the_table_has_a_row_per_answer_and_factor(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ch11_sensitivity, "DURATION_S", 300.0)
    table = sobol_indices(MIX, calibration, LIGHT, samples=2)
    answers = ["capacity_adapters", "served_share", "log10_mean_ttft_ms", "mean_itl_ms"]
    assert list(table) == [
        *("answer", "factor", "first", "first_conf", "total", "total_conf", "mean", "sd")
    ]
    assert list(table.answer) == [name for name in answers for _ in FACTORS]
    assert list(table.factor) == list(FACTORS) * len(answers)
    assert np.isfinite(table.drop(columns=["answer", "factor"])).all(axis=None)
    capacity = table[table.answer == "capacity_adapters"].set_index("factor")
    assert (capacity.total[["front_end", "arrival_cv"]] == 0).all()


@pytest.mark.parametrize("samples", [0, 1, 3, 48, -8])
def test_samples_that_are_no_power_of_two_are_refused(
    calibration: Calibration, samples: int
) -> None:
    with pytest.raises(AdapterTwinError, match=r"^samples: give a power of two"):
        sobol_indices(MIX, calibration, LIGHT, samples=samples)


def test_less_memory_is_less_for_slots_and_kv_cache(calibration: Calibration) -> None:
    engine = EngineConfig(model=calibration.model, max_loras=8)
    less = perturbed(calibration, {"kv_memory": 0.9}).memory
    assert less.shared_gib(engine) == pytest.approx(0.9 * calibration.memory.shared_gib(engine))
    assert less.version == calibration.memory.version


def test_an_unknown_factor_is_refused(calibration: Calibration) -> None:
    with pytest.raises(AdapterTwinError, match="did you mean 'loading'"):
        perturbed(calibration, {"loadings": 1.1})


def test_a_start_that_the_least_memory_refuses_is_refused_at_once(calibration: Calibration) -> None:
    engine = EngineConfig(model=calibration.model, max_loras=208, max_lora_rank=16)
    assert calibration.memory.starts(engine)
    with pytest.raises(AdapterTwinError, match="lower max_model_len"):
        sobol_indices(MIX, calibration, (208, 208), samples=2)


def test_traffic_too_thin_to_fill_a_gpu_is_refused(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ch11_sensitivity, "DEALS", [0, 1, 2])
    with pytest.raises(AdapterTwinError, match="rates_per_adapter: too low"):
        answer(MIX, calibration, LIGHT, {})
