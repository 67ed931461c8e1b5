"""Calibrations from a folder of measured tables: the published ones, or those of a campaign."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pandas as pd
from pydantic import Field
from typing_extensions import TypedDict

from adapter_twin.calibrate import campaign_fit, published_fit
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.calibration import Calibration
from adapter_twin.tables import datasets
from adapter_twin.tables.importer import COMMIT, REPOSITORY_URL
from adapter_twin.workload.gpus import gpu_key
from adapter_twin.workload.models import ModelShape, model_shape, read_object
from adapter_twin.workload.strict import Text, keys, read


def calibrate_tables(
    folder: Path,
    model: str | None = None,
    *,
    gpu: str | None = None,
    engine_version: str | None = None,
    jobs: int = 1,
) -> Calibration:
    """Fit the laws of one model to a folder of measured tables.

    Parameters
    ----------
    folder : pathlib.Path
        Published tables (`adapter_twin.tables.schemas`), or those of a campaign of ``adapter-twin
        profile`` (`adapter_twin.tables.campaign_schemas`), known by its ``micro_steps.parquet``.
    model : str, optional
        Needed where the tables hold several.
    gpu, engine_version : str, optional
        For the name; by default those of the published tables, or what the campaign's
        ``machine.json`` says.
    jobs : int
        Processes for simulations.

    Raises
    ------
    AdapterTwinError
        A table is missing or damaged, or holds no such model.

    Examples
    --------
    The calibration of the CPU in the book is made in some ten seconds by::

        calibrate_tables(Path("data/campaigns/cpu-small"))
    """
    if (folder / "micro_steps.parquet").is_file():
        measured = datasets.read_campaign(folder)
        for name in campaign_fit.TABLES:
            require(name in measured, f"{folder}: {name}.parquet is missing; finish the campaign")
        machine = read_machine(folder)
        model = _choose_model(measured["runs"], model)
        told = machine.get("model_config")
        return campaign_fit.calibrate_campaign(
            measured,
            model,
            model_shape(model) if told is None else ModelShape.of_config(told),
            gpu=gpu or device_name(machine),
            engine_version=engine_version or str(machine["vllm"]).split("+")[0],
            memory_gib=_memory_gib(machine),
            source={"campaign": measured["runs"].campaign.iloc[0], "machine": machine["device"]},
            jobs=jobs,
        )
    dataset = str(folder.resolve())
    measured = {name: datasets.load(name, dataset) for name in published_fit.TABLES}
    source = {"dataset": folder.resolve().name}
    if source["dataset"] == datasets.DATASET:
        source |= {"repository": REPOSITORY_URL, "commit": COMMIT}
    return published_fit.calibrate(
        measured,
        datasets.sharegpt_lengths(dataset),
        _choose_model(measured["runs"], model),
        gpu=gpu or "h100-64gb",
        engine_version=engine_version or "0.8.5",
        source=source,
        jobs=jobs,
    )


_Gpu = TypedDict("_Gpu", {"memory.total": Annotated[str, Field(pattern=r"^\d+ MiB$")]})


@keys
class _Machine(TypedDict):
    device: Text
    vllm: Text
    gpus: list[_Gpu]
    model_config: NotRequired[dict[str, Any] | None]


def read_machine(folder: Path) -> dict[str, Any]:
    """Read what a campaign says of the machine it ran on."""
    path = folder / "machine.json"
    require(path.is_file(), f"{path}: missing; `adapter-twin profile` writes it")
    machine = read_object(path, "what `adapter-twin profile` wrote")
    read(_Machine, machine, path.name)
    return machine


def device_name(machine: dict[str, Any]) -> str:
    """Return the device as calibrations name it: ``cpu``, a name of ``data/gpus``, or its own."""
    if not machine["gpus"]:
        return "cpu"
    with suppress(AdapterTwinError):
        return gpu_key(str(machine["device"]))
    name = re.sub(r"^nvidia\s+", "", str(machine["device"]).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _memory_gib(machine: dict[str, Any]) -> float:
    """Return the memory of a machine's GPU in GiB (the driver tells MiB), 0 where it has none."""
    gpus = machine["gpus"]
    return float(gpus[0]["memory.total"].removesuffix(" MiB")) / 1024 if gpus else 0.0


def _choose_model(runs: pd.DataFrame, model: str | None) -> str:
    models = sorted(runs["model"].unique())
    if model is None:
        require(len(models) == 1, f"model: choose one with --model: {', '.join(models)}")
        return str(models[0])
    known = ", ".join(models)
    require(model in models, f"model: {model!r} is not in the tables; they hold {known}")
    return model
