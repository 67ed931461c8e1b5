"""Engine, adapters and traffic as asked, under vLLM's own names.

Every class checks itself when constructed and raises `AdapterTwinError`, ``field: remedy``;
`adapter_twin.workload.files` reads the same classes from strict YAML and from rows of a runs table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, field, fields, replace
from itertools import cycle
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from adapter_twin.errors import require
from adapter_twin.workload.strict import (
    Count,
    Integer,
    Many,
    Name,
    NotNegative,
    Positive,
    Several,
    Size,
    Some,
    Text,
    Whole,
    dataclass,
    function,
    suggestion,
)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM accepts these values of ``--max-lora-rank``, the first since 0.11.1."""


def _lora_rank(rank: int) -> int:
    if rank not in LORA_RANKS:
        raise ValueError(f"vLLM takes one of {LORA_RANKS}")
    return rank


LoraRank = Annotated[Count, AfterValidator(_lora_rank)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1e6)]
Variation = Annotated[float, Field(ge=1e-3, le=100)]
Duration = Annotated[float, Field(gt=0, le=366 * 86400)]
Phase = Annotated[float, Field(ge=1e-3, le=366 * 86400)]
Adapted = Annotated[Count, Field(le=1_000_000)]
MeanTokens = Annotated[float, Field(ge=1, le=1e7)]
LengthDistribution = Literal["sharegpt", "lognormal", "fixed"]


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
    priority: int
        Of its requests, where the engine's `scheduling_policy` is ``priority``: the lowest goes
        first, and the highest is preempted first. That of the base model is 0.
    target_modules : tuple of str, optional
        Modules that it changes; left out, all of a layer. Fewer are read and copied faster.
    layers : int, optional
        Number of the model's layers that it changes; left out, all. Fewer are read and copied
        faster; a slot of vLLM has room for all, and its kernels pass over all of them.
    path : str, optional
        Its folder, for the printed ``--lora-modules``; a file need not tell what the folder does,
        see `adapter_twin.workload.adapter_folders`.
    """

    name: Name
    rank: Count
    request_rate: Rate
    pinned: bool = False
    priority: Integer = 0
    target_modules: Some[Text] | None = None
    layers: Count | None = None
    path: Text | None = None


@function
def deal_adapters(
    count: Adapted, request_rates: Several[Rate], ranks: Several[Count]
) -> tuple[Adapter, ...]:
    """Deal rates and ranks round-robin, as the reference study did.

    Parameters
    ----------
    count : int
    request_rates : sequence of float
        Requests/s of an adapter.
    ranks : sequence of int
    """
    dealt = zip(range(count), cycle(ranks), cycle(request_rates), strict=False)
    return tuple(
        Adapter(name=f"adapter-{i}", rank=rank, request_rate=rate) for i, rank, rate in dealt
    )


@function
def zipf_adapters(
    count: Adapted, total_request_rate: Rate, zipf_exponent: NotNegative, ranks: Several[Count]
) -> tuple[Adapter, ...]:
    """Share out requests by Zipf's law: the share of adapter k goes as k^-exponent.

    Parameters
    ----------
    count : int
    total_request_rate : float
        Requests/s of all adapters.
    zipf_exponent : float
    ranks : sequence of int
        Dealt round-robin.
    """
    weights = [k**-zipf_exponent for k in range(1, count + 1)]
    scale = total_request_rate / math.fsum(weights)
    return deal_adapters(count, [scale * weight for weight in weights], ranks)


@function
def split_adapters(
    traffic_split: dict[Name, Share], total_request_rate: Rate, ranks: Several[Count]
) -> tuple[Adapter, ...]:
    """Share out requests by name, as inference-perf's ``lora_traffic_split`` does.

    Parameters
    ----------
    traffic_split : dict
        Share of the requests by adapter; together 1.
    total_request_rate : float
        Requests/s of all adapters.
    ranks : sequence of int
        Dealt round-robin.
    """
    total = math.fsum(traffic_split.values())
    require(abs(total - 1) < 1e-6, f"traffic_split: shares add up to {total:g}; make that 1")
    rates = [total_request_rate * share for share in traffic_split.values()]
    named = zip(traffic_split, deal_adapters(len(rates), rates, ranks), strict=True)
    return tuple(replace(adapter, name=name) for name, adapter in named)


def dealt(adapters: Any) -> Any:
    """Return the adapters that a short form stands for: the arguments of one of these three."""
    if not isinstance(adapters, dict):
        return adapters
    if "traffic_split" in adapters:
        return split_adapters(**adapters)
    is_zipf = "zipf_exponent" in adapters or "total_request_rate" in adapters
    return (zipf_adapters if is_zipf else deal_adapters)(**adapters)


_TOLD = (
    "A list, or dealt: {count, request_rates, ranks}, {count, total_request_rate, zipf_exponent, "
    "ranks} or {traffic_split: {name: share}, total_request_rate, ranks}; or folders of PEFT "
    "adapters, {folders: DIR}, or a .csv."
)
Adapters = Annotated[Many[Adapter], BeforeValidator(dealt), Field(description=_TOLD)]


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
    Slo(ttft_ms=2000.0, itl_ms=100.0, percentile=99.0)
    """

    ttft_ms: Positive | None = None
    itl_ms: Positive | None = None
    percentile: Annotated[float, Field(gt=0, lt=100)] = 99.0

    def __post_init__(self) -> None:
        require(self.percentile > 1, f"percentile: in percent, 99, not 0.99; got {self.percentile}")
        limited = self.ttft_ms is not None or self.itl_ms is not None
        require(limited, "ttft_ms: an SLO needs ttft_ms or itl_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests arrive: one stationary renewal process per adapter, or a replayed trace.

    Attributes
    ----------
    process : {"poisson", "gamma", "on_off", "trace", "agullo2025"}
        On_off: each adapter's requests are Poisson while it is on, and none while it is off. The
        last one is Poisson as the reference study's load generator drew it, number by number.
    cv : float
        Coefficient of variation of the gaps between an adapter's requests (gamma only).
    on_s, off_s : float
        Mean times that an adapter is on, and off, exponentially distributed (on_off only). Rates
        are means over both.
    path : str, optional
        Trace to replay (trace only): it brings the requests' adapters and lengths as well.
    period_s, amplitude : float
        All rates follow a sine, ``1 + amplitude * sin(2 pi t / period_s)`` times their mean
        (poisson and gamma only).
    num_prompts : int, optional
        All there are: they come at the start, as with ``vllm bench serve --request-rate inf``, and
        the adapters' rates are their shares (poisson only). The run ends with the last answer.
    max_concurrency : int, optional
        Most requests that the client has under way. Others wait for an answer, in order, before
        they are sent and count as arrived, as with ``vllm bench serve --max-concurrency``.
    """

    process: Literal["poisson", "gamma", "on_off", "trace", "agullo2025"] = "poisson"
    cv: Variation = 1.0
    on_s: Phase | None = None
    off_s: Phase | None = None
    path: Text | None = None
    period_s: Duration | None = None
    amplitude: Annotated[float, Field(ge=0, le=1)] = 0.0
    num_prompts: Size | None = None
    max_concurrency: Size | None = None

    def __post_init__(self) -> None:
        require(self.process == "gamma" or self.cv == 1, "cv: only for process gamma; leave it out")
        for name in ("on_s", "off_s"):
            told, needed = getattr(self, name) is not None, self.process == "on_off"
            require(told or not needed, f"{name}: process on_off needs it; give the mean time in s")
            require(needed or not told, f"{name}: only for process on_off; leave it out")
        is_trace = self.process == "trace"
        has_path = self.path is not None
        require(has_path or not is_trace, "path: process trace needs the path of a trace")
        require(is_trace or not has_path, "path: only for process trace; leave it out")
        swings, at_once = self.amplitude > 0, self.num_prompts is not None
        require(swings == (self.period_s is not None), "amplitude: goes with period_s; give both")
        require(
            not swings or self.process in ("poisson", "gamma"),
            "amplitude: only for processes poisson and gamma; leave it out",
        )
        require(
            not at_once or (self.process == "poisson" and not swings),
            "num_prompts: they come all at once; leave process and amplitude out",
        )

    @property
    def is_steady(self) -> bool:
        """Whether requests come at a constant rate, whatever becomes of those before."""
        return self.num_prompts is None and self.max_concurrency is None and self.amplitude == 0

    def for_clients(self, load: float) -> Arrivals:
        """Return the arrivals from `load` times the clients: places, and prompts if numbered."""

        def times(count: int | None) -> int | None:
            return None if count is None else max(round(load * count), 1)

        places, prompts = times(self.max_concurrency), times(self.num_prompts)
        return replace(self, max_concurrency=places, num_prompts=prompts)

    def dispersion(self, rate: float) -> float:
        """Return the index of dispersion of an adapter's requests: variance by mean of a count.

        Over a long time, of a stationary process: 1 of a Poisson one, the square of
        ``cv`` of a renewal one, of an interrupted Poisson one as in Fischer and
        Meier-Hellstern, Performance Evaluation 18 (1993).

        Parameters
        ----------
        rate : float
            Mean requests/s.
        """
        if self.on_s is not None and self.off_s is not None:
            return 1 + 2 * rate * self.off_s**2 / (self.on_s + self.off_s)
        return self.cv**2


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
    shared_prefix_tokens : int
        Length of each adapter's system prompt, which comes in front of every prompt.
    """

    distribution: LengthDistribution = "sharegpt"
    mean_input_tokens: MeanTokens
    mean_output_tokens: MeanTokens
    cv: Variation = 1.0
    rank_correlation: Annotated[float, Field(ge=-1, le=1)] | None = None
    shared_prefix_tokens: Annotated[Whole, Field(le=10_000_000)] = 0

    def __post_init__(self) -> None:
        has_cv = self.distribution == "lognormal"
        require(has_cv or self.cv == 1, "cv: only for lognormal lengths; leave it out")
        if self.distribution == "fixed":
            for name in ("mean_input_tokens", "mean_output_tokens"):
                whole = getattr(self, name).is_integer()
                require(whole, f"{name}: fixed lengths are whole tokens")
            require(not self.rank_correlation, "rank_correlation: fixed lengths have none")

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean length of a prompt with the system prompt in front of it."""
        return self.shared_prefix_tokens + self.mean_input_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Requests in several turns, each of which waits for the answer to the one before.

    A turn's prompt is all prompts and outputs before it and `Lengths.mean_input_tokens` more, so
    that the prefix cache can hold it but for these. A turn that the server refuses, or that is not
    answered in the window, is the session's last one.

    Attributes
    ----------
    turns : float, optional
        Mean number of turns; left out, once along the `chain`.
    distribution : {"fixed", "geometric"}
        Of that number; geometric: after each turn the session goes on with the same probability.
    mean_think_s : float
        Mean time from an answer to the next turn, exponentially distributed.
    chain : tuple of str, optional
        Adapters to which the turns of a session go, in order and over again, if it opens with the
        first of them; left out, sessions stay with their adapter.
    """

    turns: Annotated[float, Field(ge=1, le=1000)] | None = None
    distribution: Literal["fixed", "geometric"] = "fixed"
    mean_think_s: NotNegative = 0.0
    chain: Some[Text] | None = None

    def __post_init__(self) -> None:
        require(
            self.turns is not None or self.chain is not None,
            "turns: give their number, or a chain of adapters",
        )
        if self.distribution == "fixed" and self.turns is not None:
            require(self.turns.is_integer(), "turns: a fixed number is a whole one")

    @property
    def mean_turns(self) -> float:
        """Mean number of turns."""
        return len(self.chain or ()) if self.turns is None else self.turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Adapters and their traffic over one window.

    Attributes
    ----------
    adapters : tuple of Adapter
        In a file also the arguments of `deal_adapters`, `zipf_adapters` or `split_adapters`.
    duration_s : float
    lengths : Lengths
    arrivals : Arrivals
    base_model_request_rate : float
        Requests/s to the base model, without an adapter.
    sessions : Sessions, optional
        Each arrival opens one, so that rates are sessions/s; left out, it is one request.
    samples : int
        Requests that each arrival sends at once, with one prompt (vLLM's ``n``).

    Examples
    --------
    >>> lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    >>> adapters = deal_adapters(96, [0.1, 0.05, 0.025], [8, 16])
    >>> workload = Workload(adapters=adapters, duration_s=3600, lengths=lengths)
    >>> round(workload.offered_tokens_per_s)
    2358
    """

    adapters: Adapters
    duration_s: Duration
    lengths: Lengths
    arrivals: Arrivals = field(default_factory=Arrivals)
    base_model_request_rate: Rate = 0.0
    sessions: Sessions | None = None
    samples: Size = 1

    def __post_init__(self) -> None:
        for name, count in Counter(adapter.name for adapter in self.adapters).items():
            require(count == 1, f"adapters: {count} adapters are named {name!r}; names must differ")
        brings = self.arrivals.process == "trace"
        require(
            not brings or self.lengths.shared_prefix_tokens == 0,
            "shared_prefix_tokens: a replayed trace brings its own lengths; leave it out",
        )
        require(
            not brings or (self.sessions is None and self.samples == 1),
            "sessions, samples: a replayed trace brings its own requests; leave them out",
        )
        require(
            self.samples == 1 or (self.sessions is None and self.arrivals.max_concurrency is None),
            "samples: no client waits for several; leave sessions and max_concurrency out",
        )
        chain = self.sessions and self.sessions.chain
        rates = {adapter.name: adapter.request_rate for adapter in self.adapters}
        for name in chain or ():
            near = suggestion(name, rates)
            require(name in rates, f"chain: {name!r} is not among the adapters{near}")
        require(
            not chain or rates[chain[0]] > 0,
            "chain: its first adapter has no request_rate, with which sessions open; give it one",
        )

    @property
    def offered_request_rate(self) -> float:
        """Requests/s over all adapters and the base model; of sessions and samples the first."""
        adapters = math.fsum(adapter.request_rate for adapter in self.adapters)
        return adapters + self.base_model_request_rate

    @property
    def offered_tokens_per_s(self) -> float:
        """Offered load: input plus requested output tokens per second."""
        mean_tokens = self.lengths.mean_prompt_tokens + self.lengths.mean_output_tokens
        return self.offered_request_rate * mean_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Equal replicas of an engine.

    Attributes
    ----------
    replicas : int
    router : str or mapping
        Chooses the replica of each request, see `adapter_twin.fleet.routers`.
    """

    replicas: Annotated[Count, Field(le=10_000)]
    router: Any = "adapter_affinity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One configuration to simulate: the content of a ``CONFIG.yaml``.

    Attributes
    ----------
    engine : EngineConfig
    workload : Workload
    calibration : str
        A name, the path of a ``.json`` file, or ``auto``: the one of the engine's model.
    seed : int
    observer : bool
        Include the effect that the reference measurement had on itself.
    slo : Slo, optional
    policy : str or mapping, optional
        ``engine.policy`` of the file, for `adapter_twin.twin.policies.make_policy`.
    fleet : Fleet, optional
        Left out, it is one engine.
    """

    engine: EngineConfig
    workload: Workload
    calibration: str = "auto"
    seed: Whole = 0
    observer: bool = False
    slo: Slo | None = None
    policy: Any = "vllm"
    fleet: Fleet | None = None

    def __post_init__(self) -> None:
        check_ranks(self.engine, self.workload)


def check_ranks(engine: EngineConfig, workload: Workload) -> None:
    """Raise `AdapterTwinError` if an adapter does not fit in the engine's slots."""
    for adapter in workload.adapters:
        require(
            engine.max_loras > 0 or adapter.request_rate == 0,
            f"engine.max_loras: 0 slots serve the base model alone, and {adapter.name} has "
            "requests; give slots or leave the adapter out",
        )
        require(
            adapter.rank <= engine.max_lora_rank,
            f"engine.max_lora_rank: {adapter.name} has rank {adapter.rank}, above max_lora_rank "
            f"= {engine.max_lora_rank}; raise max_lora_rank or leave the adapter out",
        )


def config_hash(config: Any) -> str:
    """Return 12 hexadecimal digits that identify the content of a configuration dataclass."""
    content = json.dumps({type(config).__name__: asdict(config)}, sort_keys=True, default=_digest)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _digest(array: Any) -> str:
    """Return what identifies the content of an array."""
    return hashlib.sha256(array.tobytes()).hexdigest()
