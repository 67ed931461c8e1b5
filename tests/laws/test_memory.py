"""Memory of a GPU: against every recorded start, and by hand."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.slots import GIB, MIB, slot_tensors
from adapter_twin.plan.what_fits import what_fits
from adapter_twin.tables import datasets
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.engine_versions import engine_version
from adapter_twin.workload.files import records, run_to_engine
from adapter_twin.workload.models import model_shape
from study.engine_constants import CONSTANTS, GPU, fit_constants, recorded_starts

LLAMA, QWEN = "llama-3.1-8b-instruct", "qwen-2.5-7b-instruct"
ENGINE = EngineConfig(model=LLAMA, max_loras=32, max_cpu_loras=96, max_lora_rank=16)


def errors(laws: dict[str, MemoryLaw]) -> pd.Series:
    starts = recorded_starts()
    predicted = [
        laws[engine.model].kv_cache_tokens(engine) for engine in map(run_to_engine, records(starts))
    ]
    return (predicted / starts.kv_cache_tokens - 1).abs()


def test_the_constants_of_the_engine_are_those_that_the_starts_tell() -> None:
    kept, fitted = engine_version("0.8.5").memory, fit_constants(recorded_starts())
    for name in CONSTANTS:
        assert getattr(kept, name) == pytest.approx(fitted[name], rel=5e-3), name


@pytest.mark.parametrize("source", ["fitted", "from config.json alone"])
def test_every_start_has_its_kv_cache(source: str) -> None:
    laws = {
        model: load_calibration("auto", model).memory
        if source == "fitted"
        else MemoryLaw(model_shape(model), "0.8.5", 63.43)
        for model in (LLAMA, QWEN)
    }
    assert errors(laws).max() < 0.01
    assert errors(laws).mean() < 0.001


def test_every_start_and_refusal_is_told_apart() -> None:
    starts = datasets.load("memory")
    for row in records(starts):
        law = MemoryLaw(model_shape(row["model"]), "0.8.5", 63.43)
        assert law.starts(run_to_engine(row)) == (row["kv_cache_tokens"] > 0), row


def test_another_gpu_and_version_from_its_config_alone() -> None:
    """An RTX 4090 with vLLM 0.19 reported 41,408 tokens for these flags."""
    flags = {"max_loras": 0, "max_num_seqs": 256, "gpu_memory_utilization": 0.9}
    for gpu in ("rtx-4090", "23.5"):
        found = what_fits("llama-3.1-8b", gpu, flags, version="vllm-0.19.0")
        assert found["kv_cache_tokens"] == pytest.approx(41408, rel=0.02)


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        ({"gpu_memory_utilization": 0.8}, 232_100),
        ({"gpu_memory_utilization": 0.95}, 310_000),
        ({"max_lora_rank": 128, "max_model_len": 8192}, 125_440),
        ({"kv_cache_dtype": "fp8"}, 2 * 284_064),
    ],
)
def test_a_memory_flag_moves_the_kv_cache(change: dict[str, Any], tokens: int) -> None:
    calibration = load_calibration("auto", LLAMA)
    assert calibration.require_start(ENGINE) == 284_064
    assert calibration.require_start(replace(ENGINE, **change)) == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu_memory_utilization": 0.35}, r"^engine.gpu_memory_utilization: 0.35 .* raise it"),
        ({"max_lora_rank": 128}, r"raise gpu_memory_utilization or lower max_model_len to 125440"),
        ({"max_model_len": 200_000}, r"^engine.max_model_len: 200000 is above 131072"),
        ({"max_lora_rank": 1}, r"^engine.max_lora_rank: vLLM 0.8.5 takes one of"),
        ({"tensor_parallel_size": 2}, r"^engine.tensor_parallel_size: .* adapter-twin memory"),
        ({"async_scheduling": True}, r"^engine.async_scheduling: vLLM 0.8.5 has no such flag"),
        ({"lora_target_modules": ("q_proj",)}, r"^engine.lora_target_modules: vLLM 0.8.5 has no"),
    ],
)
def test_what_does_not_start_or_was_not_measured_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message):
        load_calibration("auto", LLAMA).require_start(replace(ENGINE, **change))


def slot_bytes(model: str, version: str = "0.32.0", **flags: Any) -> int:
    engine = EngineConfig(model=model, max_loras=1, **flags)
    return sum(slot_tensors(engine, model_shape(model), engine_version(version)))


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_slots_are_shared_among_gpus_as_vllm_does(gpus: int) -> None:
    """Per GPU, layer and rank 7 h + (2 q + 2 kv + 3 i) / T weights; fully sharded all over T."""
    h, q, kv, i, layers = 5120, 64 * 128, 8 * 128, 25600, 64  # heads x head size is not h
    vocabulary = 2 * 151936 + 2 * 5120  # embedding and output layer, not shared
    for sharded in (False, True):
        flags = {"tensor_parallel_size": gpus, "fully_sharded_loras": sharded}
        whole = 7 * h // (gpus if sharded else 1) + (2 * q + 2 * kv + 3 * i) // gpus
        by_hand = 16 * 2 * (layers * whole + vocabulary)
        assert slot_bytes("Qwen/Qwen3-32B", max_lora_rank=16, **flags) == by_hand


def test_a_slot_has_the_modules_that_its_version_adapts() -> None:
    layers = 16 * 2 * 32 * (9 * 4096 + 2 * 1024 + 3 * 14336)
    assert slot_bytes("mistral-7b-v0.3", max_lora_rank=16) == layers
    assert slot_bytes("mistral-7b-v0.3", "0.8.5", max_lora_rank=16) > layers
    attention = 16 * 2 * 32 * (4 * 4096 + 2 * 1024)
    only = {"lora_target_modules": ("q_proj",), "max_lora_rank": 16}
    assert slot_bytes("mistral-7b-v0.3", **only) == attention  # q, k and v are one module
    assert slot_bytes(QWEN) / MIB == pytest.approx(77, rel=0.01)
    assert slot_bytes(LLAMA, max_lora_rank=8) == slot_bytes(LLAMA, max_lora_rank=16) // 2


def test_what_fits_adds_up_and_tells_the_most_slots() -> None:
    found = what_fits("Qwen/Qwen3-8B", "l40s", {"max_loras": 32, "max_model_len": 8192})
    parts = ("weights", "activations", "reserve", "slots", "kv_cache")
    whole = sum(found[f"{part}_gib"] for part in parts)
    assert whole == pytest.approx(0.92 * found["memory_gib"])
    most = found["largest_max_loras"]
    for slots, starts in ((most, True), (most + 1, False)):
        flags = {"max_loras": slots, "max_model_len": 8192}
        assert what_fits("Qwen/Qwen3-8B", "l40s", flags)["starts"] is starts
    at_once = found["requests_at_once_by_tokens"]
    assert at_once == {
        length: found["kv_cache_tokens"] // int(length) for length in ("512", "2048", "8192")
    }


def test_an_h100_of_80_gb_holds_what_its_size_adds() -> None:
    flags = {"max_loras": 32, "max_num_seqs": 2048, "max_num_batched_tokens": 2048}
    found = what_fits(LLAMA, "h100-80gb-sxm", flags, version="0.8.5")
    assert found["kv_cache_tokens"] == pytest.approx(399_600, rel=2e-3)
    assert found["kv_cache_gib"] * GIB >= found["kv_cache_tokens"] * 131072


@pytest.mark.parametrize(
    ("model", "gpu", "flags", "message"),
    [
        ("gemma-2-9b", "h200", {}, "Gemma2ForCausalLM is not among"),
        ("deepseek-v2-lite", "h200", {}, r"latent attention \(MLA\)"),
        ("gpt-oss-20b", "h200", {}, "attention of several kinds"),
        ("mixtral-8x7b", "h200", {}, "slots of experts are not known"),
        ("mistral-7b-v0.1", "l4", {}, "attention reaches back 4096 tokens"),
        ("nobody/knows", "l4", {}, "neither shipped nor a folder with a config.json"),
        ("llama-3.1-8b", "h9000", {}, "neither GiB of memory nor a known GPU"),
        ("llama-3.1-8b", "l4", {"tensor_parallel_size": 3}, "cannot be shared among 3 GPUs"),
        ("llama-3.1-8b", "l4", {"lora_target_modules": ("qproj",)}, "did you mean 'q_proj'"),
    ],
)
def test_what_the_law_does_not_know_is_refused(
    model: str, gpu: str, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        what_fits(model, gpu, flags)
    assert "\n" not in str(caught.value)


def test_the_memory_of_the_recorded_gpu_is_the_shipped_one() -> None:
    for model in (LLAMA, QWEN):
        law = load_calibration("auto", model).memory
        assert law.total_gib == what_fits(model, GPU)["memory_gib"]
