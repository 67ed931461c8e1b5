"""Adapters as they lie on a disk or in a table: PEFT folders, and what vLLM takes of them.

In a file, an adapter with a ``path`` needs neither rank nor target modules. All may be given as
``{folders: FOLDER or list}`` with the rates of a short form, or as the path of a ``.csv`` with the
columns of `adapter_twin.workload.adapters.Adapter`. Paths are relative to the file that has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.workload.adapters import dealt
from adapter_twin.workload.models import ModelShape, model_shape, read_object, same_model
from adapter_twin.workload.strict import Size, Text, Whole, keys, read, suggestion
from adapter_twin.workload.tensor_files import read_header

PEFT_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_REFUSED = (
    *("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens", "layer_replication"),
    *("use_bdlora", "use_qalora"),
)
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Other named initial weights change the base model as well, which vLLM does not."""
_OF_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Inputs of these modules are as wide as the model's hidden states."""


@keys
class _Peft(TypedDict, total=False):
    r: Required[Size]
    rank_pattern: dict[str, Size] | None
    target_modules: list[Text] | str | None
    base_model_name_or_path: str | None
    bias: str | None
    layers_to_transform: list[Whole] | Whole | None


def peft_config(folder: Path) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of a LoRA adapter that vLLM loads.

    Raises
    ------
    AdapterTwinError
        There is none, or it uses what vLLM (0.32, ``PEFTHelper``) refuses.
    """
    path = folder / PEFT_CONFIG
    config = read_object(path, "a PEFT adapter")
    require(config.get("peft_type") == "LORA", f"{path}: no LoRA of PEFT; give a LoRA adapter")
    read(_Peft, config, str(path))
    init, bias = config.get("init_lora_weights"), config.get("bias", "none")
    refused = {key: config.get(key) for key in _REFUSED}
    refused["bias"] = bias if bias != "none" else None
    if isinstance(init, str):
        refused["init_lora_weights"] = init if init.lower() not in _PLAIN_INITS else None
    for key, value in refused.items():
        require(not value, f"{path}: vLLM takes no adapter with {key} = {value!r}; leave it out")
    return config


def peft_rank(config: Mapping[str, Any]) -> int:
    """Return the rank that a slot must have: the largest of all modules, as vLLM counts it."""
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def read_adapter(folder: Path, model: str) -> dict[str, Any]:
    """Return what a PEFT adapter tells; its weights are not loaded.

    These are its ``rank`` and ``target_modules``, and the number of ``layers`` where its weights
    or its configuration tell.

    Parameters
    ----------
    folder : pathlib.Path
    model : str
        That it shall be served with.

    Raises
    ------
    AdapterTwinError
        vLLM would refuse it, or it is of another model.
    """
    config = peft_config(folder)
    rank, targets = peft_rank(config), config.get("target_modules")
    base = str(config.get("base_model_name_or_path") or model)
    shape, trained_on = _shape(model), _shape(base)
    fits = same_model(base, model) or None in (shape, trained_on) or shape == trained_on
    require(fits, f"{folder}: an adapter of {base}, not of {model}; leave it out")
    chosen = config.get("layers_to_transform")
    layers = len(set(chosen)) if isinstance(chosen, list) else None if chosen is None else 1
    if (folder / WEIGHTS).is_file():
        tensors, layers = _lora_tensors(folder / WEIGHTS)
        largest = max(rank for rank, _ in tensors.values())
        told = f"its weights have rank {largest}, above the {rank} of {PEFT_CONFIG}"
        require(largest <= rank, f"{folder}: {told}; save it again")
        widths = {tensors[module][1] for module in _OF_HIDDEN if module in tensors}
        others = widths - {shape.hidden} if shape is not None else set()
        told = f"its weights are for hidden states of {others}, not those of {model}"
        require(not others, f"{folder}: {told}; leave it out")
        targets = list(tensors)
    if not isinstance(targets, list):
        raise AdapterTwinError(
            f"{folder}: target_modules is a pattern, {targets!r}; add {WEIGHTS}, which tells them"
        )
    modules = sorted({name.rpartition(".")[2] for name in targets})
    return {"rank": rank, "target_modules": modules} | ({"layers": layers} if layers else {})


def _shape(model: str) -> ModelShape | None:
    """Return a model's shape, None where it is not known here."""
    with suppress(AdapterTwinError):
        return model_shape(model)
    return None


def _lora_tensors(path: Path) -> tuple[dict[str, tuple[int, int]], int | None]:
    """Return the largest rank and the width of the input, by module, from a file's header.

    And the number of layers that have some, None where names tell none.
    """
    found: dict[str, tuple[int, int]] = {}
    layers: set[str] = set()
    for name, about in read_header(path).items():
        if ".lora_A" in name or ".lora_embedding_A" in name:
            module = name.partition(".lora_")[0].rpartition(".")[2]
            try:
                rank, width = map(int, about["shape"])
            except (ValueError, LookupError, TypeError, OverflowError):
                raise AdapterTwinError(f"{path}: no safetensors file; save it again") from None
            found[module] = max(found.get(module, (0, 0)), (rank, width))
            layers |= set(re.findall(r"\.layers\.(\d+)\.", name))
    require(bool(found), f"{path}: holds no LoRA weights; give a LoRA adapter")
    return found, len(layers) or None


