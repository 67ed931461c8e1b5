"""Adapter slots: the tensors that vLLM reserves for them, and what they take of a GPU's memory.

vLLM reserves every slot at ``max_lora_rank`` for every adapted layer; what PyTorch's caching
allocator takes for them is larger, because it hands out memory in segments: 2 MiB ones for tensors
up to 1 MiB, 20 MiB ones up to 10 MiB, and multiples of 2 MiB above
(``c10/cuda/CUDACachingAllocator``).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.engine_versions import EngineVersion
from adapter_twin.workload.models import ModelShape
from adapter_twin.workload.strict import suggestion

GIB = 2**30
MIB = 2**20

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer that adapters may change; vLLM has the first three, and gate and up, in
one, ``qkv_proj`` and ``gate_up_proj``, which get slots together."""
PACKED = {"qkv_proj": LINEAR[:3], "o_proj": LINEAR[3:4], "gate_up_proj": LINEAR[4:6]}
PACKED["down_proj"] = LINEAR[6:]
_VOCABULARY = ("embed_tokens", "lm_head")


class Slots(NamedTuple):
    """The flags of an `EngineConfig` that decide what its slots take."""

    max_loras: int
    max_lora_rank: int
    tensor_parallel_size: int
    fully_sharded_loras: bool
    lora_target_modules: tuple[str, ...] | None


_slot_flags = attrgetter(*Slots._fields)


def adapted_modules(
    engine: EngineConfig | Slots, shape: ModelShape, version: EngineVersion
) -> list[str]:
    """Return the modules that an engine has slots for, as vLLM packs them.

    Raises
    ------
    AdapterTwinError
        A target module is unknown, or experts are to be adapted.
    """
    vocabulary = _VOCABULARY if shape.architecture in version.vocabulary_slots else ()
    targets = engine.lora_target_modules
    known = [*LINEAR, *(name for name in PACKED if name not in LINEAR), *vocabulary]
    for target in set(targets or ()).difference(known):
        choices = suggestion(target, known)
        raise AdapterTwinError(f"engine.lora_target_modules: {target!r} is no module{choices}")
    modules = [
        *(packed for packed, parts in PACKED.items() if _chosen(targets, packed, *parts)),
        *(name for name in vocabulary if _chosen(targets, name)),
    ]
    experts = [name for name in modules if name in ("gate_up_proj", "down_proj")]
    require(
        not (shape.experts and experts),
        f"engine.lora_target_modules: slots of experts are not known here; of "
        f"{shape.architecture} give some of q_proj, k_proj, v_proj, o_proj",
    )
    return modules


def _chosen(targets: Sequence[str] | None, *names: str) -> bool:
    return targets is None or any(name in targets for name in names)


