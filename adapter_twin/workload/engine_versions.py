"""Versions of the engine: what each one takes, gives slots to, and keeps for itself."""

from __future__ import annotations

import re
from dataclasses import field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.workload.shipped import facts
from adapter_twin.workload.strict import (
    Count,
    Many,
    NotNegative,
    Positive,
    Some,
    Text,
    Whole,
    dataclass,
    read,
)

if TYPE_CHECKING:
    from adapter_twin.workload.engine_config import EngineConfig

WITH_ADAPTERS = "0.8.5"
"""Of this version steps with adapters have been measured on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMemory:
    """What a version holds of a GPU's memory beside weights, slots and KV cache.

    Attributes
    ----------
    logit_bytes : float
        Of the sampler, per entry of the vocabulary and request of a full batch.
    intermediate_bytes, hidden_bytes : float
        Of a forward pass, per token and entry of a layer's widths; the larger of both counts.
    reserve_gib, lora_reserve_gib : float
        Always, and with adapters.
    """

    logit_bytes: NotNegative
    intermediate_bytes: NotNegative
    hidden_bytes: NotNegative
    reserve_gib: float
    lora_reserve_gib: NotNegative


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDefaults:
    """What ``vllm serve`` takes for flags left out, on GPUs from a size on.

    Attributes
    ----------
    memory_gib : float
        Least memory of the GPU.
    not_named : str, optional
        Not on GPUs with this in their name.
    max_num_seqs, max_num_batched_tokens : int
    """

    memory_gib: NotNegative
    not_named: Text | None = None
    max_num_seqs: Count
    max_num_batched_tokens: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineVersion:
    """One version of vLLM, as ``data/engines`` tells of it.

    Attributes
    ----------
    version : str
    max_lora_ranks : tuple of int
        What ``--max-lora-rank`` takes.
    vocabulary_slots : tuple of str
        Architectures whose embedding and output layers have adapter slots as well.
    extra_vocabulary : int
        Rows of new tokens that a slot of those has room for.
    reserves_prompts : bool
        A prompt is admitted when KV blocks for all of it are free, not for its first chunk.
    async_scheduling : bool
        A step is scheduled while the one before runs, on a GPU.
    estimates_graphs : bool
        An estimate of the CUDA graphs' memory is taken off the KV cache, unless
        ``--kv-cache-memory-bytes`` is given.
    checks_usable_blocks : bool
        At the start the longest request must fit into what is left without the KV block that the
        engine keeps to itself.
    capture_s : float, optional
        What the capture of its CUDA graphs takes with however many slots, by public reports; left
        out where it grows with them, which only measured starts tell.
    lacks : tuple of str
        Flags of `adapter_twin.workload.engine_config.ServeFlags` that it does not have. Adapter
        kernels are launched for every slot, whether it is active or not, unless it has and is given
        ``specialize_active_lora``.
    gpu_memory_utilization : float
        Share of a GPU's memory that is used where no flag tells.
    defaults : tuple of BatchDefaults
        The first that fits a GPU holds.
    memory : KeptMemory
    steps : dict
        Constants of its steps by name (`adapter_twin.laws.roofline.ENGINE_CONSTANTS`): the value,
        and how far its logarithm spreads between models. Empty where none were measured.
    source : str
    """

    version: Text
    max_lora_ranks: Some[Count]
    vocabulary_slots: Many[Text]
    extra_vocabulary: Whole
    reserves_prompts: bool
    async_scheduling: bool
    estimates_graphs: bool
    checks_usable_blocks: bool
    capture_s: NotNegative | None = None
    lacks: Many[Text]
    gpu_memory_utilization: Positive
    defaults: Annotated[Many[BatchDefaults], Field(min_length=1)]
    memory: KeptMemory
    steps: dict[str, tuple[Positive, Positive]] = field(default_factory=dict, hash=False)
    source: Text

    def require_known(self, engine: EngineConfig) -> None:
        """Raise `AdapterTwinError` where this version does not take an engine's flags."""
        require(
            engine.max_lora_rank in self.max_lora_ranks,
            f"engine.max_lora_rank: vLLM {self.version} takes one of {self.max_lora_ranks}, "
            f"got {engine.max_lora_rank}",
        )
        for flag in self.lacks:
            require(
                getattr(engine, flag) in (None, False),
                f"engine.{flag}: vLLM {self.version} has no such flag; leave it out",
            )

    def flags_left_out(self, gpu: str, memory_gib: float) -> dict[str, Any]:
        """Return what ``vllm serve`` takes on a GPU for flags that no one gives.

        Parameters
        ----------
        gpu : str
            Its name.
        memory_gib : float

        Examples
        --------
        >>> engine_version("0.8.5").flags_left_out("NVIDIA L4", 22.0)
        {'max_num_seqs': 256, 'max_num_batched_tokens': 2048, 'gpu_memory_utilization': 0.9}
        """
        fits = (
            one
            for one in self.defaults
            if memory_gib >= one.memory_gib
            and (one.not_named is None or one.not_named not in gpu.lower())
        )
        found = next(fits)
        return {
            "max_num_seqs": found.max_num_seqs,
            "max_num_batched_tokens": found.max_num_batched_tokens,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


@cache
def engine_version(version: str | None = None) -> EngineVersion:
    """Return what holds for a version: the newest of ``data/engines`` that is not newer.

    Parameters
    ----------
    version : str, optional
        As ``0.32.0``, ``vllm-0.32.0`` or ``0.32.0+cpu``; left out, the newest of all.

    Raises
    ------
    AdapterTwinError
        It is no version, or older than all.

    Examples
    --------
    >>> engine_version("vllm-0.20.1").version
    '0.19.0'
    """
    known = sorted((_release(file["version"]), file) for file in facts("engines").values())
    release = known[-1][0] if version is None else _release(version)
    names = ", ".join(file["version"] for _, file in known)
    require(bool(release), f"engine: {version!r} is no version of vLLM; use one from {names}")
    older = [file for its_release, file in known if its_release <= release]
    require(bool(older), f"engine: nothing is known of vLLM {version}; use one from {names}")
    return read(EngineVersion, older[-1])


def require_runs(gpu: str, version: str) -> None:
    """Raise `AdapterTwinError` if a version of vLLM is too old for a GPU.

    Parameters
    ----------
    gpu : str
        A name of ``data/gpus``.
    version : str

    Examples
    --------
    >>> require_runs("b200", "0.19.0")
    """
    first = str(facts("gpus")[gpu].get("first_vllm", "0"))
    newest = max(
        (one["version"] for one in facts("engines").values() if "steps" in one), key=_release
    )
    require(
        _release(version) >= _release(first),
        f"gpu: vLLM {version} does not run on {gpu}, which takes {first} or newer; of these steps "
        f"without adapters are known: ask for {gpu}-vllm{newest} and 0 slots, or for another GPU",
    )
