"""A real ``vllm serve`` command line, read as an engine."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.workload.calibration_files import complete
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.strict import read

_SHORT = {"-tp": "tensor_parallel_size"}
_FLAGS = {flag.name: str(flag.type) for flag in fields(EngineConfig) if flag.name != "model"}
_NO_EFFECT = (
    *("host", "port", "api_key", "served_model_name", "uvicorn_log_level", "allowed_origins"),
    *("disable_log_requests", "no_enable_log_requests", "disable_log_stats", "chat_template"),
    *("download_dir", "trust_remote_code", "tokenizer", "hf_token", "root_path", "ssl_keyfile"),
    *("ssl_certfile", "enable_auto_tool_choice", "tool_call_parser", "reasoning_parser", "seed"),
    *("revision", "response_role", "max_log_len", "load_format", "distributed_executor_backend"),
)
"""Flags that change nothing of what the twin tells."""
_MULTIPLES = dict(zip("kKmMgGtT", (b**e for e in (1, 2, 3, 4) for b in (1000, 1024)), strict=True))


def read_command(command: str, model: str | None = None, calibration: str = "auto") -> EngineConfig:
    """Return the engine that a command line starts.

    Parameters
    ----------
    command : str
        ``vllm serve MODEL --flag value ...``, or its flags alone.
    model : str, optional
        Where the command names none.
    calibration : str
        On whose GPU and version of vLLM it starts: flags left out take vLLM's own defaults there.

    Raises
    ------
    AdapterTwinError
        A flag is not known here, or has no value or a wrong one.

    Examples
    --------
    >>> flags = "--enable-lora --max-loras 8 --max-model-len 8k"
    >>> read_command(f"vllm serve meta-llama/Llama-3.1-8B-Instruct {flags}").max_model_len
    8000
    """
    named, flags = parse_flags(_words(command))
    model = named or model
    require(model is not None, "vllm_args: the command names no model; add it after `vllm serve`")
    assert model is not None
    if not flags.pop("enable_lora", False):
        flags["max_loras"] = 0
    engine = complete({"max_loras": 1, **flags, "defaults": "vllm"}, calibration, model)
    return read(EngineConfig, {"model": model, **engine}, "vllm_args")


def _words(command: str) -> list[str]:
    """Return the words of a command line behind ``vllm serve``."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as error:
        raise AdapterTwinError(f"vllm_args: not a command line ({error}); correct it") from None
    while words and (words[0] in ("vllm", "serve") or "=" in words[0].partition("-")[0]):
        words.pop(0)  # and variables in front
    return words


def lora_modules(command: str) -> dict[str, str]:
    """Return the adapters' paths by name that a command line names, ``--lora-modules``.

    Each is ``name=path`` or a JSON object with ``name`` and ``path``, as vLLM takes them; relative
    paths are of the folder in which this runs.

    Raises
    ------
    AdapterTwinError
        One is neither.

    Examples
    --------
    >>> lora_modules("vllm serve m --enable-lora --lora-modules sql=/adapters/sql")
    {'sql': '/adapters/sql'}
    """
    left, found = _words(command), dict[str, str]()
    while left:
        start, left = left, left[1:]
        if start[0].partition("=")[0] not in ("--lora-modules", "--lora_modules"):
            continue
        _, values, left = _next_flag(start)
        for value in values:
            name, _, path = value.partition("=")
            if "," in value:  # vLLM takes it as JSON
                name = path = ""
                with suppress(ValueError, KeyError, TypeError):
                    told = json.loads(value)
                    name, path = str(told["name"]), str(told["path"])
            neither = f"--lora-modules: {value!r} is neither name=path nor JSON with name and path"
            require(bool(name and path), f"{neither}; correct it")
            found[name] = str(Path(path).absolute())
    return found


def parse_flags(words: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Return the model and the flags of ``vllm serve``, as far as they count.

    Parameters
    ----------
    words : sequence of str

    Returns
    -------
    model : str or None
    flags : dict
        Fields of `EngineConfig`, and ``enable_lora``.

    Raises
    ------
    AdapterTwinError
        A flag is not known here.
    """
    left, flags = list(words), dict[str, Any]()
    model = left.pop(0) if left and not left[0].startswith("-") else None
    while left:
        name, value, left = _next_flag(left)
        if name == "model":
            model = None if value is True else str(value)
        elif name == "lora_modules":
            flags[name] = "all"
        elif name == "enable_lora" or name in _FLAGS:
            flags[name] = value
        else:
            _require_without_effect(name, value)
    return model, flags


def _next_flag(words: list[str]) -> tuple[str, Any, list[str]]:
    """Return the first flag's name and value, and the words behind them."""
    first, *rest = words
    word, _, given = first.partition("=")
    name = _SHORT.get(word, word.lstrip("-").replace("-", "_"))
    require(word.startswith("-"), f"{word}: belongs to no flag; leave it out")
    if name.startswith("no_") and name[3:] in (*_FLAGS, "enable_lora"):
        return name[3:], False, rest
    values = [given] if given else []
    while not given and rest and not re.match(r"-+[A-Za-z]", rest[0]):
        values.append(rest.pop(0))
    if not values:
        return name, True, rest
    if name == "lora_modules":
        return name, values, rest
    if _FLAGS.get(name, "").startswith("Some["):
        return name, [part for value in values for part in value.split(",")], rest
    return name, _value(name, values[0] if len(values) == 1 else " ".join(values)), rest


def _value(name: str, text: str) -> Any:
    """Return a value as a flag takes it; whole numbers may end in k, K, M and so on."""
    kind = _FLAGS.get(name, "")
    if "bool" in kind and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if name == "max_model_len" and text.lower() in ("auto", "-1"):
        return None
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text)
    if number is None:
        return text
    value = float(number[1]) * _MULTIPLES.get(number[2], 1)
    return int(value) if value.is_integer() else value


def _require_without_effect(name: str, value: Any) -> None:
    """Refuse a flag that may change what the twin tells."""
    usual = {"dtype": ("auto", "bfloat16", "half", "float16"), "enforce_eager": (False,)}
    if name in _NO_EFFECT or value in usual.get(name, ()):
        return
    flag, near = name.replace("_", "-"), difflib.get_close_matches(name, _FLAGS, n=1)
    remedy = f"did you mean --{near[0].replace('_', '-')}?" if near else "leave it out"
    raise AdapterTwinError(f"--{flag}: what it changes is not known here; {remedy}")
