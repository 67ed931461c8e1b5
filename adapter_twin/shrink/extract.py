"""An adapter out of a full fine-tuned checkpoint and its base (PHLoRA, arXiv 2509.10971).

Each linear layer's change, ``delta = fine-tuned - base``, is dense: its singular values are roots
of the eigenvalues of ``delta delta^T``, on the smaller side. One module is in memory at a time.
What else a fine-tuning has changed (norms, embeddings) no adapter holds: its share is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.laws.slots import LINEAR
from adapter_twin.shrink import low_rank
from adapter_twin.shrink.low_rank import Factors, Matrix
from adapter_twin.shrink.peft_weights import PREFIX, write_adapter
from adapter_twin.shrink.shrink import ENERGY, PROXY, require_options, writing
from adapter_twin.workload.engine_config import LORA_RANKS
from adapter_twin.workload.models import read_object
from adapter_twin.workload.tensor_files import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The safetensors files of a model's folder; tensors are read one at a time.

    Attributes
    ----------
    folder : pathlib.Path
    shapes : dict of str to tuple of int
        By tensor.

    Raises
    ------
    AdapterTwinError
        The folder holds none, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, index = folder, folder / INDEX
        names: list[Any] = [SINGLE]
        if index.is_file():
            told = read_object(index, "a checkpoint in safetensors").get("weight_map")
            require(isinstance(told, dict) and bool(told), f"{index}: has no weight_map; fetch it")
            names = sorted({str(name) for name in dict(told or {}).values()})
        for name in names:
            there = Path(name).name == name and (folder / name).is_file()
            require(there, f"{folder / name}: no such file; give a checkpoint in safetensors")
        self._files = {
            tensor: file
            for file in (TensorFile(folder / name) for name in names)
            for tensor in file.places
        }
        self.shapes = {name: file.places[name].shape for name, file in self._files.items()}

    def read(self, name: str) -> Matrix:
        """Return a tensor; raises `AdapterTwinError` if it is not of finite floats."""
        return self._files[name].read(name)

    def dtype(self, name: str) -> str:
        """Return the element type of a tensor."""
        return self._files[name].places[name].dtype


def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    energy: float = ENERGY,
    rank: int | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Tell what an adapter keeps of a full fine-tuning, and write it.

    Parameters
    ----------
    tuned, base : path
        Folders of the fine-tuned model and of the one that it was made of, in safetensors.
    energy : float
        Share of the energy of each module's change that the chosen rank keeps.
    rank : int, optional
        In place of the one that keeps `energy`.
    out : path, optional
        Folder, not there yet, for the PEFT adapter.

    Returns
    -------
    dict
        ``rank``; ``modules``: name, the ``needed_rank`` of each that has changed, and the
        ``kept_share`` of its energy; ``kept_share`` of all of them; ``left_out``: other tensors
        that have changed, and ``left_out_share``, theirs of the energy of all that has changed.

    Raises
    ------
    AdapterTwinError
        The two are not of one model, nothing has changed, or no rank that vLLM takes suffices.
    """
    require_options(energy, rank, out)
    ours, theirs = Checkpoint(Path(tuned)), Checkpoint(Path(base))
    for name in ours.shapes.keys() | theirs.shapes.keys():
        same = ours.shapes.get(name) == theirs.shapes.get(name)
        require(same, f"{ours.folder}: {name} is not as in {theirs.folder}; give its own base")
    rows: list[dict[str, Any]] = []
    parts: dict[str, Factors] = {}
    left_out: list[str] = []
    changed = kept = beside = 0.0
    for name, delta in _changes(ours, theirs):
        own = float(np.vdot(delta, delta))
        if not _is_linear(name, delta):
            left_out.append(name)
            beside += own
            continue
        values, largest = low_rank.decompose_dense(delta, rank or max(LORA_RANKS))
        needed = low_rank.needed_rank(values, energy)
        took = rank or needed
        require(
            took <= max(LORA_RANKS),
            f"energy: {name} needs rank {took} for it, and vLLM takes {max(LORA_RANKS)} at most; "
            "give less, or a rank",
        )
        share = low_rank.energy(values[:took]) / low_rank.energy(values)
        rows.append({"name": name, "needed_rank": needed, "kept_share": share})
        parts[name] = Factors(*(one.astype(np.float32) for one in largest.factors(took)))
        changed, kept = changed + own, kept + share * own
    require(bool(parts), f"{ours.folder}: no linear layer differs from the base; give another")
    took = rank or max(row["needed_rank"] for row in rows)
    if out is not None:
        with writing(Path(out)) as temporary:
            filled = ((name, one.filled(took), ours.dtype(name)) for name, one in parts.items())
            modules = (
                (PREFIX + name.removesuffix(".weight"), one, (d, d)) for name, one, d in filled
            )
            write_adapter(temporary, _config(theirs, parts), took, modules)
    return {
        "rank": took,
        "kept_share": kept / changed,
        "modules": rows,
        "left_out": left_out,
        "left_out_share": beside / (changed + beside),
        "out": None if out is None else str(out),
        "proxy": PROXY,
        "version": __version__,
    }


def _changes(tuned: Checkpoint, base: Checkpoint) -> Iterator[tuple[str, Matrix]]:
    for name in sorted(tuned.shapes):
        delta = tuned.read(name)
        delta -= base.read(name)
        if delta.any():
            yield name, delta


def _is_linear(name: str, delta: Matrix) -> bool:
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in LINEAR and delta.ndim == 2


def _config(base: Checkpoint, names: Iterable[str]) -> dict[str, Any]:
    targets = {name.removesuffix(".weight").rpartition(".")[2] for name in names}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.folder),
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(targets),
    }
