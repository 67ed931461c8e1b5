"""What benchmark clients save: their requests as rows of a log, and a benchmark as it was asked.

Read are the JSON of ``vllm bench serve --save-result`` (of vLLM 0.8 to 0.32; requests one by one
with ``--save-detailed``, of versions since January 2026, which save ``start_times``), the JSON of
guidellm (0.2 to 0.7) and AIPerf's ``profile_export.jsonl`` (0.1, and later ones where it still has
these fields). None of them tells the adapters of its requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.workload.models import same_model
from adapter_twin.workload.strict import Count, Positive, Text, Tokens, dataclass, keys, read

if TYPE_CHECKING:
    import pandas as pd

LONGEST_S = 1e6
"""A benchmark lasts until all is answered; no one waits longer than this."""

VLLM_COLUMNS = {
    "start_times": "arrival_s",
    "input_lens": "prompt_tokens",
    "output_lens": "output_tokens",
}
"""Lists of vLLM's detailed results, and the columns of a log that they are."""

AIPERF_COLUMNS = {
    "metadata.request_start_ns": "arrival_s",
    "metrics.input_sequence_length.value": "prompt_tokens",
    "metrics.output_sequence_length.value": "output_tokens",
}
"""The same of AIPerf's records, of which the times are in ns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One result of ``vllm bench serve``: what was asked, and its sums.

    Attributes
    ----------
    model_id : str
    num_prompts : int
    request_rate : float or "inf"
        Requests/s; with ``inf`` all are sent at once.
    burstiness : float
        Shape of the Gamma-distributed gaps; 1 is Poisson.
    max_concurrency : int, optional
        Most requests that the client has in flight.
    completed : int
    duration : float
        From the first request to the last answer, in s.
    total_input_tokens, total_output_tokens : int
        Of the completed requests.
    ramp_up_strategy : str, optional
        How the rate grows, of requests that were not saved one by one.
    detailed : bool
        Requests were saved one by one, with the times at which they were sent.
    """

    model_id: Text
    num_prompts: Count
    request_rate: Positive | Literal["inf"]
    burstiness: Positive = 1.0
    max_concurrency: Count | None = None
    completed: Count
    duration: Positive
    total_input_tokens: Count
    total_output_tokens: Count
    ramp_up_strategy: Text | None = None
    detailed: bool = False

    def __post_init__(self) -> None:
        require(
            self.detailed or self.ramp_up_strategy is None,
            "ramp_up_strategy: a growing rate is not known here; measure it with --save-detailed",
        )

    @property
    def sending_s(self) -> float:
        """Time in s over which the client spreads its requests."""
        return 0.0 if self.request_rate == "inf" else self.num_prompts / self.request_rate

    def workload(self, told: Mapping[str, Any], model: str) -> dict[str, Any]:
        """Return the keys of a `adapter_twin.workload.traffic.Workload` with this traffic.

        Parameters
        ----------
        told : mapping
            What a file says: ``adapters`` without rates, all asked alike; and ``lengths`` without
            means, unless requests were saved one by one.
        model : str
            That is served.

        Raises
        ------
        AdapterTwinError
            The file tells what the benchmark does, or of another model.
        """
        require(
            same_model(self.model_id, model),
            f"engine.model: the benchmark is of {self.model_id}, not of {model}; correct it",
        )
        lengths, adapters = told.get("lengths") or {}, told.get("adapters", [])
        require(isinstance(lengths, dict), "workload.lengths: expected a mapping of keys")
        means = ("mean_input_tokens", "mean_output_tokens", "shared_prefix_tokens")
        rates = ("request_rate", "request_rates", "total_request_rate", "zipf_exponent")
        places = [told, lengths, *(adapters if isinstance(adapters, list) else [adapters])]
        brought = ("duration_s", "arrivals", "base_model_request_rate", *rates, *means)
        for key in brought:
            twice = any(isinstance(place, dict) and key in place for place in places)
            require(not twice, f"workload: {key}: the benchmark tells; leave it out")
        require(
            self.detailed == ("lengths" not in told),
            "workload.lengths: the requests' own are saved; leave it out"
            if self.detailed
            else "workload.lengths: the benchmark holds means alone; tell their distribution, as "
            "{distribution: fixed}, or measure it with --save-detailed",
        )
        rate = self.num_prompts / (self.sending_s or 1.0)  # all at once: within a second
        if isinstance(adapters, dict):
            adapters = {**adapters, "total_request_rate": rate, "zipf_exponent": 0}  # all alike
        elif isinstance(adapters, list):
            each = {"request_rate": rate / max(len(adapters), 1)}
            adapters = [one | each if isinstance(one, dict) else one for one in adapters]
        totals = (self.total_input_tokens, self.total_output_tokens)
        tokens: list[float] = [total / self.completed for total in totals]
        if lengths.get("distribution") == "fixed":
            tokens = [round(mean) for mean in tokens]
        return {
            **told,
            "duration_s": LONGEST_S,
            "adapters": adapters,
            "lengths": {**lengths, **dict(zip(means, tokens, strict=False))},
            "base_model_request_rate": 0.0 if adapters else rate,
        }


