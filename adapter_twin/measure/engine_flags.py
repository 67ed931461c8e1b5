"""The engine flags of a profile, as vLLM's keyword arguments and as its command line."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adapter_twin.workload.scenario import LoraRank, Share
from adapter_twin.workload.strict import Count, Positive, Whole, dataclass, require

GIB = 2**30
LORA_FLAGS = ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """The flags of one engine, under vLLM's own names.

    Attributes
    ----------
    max_loras : int
        Adapter slots; 0 serves the base model alone, without LoRA.
    max_lora_rank, max_cpu_loras, max_num_seqs, max_num_batched_tokens, max_model_len : int
    block_size : int, optional
        Tokens per KV block; left out, vLLM chooses.
    dtype, load_format : str
        ``load_format="dummy"`` fills the model with random weights.
    enforce_eager : bool
    gpu_memory_utilization : float
    cpu_kv_cache_gib : float
        Size of the KV cache on a CPU, where `gpu_memory_utilization` decides nothing.
    """

    max_loras: Whole
    max_lora_rank: LoraRank
    max_cpu_loras: Whole
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count = 512
    max_model_len: Count = 1024
    block_size: Count | None = None
    dtype: str = "bfloat16"
    load_format: str = "dummy"
    enforce_eager: bool = False
    gpu_memory_utilization: Share = 0.9
    cpu_kv_cache_gib: Positive = 1.0

    def __post_init__(self) -> None:
        require(
            self.max_loras <= self.max_cpu_loras,
            f"max_cpu_loras: {self.max_cpu_loras} is below max_loras = {self.max_loras}; "
            "raise it or lower the slots",
        )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``vllm.EngineArgs``.

        Prefix caching is off: it would answer from memory what the profile wants to time.
        """
        arguments = asdict(self) | {"enable_prefix_caching": False, "enable_lora": True}
        kv_cache_gib = arguments.pop("cpu_kv_cache_gib")
        if is_cpu_build():
            arguments["kv_cache_memory_bytes"] = round(kv_cache_gib * GIB)
        left_out = () if self.max_loras else LORA_FLAGS
        return {
            name: value
            for name, value in arguments.items()
            if name not in left_out and value is not None
        }

    def command_line(self) -> list[str]:
        """Return the same as flags of ``vllm serve``."""
        words = []
        for name, value in self.arguments().items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return words


def environment(flags: EngineFlags) -> dict[str, str]:
    """Return the variables that an engine's process gets on top of the present ones.

    One OpenMP thread: with more, and anything else on the machine, steps stall for seconds. On a
    CPU the worker is in the engine's process, as on a GPU: in one of its own, as vLLM has it there,
    it shares the cores with an engine that spins while it waits, and steps take longer.

    Raises
    ------
    AdapterTwinError
        A variable is set that would silently win over the flags.
    """
    # vLLM takes it, in whole GiB, in place of kv_cache_memory_bytes.
    require(
        "VLLM_CPU_KVCACHE_SPACE" not in os.environ,
        f"cpu_kv_cache_gib: unset VLLM_CPU_KVCACHE_SPACE, which would replace the "
        f"{flags.cpu_kv_cache_gib} GiB given here",
    )
    in_one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {
        **(in_one_process if is_cpu_build() else {}),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }


def is_cpu_build() -> bool:
    """Tell whether the vLLM installed here is built for CPUs."""
    return "cpu" in (engine_version() or "")


def engine_version() -> str | None:
    """Return the version of the vLLM installed here, or None where there is none.

    The distribution ``vllm-cpu`` is vLLM's CPU build; its version reads as vLLM's own CPU builds
    do, with ``+cpu`` at the end.
    """
    try:
        return version("vllm")
    except PackageNotFoundError:
        pass
    try:
        return f"{version('vllm-cpu')}+cpu"
    except PackageNotFoundError:
        return None
