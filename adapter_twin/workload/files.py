"""Configurations as they reach the twin: a YAML file, or a row of a runs table."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.workload.adapter_folders import resolve
from adapter_twin.workload.adapters import Adapter, deal_adapters, zipf_adapters
from adapter_twin.workload.benchmark_clients import Benchmark
from adapter_twin.workload.calibration_files import complete, take_gpu
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.request_log import read_requests
from adapter_twin.workload.scenario import Scenario, Slo, check_ranks
from adapter_twin.workload.serve_command import lora_modules, read_command
from adapter_twin.workload.strict import read
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload

if TYPE_CHECKING:
    import pandas as pd

LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Where PyYAML was built with libyaml, that one reads a dozen times as fast."""

MOST_VALUES = 20_000_000
"""A file holds no more values, those of repeated aliases counted again."""

DEFAULT_DURATION_S = 3600.0
DEFAULT_MEAN_INPUT_TOKENS = 223.0
DEFAULT_MEAN_OUTPUT_TOKENS = 198.0
"""Runs that failed to start take window and mean lengths of the reference campaign."""

DEFAULT_BATCHED_TOKENS = 2048
"""Rows that do not tell the engine's token budget take this."""


def load_scenario(
    path: str | Path,
    vllm_args: str | None = None,
    benchmark: Benchmark | None = None,
    calibration: str = "auto",
) -> Scenario:
    """Read a ``CONFIG.yaml``.

    Adapters are a list of ``{name, rank, request_rate}``, with ``pinned: true`` where one is, or
    one of the short forms ``{count, request_rates, ranks}``, ``{count, total_request_rate,
    zipf_exponent, ranks}`` and ``{traffic_split: {name: share}, total_request_rate, ranks}``; for
    folders and tables of them see `adapter_twin.workload.adapter_folders`. The path of a trace is
    relative to the file; beside one, rates and ``lengths`` may be left out. ``engine.policy`` is
    the name of a policy, or ``{name, ...}`` with its parameters; for ``engine.defaults`` see
    `adapter_twin.workload.calibration_files.complete`, for ``gpu`` its
    `adapter_twin.workload.calibration_files.take_gpu`.

    Parameters
    ----------
    path : path-like
    vllm_args : str, optional
        A ``vllm serve`` command line in place of the file's engine, of which the model is kept
        where the command names none, and the policy. The adapters of its ``--lora-modules`` are
        the file's, which then needs only their rates.
    benchmark : Benchmark, optional
        Tells the traffic in place of the file.
    calibration : str
        In place of the file's, which then has none.

    Raises
    ------
    AdapterTwinError
        The file cannot be read, is no YAML, or has an unknown, missing or wrong key, which the
        message names by its path.
    """
    content = read_yaml(Path(path))
    if isinstance(content, dict):
        take_gpu(content)
        if calibration != "auto":
            told = content.setdefault("calibration", calibration)
            same = told in ("auto", calibration)
            require(same, f"calibration: the file has {told!r}; leave one of the two out")
            content["calibration"] = calibration
        require("policy" not in content, "policy: unknown key; did you mean engine.policy?")
        engine = content.get("engine", {} if vllm_args else None)
        if isinstance(engine, dict):
            if "policy" in engine:
                content["policy"] = engine.pop("policy")
            calibration = str(content.get("calibration", "auto"))
            if vllm_args is not None:
                engine = asdict(read_command(vllm_args, engine.get("model"), calibration))
            elif "defaults" in engine:
                engine = complete(engine, calibration, str(engine.get("model")))
            content["engine"] = engine
            model, workload = str(engine.get("model")), content.get("workload")
            if isinstance(workload, dict):
                _take_from_trace(workload, Path(path).parent)
            if isinstance(workload, dict) and "adapters" in workload:
                named = lora_modules(vllm_args) if vllm_args else {}
                told = workload["adapters"]
                workload["adapters"] = resolve(told, Path(path), model, named, "workload.adapters")
            if benchmark is not None:
                told = workload if isinstance(workload, dict) else {}
                content["workload"] = benchmark.workload(told, model)
    scenario = read(Scenario, content)
    trace = scenario.workload.arrivals.path
    if trace is None:
        return scenario
    arrivals = replace(scenario.workload.arrivals, path=str(Path(path).parent / trace))
    return replace(scenario, workload=replace(scenario.workload, arrivals=arrivals))


