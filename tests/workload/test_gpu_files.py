"""The files of GPUs: a source for each number, and numbers in the units that they claim."""

import json
from pathlib import Path

import pytest

from adapter_twin.laws.roofline import GPU_CONSTANTS

FILES = sorted((Path(__file__).parents[2] / "data" / "gpus").glob("*.json"))
PLAUSIBLE = {
    "memory_gib": (10, 300),
    "memory_bandwidth_gb_s": (200, 10_000),
    "bf16_tflops": (50, 3_000),
    "fp16_tflops": (50, 3_000),
    "fp8_tflops": (100, 6_000),
    "link_gb_s": (30, 2_000),
    "sms": (20, 400),
}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def gpu(request):
    return json.loads(request.param.read_text())


def test_there_are_files():
    assert {"h100-64gb", "h100-80gb-sxm", "a100-80gb-sxm", "l40s"} <= {path.stem for path in FILES}


def test_each_number_has_a_source(gpu):
    numbers = set(gpu) - {"name", "sources", "steps_from"}
    assert gpu["name"]
    assert "memory_gib" in numbers
    assert numbers - {"steps", "first_vllm"} <= set(PLAUSIBLE)
    assert set(gpu.get("steps", GPU_CONSTANTS)) == set(GPU_CONSTANTS)
    assert set(gpu["sources"]) == numbers
    assert all(gpu["sources"].values())


def test_each_number_is_plausible(gpu):
    for key, (low, high) in PLAUSIBLE.items():
        assert low <= gpu.get(key, low) <= high


def test_eight_bits_are_twice_as_fast_as_sixteen(gpu):
    if "fp8_tflops" in gpu:
        assert gpu["fp8_tflops"] == pytest.approx(2 * gpu["bf16_tflops"], rel=0.02)


def test_software_sees_less_memory_than_the_name_says(gpu):
    sizes = [word[:-2] for word in gpu["name"].replace("-", " ").split() if word.endswith("GB")]
    for size in sizes:
        assert 0.95 * float(size) < gpu["memory_gib"] < float(size)


def test_no_name_is_in_two_files():
    names = [json.loads(path.read_text())["name"] for path in FILES]
    assert len(names) == len(set(names))
