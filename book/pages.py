"""Sphinx extension: pages need nothing but the book's own files, and little of them."""

from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

# TeX in, HTML with web fonts out, and MathML for screen readers; no menus, no speech.
PARTS = ("startup.js", "core.js", "input/tex.js", "output/chtml.js", "a11y/assistive-mml.js")
FOLDERS = ("input/tex/extensions", "output/chtml/fonts")

WIDE = 600  # pixels, of which a phone would make labels that are too small to read


def copy_mathjax(html: Path) -> None:
    """Copy the parts from the package `sphinx-mathjax-offline`, which has all of MathJax."""
    source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    target = html / "_static" / "mathjax"
    for part in PARTS:
        copy_asset(source / part, (target / part).parent)
    for folder in FOLDERS:
        copy_asset(source / folder, target / folder)


def shrink_figures(html: Path) -> None:
    """Give each figure a palette: a third of the size, and no difference that one could see."""
    for path in (html / "_images").glob("*.png"):
        with Image.open(path) as figure:
            colors = figure.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        colors.save(path, optimize=True)


def size_figures(app: Sphinx, page: nodes.document, name: str) -> None:
    """Show figures as large as they were drawn, and let the style sheet tell the wide ones."""
    for image in page.findall(nodes.image):
        with Image.open(Path(app.srcdir) / image["uri"]) as figure:
            dots_per_inch, _ = figure.info.get("dpi", (96, 96))
            width = round(96 * figure.width / dots_per_inch)
        image["width"] = f"{width}px"
        if width > WIDE:
            image["classes"].append("wide")


def finish(app: Sphinx, error: Exception | None) -> None:
    """Complete the folder of the pages."""
    if error is None:
        copy_mathjax(Path(app.outdir))
        shrink_figures(Path(app.outdir))


def setup(app: Sphinx) -> dict[str, bool]:
    """Let the pages load MathJax's parts instead of one file from a server, and do the above."""
    app.config.mathjax_path = "mathjax/startup.js"
    app.config.mathjax3_config = {
        "loader": {"load": ["input/tex", "output/chtml", "a11y/assistive-mml"]}
    }
    app.connect("doctree-resolved", size_figures)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
