"""What the twin is asked: engine, adapters and traffic, under vLLM's own names.

Every class checks itself when constructed and raises `AdapterTwinError`, ``field: remedy``;
`adapter_twin.workload.files` reads the same classes from strict YAML and from rows of a runs table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any, Literal

from adapter_twin.workload.strict import require, require_choice, require_positive, require_rate

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM accepts for ``--max-lora-rank``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One LoRA adapter and its traffic.

    Attributes
    ----------
    name : str
    rank : int
    request_rate : float
        Mean arrivals in requests/s; 0 is an idle adapter.
    pinned : bool
        Never evicted from its slot, which it has from the start (vLLM's ``pin_lora``).
    """

    name: str
    rank: int
    request_rate: float
    pinned: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        require_rate(self, "request_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The flags of one vLLM replica.

    Attributes
    ----------
    model : str
    max_loras : int
        Adapter slots in GPU memory (G): the most distinct adapters in one batch.
    max_cpu_loras : int
        Adapters kept in host memory (N, the served adapters).
    max_lora_rank : int
        Every slot is reserved at this rank.
    max_num_seqs, max_num_batched_tokens : int
        Most requests, and most tokens, in one step.
    block_size : int
        Tokens per KV block.
    gpu_memory_utilization : float
        Share of the GPU's memory that vLLM may use.

    Examples
    --------
    >>> EngineConfig(model="m", max_loras=64, max_cpu_loras=32, max_lora_rank=16)
    Traceback (most recent call last):
    adapter_twin.errors.AdapterTwinError: max_loras: 64 adapter slots exceed max_cpu_loras ...
    """

    model: str
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    max_num_seqs: int = 2048
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        require(bool(self.model), "model: must not be empty")
        require_positive(self, "max_loras", "max_cpu_loras", "max_num_seqs", "block_size")
        require_positive(self, "gpu_memory_utilization")
        require(
            self.max_loras <= self.max_cpu_loras,
            f"max_loras: {self.max_loras} adapter slots exceed max_cpu_loras (served adapters) "
            f"= {self.max_cpu_loras}; lower the slots or serve more adapters",
        )
        require(
            self.max_lora_rank in LORA_RANKS,
            f"max_lora_rank: vLLM takes one of {LORA_RANKS}, got {self.max_lora_rank}",
        )
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens: must be at least max_num_seqs = {self.max_num_seqs}, "
            f"got {self.max_num_batched_tokens}",
        )
        require(self.gpu_memory_utilization <= 1, "gpu_memory_utilization: must be at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """A service objective: `percentile` % of the requests stay within the limits.

    Attributes
    ----------
    ttft_ms : float, optional
        Limit on the time to first token.
    itl_ms : float, optional
        Limit on a request's own mean inter-token latency.
    percentile : float
        Share of the requests that must comply, in percent.

    Examples
    --------
    >>> Slo(ttft_ms=2000, itl_ms=100)
    Slo(ttft_ms=2000, itl_ms=100, percentile=99.0)
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None
    percentile: float = 99.0

    def __post_init__(self) -> None:
        limits = [name for name in ("ttft_ms", "itl_ms") if getattr(self, name) is not None]
        require(bool(limits), "ttft_ms: an SLO needs ttft_ms or itl_ms")
        require_positive(self, *limits)
        require(0 < self.percentile < 100, f"percentile: got {self.percentile}, give 0 to 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests arrive: one stationary renewal process per adapter, or a replayed trace.

    Attributes
    ----------
    process : {"poisson", "gamma", "trace", "agullo2025"}
        The last one is Poisson as the reference study's load generator drew it, number by number.
    cv : float
        Coefficient of variation of the gaps between an adapter's requests (gamma only).
    path : str, optional
        Trace to replay (trace only): it brings the requests' adapters and lengths as well.
    """

    process: Literal["poisson", "gamma", "trace", "agullo2025"] = "poisson"
    cv: float = 1.0
    path: str | None = None

    def __post_init__(self) -> None:
        require_choice(self, "process")
        require_positive(self, "cv")
        require(self.process == "gamma" or self.cv == 1, "cv: only for process gamma; leave it out")
        is_trace = self.process == "trace"
        require(not is_trace or bool(self.path), "path: process trace needs the path of a trace")
        require(is_trace or self.path is None, "path: only for process trace; leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long prompts and outputs are; lengths are whole tokens, at least one.

    Attributes
    ----------
    distribution : {"sharegpt", "lognormal", "fixed"}
    mean_input_tokens, mean_output_tokens : float
    cv : float
        Coefficient of variation of both lengths (lognormal only).
    rank_correlation : float, optional
        Spearman correlation of prompt and output length; left out, it is the measured one for
        sharegpt and none for the others.
    """

    distribution: Literal["sharegpt", "lognormal", "fixed"] = "sharegpt"
    mean_input_tokens: float
    mean_output_tokens: float
    cv: float = 1.0
    rank_correlation: float | None = None

    def __post_init__(self) -> None:
        require_choice(self, "distribution")
        fixed = self.distribution == "fixed"
        for name in ("mean_input_tokens", "mean_output_tokens"):
            mean = getattr(self, name)
            require(1 <= mean < math.inf, f"{name}: must be at least 1 token, got {mean}")
            require(not fixed or mean == round(mean), f"{name}: fixed lengths are whole tokens")
        require_positive(self, "cv")
        has_cv = self.distribution == "lognormal"
        require(has_cv or self.cv == 1, "cv: only for lognormal lengths; leave it out")
        correlation = self.rank_correlation or 0.0
        require(-1 <= correlation <= 1, f"rank_correlation: got {correlation}, give -1 to 1")
        require(not fixed or correlation == 0, "rank_correlation: fixed lengths have none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Adapters and their traffic over one window.

    Attributes
    ----------
    adapters : tuple of Adapter
    duration_s : float
    lengths : Lengths
    arrivals : Arrivals
    base_model_request_rate : float
        Requests/s to the base model, without an adapter.

    Examples
    --------
    >>> lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    >>> adapters = deal_adapters(96, [0.1, 0.05, 0.025], [8, 16])
    >>> workload = Workload(adapters=adapters, duration_s=3600, lengths=lengths)
    >>> round(workload.offered_tokens_per_s)
    2358
    """

    adapters: tuple[Adapter, ...]
    duration_s: float
    lengths: Lengths
    arrivals: Arrivals = field(default_factory=Arrivals)
    base_model_request_rate: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "duration_s")
        require_rate(self, "base_model_request_rate")
        for name, count in Counter(adapter.name for adapter in self.adapters).items():
            require(count == 1, f"adapters: {count} adapters are named {name!r}; names must differ")

    @property
    def offered_request_rate(self) -> float:
        """Requests/s over all adapters and the base model."""
        adapters = math.fsum(adapter.request_rate for adapter in self.adapters)
        return adapters + self.base_model_request_rate

    @property
    def offered_tokens_per_s(self) -> float:
        """Offered load: input plus requested output tokens per second."""
        mean_tokens = self.lengths.mean_input_tokens + self.lengths.mean_output_tokens
        return self.offered_request_rate * mean_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One configuration to simulate: the content of a ``CONFIG.yaml``.

    Attributes
    ----------
    engine : EngineConfig
    workload : Workload
    calibration : str
        Name of a calibration, or ``auto``: the one of the engine's model.
    seed : int
    observer : bool
        Include the effect that the reference measurement had on itself.
    slo : Slo, optional
    policy : str or mapping, optional
        ``engine.policy`` of the file, for `adapter_twin.twin.policies.make_policy`.
    """

    engine: EngineConfig
    workload: Workload
    calibration: str = "auto"
    seed: int = 0
    observer: bool = False
    slo: Slo | None = None
    policy: Any = "vllm"

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: must be zero or more, got {self.seed}")
        check_ranks(self.engine, self.workload)


def check_ranks(engine: EngineConfig, workload: Workload) -> None:
    """Raise `AdapterTwinError` if an adapter does not fit in the engine's slots."""
    for adapter in workload.adapters:
        require(
            adapter.rank <= engine.max_lora_rank,
            f"engine.max_lora_rank: {adapter.name} has rank {adapter.rank}, above max_lora_rank "
            f"= {engine.max_lora_rank}; raise max_lora_rank or leave the adapter out",
        )


def deal_adapters(
    count: int, request_rates: Sequence[float], ranks: Sequence[int]
) -> tuple[Adapter, ...]:
    """Deal rates (requests/s each) and ranks round-robin, as the reference study did."""
    require(count >= 1, f"count: must be at least 1 adapter, got {count}")
    require(len(request_rates) > 0, "request_rates: give at least one rate")
    require(len(ranks) > 0, "ranks: give at least one rank")
    for rate in request_rates:
        require(rate >= 0, f"request_rates: must be zero or more, got {rate:g}")
    for rank in ranks:
        require(rank >= 1, f"ranks: must be at least 1, got {rank}")
    dealt = zip(range(count), cycle(ranks), cycle(request_rates), strict=False)
    return tuple(
        Adapter(name=f"adapter-{i}", rank=rank, request_rate=float(rate)) for i, rank, rate in dealt
    )


def zipf_adapters(
    count: int, total_request_rate: float, zipf_exponent: float, ranks: Sequence[int]
) -> tuple[Adapter, ...]:
    """Share out `total_request_rate` (requests/s): adapter k's share goes as k^-exponent."""
    require(count >= 1, f"count: must be at least 1 adapter, got {count}")
    total, exponent = total_request_rate, zipf_exponent
    require(0 <= total < math.inf, f"total_request_rate: must be zero or more, got {total}")
    require(0 <= exponent < math.inf, f"zipf_exponent: must be zero or more, got {exponent}")
    weights = [k**-exponent for k in range(1, count + 1)]
    scale = total / math.fsum(weights)
    return deal_adapters(count, [scale * weight for weight in weights], ranks)


def config_hash(config: Any) -> str:
    """Return 12 hexadecimal digits that identify the content of a configuration dataclass."""
    content = json.dumps({type(config).__name__: asdict(config)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
