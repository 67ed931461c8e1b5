"""Keys of the files that verbs read, from their dataclasses: for `init`, help and the book."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

READS = {
    "simulate": "adapter_twin.workload.scenario.Scenario",
    "recommend": "adapter_twin.plan.demand.Demand",
    "place": "adapter_twin.plan.demand.Demand",
    "optimum": "adapter_twin.workload.scenario.Slo",
    "sweep": "adapter_twin.learn.design.Design",
    "profile": "adapter_twin.measure.campaign.Campaign",
    "prove": "adapter_twin.prove.rivals.Study",
}
"""The file of a verb holds the attributes of this class."""

LOG = "Path of a table of requests, in place of their rates, lengths and arrivals."
TURNS = "Conversations, as for simulate."
SAMPLES = "Of each prompt, as for simulate."
GPU = (
    "In place of a calibration: a GPU of data/gpus, as l40s or l40s-vllm0.8.5. Where the model "
    "was not measured there, a prior."
)
DEFAULTS = "study or vllm: whose defaults the flags take that are left out."
ELSEWHERE: Mapping[str, Mapping[str, Mapping[str, tuple[str, Any]]]] = {
    "Scenario": {
        "engine": {"defaults": (DEFAULTS, "study"), "policy": ("A scheduler.", "vllm")},
        "": {"gpu": (GPU, None)},
    },
    "Demand": {
        "engine": {"defaults": (DEFAULTS, "study")},
        "": {
            "gpu": (GPU, None),
            "request_log": (LOG, None),
            "sessions": (TURNS, None),
            "samples": (SAMPLES, 1),
        },
        "kinds": {"gpu": (GPU, None)},
    },
}
"""Loaders take keys, under ``engine`` or at the top, that the class does not have there."""

MODEL = {"model": "llama-3.1-8b-instruct"}
SLO = {"slo": {"ttft_ms": 2000, "itl_ms": 100}}
TRAFFIC = {
    "adapters": [
        {"name": "customer-a", "rank": 16, "request_rate": 0.4},
        {"name": "customer-b", "rank": 8, "request_rate": 0.1},
    ],
    "lengths": {"distribution": "sharegpt", "mean_input_tokens": 223, "mean_output_tokens": 198},
}
START: Mapping[str, Mapping[str, Any]] = {
    "recommend": {**MODEL, **TRAFFIC, **SLO},
    "simulate": {
        "engine": {**MODEL, "max_loras": 2, "max_cpu_loras": 2},
        "workload": {**TRAFFIC, "duration_s": 600},
        **SLO,
    },
}
"""A new file for a verb holds these values, and its other keys are off."""

WIDTH = 88
"""Its comments are as wide, in characters."""


class Key(NamedTuple):
    """One key of a file."""

    name: str
    about: str
    default: Any
    held: Mapping[str, Any]  # what it may hold, as JSON Schema has it
    needed: bool = False
    keys: tuple[Key, ...] = ()  # of the mapping, or the list of such, that it holds

    @property
    def several(self) -> bool:
        """Whether it holds a list."""
        return "items" in self.held


def keys_of(verb: str) -> tuple[Key, ...]:
    """Return the keys of the file that a verb reads."""
    module, _, name = READS[verb].rpartition(".")
    kind = TypeAdapter(getattr(import_module(module), name))
    schema = kind.json_schema(schema_generator=_Documented)
    return _keys(schema, schema.get("$defs", {}), ELSEWHERE.get(name, {}))


class _Documented(GenerateJsonSchema):
    """Describes fields by the attributes in the docstring of their class."""

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        made = super().dataclass_schema(schema)
        told = _attributes(schema["cls"])
        for name, field in made["properties"].items():
            field.setdefault("description", told.get(name, ""))
        return made


def _attributes(kind: type) -> dict[str, str]:
    """Return what numpydoc says of a class's attributes, those that it inherits among them."""
    told = {}
    for base in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes\n----------\n")
        section = section.partition("\n\n")[0]
        for names, text in re.findall(r"^(\w[\w, ]*?) ?:.*((?:\n +.*)*)", section, re.MULTILINE):
            words = re.sub(r"`+(?:adapter_twin[\w.]*\.)?([^`]+)`+", r"\1", " ".join(text.split()))
            told.update(dict.fromkeys(names.split(", "), words))
    return told


def _keys(
    owner: Mapping[str, Any], defs: Mapping[str, Any], elsewhere: Mapping[str, Any], place: str = ""
) -> tuple[Key, ...]:
    """Return the keys of a mapping, and those that its loader takes there as well."""
    keys = []
    for name, field in owner["properties"].items():
        if name in elsewhere.get("engine", ()):
            continue
        held = next(one for one in field.get("anyOf", [field]) if one.get("type") != "null")
        inner = held.get("items", held).get("$ref", "").rpartition("/")[2]
        key = Key(
            name=name,
            about=field.get("description", ""),
            default=field.get("default", held.get("minimum", held.get("enum", [None])[0])),
            held=held,
            needed=name in owner.get("required", ()),
            keys=_keys(defs[inner], defs, elsewhere, name) if inner else (),
        )
        keys.append(key)
    besides = elsewhere.get(place, {})
    return (*keys, *(Key(name, about, default, {}) for name, (about, default) in besides.items()))


def outline(keys: tuple[Key, ...]) -> str:
    """Return the names of keys in a line, those with a star needed."""
    return ", ".join(
        key.name + "*" * key.needed + (f" ({outline(key.keys)})" if key.keys else "")
        for key in keys
    )


def template(verb: str, target: str) -> str:
    """Return a file for a verb of `START`: every key with its meaning."""
    head = (
        f"# For: adapter-twin {verb} {target}\n"
        "# A key right behind a # is off, and shows its default: take the # away to set it.\n"
    )
    return "\n".join([head, *_lines(keys_of(verb), START[verb])]) + "\n"


def _lines(keys: tuple[Key, ...], given: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines of a mapping; without `given` all keys are on, with their defaults."""
    before = ""
    for key in keys:
        is_on = given is None or key.name in given
        value = given[key.name] if given and is_on else key.default
        choices = key.held.get("enum")
        about = f"{key.about} ({' | '.join(choices)})" if choices else key.about
        if key.about != before:
            yield from (f"# {line}" for line in textwrap.wrap(about, WIDTH))
        before = key.about
        lines = [f"{key.name}: {json.dumps(value)}"]
        if key.keys:
            lines = [f"{key.name}:", *_block(key, value if given and is_on else None)]
        yield from (line if is_on else f"#{line}" for line in lines)


def _block(key: Key, value: Any) -> Iterator[str]:
    """Yield what a key holds, further in: a mapping, or a list whose first one is explained."""
    first, *others = value if key.several and value else [value]
    lines = [f"  {line}" for line in _lines(key.keys, first)]
    yield from [f"-{lines[0][1:]}", *lines[1:]] if key.several else lines
    for other in others:
        yield f"- {{{', '.join(f'{name}: {json.dumps(one)}' for name, one in other.items())}}}"
