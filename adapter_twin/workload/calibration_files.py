"""Which file a calibration's name stands for, and what vLLM itself would do on its GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.workload.engine_versions import WITH_ADAPTERS, engine_version, require_runs
from adapter_twin.workload.gpus import gpu_key, gpu_memory_gib, gpu_name
from adapter_twin.workload.models import read_object, same_model
from adapter_twin.workload.shipped import SHIPPED
from adapter_twin.workload.strict import suggestion

FOLDER = SHIPPED / "calibrations"
"""The calibrations that come with the package lie in this folder."""


class Place(NamedTuple):
    """Where a model of which nothing was measured is to run.

    Attributes
    ----------
    gpu : str
        A name of ``data/gpus``.
    version : str
        Of vLLM.
    """

    gpu: str
    version: str


def list_calibrations() -> list[str]:
    """Return the names of the calibrations that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def calibration_path(name: str, model: str) -> Path | Place:
    """Return the file of a calibration, or where a prior is asked for.

    Parameters
    ----------
    name : str
        A name; the path of a ``.json`` file; ``auto``, the first one of the model; or
        ``auto@GPU`` or ``auto@GPU-vllmVERSION``, the one that was measured there, or a prior.
    model : str

    Raises
    ------
    AdapterTwinError
        There is none.
    """
    names = list_calibrations()
    known = ", ".join(names)
    auto, _, where = name.partition("@")
    own = [name for name in names if same_model(name.split("@")[0], model)]
    if name == "auto":
        require(
            bool(own),
            f"model: {model!r} has no calibration; there are {known}; for a prior say on which gpu "
            "(gpu: l40s, or auto@l40s); adapter-twin memory tells what fits on it",
        )
        name = own[0]
    elif auto == "auto":
        gpu, named, version = where.partition("-vllm")
        require(bool(version) or not named, f"gpu: {where!r} names no version; leave -vllm out")
        gpu = gpu if gpu == "cpu" else gpu_key(gpu)
        there = [name for name in own if name.partition("@")[2].startswith(f"{gpu}-vllm")]
        name = next((name for name in there if version in ("", name.rpartition("-vllm")[2])), "")
        if not name:
            place = Place(gpu_key(gpu), version or WITH_ADAPTERS)
            require_runs(*place)
            return place
    is_file = name.endswith(".json")
    require(is_file or name in names, f"calibration: {name!r} is unknown; use auto or {known}")
    return Path(name) if is_file else FOLDER / f"{name}.json"


def take_gpu(content: dict[str, Any]) -> None:
    """Replace the key ``gpu`` of a file by the calibration that it stands for.

    Parameters
    ----------
    content : dict
        Of the file.

    Examples
    --------
    >>> content = {"gpu": "l40s"}
    >>> take_gpu(content)
    >>> content
    {'calibration': 'auto@l40s'}
    """
    gpu = content.pop("gpu", None)
    if gpu is not None:
        require(isinstance(gpu, str), f"gpu: expected a name as l40s, got {gpu!r}")
        told = content.get("calibration", "auto")
        require(told == "auto", "gpu: a calibration is of one GPU; leave one of the two out")
        content["calibration"] = f"auto@{gpu}"


def flags_left_out(calibration: str, model: str) -> dict[str, Any]:
    """Return what ``vllm serve`` takes for flags left out, on a calibration's GPU and version.

    Parameters are those of `calibration_path`.

    Raises
    ------
    AdapterTwinError
        There is no such calibration, or its GPU is not known.

    Examples
    --------
    >>> flags_left_out("auto", "llama-3.1-8b-instruct")["max_num_batched_tokens"]
    2048
    """
    found = calibration_path(calibration, model)
    if isinstance(found, Place):
        gpu, version = found
    else:
        content = read_object(found, "a calibration")
        try:
            gpu, version = str(content["gpu"]), str(content["memory"]["version"])
        except (KeyError, TypeError):
            raise AdapterTwinError(f"calibration: {found} is no calibration") from None
    require(gpu != "cpu", "engine.defaults: vLLM's own are known for GPUs; leave it out on a CPU")
    return engine_version(version).flags_left_out(gpu_name(gpu), gpu_memory_gib(gpu))


def complete(engine: dict[str, Any], calibration: str, model: str) -> dict[str, Any]:
    """Return an ``engine:`` mapping without ``defaults``, with what that stands for.

    Parameters
    ----------
    engine : dict
        As in a file. ``defaults: vllm`` takes vLLM's own for flags left out, ``study`` or nothing
        the reference study's.
    calibration, model : str
        As for `calibration_path`.
    """
    defaults = engine.get("defaults", "study")
    choices = ("study", "vllm")
    named = defaults in choices
    require(named, f"engine.defaults: got {defaults!r}{suggestion(defaults, choices)}")
    told = {name: value for name, value in engine.items() if name != "defaults"}
    return (flags_left_out(calibration, model) if defaults == "vllm" else {}) | told
