"""What the measurements were taken on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adapter_twin import __version__
from adapter_twin.measure.engine_flags import GIB, EngineFlags, engine_version, environment
from adapter_twin.workload.strict import require

VLLM_PYTHON = Path(".venv-vllm/bin/python")
_GPU_FIGURES = ("name", "memory.total", "driver_version")


def require_engine() -> None:
    """Raise `AdapterTwinError` where vllm is not installed, and say how to get it."""
    if engine_version() is not None:
        return
    remedy = "install it with `make setup-vllm` (CPU) or `pip install 'adapter-twin[gpu]'`"
    if VLLM_PYTHON.is_file():
        remedy = f"it is in .venv-vllm: use {VLLM_PYTHON} -m adapter_twin"
    require(False, f"vllm: not installed in this environment; {remedy}")


def describe_machine(flags: EngineFlags) -> dict[str, Any]:
    """Return what may decide the measured times: hardware, system, versions, settings.

    Parameters
    ----------
    flags : EngineFlags
        Those that all engines share; they decide the engines' environment variables.
    """
    gpus = _gpus()
    cpu = _cpu_model()
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


def _cpu_model() -> str:
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