def _take_from_trace(workload: dict[str, Any], folder: Path) -> None:
    """Fill in what a workload leaves out beside a trace: its mean lengths, and no rates."""
    arrivals, adapters = workload.get("arrivals"), workload.get("adapters")
    if not isinstance(arrivals, dict) or arrivals.get("process") != "trace":
        return
    if "lengths" not in workload and isinstance(arrivals.get("path"), str):
        log = read_requests(folder / arrivals["path"])
        means = float(log.prompt_tokens.mean()), float(log.output_tokens.mean())
        names = ("mean_input_tokens", "mean_output_tokens")
        workload["lengths"] = dict(zip(names, means, strict=True))
    if isinstance(adapters, dict) and not {"request_rates", "total_request_rate"} & adapters.keys():
        adapters["request_rates"] = [0]
    for one in adapters if isinstance(adapters, list) else ():
        if isinstance(one, dict):
            one.setdefault("request_rate", 0)


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file, the path of a calibration relative to its folder.

    Raises
    ------
    AdapterTwinError
        It cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise AdapterTwinError(f"{file}: {reason}; give a YAML file that can be read") from None
    try:
        content = yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: 2024-13-01 is no date
        mark, reason = getattr(error, "problem_mark", None), one_line(error)
        if mark is not None:
            place = f"line {mark.line + 1}, column {mark.column + 1}"
            reason = f"{place}: {getattr(error, 'problem', error)}"
        raise AdapterTwinError(f"{file}: not valid YAML ({reason}); correct it") from None
    require(content is not None, f"{file}: the file is empty; adapter-twin init writes one")
    size = _count_values(content, {})
    require(size < math.inf, f"{file}: refers to itself; write it out")
    require(size <= MOST_VALUES, f"{file}: its aliases stand for {size:.0e} values; write fewer")
    calibration = content.get("calibration") if isinstance(content, dict) else None
    if isinstance(calibration, str) and calibration.endswith(".json"):
        content["calibration"] = os.path.normpath(file.parent / calibration)
    return content


def _count_values(content: Any, counted: dict[int, float]) -> float:
    """Return the number of values in nested lists and mappings, infinite if one holds itself."""
    if isinstance(content, str):
        at = next((one for one in content if ord(one) < 32 and not one.isspace()), None)
        require(at is None, f"{content[:40]!r}: holds the control character {at!r}; leave it out")
    if not isinstance(content, (list, dict, set)):
        return 1
    if id(content) not in counted:
        counted[id(content)] = math.inf
        parts = [*content, *content.values()] if isinstance(content, dict) else content
        counted[id(content)] = 1 + sum(_count_values(part, counted) for part in parts)
    return counted[id(content)]


def parse_rates(text: object, name: str = "rates_per_adapter") -> tuple[float, ...]:
    """Parse a `rates_per_adapter` cell, or an option of that kind.

    >>> parse_rates("0.1-0.05-0.025")
    (0.1, 0.05, 0.025)
    """
    rates: tuple[float, ...] = _parse(name, text, float, "0.1-0.05-0.025")
    require(all(map(math.isfinite, rates)), f"{name}: {text!r} holds a value that is not finite")
    return rates


def parse_ranks(text: object) -> tuple[int, ...]:
    """Parse a `ranks` cell.

    >>> parse_ranks("8-16")
    (8, 16)
    """
    return _parse("ranks", text, int, "8-16")


def parse_grid(name: str, text: str) -> tuple[int, ...]:
    """Parse a grid of whole numbers as options give it.

    >>> parse_grid("slots_grid", "8,16,32")
    (8, 16, 32)
    """
    return _parse(name, text, int, "8,16,32")


def _parse(name: str, text: object, number: type[Any], example: str) -> tuple[Any, ...]:
    separator = "," if "," in example else "-"
    try:
        return tuple(number(part) for part in str(text).split(separator))
    except ValueError:
        kind = "whole numbers" if number is int else "numbers"
        raise AdapterTwinError(
            f"{name}: expected {kind} joined by {separator!r}, as in {example!r}, got {text!r}"
        ) from None


def load_slo(path: str | Path) -> Slo:
    """Read a YAML file with the keys of `adapter_twin.workload.scenario.Slo`."""
    return read(Slo, read_yaml(Path(path)))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table, by column name."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def run_to_workload(
    row: Mapping[str, Any], adapters: tuple[Adapter, ...] | None = None
) -> tuple[EngineConfig, Workload]:
    """Turn the configuration columns of one run into what the twin takes.

    Parameters
    ----------
    row : mapping
        ``model, rates_per_adapter, ranks, served_adapters, adapter_slots, max_lora_rank,
        max_num_seqs, duration_s, mean_input_tokens, mean_requested_output_tokens``; ``run_id`` for
        messages. There may be other flags of the engine
        (`adapter_twin.workload.engine_config.ServeFlags`), in a campaign of one's own
        ``length_distribution, length_cv`` and the path of a ``request_log`` that is replayed, in a
        sweep ``zipf_exponent, arrival_cv``. Nothing else is read.
    adapters : tuple of Adapter, optional
        Stand in for those that the row tells.

    Raises
    ------
    AdapterTwinError
        A missing column or a value out of range; the message names the run and the column.
    """
    try:
        engine, workload = run_to_engine(row), _workload(row, adapters)
        check_ranks(engine, workload)
        return engine, workload
    except AdapterTwinError as error:
        run = f"run {row['run_id']}: " if "run_id" in row else ""
        raise AdapterTwinError(f"{run}{error}") from None


