"""Commands that start, and command lines that are read."""

from dataclasses import replace
from typing import Any

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.plan.commands import sglang_args, vllm_args
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.serve_command import read_command

LLAMA = "llama-3.1-8b-instruct"
ENGINE = EngineConfig(model=LLAMA, max_loras=32, max_cpu_loras=96, max_lora_rank=16)
SERVE = "vllm serve meta-llama/Llama-3.1-8B-Instruct "
CPU = {"model": "small", "block_size": 128, "max_num_seqs": 64, "max_num_batched_tokens": 512}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"max_model_len": 8192, "gpu_memory_utilization": 0.85},
        {"kv_cache_dtype": "fp8", "enable_prefix_caching": True, "max_num_seqs": 256},
        {"long_prefill_token_threshold": 512, "scheduling_policy": "priority"},
        {"max_num_batched_tokens": 8192, "enable_chunked_prefill": False, "max_model_len": 4096},
    ],
)
def test_a_printed_command_is_read_back_as_the_same_engine(change: dict[str, Any]) -> None:
    calibration = load_calibration("auto", LLAMA)
    engine = replace(ENGINE, **change)
    words = vllm_args(engine, calibration)
    told = {"max_model_len": 131072, "enable_prefix_caching": False} | change
    read = read_command(" ".join(["vllm", "serve", LLAMA, *words]))
    assert read == replace(engine, **told)


def test_what_is_left_out_is_what_vllm_itself_takes_there() -> None:
    engine = read_command(SERVE + "--enable-lora --max-loras 4")
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (256, 2048)
    assert (engine.max_cpu_loras, engine.max_lora_rank) == (4, 16)
    assert read_command(SERVE).max_loras == 0
    assert read_command("--enable-lora", model=LLAMA).model == LLAMA


def test_a_command_line_is_read_as_a_shell_and_vllm_would() -> None:
    line = "VLLM_USE_V1=1 " + SERVE + "--port 8000 --enable-lora --max_loras=8 --max-model-len 8K "
    engine = read_command(line + "--dtype bfloat16 --lora-modules a=/x b=/y # as in production")
    assert (engine.max_loras, engine.max_model_len, engine.lora_modules) == (8, 8192, "all")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max-lorras 4", r"^--max-lorras: .* did you mean --max-loras\?"),
        ("--quantization awq", r"^--quantization: what it changes is not known here; leave it out"),
        ("--enforce-eager", r"^--enforce-eager: "),
        ("--max-loras", r"^vllm_args.max_loras: expected a whole number, got True"),
        ("--max-num-seqs many", r"^vllm_args.max_num_seqs: expected a whole number"),
        ("'--max-loras", r"^vllm_args: not a command line \(No closing quotation\)"),
        ("--max-loras 8 --max-cpu-loras 4", r"^vllm_args.max_loras: 8 adapter slots exceed"),
    ],
)
def test_a_flag_that_cannot_be_heeded_is_refused(flags: str, message: str) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        read_command(f"{SERVE} --enable-lora {flags}")
    assert "\n" not in str(caught.value)


def test_a_command_without_a_model_needs_one() -> None:
    with pytest.raises(AdapterTwinError, match="the command names no model"):
        read_command("--enable-lora")


def test_sizes_of_the_kv_cache_are_given_where_the_engine_would_estimate_graphs() -> None:
    engine = EngineConfig(**CPU, max_loras=4, max_lora_rank=16)
    words = vllm_args(engine, load_calibration("auto", "small"))
    assert int(words[words.index("--kv-cache-memory-bytes") + 1]) == 2**28
    assert "--no-async-scheduling" in words
    assert "--kv-cache-memory-bytes" not in vllm_args(ENGINE, load_calibration("auto", LLAMA))


def test_sglang_is_told_which_modules_to_adapt() -> None:
    assert "--lora-target-modules all" in " ".join(sglang_args(ENGINE, base_model=False))


@pytest.mark.live
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "change", [{}, {"lora_target_modules": ("q_proj", "o_proj"), "kv_cache_dtype": "fp8"}]
)
def test_vllms_own_parser_takes_the_printed_command(change: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine = EngineConfig(**CPU, max_loras=4, max_cpu_loras=9, max_lora_rank=16, **change)
    words = vllm_args(engine, load_calibration("auto", "small"))
    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", "m", *words])
    assert parsed.enable_lora
    for name in ("max_loras", "max_cpu_loras", "max_lora_rank", "max_num_seqs", "block_size"):
        assert getattr(parsed, name) == getattr(engine, name)
    assert parsed.max_model_len == 1024
    assert parsed.enable_prefix_caching is False
    assert parsed.kv_cache_memory_bytes == 2**28
    if change:
        assert parsed.lora_target_modules == list(change["lora_target_modules"])
        assert parsed.kv_cache_dtype == "fp8"
