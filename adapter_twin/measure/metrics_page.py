"""Pages of vLLM's metrics, and what they tell of the time between two of them.

Names are those of vLLM 0.8.5 to 0.32; where a metric was renamed, the newer name comes first.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.measure.ask import ask
from adapter_twin.service.metrics import PERCENTILES

CACHE, LORA = "vllm:cache_config_info", "vllm:lora_requests_info"
STARTED_S = ("vllm:num_preemptions_created", "process_start_time_seconds")
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
FINISHED, PREEMPTED = "vllm:request_success_total", "vllm:num_preemptions_total"
PREFIX_QUERIES = ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")
PREFIX_HITS = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")
LENGTHS = ("vllm:request_prompt_tokens", "vllm:request_generation_tokens")
IN_ENGINE_S = "vllm:request_inference_time_seconds_sum"
QUEUED_S = "vllm:request_queue_time_seconds_sum"
TTFT = ("vllm:time_to_first_token_seconds",)
ITL = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")

Bounded = tuple[float, float, float]
"""A figure, and the bounds between which it is known to lie."""

MOST_PAGE_BYTES = 2**26
"""A page is read up to this size: every combination of adapters adds a line to it."""


def fetch(url: str, timeout_s: float = 5.0) -> str:
    """Get a page.

    Raises
    ------
    AdapterTwinError
        It is no http or https URL, or no page comes in time.
    """
    try:
        parts = urlsplit(url)
        require(bool(parts.scheme in ("http", "https") and parts.hostname), "expected http://HOST")
        status, page = ask(url, timeout_s, most_bytes=MOST_PAGE_BYTES)
        require(status == HTTPStatus.OK, f"status {status}")
    except (AdapterTwinError, ValueError) as error:
        raise AdapterTwinError(f"{url}: no metrics ({one_line(error)}); is vLLM there?") from None
    return page


@dataclass(slots=True)
class MetricsPage:
    """The samples of one page.

    Attributes
    ----------
    values : dict of str to float
        By name, samples of all label sets added up.
    buckets : dict of str to dict of float to float
        By histogram: how many values lie up to each upper edge.
    labels : dict of str to dict
        By name, of the sample with the highest value: of ``lora_requests_info`` the newest.
    engines : set of str
    """

    values: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    engines: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, text: str, source: str = "metrics") -> Self:
        """Read a page; raise `AdapterTwinError`, which names the source, where it is none."""
        page, highest = cls(), dict[str, float]()
        try:
            families = text_string_to_metric_families(text)
            for sample in (sample for family in families for sample in family.samples):
                name, labels, value = sample.name, sample.labels, float(sample.value)
                if "le" in labels:
                    upto = page.buckets.setdefault(name.removesuffix("_bucket"), {})
                    edge = float(labels["le"])
                    upto[edge] = upto.get(edge, 0.0) + value
                else:
                    page.values[name] = page.values.get(name, 0.0) + value
                if value >= highest.get(name, value):
                    highest[name], page.labels[name] = value, labels
                if name == RUNNING:
                    page.engines.add(labels.get("engine", "0"))
        except (ValueError, IndexError) as error:
            raise AdapterTwinError(f"{source}: no page of metrics ({one_line(error)})") from None
        return page

    def value(self, *names: str) -> float:
        """Return the value under the first of the names that is there."""
        name = next((name for name in names if name in self.values), "")
        require(name != "", f"metrics: {names[0]} is missing; give the whole page of a vLLM server")
        return self.values[name]

    @property
    def in_flight(self) -> float:
        """Requests that run or wait."""
        return self.value(RUNNING) + self.value(WAITING)

    def kv_cache(self) -> dict[str, float]:
        """Return the size of the KV cache and of a block in tokens, NaN where they are not told."""
        labels = self.labels.get(CACHE, {})
        told = (labels.get(name, "") for name in ("num_gpu_blocks", "block_size"))
        # vLLM 0.8.5 may say None
        blocks, block_size = (float(size) if size.isdecimal() else math.nan for size in told)
        return {"kv_cache_tokens": blocks * block_size, "block_size": block_size}


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some time of a server's life: between two pages, or from its start to one.

    Attributes
    ----------
    span_s : float
    end : MetricsPage
    begin : MetricsPage, optional
        Left out, it is the server's start, when all counters were 0.
    """

    span_s: float
    end: MetricsPage
    begin: MetricsPage | None = None

    def counted(self, *names: str) -> float:
        """Return by how much a counter grew."""
        grown = self.end.value(*names) - (self.begin.value(*names) if self.begin else 0.0)
        require(grown >= 0, f"metrics: {names[0]} fell; the server was started anew, read again")
        return grown

    @property
    def arrived(self) -> float:
        """Requests that finished or came to be in flight; vLLM counts none that was broken off."""
        before = self.begin.in_flight if self.begin else 0.0
        return self.counted(FINISHED) + self.end.in_flight - before

    def statistics(self, label: str, *names: str, scale: float = 1.0) -> dict[str, Bounded]:
        r"""Return mean, median and p99 of the histogram under the first name that is there.

        The mean is exact. Percentiles are interpolated linearly within a bucket, whose edges are
        the bounds; in the last one they are its lower edge, as ``histogram_quantile`` has it.

        Raises
        ------
        AdapterTwinError
            There is none, or its buckets and its count do not fit together.

        Examples
        --------
        >>> page = 'x_bucket{le="1"} 2\nx_bucket{le="+Inf"} 3\nx_count 3\nx_sum 4\n'
        >>> Stretch(60.0, MetricsPage.parse(page)).statistics("x", "x")["median_x"]
        (0.75, 0.0, 1.0)
        """
        name = next((name for name in names if name in self.end.buckets), names[0])
        count, total = (self.counted(f"{name}_{part}") for part in ("count", "sum"))
        upto = self.end.buckets.get(name, {})
        before = self.begin.buckets.get(name, {}) if self.begin else dict.fromkeys(upto, 0.0)
        edges = sorted(upto.keys() & before.keys())
        seen = [0.0, *(upto[edge] - before[edge] for edge in edges)]
        require(
            math.inf in edges and seen == sorted(seen) and seen[-1] == count,
            f"metrics: the buckets of {name} do not fit together; give the whole page",
        )
        mean = scale * total / count if count else math.nan
        told = {f"mean_{label}": (mean, mean, mean)}
        for which, percent in PERCENTILES.items():
            place = percent / 100 * count
            bucket = bisect_left(seen, place, lo=1) - 1
            low, high = [0.0, *edges][bucket : bucket + 2]
            share = (
                (place - seen[bucket]) / (seen[bucket + 1] - seen[bucket]) if count else math.nan
            )
            value = low + share * (high - low) if math.isfinite(high) else low
            told[f"{which}_{label}"] = scale * value, scale * low, scale * high
        return told
