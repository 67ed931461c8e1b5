"""Print the built book as one PDF: `python -m book.pdf HTML_FOLDER OUT.pdf`.

The chapters become one document, in the order of the side bar and with links that lead through it.
Chromium prints that with the pages' own style sheets and `pdf.css`.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urljoin

from bs4 import BeautifulSoup, Tag
from playwright.sync_api import sync_playwright

from book.browser import launch

TEXT_WIDTH = round((210 - 2 * 24) / 25.4 * 96)  # pixels: A4 less the margins in book.css
MATHJAX = 'script:-soup-contains("MathJax"), script[src*="mathjax"]'
LEFT_OUT = "details.hide, a.headerlink, script, .noprint, .tag_injected-parameters"
DOCUMENT = """<!DOCTYPE html>
<html lang="en" data-theme="light">
<head><meta charset="utf-8"><title>Adapter twin</title>{head}<style>{style}</style></head>
<body><article class="bd-article">
<div class="cover">
  <h1>Adapter twin</h1>
  <p>A digital twin of one GPU that serves many LoRA adapters with vLLM:
  how many adapters, how many slots, what service</p>
  <p>The adapter-twin developers<br>Version {version}, Apache License 2.0</p>
</div>
<nav class="table-of-contents"><h2>Contents</h2>{contents}</nav>
{chapters}
</article></body>
</html>
"""
# Else Chromium would make every page smaller, until the widest table fits.
FIT_TABLES = """() => {
  for (const table of document.querySelectorAll("table"))
    table.style.zoom = Math.min(1, table.parentElement.clientWidth / table.scrollWidth);
}"""
NUMBER_CONTENTS = """pages => {
  for (const link of document.querySelectorAll(".table-of-contents a"))
    link.lastElementChild.textContent = pages[link.hash.slice(1)];
}"""


def read(page: Path) -> BeautifulSoup:
    """Parse a page, with full addresses of its files and of where its links lead."""
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    for attribute in ("href", "src"):
        for element in soup.select(f"[{attribute}]"):
            element[attribute] = urljoin(page.as_uri(), element[attribute])
    return soup


def name(address: str) -> str:
    """Return what a page, or a place in it, is called in the whole book."""
    page, _, place = address.partition("#")
    return ".".join(filter(None, [Path(page).stem, place]))


def adapt(text: Tag, page: Path, addresses: set[str]) -> None:
    """Leave out what is for the screen, and let names and links hold in the whole book."""
    for element in text.select(LEFT_OUT):
        element.decompose()
    for element in text.select("details"):
        element["open"] = ""
    # A styled table's style goes by its name.
    for element in (text, *text.select("[id]:not(table, table *)")):
        element["id"] = name(f"{page}#{element['id']}")
    for link in text.select("a.internal[href]"):
        if link["href"].partition("#")[0] in addresses:
            link["href"] = "#" + name(link["href"])
        else:
            del link["href"]


def merge(html: Path) -> str:
    """Return the chapters as one document; the package's reference is for the screen."""
    side_bar = BeautifulSoup((html / "search.html").read_text(encoding="utf-8"), "html.parser")
    links = side_bar.select('nav.bd-links .toctree-l1 > a:not([href*="/api/"])')
    addresses = {(html / link["href"]).as_uri() for link in links}
    head, contents, chapters, part = {}, "", "", None
    for link in links:
        page = html / link["href"]
        soup = read(page)
        text = soup.select_one("article.bd-article > section")
        adapt(text, page, addresses)
        head |= dict.fromkeys(map(str, soup.select(f'link[rel="stylesheet"], {MATHJAX}')))
        if part != (part := link.find_previous("p", class_="caption")):
            contents += f"<h3>{part.get_text()}</h3>"
        contents += f'<a href="#{page.stem}">{text.h1.get_text()}<span>0</span></a>'
        chapters += f'<div class="chapter" id="{page.stem}">{text}</div>'
    return DOCUMENT.format(
        head="".join(head),
        style=Path(__file__).with_name("pdf.css").read_text(encoding="utf-8"),
        version=version("adapter-twin"),
        contents=contents,
        chapters=chapters,
    )


def page_numbers(pdf: bytes) -> dict[str, int]:
    """Return the page on which each name is, in a PDF by Chromium."""
    pages = re.findall(rb"(\d+) 0 obj\s*<</Type /Page\s", pdf)
    places = re.findall(rb"/([\w.-]+) \[(\d+) 0 R /XYZ", pdf)
    return {place.decode(): pages.index(page) + 1 for place, page in places}


def main(html: str, out: str) -> None:
    """Write the pages of a folder as a PDF; what was printed stays beside it."""
    pdf = Path(out).resolve()
    document = pdf.with_suffix(".html")
    document.write_text(merge(Path(html).resolve()), encoding="utf-8")
    with sync_playwright() as playwright:
        page = launch(playwright).new_page(viewport={"width": TEXT_WIDTH, "height": 1000})
        page.emulate_media(media="print")
        page.goto(document.as_uri())
        page.evaluate("window.MathJax && MathJax.startup.promise.then(() => true)")
        page.evaluate(FIT_TABLES)
        first = page.pdf(prefer_css_page_size=True)
        page.evaluate(NUMBER_CONTENTS, page_numbers(first))
        page.pdf(path=pdf, prefer_css_page_size=True, outline=True, tagged=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
