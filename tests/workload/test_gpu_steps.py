"""Constants of GPUs: what is shipped is what was recorded, and what data sheets promise."""

import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws.roofline import GPU_CONSTANTS
from adapter_twin.tables import datasets
from adapter_twin.workload import gpus
from adapter_twin.workload.gpus import (
    SHARE_OF,
    data_sheet_steps,
    gpu_steps,
    share_of_data_sheet,
    steps_from,
)
from adapter_twin.workload.shipped import facts

EXPECTED = datasets.REPOSITORY / "data" / "expected"
RECORDED = pd.read_csv(EXPECTED / "gpu_efficiencies.csv")
SHIPPED = RECORDED.query("engine == 'vllm'").set_index("gpu")
OWN, LEFT_OUT, BEYOND = 5.0, 10.0, "a100-80gb-sxm"


def test_the_files_hold_what_was_recorded() -> None:
    assert {*SHIPPED.index} == {name for name in facts("gpus") if steps_from(name) == "operators"}
    for gpu, row in SHIPPED.iterrows():
        assert {name: value for name, (value, _) in gpu_steps(str(gpu)).items()} == {
            name: row[name] for name in GPU_CONSTANTS
        }
        assert f"vLLM {row.version}" in facts("gpus")[str(gpu)]["sources"]["steps"]
        assert all(0 < spread < 2 for _, spread in gpu_steps(str(gpu)).values())


def test_recorded_shares_are_of_the_data_sheet() -> None:
    for row in RECORDED.itertuples():
        for name in (name for name, keys in SHARE_OF.items() if keys):
            share = getattr(row, name) / share_of_data_sheet(str(row.gpu), name)
            assert getattr(row, f"{name}_share") == pytest.approx(share, abs=1e-4)
            assert 0.5 < share < 1


def test_steps_are_predicted_as_well_as_is_said() -> None:
    assert RECORDED.decode_error.max() <= OWN
    assert SHIPPED.left_out_decode_error.mean() <= LEFT_OUT
    assert {*SHIPPED.query("left_out_decode_error > @LEFT_OUT").index} == {BEYOND}
    models = pd.read_csv(EXPECTED / "gpu_models_left_out.csv")
    assert {*models.gpu} == {*SHIPPED.index}
    assert models.mean_error.max() <= 1.1 * OWN
    assert models.groupby("gpu").left_out_error.mean().max() <= OWN
    assert (models.left_out_error >= 0.95 * models.mean_error).all()


def test_only_runs_of_an_engine_count_as_such() -> None:
    assert steps_from("h100-64gb") == "runs"
    assert steps_from("h200") == steps_from("NVIDIA H200") == "operators"
    assert steps_from("l4") == steps_from("another") == ""
    for name, about in facts("gpus").items():
        assert ("steps" in about) == (steps_from(name) in ("runs", "operators"))


def test_shares_are_told_of_the_constants_of_a_gpu() -> None:
    assert [*SHARE_OF] == [*GPU_CONSTANTS]


@pytest.mark.parametrize(
    "gpu", sorted(set(facts("gpus")) - {"h100-64gb", "rtx-3090", "rtx-5090", "mi300x", "t4"})
)
def test_no_data_sheet_promises_more_than_it_says(gpu: str) -> None:
    steps = data_sheet_steps(gpu)
    assert [*steps] == [*GPU_CONSTANTS]
    for name in (name for name, keys in SHARE_OF.items() if keys):
        assert 0.6 < steps[name][0] / share_of_data_sheet(gpu, name) < 0.95
    assert all(0 < spread < 0.7 for _, spread in steps.values())


@pytest.mark.parametrize(
    ("key", "doubled"),
    [
        ("memory_bandwidth_gb_s", {"bandwidth_gb_s", "kv_bandwidth_gb_s"}),
        ("bf16_tflops", {"compute_tflops"}),
    ],
)
def test_twice_the_data_sheet_is_twice_the_constant(
    monkeypatch: pytest.MonkeyPatch, key: str, doubled: set[str]
) -> None:
    known, before = facts("gpus"), data_sheet_steps("l4")
    l4 = known["l4"] | {key: 2 * known["l4"][key]}
    monkeypatch.setattr(gpus, "facts", lambda kind: known | {"l4": l4})
    for name, (value, spread) in data_sheet_steps("l4").items():
        factor = 2 if name in doubled else 1
        assert (value, spread) == (pytest.approx(factor * before[name][0]), before[name][1])


def test_what_was_measured_on_a_gpu_does_not_enter_its_own_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, before = facts("gpus"), data_sheet_steps("h200")
    slower = {name: [value / 2, spread] for name, (value, spread) in gpu_steps("h200").items()}
    changed = known | {"h200": known["h200"] | {"steps": slower}}
    other = data_sheet_steps("b200")
    monkeypatch.setattr(gpus, "facts", lambda kind: changed)
    assert data_sheet_steps("h200") == before
    assert data_sheet_steps("b200")["bandwidth_gb_s"][0] < other["bandwidth_gb_s"][0]


def test_a_mean_of_shares_is_geometric() -> None:
    others = SHIPPED.drop(index="h200")
    value, spread = data_sheet_steps("h200")["bandwidth_gb_s"]
    logarithms = np.log(others.bandwidth_gb_s_share)
    assert value == pytest.approx(4800 * np.exp(logarithms.mean()), rel=1e-4)
    assert spread == pytest.approx(logarithms.std(ddof=1), rel=1e-2)


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("h100-64gb", "has no memory_bandwidth_gb_s in data/gpus; add it, with its source"),
        ("mi300x", "steps of AMD Instinct MI300X were not measured, nor of others of its make"),
        ("t4", "has no bf16_tflops in data/gpus"),  # nor can it multiply in bf16
        ("rtx-3090", "has no bf16_tflops in data/gpus"),
        ("h20", "is no known GPU; did you mean 'h200'"),
    ],
)
def test_a_gpu_of_which_too_little_is_known_is_refused(gpu: str, message: str) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        data_sheet_steps(gpu)
    assert "\n" not in str(caught.value)
