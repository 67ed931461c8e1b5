"""GPU memory: what weights and slots take, what is left for the KV cache, and whether it starts.

``KV cache = share x memory - weights - activations - reserve - slots``. Weights follow from the
model's shape. Activations are the larger of two: what the sampler holds of a full batch's logits,
and what a forward pass holds of ``max_num_batched_tokens``. Slots are those of
`adapter_twin.laws.slots`. That leaves one number to fit, the reserve, or to take from the engine's
version (`adapter_twin.workload.engine_versions`). On a CPU the user says how much the KV cache
takes, and slots leave it be; or a campaign gives it what the slots leave of a memory they share, as
on a GPU but to the byte.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.estimator import Estimator, Fitted, NotBelow0
from adapter_twin.laws.slots import GIB, PACKED, layer_slots_bytes, layer_widths, slots_gib
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.engine_versions import EngineVersion, engine_version
from adapter_twin.workload.files import records, run_to_engine
from adapter_twin.workload.models import ModelShape
from adapter_twin.workload.strict import Count, Size

if TYPE_CHECKING:
    import pandas as pd


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
        widths = layer_widths(engine, self.shape, tuple(PACKED))
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