def read_benchmark(content: Mapping[str, Any], path: str | Path) -> Benchmark:
    """Read one result of ``vllm bench serve``; raises `AdapterTwinError` where a field is wrong."""
    known = {field.name for field in fields(Benchmark)} - {"detailed"}
    told = {name: value for name, value in content.items() if name in known}
    return read(Benchmark, told | {"detailed": bool(content.get("start_times"))}, str(path))


@keys
class _Saved(TypedDict):
    start_times: list[float]
    input_lens: list[Tokens]
    output_lens: list[Tokens]


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file: one, or one a line (``--append-result``).

    Raises
    ------
    AdapterTwinError
        The file cannot be read, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise AdapterTwinError(f"{path}: {reason}; give a benchmark's JSON") from None
    try:
        found = [json.loads(text)]
    except (ValueError, RecursionError):
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise AdapterTwinError(f"{path}: not valid JSON; give a benchmark's result") from None
    objects = bool(found) and all(isinstance(one, dict) for one in found)
    require(objects, f"{path}: holds no JSON object; give a benchmark's result")
    return found


def requests_of_results(path: str | Path) -> pd.DataFrame:
    """Return the requests in a JSON file of ``vllm bench serve`` or guidellm, as rows of a log.

    Raises
    ------
    AdapterTwinError
        It holds several benchmarks, not all of its requests, or is of another kind.
    """
    results = read_results(path)
    benchmarks = [one for result in results for one in result.get("benchmarks", [result])]
    require(
        len(benchmarks) == 1,
        f"{path}: holds {len(benchmarks)} benchmarks, each of other traffic; give a file of one",
    )
    (content,) = benchmarks
    if "benchmarks" in results[0]:
        return _guidellm_requests(content, path)
    require(
        "model_id" in content,
        f"{path}: is no result of `vllm bench serve` or guidellm; of AIPerf give the "
        "profile_export.jsonl",
    )
    return vllm_requests(content, path)


def vllm_requests(content: Mapping[str, Any], path: str | Path) -> pd.DataFrame:
    """Return the requests of a detailed result of ``vllm bench serve``, from the first answered.

    Raises
    ------
    AdapterTwinError
        It does not hold when each was sent.
    """
    import pandas as pd

    for name in VLLM_COLUMNS:
        require(
            bool(content.get(name)),
            f"{path}: holds no {name}; save the benchmark with --save-detailed, with a vLLM that "
            "saves start_times",
        )
    read(_Saved, {name: content[name] for name in VLLM_COLUMNS}, str(path))
    lists = {own: content[name] for name, own in VLLM_COLUMNS.items()}
    sizes = {len(values) for values in lists.values()}
    require(len(sizes) == 1, f"{path}: its lists differ in length; save the benchmark again")
    frame = pd.DataFrame(lists)
    empty = (frame["prompt_tokens"] == 0) & (frame["output_tokens"] > 0)
    require(not empty.any(), f"{path}: input_lens: no prompt is empty; save the benchmark again")
    answered_s = frame["arrival_s"][frame["output_tokens"] > 0]  # its clock starts anywhere
    return frame.assign(arrival_s=frame["arrival_s"] - answered_s.min())


def _guidellm_requests(content: Any, path: str | Path) -> pd.DataFrame:
    import pandas as pd

    kinds = content.get("requests") if isinstance(content, dict) else None
    rows = kinds.get("successful") if isinstance(kinds, dict) else None
    require(isinstance(rows, list) and bool(rows), f"{path}: holds no successful requests")
    assert isinstance(rows, list)
    totals = {**content, **(content.get("metrics") or {})}.get("request_totals") or {}
    total = totals.get("successful", len(rows))
    require(
        len(rows) == total,
        f"{path}: holds {len(rows)} of {total} requests; save all of them (guidellm's sample size)",
    )
    frame = pd.DataFrame(rows)
    began = "request_start_time" if "request_start_time" in frame else "start_time"
    return frame.rename(columns={began: "arrival_s"})


def aiperf_requests(frame: pd.DataFrame) -> pd.DataFrame:
    """Return AIPerf's records as rows of a log; warm-up is left out, what failed has no output.

    Parameters
    ----------
    frame : pandas.DataFrame
        Columns ``metadata`` and ``metrics``, of mappings.
    """
    import pandas as pd

    records: Any = frame[["metadata", "metrics"]].to_dict("records")
    rows = pd.json_normalize(records).rename(columns=AIPERF_COLUMNS)
    if "metadata.benchmark_phase" in rows:
        rows = rows[rows["metadata.benchmark_phase"] == "profiling"]
    return rows.assign(arrival_s=rows["arrival_s"] / 1e9) if "arrival_s" in rows else rows
