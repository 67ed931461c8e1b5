"""GPU memory: what the adapter slots take, what is left for the KV cache, and whether vLLM starts.

vLLM reserves every slot at ``max_lora_rank`` for every adapted layer before it measures what is
left for the KV cache. The slots' size follows from the model's shape; what PyTorch's caching
allocator takes for them is larger, because it hands out memory in segments: 2 MiB ones for tensors
up to 1 MiB, 20 MiB ones up to 10 MiB, and multiples of 2 MiB above
(``c10/cuda/CUDACachingAllocator``). Counting segments leaves one number to fit: the memory that
slots and KV cache share. On a CPU the user says how much the KV cache takes, and slots leave it be;
or a campaign gives it what the slots leave of a memory they share, as on a GPU but to the byte.
"""

from __future__ import annotations

import bisect
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws.estimator import Estimator
from adapter_twin.workload.models import BYTES_PER_WEIGHT, ModelShape, model_shape
from adapter_twin.workload.scenario import EngineConfig

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
MIB = 2**20
EXTRA_VOCABULARY = 256
"""Each slot may bring this many rows of new tokens (vLLM's ``lora_extra_vocab_size``)."""


def _slot_tensors(shape: ModelShape, max_loras: int, max_lora_rank: int) -> list[int]:
    """Return the sizes in bytes of the slot tensors in the order in which vLLM allocates them."""
    h, v, extra = shape.hidden, shape.vocabulary, EXTRA_VOCABULARY * shape.hidden
    widths = [max_lora_rank * width for width in _layer_widths(shape) * shape.layers]
    if shape.adapts_vocabulary:
        # embedding and output layer: A, B, and rows for the extra tokens
        widths += [max_lora_rank * v, max_lora_rank * h, extra, extra]
        widths += [max_lora_rank * h, max_lora_rank * v, extra]
    return [max_loras * width * BYTES_PER_WEIGHT for width in widths]


def _layer_widths(shape: ModelShape) -> list[int]:
    """Return the weights per rank of the tensors that adapt one layer."""
    h, kv, i = shape.hidden, shape.kv_width, shape.intermediate
    qkv, out, gate_up, down = [h, h, h, h, kv, kv], [h, h], [h, h, i, i], [i, h]
    return qkv + out + gate_up + down


def slots_bytes(shape: ModelShape, max_loras: int, max_lora_rank: int) -> int:
    """Return the memory in bytes that the adapter slots take, without what an allocator adds.

    Parameters
    ----------
    shape : ModelShape
    max_loras, max_lora_rank : int
        As on `EngineConfig`.
    """
    return sum(_slot_tensors(shape, max_loras, max_lora_rank))


@lru_cache(maxsize=1024)
def slots_gib(model: str, max_loras: int, max_lora_rank: int) -> float:
    """Return the GPU memory in GiB that PyTorch's allocator takes for the adapter slots.

    Parameters
    ----------
    model : str
    max_loras, max_lora_rank : int
        As on `EngineConfig`.
    """
    free: list[int] = []  # rests of segments, smallest first
    reserved = small = 0
    for size in _slot_tensors(model_shape(model), max_loras, max_lora_rank):
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


SlotsTake = Literal["segments", "bytes", "apart"]


def _slots_take(kv_gib: NDArray[np.float64], asked_gib: pd.Series[float] | None) -> SlotsTake:
    """Tell from engine starts how slots take memory: a CPU's KV cache is as large as asked for."""
    if asked_gib is None or not np.allclose(kv_gib, asked_gib, rtol=0.01):
        return "segments"
    # where the same was asked for whatever the slots, they are apart; else they were counted
    return "apart" if asked_gib.nunique() == 1 else "bytes"


