"""GPU memory: what weights and slots take, what is left for the KV cache, and whether it starts.

``KV cache = share x memory - weights - activations - reserve - slots``. Weights follow from the
model's shape. Activations are the larger of two: what the sampler holds of a full batch's logits,
and what a forward pass holds of ``max_num_batched_tokens``. vLLM reserves every slot at
``max_lora_rank`` for every adapted layer; what PyTorch's caching allocator takes for them is
larger, because it hands out memory in segments: 2 MiB ones for tensors up to 1 MiB, 20 MiB ones up
to 10 MiB, and multiples of 2 MiB above (``c10/cuda/CUDACachingAllocator``). That leaves one number
to fit, the reserve, or to take from the engine's version (`adapter_twin.workload.engine_versions`).
On a CPU the user says how much the KV cache takes, and slots leave it be; or a campaign gives it
what the slots leave of a memory they share, as on a GPU but to the byte.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.estimator import Estimator, Fitted, NotBelow0
from adapter_twin.workload.engine_versions import EngineVersion, engine_version
from adapter_twin.workload.files import records, run_to_engine
from adapter_twin.workload.models import ModelShape
from adapter_twin.workload.scenario import Adapter, EngineConfig, ServeFlags
from adapter_twin.workload.strict import Count, Size, suggestion

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
MIB = 2**20

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer that adapters may change; vLLM has the first three, and gate and up, in
one, ``qkv_proj`` and ``gate_up_proj``, which get slots together."""
_PACKED = {"qkv_proj": LINEAR[:3], "o_proj": LINEAR[3:4], "gate_up_proj": LINEAR[4:6]}
_PACKED["down_proj"] = LINEAR[6:]
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
    known = [*LINEAR, *(name for name in _PACKED if name not in LINEAR), *vocabulary]
    for target in set(targets or ()).difference(known):
        choices = suggestion(target, known)
        raise AdapterTwinError(f"engine.lora_target_modules: {target!r} is no module{choices}")
    modules = [
        *(packed for packed, parts in _PACKED.items() if _chosen(targets, packed, *parts)),
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


def _layer_widths(
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
    """Return what a copy and a read of an adapter take, relative to one of all modules of a layer.

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
        One of its target modules is unknown.
    """
    own = adapter.target_modules or LINEAR
    for module in set(own).difference(LINEAR):
        choices = suggestion(module, LINEAR)
        raise AdapterTwinError(f"{adapter.name}.target_modules: no module {module!r}{choices}")
    slots = adapted_modules(engine, shape, version)
    copied = [name for packed in slots for name in _PACKED.get(packed, ()) if name in own]
    h, q, kv, i = shape.hidden, shape.heads * shape.head_size, shape.kv_width, shape.intermediate
    widths = dict(zip(LINEAR, (h + q, h + kv, h + kv, q + h, h + i, h + i, i + h), strict=True))
    weights = sum(widths[module] for module in own) / sum(widths.values())
    return len(copied) / len(LINEAR), weights


def slot_tensors(
    engine: EngineConfig | Slots, shape: ModelShape, version: EngineVersion
) -> list[int]:
    """Return the bytes of all slots' tensors on each GPU, in the order of their allocation."""
    modules = adapted_modules(engine, shape, version)
    rank, h, extra = engine.max_lora_rank, shape.hidden, version.extra_vocabulary
    tensors = [rank * width for width in _layer_widths(engine, shape, modules) * shape.layers]
    if "embed_tokens" in modules:
        # the model's own embedding has room for the new rows of all slots as well
        tensors += [rank * shape.vocabulary, rank * h, extra * h, extra * h]
    if "lm_head" in modules:
        tensors += [rank * h, rank * shape.vocabulary, extra * h]
    return [engine.max_loras * shape.value_bytes * tensor for tensor in tensors if tensor]


def layer_slots_bytes(engine: EngineConfig, shape: ModelShape) -> int:
    """Return the bytes of all slots for the layers alone, without vocabulary and allocator."""
    widths = _layer_widths(engine, shape, tuple(_PACKED))
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


def activations_gib(engine: EngineConfig, shape: ModelShape, version: EngineVersion) -> float:
    """Return what the engine's dry run holds on each GPU at its peak, in GiB.

    Parameters
    ----------
    engine : EngineConfig
    shape : ModelShape
    version : EngineVersion
    """
    kept, gpus = version.memory, engine.tensor_parallel_size
    sampler = kept.logit_bytes * shape.vocabulary * engine.max_num_seqs
    per_token = kept.intermediate_bytes * shape.intermediate / gpus
    per_token += kept.hidden_bytes * shape.hidden
    return max(sampler, per_token * engine.max_num_batched_tokens) / GIB


SlotsTake = Literal["segments", "bytes", "apart"]


def _slots_take(kv_gib: NDArray[np.float64], asked_gib: pd.Series[float] | None) -> SlotsTake:
    """Tell from engine starts how slots take memory: a CPU's KV cache is as large as asked for."""
    if asked_gib is None or not np.allclose(kv_gib, asked_gib, rtol=0.01):
        return "segments"
    # where the same was asked for whatever the slots, they are apart; else they were counted
    return "apart" if asked_gib.nunique() == 1 else "bytes"


class MemoryLaw(Estimator):
    """KV-cache size, feasible starts and start-up time of one model on one GPU.

    Parameters
    ----------
    shape : ModelShape
    version : str
        Of the engine.
    total_gib : float
        Memory of the GPU as the engine sees it; on a CPU what KV cache and slots share.

    Attributes
    ----------
    reserve_gib_ : float
        What the engine keeps beside all that is counted, with adapters.
    reserve_gib_interval_ : tuple of float
        95 % interval of the mean.
    slots_ : str
        How slots take memory from the KV cache: in ``segments`` of a GPU's allocator, by their
        layers' ``bytes`` on a CPU where both share a memory, or ``apart`` from it.
    max_model_len_ : int
        Longest request in tokens, where the flags do not tell; one must fit.
    step_tokens_ : int
        Largest ``max_num_batched_tokens`` of the starts: longer steps were not measured.
    capture_s_, capture_s_per_slot_ : float
        CUDA-graph capture at start-up; before any start what the engine's version tells.
    max_relative_error_ : float
        Of the KV tokens, over the starts fitted.
    """

    shape: ModelShape
    version: str
    total_gib: NotBelow0
    max_model_len_: Annotated[Count, Field(lt=2**31)]
    step_tokens_: Size
    slots_: SlotsTake
    reserve_gib_: Fitted
    reserve_gib_interval_: tuple[float, float]
    capture_s_: NotBelow0
    capture_s_per_slot_: NotBelow0
    max_relative_error_: float

    def __init__(self, shape: ModelShape, version: str, total_gib: float) -> None:
        self.shape, self.version, self.total_gib = shape, version, total_gib
        # what is known before any start
        about = engine_version(version)
        kept = about.memory
        self.max_model_len_ = shape.max_model_len
        self.step_tokens_ = ServeFlags().max_num_batched_tokens
        self.slots_ = "segments"
        self.reserve_gib_ = kept.reserve_gib + kept.lora_reserve_gib
        self.reserve_gib_interval_ = (self.reserve_gib_, self.reserve_gib_)
        self.capture_s_ = about.capture_s or 0.0
        self.capture_s_per_slot_ = self.max_relative_error_ = 0.0

    def fit(self, starts: pd.DataFrame) -> MemoryLaw:
        """Fit to measured server starts (table ``memory``: one row per start)."""
        if "max_model_len" in starts:
            self.max_model_len_ = int(starts.max_model_len.max())
        if "max_num_batched_tokens" in starts:
            self.step_tokens_ = int(starts.max_num_batched_tokens.max())
        started = starts.dropna(subset=["kv_cache_tokens"])
        engines = [run_to_engine(row) for row in records(started)]
        tokens = started.kv_cache_tokens.to_numpy(float)
        kv_gib = tokens * self.shape.kv_bytes_per_token() / GIB
        self.slots_ = _slots_take(kv_gib, started.get("cpu_kv_cache_gib"))
        on_gpu = self.slots_ == "segments"
        if not on_gpu:
            kv_gib = started.cpu_kv_cache_gib.to_numpy(float)  # the tokens are whole blocks of it
        self.total_gib, self.reserve_gib_ = self.total_gib if on_gpu else 0.0, 0.0
        left_gib = np.array([self.kv_cache_gib(engine) for engine in engines]) - kv_gib
        # Relative errors in KV tokens count: weight by the tokens left.
        mean_gib = float(np.average(left_gib, weights=kv_gib**-2))
        if on_gpu:
            self.reserve_gib_ = mean_gib
        else:
            self.total_gib = -mean_gib
        half = 1.96 * float(left_gib.std(ddof=1)) / np.sqrt(len(left_gib))
        self.reserve_gib_interval_ = (self.reserve_gib_ - half, self.reserve_gib_ + half)
        captured = starts.dropna(subset=["graph_capture_s"])
        self.capture_s_ = 0.0  # a CPU captures no graphs
        if len(captured):
            slope, intercept = np.polyfit(captured.adapter_slots, captured.graph_capture_s, 1)
            self.capture_s_, self.capture_s_per_slot_ = float(intercept), float(slope)
        predicted = np.array([self.kv_cache_tokens(engine) for engine in engines])
        self.max_relative_error_ = float(np.abs(predicted / tokens - 1).max())
        return self

    @property
    def _version(self) -> EngineVersion:
        return engine_version(self.version)

    def shared_gib(self, engine: EngineConfig) -> float:
        """Return the memory in GiB that slots and KV cache share on each GPU."""
        if self.slots_ != "segments":
            return self.total_gib
        weights_gib = self.shape.weights_bytes / GIB / engine.tensor_parallel_size
        used_gib = weights_gib + activations_gib(engine, self.shape, self._version)
        share_gib = engine.gpu_memory_utilization * self.total_gib
        return share_gib - used_gib - self.kept_gib(engine)

    def kept_gib(self, engine: EngineConfig) -> float:
        """Return the reserve in GiB: less without adapters."""
        lora_gib = self._version.memory.lora_reserve_gib
        return self.reserve_gib_ - (lora_gib if engine.max_loras == 0 else 0.0)

    def _slots_gib(self, engine: EngineConfig) -> float:
        """Return what the slots take of that in GiB."""
        if self.slots_ == "apart" or engine.max_loras == 0:
            return 0.0
        if self.slots_ == "bytes":
            return layer_slots_bytes(engine, self.shape) / GIB
        return slots_gib(engine, self.shape, self._version)

    def kv_cache_gib(self, engine: EngineConfig, *, slots: bool = True) -> float:
        """Return the memory of the KV cache in GiB; below zero when the rest does not fit.

        Parameters
        ----------
        engine : EngineConfig
        slots : bool
            Reserve them.
        """
        if engine.kv_cache_memory_bytes is not None:
            return engine.kv_cache_memory_bytes / GIB
        return self.shared_gib(engine) - (self._slots_gib(engine) if slots else 0.0)

    def kv_cache_tokens(self, engine: EngineConfig, *, slots: bool = True) -> int:
        """Return the KV-cache size in tokens; below zero when the rest alone does not fit.

        Parameters are those of `kv_cache_gib`.
        """
        blocks = self.kv_cache_gib(engine, slots=slots) / self.block_gib(engine)
        return engine.block_size * math.floor(blocks)

    def block_gib(self, engine: EngineConfig) -> float:
        """Return the memory of a KV block in GiB."""
        dtype, gpus = engine.kv_cache_dtype, engine.tensor_parallel_size
        return engine.block_size * self.shape.kv_bytes_per_token(dtype, gpus) / GIB

    def max_model_len(self, engine: EngineConfig) -> int:
        """Return the longest request in tokens that an engine takes.

        Raises
        ------
        AdapterTwinError
            The model cannot, or its attention does not reach back so far.
        """
        longest, most = engine.max_model_len or self.max_model_len_, self.shape.max_model_len
        require(
            longest <= most,
            f"engine.max_model_len: {longest} is above {most}, the longest that the model takes",
        )
        window = self.shape.sliding_window or longest
        require(
            longest <= window,
            f"engine.max_model_len: attention reaches back {window} tokens, and what vLLM frees "
            f"behind them is not known here; give at most {window}",
        )
        return longest

    def least_kv_cache_tokens(self, engine: EngineConfig) -> int:
        """Return the KV-cache size in tokens below which vLLM does not start."""
        kept = engine.block_size if self._version.checks_usable_blocks else 0
        return self.max_model_len(engine) + kept

    def starts(self, engine: EngineConfig) -> bool:
        """Return whether vLLM starts: one request of the longest length must fit."""
        return self.kv_cache_tokens(engine) >= self.least_kv_cache_tokens(engine)

    def startup_s(self, engine: EngineConfig) -> float:
        """Return the CUDA-graph capture time in seconds."""
        return self.capture_s_ + self.capture_s_per_slot_ * engine.max_loras

    def adapter_blocks(self, ranks: NDArray[np.int64], engine: EngineConfig) -> NDArray[np.int64]:
        """Return the KV blocks that adapters fill at their own ranks, one number per rank given.

        Of the adapted layers only: slots also hold vocabulary that an adapter may bring.
        """
        widths = _layer_widths(engine, self.shape, tuple(_PACKED))
        bytes_per_rank = self.shape.value_bytes * sum(widths) * self.shape.layers
        block_bytes = round(self.block_gib(engine) * GIB)
        return -(-np.asarray(ranks, np.int64) * bytes_per_rank // block_bytes)

    def require_start(self, engine: EngineConfig, *, slots: bool = True) -> int:
        """Return the KV-cache size in tokens.

        Parameters are those of `kv_cache_gib`.

        Raises
        ------
        AdapterTwinError
            vLLM would refuse to start; the message names the flags that help, as vLLM does.
        """
        tokens = self.kv_cache_tokens(engine, slots=slots)
        least = self.least_kv_cache_tokens(engine)
        if tokens >= least:
            return tokens
        plural = "slot" if engine.max_loras == 1 else "slots"
        taken = f"{engine.max_loras} {plural} of rank {engine.max_lora_rank}"
        fewer = "; or lower max_loras or max_lora_rank" if engine.max_loras else ""
        if tokens < engine.block_size:
            raise AdapterTwinError(
                f"engine.gpu_memory_utilization: {engine.gpu_memory_utilization:g} of "
                f"{self.total_gib:.5g} GiB leaves {self.kv_cache_gib(engine):.1f} GiB for the KV "
                f"cache beside the weights and {taken}; raise it, share the model among more GPUs "
                f"(tensor_parallel_size){fewer}"
            )
        raise AdapterTwinError(
            f"engine.max_model_len: {taken} leave {tokens} KV-cache tokens, and one request of "
            f"{least} must fit to start; raise gpu_memory_utilization or lower max_model_len to "
            f"{self.max_model_len(engine) - (least - tokens)}{fewer}"
        )
