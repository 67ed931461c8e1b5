"""GPUs: what ``data/gpus`` tells of each kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import exp, log
from statistics import fmean, stdev
from typing import Any

from adapter_twin.errors import require
from adapter_twin.workload.shipped import facts
from adapter_twin.workload.strict import suggestion

SHARE_OF = {
    "bandwidth_gb_s": "memory_bandwidth_gb_s",
    "kv_bandwidth_gb_s": "memory_bandwidth_gb_s",
    "compute_tflops": "bf16_tflops",
    "knee": "",
    "layer_ms": "",
}
"""Constants of steps, and the number of a data sheet of which each is a share; those of none are
about the same on all GPUs."""


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


def gpu_key(gpu: str) -> str:
    """Return a GPU's name in ``data/gpus``, however it is spelt; raise `AdapterTwinError` if none.

    Examples
    --------
    >>> gpu_key("NVIDIA L40S")
    'l40s'
    """
    names = facts("gpus")
    found = next((name for name, about in names.items() if about == _known(gpu)), "")
    require(bool(found), f"gpu: {gpu!r} is unknown{suggestion(gpu, names)}")
    return found


def gpu_steps(gpu: str) -> dict[str, tuple[float, float]]:
    """Return the constants of steps that were measured on a GPU, by name: value and spread.

    Parameters
    ----------
    gpu : str
        A name of ``data/gpus``; of others none are known. `steps_from` tells how they were
        measured.
    """
    return {name: (value, spread) for name, (value, spread) in _known(gpu).get("steps", {}).items()}


def steps_from(gpu: str) -> str:
    """Return what a GPU's constants of steps were fitted to, empty where it has none.

    Parameters
    ----------
    gpu : str

    Returns
    -------
    str
        ``runs`` of an engine, or single ``operators``: without all that an engine adds to them.
    """
    return str(_known(gpu).get("steps_from", ""))


def data_sheet_steps(gpu: str) -> dict[str, tuple[float, float]]:
    """Return what a GPU's data sheet promises of its constants of steps: value and spread.

    Each is the data sheet's number times the geometric mean of the share of theirs that the other
    GPUs reach, those with both `gpu_steps` and a data sheet. The spread is the standard deviation
    of the logarithm between them. What was measured on the GPU itself does not enter.

    Parameters
    ----------
    gpu : str
        A name of ``data/gpus``.

    Raises
    ------
    AdapterTwinError
        It is none, or there is no bandwidth or rate of it.

    Examples
    --------
    >>> value, spread = data_sheet_steps("l4")["bandwidth_gb_s"]
    >>> 220 < value < 260, spread < 0.1
    (True, True)
    """
    own = _known(gpu)
    require(bool(own), f"gpu: {gpu!r} is no known GPU{suggestion(gpu, facts('gpus'))}")
    others_make = f"gpu: steps of {own['name']} were not measured, nor of others of its make"
    require(not own["name"].startswith("AMD"), f"{others_make}; measure yours")
    steps = {}
    for name in SHARE_OF:
        unit = share_of_data_sheet(gpu, name)
        shares = [
            log(other["steps"][name][0] / _share_of(other, name))
            for other in facts("gpus").values()
            if other["name"] != own["name"] and "steps" in other and _share_of(other, name)
        ]
        steps[name] = unit * exp(fmean(shares)), stdev(shares)
    return steps


def share_of_data_sheet(gpu: str, constant: str) -> float:
    """Return the number of a GPU's data sheet that a constant of steps is a share of, 1 for none.

    Parameters
    ----------
    gpu : str
        A name of ``data/gpus``.
    constant : str
        One of `SHARE_OF`.

    Raises
    ------
    AdapterTwinError
        There is no such number of it.
    """
    number = _share_of(_known(gpu), constant)
    wanted = SHARE_OF[constant]
    require(number > 0, f"gpu: {gpu!r} has no {wanted} in data/gpus; add it, with its source")
    return number


def _share_of(about: Mapping[str, Any], constant: str) -> float:
    key = SHARE_OF[constant]
    return float(about.get(key, 0.0)) if key else 1.0


def _known(gpu: str) -> dict[str, Any]:
    """Return what is told of a GPU, however its name is spelt."""
    for name, about in facts("gpus").items():
        if _key(gpu) in (_key(name), _key(about["name"])):
            return dict(about)
    return {}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())
