"""Read public traces of ten million made-up rows: ``python -m benchmarks.logs``.

A day in the columns of the Azure LLM inference trace of 2024, and a month in those of BurstGPT;
each is read in a process of its own, whose peak memory is told.
"""

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from adapter_twin.workload.request_log import read_requests
from benchmarks.__main__ import verdict

ROWS = 10_000_000
BAR_S = 30.0
BAR_GIB = 2.0


def azure_day(rng: np.random.Generator) -> pa.Table:
    """Return a day of requests, dated to the microsecond."""
    time_us = np.sort(rng.integers(0, 86_400_000_000, ROWS))
    begin = np.datetime64("2024-05-10T00:00:00", "us")
    return pa.table({"TIMESTAMP": begin + time_us, **lengths(rng, "ContextTokens GeneratedTokens")})


def burstgpt_month(rng: np.random.Generator) -> pa.Table:
    """Return a month of requests, in seconds, of which some were not answered."""
    tokens = lengths(rng, "Request tokens,Response tokens", ",")
    answered = rng.random(ROWS) > 0.02
    tokens["Response tokens"] = tokens["Response tokens"] * answered
    return pa.table(
        {
            "Timestamp": np.sort(rng.integers(0, 30 * 86_400, ROWS)).astype(float),
            "Model": pa.array(["ChatGPT", "GPT-4"]).take(rng.integers(0, 2, ROWS)),
            **tokens,
            "Total tokens": sum(tokens.values()),
            "Log Type": pa.repeat("Conversation log", ROWS),
        }
    )


def lengths(rng: np.random.Generator, names: str, between: str = " ") -> dict[str, np.ndarray]:
    """Return log-normal lengths of prompts and outputs, in tokens."""
    return {name: 1 + rng.lognormal(5, 1, ROWS).astype(int) for name in names.split(between)}


def read(path: Path) -> tuple[int, float, float]:
    """Return the requests of a log, the time that reading took, and the process's peak in GiB."""
    begun_s = time.perf_counter()
    requests = len(read_requests(path).arrival_s)
    took_s = time.perf_counter() - begun_s
    return requests, took_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    for make in (azure_day, burstgpt_month):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{make.__name__}.csv"
            # each in a process of its own: the rows made here are not the reader's memory
            alone = multiprocessing.get_context("spawn")
            with alone.Pool(1) as maker:
                maker.apply(write, (make.__name__, path))
            with alone.Pool(1) as reader:
                requests, took_s, peak_gib = reader.apply(read, (path,))
        holds = verdict(took_s <= BAR_S and peak_gib <= BAR_GIB)
        print(
            f"{make.__name__}: {requests:,} of {ROWS:,} rows in {took_s:.1f} s (bar {BAR_S:g} s), "
            f"{peak_gib:.2f} GiB (bar {BAR_GIB:g} GiB) {holds}"
        )


def write(name: str, path: Path) -> None:
    """Write one of the two logs."""
    make = {made.__name__: made for made in (azure_day, burstgpt_month)}[name]
    csv.write_csv(make(np.random.default_rng(0)), path)


if __name__ == "__main__":
    main()
