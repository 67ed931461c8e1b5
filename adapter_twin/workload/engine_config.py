"""A vLLM replica's flags, under vLLM's own names."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from adapter_twin.errors import require
from adapter_twin.workload.adapters import Adapted, Share
from adapter_twin.workload.strict import Count, Size, Some, Text, Whole, dataclass

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM accepts these values of ``--max-lora-rank``, the first since 0.11.1."""


def _lora_rank(rank: int) -> int:
    if rank not in LORA_RANKS:
        raise ValueError(f"vLLM takes one of {LORA_RANKS}")
    return rank


LoraRank = Annotated[Count, AfterValidator(_lora_rank)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags:
    """The flags of a vLLM replica that do not depend on the adapters, under vLLM's names.

    Attributes
    ----------
    max_num_seqs, max_num_batched_tokens : int
        Most requests, and most tokens, in one step; the defaults are the reference study's.
    block_size : int
        Tokens per KV block.
    gpu_memory_utilization : float
        Share of the GPU's memory that vLLM may use.
    max_model_len : int, optional
        Longest request in tokens, prompt and output; left out, as the calibration was measured.
    kv_cache_dtype : {"auto", "fp8"}
        Type of keys and values; ``auto`` is the model's own.
    kv_cache_memory_bytes : int, optional
        Size of the KV cache, in place of what `gpu_memory_utilization` leaves for it.
    tensor_parallel_size : int
        GPUs that share every layer.
    fully_sharded_loras : bool
        Share all of the adapters' matrices among those GPUs.
    lora_target_modules : tuple of str, optional
        Modules that slots are reserved for; left out, all that the engine can adapt.
    enable_prefix_caching : bool, optional
        Keep KV blocks for later requests that begin alike; left out, as vLLM has it where the
        traffic has such requests, else as the calibration was measured.
    enable_chunked_prefill : bool
        Let a prompt take several steps.
    long_prefill_token_threshold : int
        Most tokens of one prompt in one step; 0 is no such limit.
    scheduling_policy : {"fcfs", "priority"}
        Who goes first: who came first, or the lowest `Adapter.priority`.
    async_scheduling : bool, optional
        Schedule a step while the one before runs; left out, as the calibration was measured.
    specialize_active_lora : bool
        Capture graphs for several numbers of active adapters.
    lora_modules : {"none", "all"}
        Adapters that are named, and so read from disk, before the server is ready; the others are
        read when their first request comes.
    """

    max_num_seqs: Size = 2048
    max_num_batched_tokens: Size = 2048
    block_size: Size = 16
    gpu_memory_utilization: Share = 0.9
    max_model_len: Annotated[Count, Field(lt=2**31)] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    kv_cache_memory_bytes: Count | None = None
    tensor_parallel_size: Size = 1
    fully_sharded_loras: bool = False
    lora_target_modules: Some[Text] | None = None
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: Annotated[Whole, Field(lt=2**31)] = 0
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    async_scheduling: bool | None = None
    specialize_active_lora: bool = False
    lora_modules: Literal["none", "all"] = "none"

    def __post_init__(self) -> None:
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens: must be at least max_num_seqs = {self.max_num_seqs}, "
            f"got {self.max_num_batched_tokens}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(ServeFlags):
    """One vLLM replica: a model, its adapter slots, and the other flags.

    Attributes
    ----------
    model : str
    max_loras : int
        Adapter slots in GPU memory (G): the most distinct adapters in one batch. 0 is an engine
        without adapters.
    max_cpu_loras : int, optional
        Adapters kept in host memory (N, the served adapters); left out, as many as slots.
    max_lora_rank : int
        Every slot is reserved at this rank.

    Examples
    --------
    >>> EngineConfig(model="m", max_loras=64, max_cpu_loras=32, max_lora_rank=16)
    Traceback (most recent call last):
    adapter_twin.errors.AdapterTwinError: max_loras: 64 adapter slots exceed max_cpu_loras ...
    """

    model: Text
    max_loras: Annotated[Whole, Field(le=1_000_000)]
    max_cpu_loras: Adapted = 0  # left out: `__post_init__` takes what vLLM does
    max_lora_rank: LoraRank = 16

    def __post_init__(self) -> None:
        ServeFlags.__post_init__(self)  # no super(): slots make another class of this one
        if self.max_cpu_loras == 0:
            object.__setattr__(self, "max_cpu_loras", max(self.max_loras, 1))
        require(
            self.max_loras <= self.max_cpu_loras,
            f"max_loras: {self.max_loras} adapter slots exceed max_cpu_loras = "
            f"{self.max_cpu_loras}, the adapters kept in host memory; lower the slots or raise it",
        )

    @property
    def flags(self) -> ServeFlags:
        """Those that do not depend on the adapters."""
        return ServeFlags(**{flag.name: getattr(self, flag.name) for flag in fields(ServeFlags)})
