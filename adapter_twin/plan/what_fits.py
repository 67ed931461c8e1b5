"""What fits into a GPU's memory: slots, KV cache, adapters, requests; no calibration is needed."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.memory import MemoryLaw, activations_gib
from adapter_twin.laws.slots import GIB, MIB, slot_tensors, slots_gib
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.engine_versions import engine_version
from adapter_twin.workload.gpus import gpu_memory_gib, gpu_name
from adapter_twin.workload.models import model_shape

MOST_SLOTS = 4096
"""More slots are not tried."""

RANKS = (8, 16, 32, 64, 128)
"""The most slots that start are told for these ranks."""

LENGTHS_TOKENS = (512, 2048, 8192, 32768)
"""The requests that fit at once are told for these lengths."""


def what_fits(
    model: str, gpu: str, flags: dict[str, Any] | None = None, *, version: str | None = None
) -> dict[str, Any]:
    """Tell what an engine's memory goes to, and whether it starts.

    Parameters
    ----------
    model : str
        A shipped name, a Hugging Face name of it, or a folder with a ``config.json``.
    gpu : str
        A name of ``data/gpus``, or GiB of memory; of each GPU where several share the model.
    flags : dict, optional
        Fields of `adapter_twin.workload.engine_config.EngineConfig`; those left out are vLLM's own
        defaults on this GPU, one slot of rank 16 among them.
    version : str, optional
        Of vLLM; left out, the newest that is known.

    Returns
    -------
    dict
        All of each GPU: ``slot_mib``, to the byte; ``slots_gib``, as large as the allocator makes
        them, ``weights_gib``, ``activations_gib``, ``reserve_gib`` and ``kv_cache_gib``, which add
        up to the share of ``memory_gib``;
        ``kv_cache_tokens``, ``max_model_len``; ``starts``, and if not, ``reason`` with what helps;
        ``estimates_graphs``: this version takes an estimate of its CUDA graphs off the KV cache,
        unless it is given these ``kv_cache_memory_bytes``;
        ``largest_max_loras`` that starts at this rank, and ``largest_max_loras_by_rank``;
        ``requests_at_once_by_tokens``: how many requests of some lengths, the last of them
        ``max_model_len``, the KV cache holds whole.

    Raises
    ------
    AdapterTwinError
        The model, the GPU or a flag is not known.

    Examples
    --------
    >>> found = what_fits("llama-3.1-8b", "l40s", {"max_loras": 32, "max_model_len": 8192})
    >>> found["starts"], found["largest_max_loras"] > 100
    (True, True)
    """
    shape, about = model_shape(model), engine_version(version)
    memory_gib = gpu_memory_gib(gpu)
    left_out = {"max_loras": 1, **about.flags_left_out(gpu_name(gpu), memory_gib)}
    engine = EngineConfig(**{"model": model, **left_out, **(flags or {})})
    about.require_known(engine)
    _require_divisible(engine, shape.heads, shape.kv_heads)
    law = MemoryLaw(shape, about.version, memory_gib)
    tokens = max(law.kv_cache_tokens(engine), 0)
    try:
        law.require_start(engine)
        reason = None
    except AdapterTwinError as error:
        reason = str(error)
    longest, blocks = law.max_model_len(engine), tokens // engine.block_size
    one = replace(engine, max_loras=1, max_cpu_loras=1)
    ranks = sorted({*RANKS, engine.max_lora_rank})
    most = {str(rank): _most_slots(law, replace(engine, max_lora_rank=rank)) for rank in ranks}
    return {
        "model": model,
        "gpu": gpu,
        "memory_gib": memory_gib,
        "engine_version": about.version,
        "max_loras": engine.max_loras,
        "max_lora_rank": engine.max_lora_rank,
        "slot_mib": sum(slot_tensors(one, shape, about)) / MIB,
        "slots_gib": slots_gib(engine, shape, about) if engine.max_loras else 0.0,
        "weights_gib": shape.weights_bytes / GIB / engine.tensor_parallel_size,
        "activations_gib": activations_gib(engine, shape, about),
        "reserve_gib": law.kept_gib(engine),
        "kv_cache_gib": law.kv_cache_gib(engine),
        "kv_cache_tokens": tokens,
        "max_model_len": longest,
        "starts": reason is None,
        "reason": reason,
        "kv_cache_memory_bytes": max(int(law.kv_cache_gib(engine) * GIB), 0),
        "estimates_graphs": about.estimates_graphs and engine.kv_cache_memory_bytes is None,
        "largest_max_loras": most[str(engine.max_lora_rank)],
        "largest_max_loras_by_rank": most,
        "requests_at_once_by_tokens": {
            str(length): blocks // -(-length // engine.block_size)
            for length in (*(length for length in LENGTHS_TOKENS if length < longest), longest)
        },
        "flags": {name: getattr(engine, name) for name in (*left_out, *(flags or {}))},
        "version": __version__,
    }


def _require_divisible(engine: EngineConfig, heads: int, kv_heads: int) -> None:
    gpus = engine.tensor_parallel_size
    fits = heads % gpus == 0 and (kv_heads % gpus == 0 or gpus % kv_heads == 0)
    require(
        fits,
        f"engine.tensor_parallel_size: {heads} heads, {kv_heads} of keys and values, cannot be "
        f"shared among {gpus} GPUs; give a power of two",
    )


def _most_slots(law: MemoryLaw, engine: EngineConfig) -> int:
    """Return the most slots with which vLLM starts; 0 where it does with none."""
    return bisect_left(
        range(1, MOST_SLOTS + 1),
        True,
        key=lambda slots: not law.starts(replace(engine, max_loras=slots, max_cpu_loras=slots)),
    )