def layer_widths(
    engine: EngineConfig | Slots, shape: ModelShape, modules: Sequence[str]
) -> list[int]:
    """Return the weights per rank of the tensors that adapt one layer, on each GPU.

    The GPUs share the outputs of what makes queries, keys, values, gate and up, and the inputs of
    the others; the sides in between are whole on all, unless LoRAs are fully sharded.
    """
    gpus = engine.tensor_parallel_size
    whole = shape.hidden // (gpus if engine.fully_sharded_loras else 1)
    q, i = shape.heads * shape.head_size // gpus, shape.intermediate // gpus
    kv = max(shape.kv_heads // gpus, 1) * shape.head_size
    widths = {
        "qkv_proj": [whole, q + 2 * kv] if shape.fused else [whole, whole, whole, q, kv, kv],
        "o_proj": [q, whole],
        "gate_up_proj": [whole, 2 * i] if shape.fused else [whole, whole, i, i],
        "down_proj": [i, whole],
    }
    return [width for module in modules for width in widths.get(module, ())]


def adapter_shares(
    engine: EngineConfig, shape: ModelShape, version: EngineVersion, adapter: Adapter
) -> tuple[float, float]:
    """Return what a copy and a read of an adapter take, relative to one of all modules and layers.

    A copy takes time by its number of tensors, of the modules that have slots; a read by weights.

    Parameters
    ----------
    engine : EngineConfig
    shape : ModelShape
    version : EngineVersion
    adapter : Adapter

    Returns
    -------
    tensors, weights : float

    Raises
    ------
    AdapterTwinError
        One of its target modules is unknown, or it has more layers than the model.
    """
    layers = adapter.layers or shape.layers
    told = f"{layers} are more than the {shape.layers} of the model; correct it"
    require(layers <= shape.layers, f"{adapter.name}.layers: {told}")
    own = adapter.target_modules or LINEAR
    for module in set(own).difference(LINEAR):
        choices = suggestion(module, LINEAR)
        raise AdapterTwinError(f"{adapter.name}.target_modules: no module {module!r}{choices}")
    slots = adapted_modules(engine, shape, version)
    copied = [name for packed in slots for name in PACKED.get(packed, ()) if name in own]
    h, q, kv, i = shape.hidden, shape.heads * shape.head_size, shape.kv_width, shape.intermediate
    widths = dict(zip(LINEAR, (h + q, h + kv, h + kv, q + h, h + i, h + i, i + h), strict=True))
    weights = sum(widths[module] for module in own) / sum(widths.values())
    part = layers / shape.layers
    return part * len(copied) / len(LINEAR), part * weights


def slot_tensors(
    engine: EngineConfig | Slots, shape: ModelShape, version: EngineVersion
) -> list[int]:
    """Return the bytes of all slots' tensors on each GPU, in the order of their allocation."""
    modules = adapted_modules(engine, shape, version)
    rank, h, extra = engine.max_lora_rank, shape.hidden, version.extra_vocabulary
    tensors = [rank * width for width in layer_widths(engine, shape, modules) * shape.layers]
    if "embed_tokens" in modules:
        # the model's own embedding has room for the new rows of all slots as well
        tensors += [rank * shape.vocabulary, rank * h, extra * h, extra * h]
    if "lm_head" in modules:
        tensors += [rank * h, rank * shape.vocabulary, extra * h]
    return [engine.max_loras * shape.value_bytes * tensor for tensor in tensors if tensor]


def layer_slots_bytes(engine: EngineConfig, shape: ModelShape) -> int:
    """Return the bytes of all slots for the layers alone, without vocabulary and allocator."""
    widths = layer_widths(engine, shape, tuple(PACKED))
    per_slot = engine.max_lora_rank * sum(widths) * shape.layers * shape.value_bytes
    return engine.max_loras * per_slot


def slots_gib(engine: EngineConfig, shape: ModelShape, version: EngineVersion) -> float:
    """Return the memory in GiB that PyTorch's allocator takes for all slots on each GPU.

    Parameters
    ----------
    engine : EngineConfig
    shape : ModelShape
    version : EngineVersion
    """
    return _slots_gib(Slots(*_slot_flags(engine)), shape, version)


@lru_cache(maxsize=1 << 14)
def _slots_gib(slots: Slots, shape: ModelShape, version: EngineVersion) -> float:
    """Return `slots_gib`: engines that differ in other flags share a result."""
    free: list[int] = []  # rests of segments, smallest first
    reserved = small = 0
    for size in slot_tensors(slots, shape, version):
        size = math.ceil(size / 512) * 512
        if size <= MIB:
            small += size
            continue
        fit = bisect.bisect_left(free, size)
        if fit < len(free):
            block = free.pop(fit)
        else:
            block = 20 * MIB if size < 10 * MIB else math.ceil(size / (2 * MIB)) * 2 * MIB
            reserved += block
        if block - size > MIB:
            bisect.insort(free, block - size)
    return (reserved + math.ceil(small / (2 * MIB)) * 2 * MIB) / GIB
