"""Weights of PEFT's LoRA adapters: read module by module, and written as folders that vLLM loads.

PEFT scales a product by ``lora_alpha / r``, or by ``lora_alpha / sqrt(r)`` (rsLoRA), each of which
may differ by module (``rank_pattern``, ``alpha_pattern``); vLLM takes the first two for all of
them. What is written is the scaled product with ``lora_alpha = r`` and one rank: both scale by 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.shrink.low_rank import Factors
from adapter_twin.workload.adapter_folders import PEFT_CONFIG, WEIGHTS, peft_config
from adapter_twin.workload.models import same_model
from adapter_twin.workload.tensor_files import TensorFile, write_tensors

PREFIX = "base_model.model."
"""PEFT's names of tensors begin so."""


class PeftWeights:
    """A LoRA adapter's folder, of which no weights have been loaded yet.

    Attributes
    ----------
    folder : pathlib.Path
    name : str
        That of the folder.
    config : dict
        Its ``adapter_config.json``.
    shapes : dict of str to (int, int, int)
        Outputs, rank and inputs by module.

    Raises
    ------
    AdapterTwinError
        It is no plain LoRA adapter of linear layers, its weights are damaged, or their ranks are
        not those of its configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.config = peft_config(folder)
        path = folder / WEIGHTS
        require(path.is_file(), f"{path}: no such file; save the adapter as safetensors")
        self._file = TensorFile(path)
        found: dict[str, dict[str, str]] = {}
        for tensor in self._file.places:
            module, _, side = tensor.removesuffix(".weight").rpartition(".lora_")
            plain = tensor.endswith(".weight") and side in ("A", "B")
            require(plain, f"{path}: {tensor} is no LoRA of a linear layer; leave the adapter out")
            found.setdefault(module, {})[side] = tensor
        require(bool(found), f"{path}: holds no LoRA weights; leave the adapter out")
        self._names: dict[str, tuple[str, str]] = {}
        self._scalings: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}
        for module, sides in found.items():
            require(len(sides) == 2, f"{path}: {module} has A or B alone; save it again")
            self._names[module] = sides["B"], sides["A"]
            self.shapes[module] = self._shape(module)
            self._scalings[module] = self._scaling(module)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(rank for _, rank, _ in self.shapes.values())

    @property
    def dtypes(self) -> dict[str, tuple[str, str]]:
        """Element types of B and A by module."""
        places = self._file.places
        return {
            module: (places[b].dtype, places[a].dtype) for module, (b, a) in self._names.items()
        }

    def factors(self, module: str) -> Factors:
        """Return scaled B and A of a module; raises `AdapterTwinError` if they are not finite."""
        left, right = map(self._file.read, self._names[module])
        return Factors(self._scalings[module] * left, right)

    def _shape(self, module: str) -> tuple[int, int, int]:
        b, a = (self._file.places[name].shape for name in self._names[module])
        where = f"{self.folder / WEIGHTS}: {module}"
        flat = len(a) == len(b) == 2 and min(*a, *b) > 0
        require(flat, f"{where} is no linear layer, A {a} and B {b}; leave the adapter out")
        rank = self._told("rank_pattern", module, self.config["r"])
        told = f"A {a} and B {b} have not the rank {rank} of {PEFT_CONFIG}"
        require(a[0] == b[1] == rank, f"{where}: {told}; save it again")
        return b[0], rank, a[1]

    def _scaling(self, module: str) -> float:
        alpha, rank = self._told("alpha_pattern", module, self._alpha()), self.shapes[module][1]
        number = type(alpha) in (int, float) and math.isfinite(alpha)
        require(number, f"{self.folder / PEFT_CONFIG}: lora_alpha {alpha!r} is no number; correct")
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _alpha(self) -> Any:
        """Return ``lora_alpha``; 8 is PEFT's own."""
        return self.config.get("lora_alpha", 8)

    def _told(self, key: str, module: str, otherwise: Any) -> Any:
        """Return what a pattern of the configuration says of a module: its first that fits."""
        patterns = self.config.get(key) or {}
        require(isinstance(patterns, dict), f"{self.folder / PEFT_CONFIG}: {key} is no mapping")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module.removeprefix(PREFIX)):
                    return value
            except re.error:
                raise AdapterTwinError(
                    f"{self.folder / PEFT_CONFIG}: {key} has no pattern {pattern!r}; correct it"
                ) from None
        return otherwise


def find_adapters(folders: list[Path]) -> list[PeftWeights]:
    """Open PEFT adapters: each folder is one, or holds some.

    Raises
    ------
    AdapterTwinError
        There is none, two have one name, or they are not of one base model.
    """
    found: list[PeftWeights] = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"*/{PEFT_CONFIG}"))
        itself = [folder] if (folder / PEFT_CONFIG).is_file() else inside
        require(bool(itself), f"{folder}: holds no PEFT adapter; name a folder that does")
        found += map(PeftWeights, itself)
    by_name = {one.name: one for one in found}
    for one in found:
        other = by_name[one.name]
        require(one is other, f"{one.folder}: {other.folder} has the same name; rename one")
    _require_one_base(found)
    return found


def _require_one_base(adapters: list[PeftWeights]) -> None:
    first = adapters[0]
    base = first.config.get("base_model_name_or_path")
    widths: dict[str, tuple[int, int]] = {}
    for one in adapters:
        other = one.config.get("base_model_name_or_path")
        same = None in (base, other) or same_model(str(base), str(other))
        require(same, f"{one.folder}: an adapter of {other}, not of {base}; leave it out")
        for module, (outputs, _, inputs) in one.shapes.items():
            known = widths.setdefault(module, (outputs, inputs))
            told = f"{module} is {outputs} x {inputs}, that of others {known[0]} x {known[1]}"
            require(known == (outputs, inputs), f"{one.folder}: {told}; leave it out")


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    rank: int,
    modules: Iterable[tuple[str, Factors, tuple[str, str]]],
) -> None:
    """Write a PEFT adapter of one rank into an empty folder.

    Parameters
    ----------
    folder : pathlib.Path
    config : mapping
        Of the adapter that it is made of; what tells rank and scaling is replaced.
    rank : int
    modules : iterable of tuple
        Module, the factors of its delta, and the element types of B and A.
    """
    tensors = (
        (f"{module}.lora_{side}.weight", dtype, values)
        for module, factors, dtypes in modules
        for side, dtype, values in zip("BA", dtypes, factors, strict=True)
    )
    write_tensors(folder / WEIGHTS, tensors)
    scaling = {"r": rank, "lora_alpha": rank, "use_rslora": False}
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    text = json.dumps({**config, **scaling, **patterns}, indent=2) + "\n"
    (folder / PEFT_CONFIG).write_text(text, encoding="utf-8")
