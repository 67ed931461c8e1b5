"""Traffic as asked: how requests arrive, how long they are, and how sessions go on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.workload.adapters import Adapters, Rate
from adapter_twin.workload.strict import (
    NotNegative,
    Size,
    Some,
    Text,
    Whole,
    dataclass,
    suggestion,
)

Variation = Annotated[float, Field(ge=1e-3, le=100)]
Duration = Annotated[float, Field(gt=0, le=366 * 86400)]
Phase = Annotated[float, Field(ge=1e-3, le=366 * 86400)]
MeanTokens = Annotated[float, Field(ge=1, le=1e7)]
LengthDistribution = Literal["sharegpt", "lognormal", "fixed"]


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
    >>> from adapter_twin import deal_adapters
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
