"""The commands that start an engine as it was planned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from adapter_twin.laws import Calibration
from adapter_twin.laws.slots import GIB
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags


def vllm_args(
    engine: EngineConfig, calibration: Calibration, adapters: Sequence[Adapter] = ()
) -> list[str]:
    """Return the flags for ``vllm serve MODEL``: all that the answer hangs on.

    Parameters
    ----------
    engine : EngineConfig
    calibration : Calibration
        Of the version that is started. Where that takes an estimate of its CUDA graphs off the KV
        cache, or runs on a CPU, the size of the KV cache is given as well.
    adapters : sequence of Adapter
        Named by ``--lora-modules`` where the engine names all at its start and each has a path.
    """
    memory, version = calibration.memory, calibration.version
    names = ("max_loras", "max_cpu_loras", "max_lora_rank") if engine.max_loras else ()
    flags = {
        **({"enable_lora": True} if engine.max_loras else {}),
        **{name: getattr(engine, name) for name in names},
        **{name: getattr(engine, name) for name in ("max_num_seqs", "max_num_batched_tokens")},
        "block_size": engine.block_size,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "max_model_len": memory.max_model_len(engine),
        "enable_prefix_caching": bool(engine.enable_prefix_caching),
    }
    if "async_scheduling" not in version.lacks:
        flags["async_scheduling"] = calibration.is_async(engine)
    if version.estimates_graphs or memory.slots_ != "segments":
        flags["kv_cache_memory_bytes"] = int(memory.kv_cache_gib(engine) * GIB)
    left_out = ServeFlags()
    for name in ("kv_cache_dtype", "lora_target_modules", "fully_sharded_loras",
                 "enable_chunked_prefill", "long_prefill_token_threshold",
                 "scheduling_policy"):  # fmt: skip
        if getattr(engine, name) != getattr(left_out, name):
            flags[name] = getattr(engine, name)
    words = flag_words(flags)
    if engine.lora_modules == "all" and adapters and all(one.path for one in adapters):
        words += ["--lora-modules", *map(_lora_module, adapters)]
    return words


def _lora_module(adapter: Adapter) -> str:
    """Return an adapter as vLLM takes it: in JSON where a comma would mislead it."""
    short = f"{adapter.name}={adapter.path}"
    plain = "," not in short and "=" not in adapter.name
    return short if plain else json.dumps({"name": adapter.name, "path": adapter.path})


def flag_words(flags: Mapping[str, object]) -> list[str]:
    """Return vLLM's flags as words of a command line.

    >>> flag_words({"max_loras": 8, "enable_prefix_caching": False})
    ['--max-loras', '8', '--no-enable-prefix-caching']
    """
    return [word for name, value in flags.items() for word in _flag(name, value)]


def _flag(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def sglang_args(engine: EngineConfig, *, base_model: bool) -> list[str]:
    """Return the flags for ``python -m sglang.launch_server --model-path MODEL`` that correspond.

    SGLang counts the base model among the adapters of a batch. Its token budgets and memory shares
    mean something else than vLLM's, and the expected service is vLLM's.

    Parameters
    ----------
    engine : EngineConfig
    base_model : bool
        It has requests of its own.
    """
    return [
        "--enable-lora",
        *("--max-loras-per-batch", str(engine.max_loras + base_model)),
        *("--max-loaded-loras", str(engine.max_cpu_loras + base_model)),
        *("--max-lora-rank", str(engine.max_lora_rank)),
        *("--lora-target-modules", *(engine.lora_target_modules or ["all"])),
        *("--max-running-requests", str(engine.max_num_seqs)),
    ]
