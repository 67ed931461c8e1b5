"""Which calibration a name stands for."""

from typing import Any

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.workload.calibration_files import (
    Place,
    calibration_path,
    flags_left_out,
    take_gpu,
)

LLAMA, MISTRAL = "llama-3.1-8b-instruct", "mistralai/Mistral-7B-v0.3"


@pytest.mark.parametrize("name", ["auto", "auto@h100-64gb", "auto@NVIDIA H100 64GB-vllm0.8.5"])
def test_what_was_measured_comes_first(name: str) -> None:
    found = calibration_path(name, LLAMA)
    assert not isinstance(found, Place)
    assert found.stem == f"{LLAMA}@h100-64gb-vllm0.8.5"


@pytest.mark.parametrize(
    ("name", "model", "place"),
    [
        ("auto@l40s", LLAMA, ("l40s", "0.8.5")),
        ("auto@NVIDIA L40S", LLAMA, ("l40s", "0.8.5")),
        ("auto@h100-64gb", MISTRAL, ("h100-64gb", "0.8.5")),
        ("auto@h100-64gb-vllm0.19.0", LLAMA, ("h100-64gb", "0.19.0")),
        ("auto@h100-64gb-vllm0.8", LLAMA, ("h100-64gb", "0.8")),  # which nobody measured
    ],
)
def test_elsewhere_a_prior_is_asked_for(name: str, model: str, place: tuple[str, str]) -> None:
    assert calibration_path(name, model) == Place(*place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gpu": "l40s", "calibration": "mine.json"}, "gpu: a calibration is of one GPU"),
        ({"gpu": ["l40s"]}, "gpu: expected a name as l40s, got"),
        ({"gpu": 5}, "gpu: expected a name as l40s, got 5"),
        ({"gpu": "h1000"}, "gpu: 'h1000' is unknown; did you mean"),
        ({"gpu": "cpu"}, "gpu: 'cpu' is unknown; use one of"),
        ({"gpu": "l40s-vllm"}, "gpu: 'l40s-vllm' names no version"),
    ],
)
def test_a_gpu_that_is_none_is_refused(content: dict[str, Any], message: str) -> None:
    def ask() -> object:
        take_gpu(content)
        return calibration_path(content["calibration"], LLAMA)

    with pytest.raises(AdapterTwinError, match=message):
        ask()


def test_a_gpu_that_is_left_out_changes_nothing() -> None:
    content = {"gpu": None, "calibration": "mine.json"}
    take_gpu(content)
    assert content == {"calibration": "mine.json"}


def test_vllms_defaults_are_those_of_the_gpu_asked_for() -> None:
    small, large = (flags_left_out(f"auto@{gpu}", LLAMA) for gpu in ("l4", "h200"))
    assert (small["max_num_seqs"], large["max_num_seqs"]) == (256, 1024)
