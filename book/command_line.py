"""Sphinx extension: the keys of files and of what ``--json`` prints, as tables."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from adapter_twin.cli.keys import Key, keys_of
from adapter_twin.cli.report import in_words

ANSWERS = Path(__file__).with_name("answers.json")
"""`book.answers` makes this file."""

Cells = tuple[str, ...]

NEEDED = "none, needed"
WORDS = {
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "mapping",
}
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class FileKeys(SphinxDirective):
    """``file-keys:: VERB``: the keys of the file that a verb reads."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        rows = file_rows(keys_of(self.arguments[0]))
        return [table(("key", "what it holds", "default", "meaning"), rows)]


class JsonKeys(SphinxDirective):
    """``json-keys:: VERB``: the keys of what a verb prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        self.env.note_dependency(str(ANSWERS))
        rows = json_rows(json.loads(ANSWERS.read_text())[self.arguments[0]])
        return [table(("key", "what it holds", "unit"), rows)]


def file_rows(keys: tuple[Key, ...], place: str = "") -> Iterator[Cells]:
    """Yield the cells of each key, those inside a mapping behind it, with dotted names."""
    for key in keys:
        name = f"{place}{key.name}"
        default = NEEDED if key.needed else "" if key.keys else json.dumps(key.default)
        yield name, holds(key.held), default, key.about
        yield from file_rows(key.keys, f"{name}{'[]' * key.several}.")


def json_rows(schema: Mapping[str, Any], place: str = "") -> Iterator[Cells]:
    """Yield the cells of each key of a JSON Schema."""
    for name, held in schema.get("properties", {}).items():
        kinds = [WORDS.get(kind, kind) for kind in held["type"]]
        missing = [] if name in schema["required"] else ["not always there"]
        unit = in_words(name).partition(", ")[2].replace("%", "share of 1")
        yield f"{place}{name}", ", ".join([" or ".join(kinds), *missing]), unit
        if "items" in held:
            yield from json_rows(held["items"], f"{place}{name}[].")
        yield from json_rows(held, f"{place}{name}.")


def holds(field: Mapping[str, Any]) -> str:
    """Return what a key holds, in words."""
    if "enum" in field:
        return " or ".join(field["enum"])
    if "$ref" in field:
        return "mapping"
    if field.get("type") == "array":
        items = field.get("items") or field["prefixItems"][0]
        return "list of mappings" if "$ref" in items else f"list of {holds(items)}"
    kind = WORDS.get(field.get("type", ""), field.get("type", "text or mapping"))
    limits = [f"{sign} {field[bound]:,.12g}" for bound, sign in SIGNS.items() if bound in field]
    return " ".join([kind, ", ".join(limits)]).strip()


def table(header: Cells, rows: Iterator[Cells]) -> nodes.Node:
    """Return a table in which keys and defaults are code."""
    head, body, group = nodes.thead(), nodes.tbody(), nodes.tgroup(cols=len(header))
    group += [*(nodes.colspec(colwidth=1) for _ in header), head, body]
    for part, cells in ((head, header), *((body, cells) for cells in rows)):
        row = nodes.row()
        for name, cell in zip(header, cells, strict=True):
            is_code = name in ("key", "default") and part is body and cell not in ("", NEEDED)
            kind = nodes.literal if is_code else nodes.inline
            row += nodes.entry("", nodes.paragraph("", "", kind("", cell)))
        part += row
    return nodes.table("", group)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the two directives."""
    app.add_directive("file-keys", FileKeys)
    app.add_directive("json-keys", JsonKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
