"""A check of the installation: what is there, what is missing and how to get it."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OLDEST_PYTHON = (3, 11)
"""The package runs on this version of Python, and on newer ones."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    found: bool
    needed: bool  # the core does not work without it
    detail: str  # what was found, or how to get it


def examine() -> list[Check]:
    """Check the installation; nothing is fetched, and neither vllm nor torch is imported."""
    return [
        _python(),
        *_packages(),
        _numba(),
        _numba_cache(),
        _calibrations(),
        _measured_data(),
        *_profiling(),
        _gpu(),
    ]


def works(checks: list[Check]) -> bool:
    """Return whether all that the core needs is there."""
    return all(check.found for check in checks if check.needed)


def _python() -> Check:
    ok, oldest = sys.version_info >= OLDEST_PYTHON, ".".join(map(str, OLDEST_PYTHON))
    detail = platform.python_version() + ("" if ok else f"; install Python {oldest} or newer")
    return Check("python", ok, True, detail)


def core_packages() -> dict[str, str]:
    """Return the packages that the core needs, with the requirement of each."""
    core = [line for line in requires("adapter-twin") or [] if "extra ==" not in line]
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0]: line for line in core}


def _packages() -> Iterator[Check]:
    for name, requirement in core_packages().items():
        try:
            yield Check(name, True, True, version(name))
        except PackageNotFoundError:
            yield Check(name, False, True, f"missing; pip install '{requirement}'")


def _numba() -> Check:
    try:
        from numba import njit

        compiled: Any = njit(_one_more)
        right = bool(compiled(1) == 2)
    except Exception as error:  # whatever breaks a compiler
        reason = " ".join(str(error).split())[:120]
        return Check("numba compiles", False, True, f"{reason}; reinstall numba and llvmlite")
    return Check("numba compiles", right, True, "yes" if right else "wrong result; reinstall numba")


def _one_more(number: int) -> int:
    return number + 1


def _numba_cache() -> Check:
    """Find where numba keeps the compiled twin; without it, each process compiles afresh."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    in_tree = Path(__file__).parents[1] / "twin"
    candidates = [Path(chosen)] if chosen else [in_tree, Path.home() / ".cache"]
    folder = next((str(folder) for folder in candidates if os.access(folder, os.W_OK)), None)
    remedy = "no folder is writable; set NUMBA_CACHE_DIR to a folder that can be written to"
    return Check("compilation cache", folder is not None, False, folder or remedy)


def _calibrations() -> Check:
    from adapter_twin.laws import list_calibrations

    names = list_calibrations()
    remedy = "none; fit one with `adapter-twin calibrate TABLES --out CAL.json`"
    return Check("calibrations", bool(names), True, ", ".join(names) or remedy)


def _measured_data() -> Check:
    from adapter_twin.tables import datasets
    from adapter_twin.tables.schemas import TABLES

    found = [table for table in TABLES if datasets.find(table) is not None]
    detail = f"{len(found)} of {len(TABLES)} tables"
    if len(found) < len(TABLES):
        detail += "; see `adapter-twin data` for the rest (needed to calibrate and validate only)"
    return Check("measured data", len(found) == len(TABLES), False, detail)


def _profiling() -> Iterator[Check]:
    for package in ("torch", "vllm"):
        found = find_spec(package) is not None
        remedy = "not installed; `make setup-vllm`, or pip install 'adapter-twin[gpu]' (to profile)"
        yield Check(package, found, False, "installed" if found else remedy)


def _gpu() -> Check:
    found = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    detail = "NVIDIA driver found" if found else "no NVIDIA driver (profiling on a GPU only)"
    return Check("CUDA", found, False, detail)
