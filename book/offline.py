"""Sphinx extension: a page takes MathJax from the book's own files, and only the parts it uses."""

from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

# TeX in, HTML with web fonts out, and MathML for screen readers; no menus, no speech.
PARTS = ("startup.js", "core.js", "input/tex.js", "output/chtml.js", "a11y/assistive-mml.js")
FOLDERS = ("input/tex/extensions", "output/chtml/fonts")


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy the parts from the package `sphinx-mathjax-offline`, which has all of MathJax."""
    if error or app.builder.format != "html":
        return
    source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in PARTS:
        copy_asset(source / part, (target / part).parent)
    for folder in FOLDERS:
        copy_asset(source / folder, target / folder)


def setup(app: Sphinx) -> dict[str, bool]:
    """Let the pages load MathJax's parts instead of a combined file from a server."""
    app.config.mathjax_path = "mathjax/startup.js"
    app.config.mathjax3_config = {
        "loader": {"load": ["input/tex", "output/chtml", "a11y/assistive-mml"]}
    }
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
