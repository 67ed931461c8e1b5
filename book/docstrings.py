"""Sphinx extension: the package's docstrings as the reference pages need them."""

import os
import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc import DataDocumenter

os.environ["NUMBA_DISABLE_JIT"] = "1"  # autodoc sees plain functions only

FIELD_OF_TUPLE = "Alias for field number"
SEVERAL = re.compile(r"(\w+(?:, \w+)+) : (.+)")


class ConstantDocumenter(DataDocumenter):
    """Documents constants, with the value where it is a number or a word."""

    def should_suppress_value_header(self) -> bool:
        """Keep long values off the page, and paths of the machine that builds it."""
        return not isinstance(self.object, int | float | str)


def split_names(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Give each of ``a, b : type`` a line of its own, as napoleon reads attributes."""
    for at, line in reversed(list(enumerate(lines))):
        if found := SEVERAL.fullmatch(line):
            lines[at : at + 1] = [f"{one} : {found[2]}" for one in found[1].split(", ")]


def keep_colons(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Undo that napoleon takes a constant's ``words: more words`` for ``type: words``."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what in ("data", "attribute", "property") and types:
        lines.remove(types[0])
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def skip_fields(
    app: Sphinx, what: str, name: str, thing: object, skip: bool, options: object
) -> bool | None:
    """Leave out a named tuple's fields: our words on them are in the class's docstring."""
    return True if str(thing.__doc__).startswith(FIELD_OF_TUPLE) else None


def where_defined(
    app: Sphinx, env: BuildEnvironment, reference: Any, shown: nodes.Element
) -> nodes.Element | None:
    """Lead from a name that a module has imported to where it is defined."""
    try:
        found = getattr(import_module(reference["py:module"]), reference["reftarget"])
        target = f"{found.__module__}.{found.__qualname__}"
    except (AttributeError, KeyError, TypeError):
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, reference["refdoc"], app.builder, "obj", target, reference, shown
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Run before napoleon (500), which reads the docstrings' sections, and after it."""
    app.add_autodocumenter(ConstantDocumenter, override=True)
    app.connect("autodoc-process-docstring", split_names, priority=400)
    app.connect("autodoc-process-docstring", keep_colons, priority=900)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", where_defined)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