def run_seed(row: Mapping[str, Any]) -> int | None:
    """Return the seed of a run's load generator, where its row tells one."""
    seed = _whole(row, "seed", -1)
    return None if seed < 0 else seed


def run_to_engine(row: Mapping[str, Any]) -> EngineConfig:
    """Turn the configuration columns of one run, or of a start, into the engine's flags.

    Parameters
    ----------
    row : mapping
        ``model, adapter_slots, max_lora_rank``, and ``served_adapters`` and the flags of
        `adapter_twin.workload.engine_config.ServeFlags` as far as they are told.
    """
    slots = _whole(row, "adapter_slots")
    told = {flag.name: _flag(row.get(flag.name)) for flag in fields(ServeFlags)}
    flags = {name: value for name, value in told.items() if value is not None}
    # where it is not told, the budget may not be smaller than max_num_seqs
    least = flags.get("max_num_seqs", 0)
    budget = max(DEFAULT_BATCHED_TOKENS, least) if isinstance(least, int) else least
    engine: dict[str, Any] = {
        "model": str(_cell(row, "model")),
        "max_loras": slots,
        "max_cpu_loras": _whole(row, "served_adapters", max(slots, 1)),
        "max_lora_rank": _whole(row, "max_lora_rank"),
        "max_num_batched_tokens": budget,
    }
    return EngineConfig(**engine | flags)


def _flag(cell: Any) -> Any:
    """Return a flag's value, None where its cell is empty; tables keep whole numbers as floats."""
    value = cell.item() if hasattr(cell, "item") else cell
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _workload(row: Mapping[str, Any], adapters: tuple[Adapter, ...] | None) -> Workload:
    arrival_cv, log = _setting(row, "arrival_cv", 1.0), row.get("request_log")
    arrivals = Arrivals() if arrival_cv == 1 else Arrivals(process="gamma", cv=arrival_cv)
    if isinstance(log, str):
        arrivals = Arrivals(process="trace", path=log)
    return Workload(
        adapters=_adapters(row) if adapters is None else adapters,
        duration_s=_number(row, "duration_s", DEFAULT_DURATION_S),
        lengths=Lengths(
            mean_input_tokens=_number(row, "mean_input_tokens", DEFAULT_MEAN_INPUT_TOKENS),
            mean_output_tokens=_number(
                row, "mean_requested_output_tokens", DEFAULT_MEAN_OUTPUT_TOKENS
            ),
            distribution=row.get("length_distribution", "sharegpt"),
            cv=_setting(row, "length_cv", 1.0),
        ),
        arrivals=arrivals,
    )


def _adapters(row: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """Deal rates and ranks; with a Zipf exponent, the one rate is the adapters' mean."""
    count, ranks = _whole(row, "served_adapters"), parse_ranks(_cell(row, "ranks"))
    rates = parse_rates(_cell(row, "rates_per_adapter"))
    exponent = _setting(row, "zipf_exponent", 0.0)
    if exponent == 0:
        return deal_adapters(count, rates, ranks)
    require(len(rates) == 1, "rates_per_adapter: with a zipf_exponent give one rate, the mean")
    return zipf_adapters(count, count * rates[0], exponent, ranks)


def _cell(row: Mapping[str, Any], column: str) -> Any:
    require(column in row, f"{column}: the column is missing; add it to the table")
    return row[column]


def _number(row: Mapping[str, Any], column: str, default: float = math.nan) -> float:
    """Return a cell as a float, or `default` where it is empty; without one that is an error."""
    cell = _cell(row, column)
    try:
        value = math.nan if cell is None else float(cell)
    except (TypeError, ValueError):
        raise AdapterTwinError(f"{column}: expected a number, got {cell!r}") from None
    value = default if math.isnan(value) else value
    require(not math.isnan(value), f"{column}: is empty; give a number")
    return value


def _setting(row: Mapping[str, Any], column: str, default: float) -> float:
    """Return a number, or `default` where there is no such column or the cell is empty."""
    return _number(row, column, default) if column in row else default


def _whole(row: Mapping[str, Any], column: str, default: float | None = None) -> int:
    """Return a whole number; with a `default`, the column may be missing or the cell empty."""
    value = _number(row, column) if default is None else _setting(row, column, default)
    require(float(value).is_integer(), f"{column}: expected a whole number, got {value}")
    return int(value)