class MemoryLaw(Estimator):
    """KV-cache size, feasible starts and start-up time of one model on one GPU.

    ``kv_cache_tokens = (available_gib - slots_gib) / KV bytes per token``, in whole blocks; vLLM
    starts when one request of ``max_model_len`` fits.

    Attributes
    ----------
    available_gib_ : float
        Memory that slots and KV cache share: the GPU's share less weights and activations.
    available_gib_interval_ : tuple of float
        95 % interval of the mean.
    slots_ : str
        How slots take memory from the KV cache: in ``segments`` of a GPU's allocator, by their
        ``bytes`` on a CPU where both share a memory, or ``apart`` from it.
    max_model_len_ : int
        Longest request in tokens; one must fit.
    kept_tokens_ : int
        Of the block that current engines keep to themselves and leave out of that check; 0 where
        the starts do not tell the size of blocks (vLLM 0.8.5 leaves out none).
    capture_s_, capture_s_per_slot_ : float
        CUDA-graph capture at start-up.
    max_relative_error_ : float
        Of the KV tokens, over the starts fitted.
    """

    model: str
    max_model_len_: int
    kept_tokens_: int
    slots_: SlotsTake
    available_gib_: float
    available_gib_interval_: tuple[float, float]
    capture_s_: float
    capture_s_per_slot_: float
    max_relative_error_: float

    def __init__(self, model: str) -> None:
        self.model = model

    def fit(self, starts: pd.DataFrame) -> MemoryLaw:
        """Fit to measured server starts (table ``memory``: one row per start)."""
        starts = starts[starts.model == self.model]
        shape = model_shape(self.model)
        told = "max_model_len" in starts
        self.max_model_len_ = int(starts.max_model_len.max()) if told else shape.max_model_len
        self.kept_tokens_ = int(starts.block_size.max()) if "block_size" in starts else 0
        started = starts.dropna(subset=["kv_cache_tokens"])
        kv_gib = started.kv_cache_tokens.to_numpy(float) * shape.kv_bytes_per_token / GIB
        self.slots_ = _slots_take(kv_gib, started.get("cpu_kv_cache_gib"))
        available_gib = kv_gib + self._slots_gib(started.adapter_slots, started.max_lora_rank)
        # Relative errors in KV tokens count: weight by the tokens left.
        weight = kv_gib**-2
        self.available_gib_ = float(np.average(available_gib, weights=weight))
        half = 1.96 * available_gib.std(ddof=1) / np.sqrt(len(available_gib))
        self.available_gib_interval_ = (self.available_gib_ - half, self.available_gib_ + half)
        captured = starts.dropna(subset=["graph_capture_s"])
        self.capture_s_ = self.capture_s_per_slot_ = 0.0  # a CPU captures no graphs
        if len(captured):
            slope, intercept = np.polyfit(captured.adapter_slots, captured.graph_capture_s, 1)
            self.capture_s_, self.capture_s_per_slot_ = float(intercept), float(slope)
        predicted = self.kv_cache_tokens(started.adapter_slots, started.max_lora_rank)
        error = np.abs(predicted / started.kv_cache_tokens.to_numpy() - 1)
        self.max_relative_error_ = float(error.max())
        return self

    def _slots_gib(self, max_loras: ArrayLike, max_lora_rank: ArrayLike) -> NDArray[np.float64]:
        pair = np.asarray(max_loras, int), np.asarray(max_lora_rank, int)

        def taken_gib(max_loras: int, max_lora_rank: int) -> float:
            if self.slots_ == "apart":
                return 0.0
            if self.slots_ == "bytes":
                return slots_bytes(model_shape(self.model), max_loras, max_lora_rank) / GIB
            return slots_gib(self.model, max_loras, max_lora_rank)

        return np.asarray(np.vectorize(taken_gib, otypes=[float])(*pair))

    def kv_cache_tokens(
        self, max_loras: ArrayLike, max_lora_rank: ArrayLike
    ) -> NDArray[np.float64]:
        """Return the KV-cache size in tokens; below zero when the slots alone do not fit."""
        left_gib = self.available_gib_ - self._slots_gib(max_loras, max_lora_rank)
        block_bytes = 16 * model_shape(self.model).kv_bytes_per_token
        return np.asarray(16 * np.floor(left_gib * GIB / block_bytes))

    def kv_gib(self, tokens: float) -> float:
        """Return the memory in GiB that n KV-cache tokens take."""
        return tokens * model_shape(self.model).kv_bytes_per_token / GIB

    @property
    def least_kv_cache_tokens(self) -> int:
        """KV-cache size in tokens below which vLLM does not start."""
        return self.max_model_len_ + self.kept_tokens_

    def starts(self, max_loras: ArrayLike, max_lora_rank: ArrayLike) -> NDArray[np.bool_]:
        """Return whether vLLM starts: one request of the longest length must fit."""
        tokens = self.kv_cache_tokens(max_loras, max_lora_rank)
        return np.asarray(tokens >= self.least_kv_cache_tokens)

    def startup_s(self, max_loras: ArrayLike) -> NDArray[np.float64]:
        """Return the CUDA-graph capture time in seconds."""
        return np.asarray(self.capture_s_ + self.capture_s_per_slot_ * np.asarray(max_loras, float))

    def adapter_blocks(self, ranks: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
        """Return the KV blocks that adapters fill at their own ranks, one number per rank given.

        Of the adapted layers only: slots also hold vocabulary that an adapter may bring.
        """
        shape = model_shape(self.model)
        bytes_per_rank = BYTES_PER_WEIGHT * sum(_layer_widths(shape)) * shape.layers
        block_bytes = block_size * shape.kv_bytes_per_token
        return -(-np.asarray(ranks, np.int64) * bytes_per_rank // block_bytes)

    def require_start(self, engine: EngineConfig, *, slots: bool = True) -> int:
        """Return the KV-cache size in tokens, without `slots` where none are reserved.

        Raises
        ------
        AdapterTwinError
            vLLM would refuse to start.
        """
        reserved = engine.max_loras if slots else 0
        tokens = int(self.kv_cache_tokens(reserved, engine.max_lora_rank))
        if tokens < self.least_kv_cache_tokens:
            raise AdapterTwinError(
                f"max_loras: {reserved} slots of rank {engine.max_lora_rank} leave "
                f"{max(tokens, 0)} KV-cache tokens and {self.model} needs "
                f"{self.least_kv_cache_tokens} to start; lower max_loras or max_lora_rank"
            )
        return tokens
