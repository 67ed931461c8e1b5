"""Logs and public traces of requests, whatever their form, as one table.

Read are ``.csv``, ``.csv.gz``, ``.jsonl`` and ``.parquet`` with a time of arrival, tokens of prompt
and output, and an adapter if there is one, under the names of `NAMES`: a gateway's log, the Azure
LLM inference traces (``TIMESTAMP, ContextTokens, GeneratedTokens``), BurstGPT (``Timestamp, Request
tokens, Response tokens``), Mooncake (milliseconds, ``hash_ids`` of the prompts' blocks) and
Qwen-Bailian. `adapter_twin.workload.log_turns` tells which columns make rows the turns of a
conversation. Other columns are ignored. What benchmark clients save is read as well, ``.json`` and
``.jsonl``, see `adapter_twin.workload.benchmark_clients`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.workload import log_turns
from adapter_twin.workload.benchmark_clients import aiperf_requests, requests_of_results
from adapter_twin.workload.contents import whole_prompts
from adapter_twin.workload.lengths import Floats
from adapter_twin.workload.strict import LONGEST_TOKENS, suggestion

if TYPE_CHECKING:
    import pandas as pd

NAMES = {
    "arrival_s": ("arrival_s", "timestamp", "arrived_at", "arrival_time", "time"),
    "prompt_tokens": (
        *("prompt_tokens", "contexttokens", "request tokens", "input_length", "input_tokens"),
        *("num_prefill_tokens", "prompt_len"),
    ),
    "output_tokens": (
        *("output_tokens", "generatedtokens", "response tokens", "output_length"),
        *("completion_tokens", "num_decode_tokens", "output_len"),
    ),
    "adapter": ("adapter", "adapter_name", "lora", "lora_name"),
}
"""What a column may be called, in any case."""

MOONCAKE_BLOCK_TOKENS = 512
"""A hash of a Mooncake trace stands for this many tokens of a prompt."""

BASE_MODEL = -1
"""The adapter of requests to the base model."""


@dataclass(frozen=True, slots=True)
class RequestLog:
    """Requests in order of arrival.

    Attributes
    ----------
    arrival_s : float64, shape (requests,)
        As it is told; dates are counted from the first request.
    prompt_tokens, output_tokens : int32, shape (requests,)
    adapter : str, shape (requests,), optional
        Names as they are told, empty for the base model; None where there is no such column.
    blocks : list of list, optional
        Hashes of each prompt's blocks of `block_tokens`.
    left_out : int
        Rows without output.
    block_tokens : int
    after : int32, shape (requests,), optional
        Index of the request that each one follows in a conversation, -1 for none.
    think_s : float64, shape (requests,), optional
        Time from its answer.
    """

    arrival_s: Floats
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    adapter: NDArray[Any] | None
    blocks: list[list[int]] | None
    left_out: int
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    after: NDArray[np.int32] | None = None
    think_s: Floats | None = None

    @property
    def gap_cv(self) -> float:
        """How much the gaps between each adapter's own requests vary: 1 for Poisson arrivals."""
        names = np.zeros(len(self.arrival_s)) if self.adapter is None else self.adapter
        adapter = np.unique(names, return_inverse=True)[1]
        order = np.argsort(adapter, kind="stable")
        own = np.flatnonzero(np.diff(adapter[order]) == 0)
        gaps_s, of = np.diff(self.arrival_s[order])[own], adapter[order][own]
        total_s, count = np.bincount(of, gaps_s), np.bincount(of)
        told = total_s[of] > 0
        relative = gaps_s[told] / (total_s / np.maximum(count, 1))[of[told]]
        return float(relative.std()) if len(relative) else 1.0

    def describe(self, window_s: float = 3600.0) -> dict[str, Any]:
        """Return what the log holds: how many requests, how long, how bursty, of which adapters.

        Parameters
        ----------
        window_s : float
            The busiest stretch of this length is named.

        Returns
        -------
        dict
            ``requests``, ``left_out``, ``span_s``, ``request_rate``, `gap_cv`; mean, median and
            p99 of ``prompt_tokens`` and ``output_tokens``;
            ``adapters`` (None where it names none), ``top_adapter``, ``top_share`` and
            ``base_model_share``; ``busiest_from_s`` and the ``busiest_request_rate`` there;
            ``shared_prefixes``, whether hashes tell what prompts share; ``sessions``, how many
            conversations there are, None where no column tells.
        """
        n, span_s = len(self.arrival_s), float(np.ptp(self.arrival_s))
        held = np.searchsorted(self.arrival_s, self.arrival_s + window_s) - np.arange(n)
        busiest = int(held.argmax())
        told: dict[str, Any] = {
            "requests": n,
            "left_out": self.left_out,
            "span_s": span_s,
            "request_rate": n / span_s if span_s else None,
            "gap_cv": self.gap_cv,
        }
        for name in ("prompt_tokens", "output_tokens"):
            tokens = getattr(self, name)
            told |= {
                f"mean_{name}": float(tokens.mean()),
                f"median_{name}": float(np.median(tokens)),
                f"p99_{name}": float(np.percentile(tokens, 99)),
            }
        names, counts = np.unique([] if self.adapter is None else self.adapter, return_counts=True)
        is_adapter = ~np.isin(names, ("", "-1"))
        top = int(np.where(is_adapter, counts, -1).argmax()) if is_adapter.any() else None
        return {
            **told,
            "adapters": None if self.adapter is None else int(is_adapter.sum()),
            "top_adapter": None if top is None else str(names[top]),
            "top_share": None if top is None else float(counts[top] / n),
            "base_model_share": float(counts[~is_adapter].sum() / n),
            "busiest_from_s": float(self.arrival_s[busiest]),
            "busiest_request_rate": float(held[busiest] / window_s),
            "shared_prefixes": self.blocks is not None,
            "sessions": None if self.after is None else int((self.after < 0).sum()),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return the log in the common form: seconds, tokens, and adapters by name if told."""
        import pandas as pd

        columns: dict[str, Any] = {
            "arrival_s": self.arrival_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
        }
        told = {} if self.adapter is None else {"adapter": self.adapter}
        hashes = {} if self.blocks is None else {"hash_ids": self.blocks}
        if self.after is not None:
            columns |= {"chat_id": np.arange(len(self.arrival_s)), "parent_chat_id": self.after}
            columns["think_s"] = self.think_s
        return pd.DataFrame(columns | told | hashes)

    def indices(self, names: Sequence[str], path: str | Path) -> NDArray[np.int32] | None:
        """Return each request's adapter as an index, `BASE_MODEL` for the base model.

        A number that is no name is an index. None where the log tells no adapters.

        Parameters
        ----------
        names : sequence of str
            Of the workload's adapters.
        path : path-like
            Of the log, for messages.

        Raises
        ------
        AdapterTwinError
            An adapter is not among them.
        """
        if self.adapter is None:
            return None
        told, seen, inverse = np.unique(self.adapter, return_index=True, return_inverse=True)
        places = {name: k for k, name in enumerate(names)}
        strange = [name for name in told[np.argsort(seen)] if not _is_number(name)]
        if strange and len(strange) <= len(names) and not places.keys() & set(strange):
            places = dict(zip(strange, range(len(names)), strict=False))
            warnings.warn(
                f"{path}: names none of the workload's adapters; its own, as they appear "
                f"({', '.join(strange[:3])}, ...), stand for them",
                stacklevel=3,
            )
        found = np.array([_index(str(name), places, path) for name in told], np.int32)
        return found[inverse]


def _is_number(name: str) -> bool:
    """Tell an index, or nothing, from a name."""
    return name == "" or name.removeprefix("-").isdecimal()


def _index(name: str, places: dict[str, int], path: str | Path) -> int:
    if name in ("", "-1"):
        return BASE_MODEL
    if name in places:
        return places[name]
    if name.isdecimal():
        index, served = int(name), len(places)
        require(
            index < served or not places,
            f"{path}: adapter {name} is not in the workload, which has {served}; count from 0",
        )
        return index
    raise AdapterTwinError(
        f"{path}: adapter {name!r} is not among the adapters{suggestion(name, places)}"
    )


def read_requests(path: str | Path) -> RequestLog:
    """Read a log or a trace of requests, its rows in any order.

    Raises
    ------
    AdapterTwinError
        The file cannot be read, is empty, lacks a column, or holds a value no request can have.
    """
    frame = _read(Path(path))
    columns = {
        name: next((c for c in frame.columns if str(c).strip().lower() in choices), None)
        for name, choices in NAMES.items()
    }
    texts = {"conversations", "messages", "text_input"} & set(frame.columns)
    require(
        not texts or columns["prompt_tokens"] is not None,
        f"{path}: {min(texts, default='')} holds text; count tokens with the model's tokenizer and "
        "give a row per turn: session_id, arrival_s, prompt_tokens, output_tokens",
    )
    others = [str(column) for column in frame.columns if column not in columns.values()]
    for name, column in columns.items():
        near = difflib.get_close_matches(name, others, n=1)
        if column is None and near:
            raise AdapterTwinError(f"{path}: unknown column {near[0]!r}; did you mean {name!r}?")
        require(
            column is not None or name == "adapter",
            f"{path}: the column {name} is missing; add it, under that name or as one of "
            f"{', '.join(NAMES[name][1:])}",
        )
    used = {*columns.values(), "hash_ids", *log_turns.COLUMNS}
    frame = frame[[column for column in frame.columns if column in used]]  # others take memory
    output = _numbers(frame[columns["output_tokens"]], "output_tokens", path, missing=True)
    answered = output > 0
    frame, output = frame[answered], output[answered]
    require(len(frame) > 0, f"{path}: the trace is empty; give at least one request with output")
    prompt = _numbers(frame[columns["prompt_tokens"]], "prompt_tokens", path)
    arrival_s = _seconds(log_turns.times(frame, str(columns["arrival_s"])), path)
    is_mooncake = str(columns["prompt_tokens"]).lower() == "input_length"
    is_bailian = "parent_chat_id" in frame
    in_ms = "hash_ids" in frame or (is_mooncake and "session_id" in frame)
    if in_ms and not is_bailian and str(columns["arrival_s"]).lower() == "timestamp":
        arrival_s = arrival_s / 1e3
    order = np.argsort(arrival_s, kind="stable")
    frame = frame.iloc[order]
    prompts, outputs = prompt[order].astype(np.int32), output[order].astype(np.int32)
    after = log_turns.predecessors(frame, path)
    if after is not None and is_mooncake and not is_bailian:
        require("hash_ids" not in frame, f"{path}: turns cannot have hash_ids; leave them out")
        prompts = whole_prompts(after, prompts, outputs)  # AIPerf's rows tell what is new
    adapter = columns["adapter"]
    return RequestLog(
        arrival_s=arrival_s[order],
        prompt_tokens=prompts,
        output_tokens=outputs,
        adapter=None if adapter is None else _adapter_names(frame[adapter]),
        blocks=[list(hashes) for hashes in frame["hash_ids"]] if "hash_ids" in frame else None,
        left_out=int((~answered).sum()),
        block_tokens=log_turns.BAILIAN_BLOCK_TOKENS if is_bailian else MOONCAKE_BLOCK_TOKENS,
        after=after,
        think_s=None if after is None else log_turns.delays_s(frame, path),
    )


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    name = path.name.lower()
    try:
        if name.endswith((".csv", ".csv.gz")):
            frame = pd.read_csv(path)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            frame = pd.read_json(path, lines=True, dtype=False)
            if {"metadata", "metrics"} <= set(frame.columns):
                frame = aiperf_requests(frame)
        elif name.endswith(".json"):
            frame = requests_of_results(path)
        else:
            frame = pd.read_parquet(path)
    except AdapterTwinError:
        raise
    # pandas' and Arrow's parse errors are ValueErrors, and columns of several kinds TypeErrors
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise AdapterTwinError(
            f"{path}: cannot be read as a trace ({reason}); give a .csv, .csv.gz, .jsonl, "
            ".parquet or .json of requests"
        ) from None
    require(len(frame) > 0, f"{path}: the trace is empty; give at least one request")
    return frame


def _numbers(
    column: pd.Series[Any], name: str, path: str | Path, *, missing: bool = False
) -> Floats:
    """Return whole numbers of at least one; with `missing`, empty cells and zeros are 0."""
    try:
        values = column.to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise AdapterTwinError(f"{path}: {name} holds text; give numbers") from None
    if missing:
        values = np.nan_to_num(values, nan=0.0, posinf=np.inf)
    lowest = 0 if missing else 1
    fits = (values >= lowest) & (values <= LONGEST_TOKENS) & (values == np.rint(values))
    require(bool(fits.all()), f"{path}: {name} must be a whole number of at least 1 in every row")
    return values


def _seconds(column: pd.Series[Any], path: str | Path) -> Floats:
    """Return times in s: numbers as they are, dates from the first one."""
    import pandas as pd

    if column.dtype.kind in "iuf":
        values = column.to_numpy(np.float64)
        fits = np.isfinite(values) & (values >= 0) & (values < np.iinfo(np.int32).max)
        if np.isfinite(values).all() and values.min() > 1e8:  # since 1970, in s or ms
            values = (values - values.min()) / (1e3 if values.min() > 1e11 else 1.0)
            fits = values < np.iinfo(np.int32).max
        require(bool(fits.all()), f"{path}: arrival_s must be a time of at least 0 in every row")
        return values
    try:
        dates = pd.to_datetime(column, utc=True, format="ISO8601")
    except (ValueError, TypeError):
        raise AdapterTwinError(
            f"{path}: arrival_s holds text that is no date; give seconds or ISO 8601 dates"
        ) from None
    require(bool(dates.notna().all()), f"{path}: arrival_s must be a time in every row")
    return np.asarray((dates - dates.min()).dt.total_seconds(), np.float64)


def _adapter_names(column: pd.Series[Any]) -> NDArray[Any]:
    """Return names as text: 7, not 7.0, and nothing for the base model."""
    return column.convert_dtypes().astype("string").fillna("").to_numpy(object).astype(str)