def resolve(
    adapters: object, file: Path, model: str, named: Mapping[str, str], at: str = "adapters"
) -> object:
    """Return what a file says of its adapters, with what folders and tables tell of them.

    Parameters
    ----------
    adapters : object
        As in the file.
    file : pathlib.Path
        That names them.
    model : str
    named : mapping
        Paths by name, of a command's ``--lora-modules``.
    at : str
        Of the key, for messages.

    Raises
    ------
    AdapterTwinError
        A folder or table cannot be read, or tells something else than the file.
    """
    if isinstance(adapters, str) and adapters.endswith(".csv"):
        file = file.parent / adapters
        adapters = _table(file)
    if isinstance(adapters, dict) and (named or "folders" in adapters):
        return _of_folders(dict(adapters), file.parent, model, named, at)
    if not isinstance(adapters, list):
        return adapters
    if named and all(isinstance(one, dict) for one in adapters):
        told = [str(one.get("name")) for one in adapters]
        for name, one in zip(told, adapters, strict=True):
            choices = suggestion(name, named)
            require(name in named, f"{at}: {name!r} is not in --lora-modules{choices}")
            require("path" not in one, f"{at}: the --lora-modules tell path; leave it out")
        adapters = [{**one, "path": named[name]} for name, one in zip(told, adapters, strict=True)]
        idle = {name: path for name, path in named.items() if name not in told}
        adapters += [{"name": n, "path": p, "request_rate": 0} for n, p in idle.items()]
    return [
        _with_folder(one, file.parent, model, f"{at}[{i}]")
        if isinstance(one, dict) and isinstance(one.get("path"), str)
        else one
        for i, one in enumerate(adapters)
    ]


def _with_folder(told: dict[str, Any], base: Path, model: str, at: str) -> dict[str, Any]:
    """Return an adapter with what its folder tells; one that lies elsewhere must tell its rank."""
    folder = base / told["path"]
    if not (folder / PEFT_CONFIG).is_file():
        reason = f"{at}.path: {folder} holds no {PEFT_CONFIG}; correct it, or give name and rank"
        require("rank" in told and "name" in told, reason)
        return told
    found = read_adapter(folder, model)
    for key, value in found.items():
        given = told.get(key, value)
        same = sorted(given) == value if isinstance(given, list) else given == value
        require(same, f"{at}.{key}: got {given}, but {folder} has {value}; leave it out")
    return {"name": folder.name, **told, **found, "path": str(folder)}


def _of_folders(
    form: dict[str, Any], base: Path, model: str, named: Mapping[str, str], at: str
) -> list[dict[str, Any]]:
    """Return the adapters of some folders, with the rates of a short form if it has any."""
    folders = form.pop("folders", None)
    if named:
        require(folders is None, f"{at}.folders: the --lora-modules tell; leave it out")
        listed = [{"name": name, "path": path} for name, path in named.items()]
    elif isinstance(folders, str):
        inside = sorted((base / folders).glob(f"*/{PEFT_CONFIG}"))
        require(bool(inside), f"{at}.folders: no PEFT adapter in {base / folders}; correct it")
        listed = [{"path": str(path.parent.relative_to(base))} for path in inside]
    else:
        texts = isinstance(folders, list) and all(isinstance(one, str) for one in folders)
        require(texts, f"{at}.folders: expected a folder of adapters, or a list of them")
        listed = [{"path": one} for one in folders or ()]
    for key in ("count", "ranks"):
        require(key not in form, f"{at}.{key}: the folders tell; leave it out")
    found = [_with_folder(one, base, model, f"{at}[{i}]") for i, one in enumerate(listed)]
    if not form:
        return found
    if isinstance(form.get("traffic_split"), dict):
        by_name = {one["name"]: one for one in found}
        same = by_name.keys() == form["traffic_split"].keys()
        require(same, f"{at}.traffic_split: name each of {', '.join(by_name)}, and no other")
        found = [by_name[name] for name in form["traffic_split"]]
    else:
        form["count"] = len(found)
    rates = dealt({**form, "ranks": [one["rank"] for one in found]})
    return [{**one, "request_rate": a.request_rate} for one, a in zip(found, rates, strict=True)]


def _table(path: Path) -> list[dict[str, Any]]:
    """Read a table of adapters; an empty cell tells nothing."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype={"name": str, "path": str}, skipinitialspace=True)
    except (OSError, ValueError) as error:  # pandas' parse errors are ValueErrors
        raise AdapterTwinError(f"{path}: cannot be read ({one_line(error)}); give a .csv") from None
    rows = json.loads(frame.convert_dtypes().to_json(orient="records"))
    return [{key: value for key, value in row.items() if value is not None} for row in rows]
