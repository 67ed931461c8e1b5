"""GPUs: what ``data/gpus`` tells of each kind."""

from __future__ import annotations

import re
from typing import Any

from adapter_twin.errors import require
from adapter_twin.workload.shipped import facts
from adapter_twin.workload.strict import suggestion


def gpu_memory_gib(gpu: str) -> float:
    """Return a GPU's memory in GiB, as the engine sees it.

    Parameters
    ----------
    gpu : str
        A name of ``data/gpus``, or the memory itself, as ``47.4``.

    Raises
    ------
    AdapterTwinError
        It is neither.

    Examples
    --------
    >>> gpu_memory_gib("l40s"), gpu_memory_gib("23.5")
    (44.53, 23.5)
    """
    about = _known(gpu)
    if about:
        return float(about["memory_gib"])
    try:
        memory_gib = float(gpu)
    except ValueError:
        memory_gib = 0.0
    choices = suggestion(gpu, facts("gpus"))
    require(0 < memory_gib < 1e6, f"gpu: {gpu!r} is neither GiB of memory nor a known GPU{choices}")
    return memory_gib


def gpu_name(gpu: str) -> str:
    """Return the name that the driver reports for a GPU of ``data/gpus``, else what is given."""
    return str(_known(gpu).get("name", gpu))


def gpu_steps(gpu: str) -> dict[str, tuple[float, float]]:
    """Return the constants of steps that were measured on a GPU, by name: value and spread.

    Parameters
    ----------
    gpu : str
        A name of ``data/gpus``; of others none are known.
    """
    return dict(_known(gpu).get("steps", {}))


def _known(gpu: str) -> dict[str, Any]:
    """Return what is told of a GPU, however its name is spelt."""
    for name, about in facts("gpus").items():
        if _key(gpu) in (_key(name), _key(about["name"])):
            return dict(about)
    return {}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())
