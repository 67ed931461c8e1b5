"""The built book in a browser: whole, light, from the disk alone, legible by phone and at night."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import numpy as np
import pytest

from adapter_twin.tables import datasets

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

BUILD = datasets.REPOSITORY / "book" / "_build"
PAGES = sorted(path for path in BUILD.glob("html/*/**/*.html") if "_static" not in path.parts)
CHAPTERS = sorted((datasets.REPOSITORY / "notebooks").glob("*.ipynb"))
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}
MOST_BYTES = 2_000_000
TALLEST = 12_000  # pixels of a screenshot: chapters are whole, the package's reference is longer
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text

TEXT_COLORS = """() => {
  const opaque = color => !/[,/] 0(\\.\\d+)?\\)$/.test(color);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (opaque(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const shown = [...document.querySelectorAll("article *")].filter(element =>
    element.checkVisibility({visibilityProperty: true, opacityProperty: true})
    && [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim()));
  return shown.map(it => [getComputedStyle(it).color, ground(it), it.innerText]);
}"""


@dataclass
class Visit:
    """A page as it was opened, and what happened meanwhile."""

    path: Path
    page: Page
    said: list[str] = field(default_factory=list)
    fetched: set[str] = field(default_factory=set)


@pytest.fixture(scope="module", params=PAGES, ids=lambda path: path.stem)
def visit(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Visit]:
    page = browser.new_page(viewport=DESKTOP, color_scheme="light")
    visit = Visit(request.param, page)
    page.on("console", lambda it: visit.said.append(f"{it.type}: {it.text}"))
    page.on("pageerror", lambda it: visit.said.append(f"error: {it}"))
    page.on("requestfailed", lambda it: visit.said.append(f"error: not loaded: {it.url}"))
    page.on("request", lambda it: visit.fetched.add(it.url))
    page.goto(visit.path.as_uri(), wait_until="networkidle")
    page.evaluate("window.MathJax && MathJax.startup.promise.then(() => true)")
    yield visit
    page.close()


@cache
def places(path: Path) -> set[str]:
    """Return what a page can be asked to show: the names in it, and itself."""
    return {"", *re.findall(r'\sid="([^"]+)"', path.read_text(encoding="utf-8"))}


def file_of(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio of two colours given as CSS does, rgb(1, 2, 3)."""
    channels = np.array([re.findall(r"[\d.]+", color)[:3] for color in (one, other)], float) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    dark, light = np.sort(linear @ [0.2126, 0.7152, 0.0722])
    return (light + 0.05) / (dark + 0.05)


def test_every_notebook_is_a_chapter_and_the_way_in_leads_to_the_first_page(browser, book):
    assert {path.stem for path in PAGES} >= {path.stem for path in CHAPTERS} | {"index"}
    page = browser.new_page()
    page.goto((book / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    page.close()


def test_page_opens_from_the_disk_alone_and_without_complaint(visit):
    assert [url for url in visit.fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    assert [line for line in visit.said if line.startswith(("error", "warning"))] == []


def test_page_is_light(visit):
    files = {file_of(url) for url in visit.fetched if url.startswith("file:")}
    sizes = sorted((path.stat().st_size, path.name) for path in files)
    assert sum(size for size, _ in sizes) < MOST_BYTES, sizes[-6:]


def test_links_within_the_book_lead_somewhere(visit):
    links = visit.page.locator("a[href]").evaluate_all("links => links.map(it => it.href)")
    inside = {link for link in links if link.startswith("file:")}
    files = {link for link in inside if file_of(link).exists()}
    assert inside - files == set()
    pages = {link for link in files if file_of(link).suffix == ".html"}
    assert {
        it for it in pages if unquote(urlsplit(it).fragment) not in places(file_of(it))
    } == set()


def test_figures_show_something_and_say_what(visit):
    for image in visit.page.locator("article img").all():
        width, source, text = image.evaluate("it => [it.naturalWidth, it.currentSrc, it.alt]")
        assert width >= 300, source
        assert plt.imread(file_of(source))[..., :3].std() > 0.02, f"{source} is blank"
        assert len(text.split()) >= 4, f"{source} says {text!r}"


def test_formulas_are_set(visit):
    formulas = visit.page.locator("article .math")
    assert formulas.locator("mjx-container").count() >= formulas.count()
    assert visit.page.locator("mjx-merror").count() == 0


def test_no_cell_has_complained(visit):
    assert visit.page.locator("article :is(.stderr, .traceback)").all_inner_texts() == []


def test_chapter_offers_its_notebook(visit):
    if visit.path.stem not in {path.stem for path in CHAPTERS}:
        return
    link = visit.page.locator(".bd-header-article a[href$='.ipynb']").first
    notebook = json.loads(file_of(link.evaluate("it => it.href")).read_text(encoding="utf-8"))
    assert any(cell["cell_type"] == "code" for cell in notebook["cells"])


def test_page_says_its_licence_and_how_to_cite_it(visit):
    assert "Apache License 2.0" in visit.page.locator("footer.bd-footer-content").inner_text()
    assert visit.page.locator("footer a[href$='CITATION.cff']").count() == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit, theme):
    visit.page.emulate_media(color_scheme=theme)
    visit.page.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
    texts = visit.page.evaluate(TEXT_COLORS)
    assert texts
    faint = {
        (color, ground): text[:40]
        for color, ground, text in texts
        if contrast(color, ground) < LEAST_CONTRAST
    }
    assert faint == {}


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("screen", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_page_fits_the_screen(visit, screen, theme):
    visit.page.set_viewport_size(screen)
    visit.page.emulate_media(color_scheme=theme)
    wide, high = visit.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    )
    visit.page.screenshot(  # to look at
        path=BUILD / "screenshots" / f"{visit.path.stem}-{screen['width']}-{theme}.png",
        animations="disabled",
        full_page=True,
        clip={"x": 0, "y": 0, "width": screen["width"], "height": min(high, TALLEST)},
    )
    visit.page.set_viewport_size(DESKTOP)
    assert wide <= screen["width"]


def test_reader_switches_to_the_dark(browser, book):
    page = browser.new_page(viewport=DESKTOP, color_scheme="light")
    page.goto(PAGES[0].as_uri())
    themes = []
    for _ in range(3):  # automatic, light and dark take turns
        page.locator(".bd-header-article .theme-switch-button").first.click()
        themes.append(page.evaluate("document.documentElement.dataset.theme"))
    page.close()
    assert set(themes) == {"light", "dark"}


def test_search_finds_the_chapter(browser, book):
    page = browser.new_page(viewport=DESKTOP)
    page.goto(PAGES[0].as_uri())
    page.keyboard.press("Control+k")
    page.keyboard.type("sobol")
    page.keyboard.press("Enter")
    found = page.locator("ul.search li a").first.evaluate("it => it.href")
    page.close()
    assert "11_sensitivity" in found


def test_whole_book_is_one_file_to_print(pdf):
    from book.pdf import page_numbers

    pages = page_numbers(pdf.read_bytes())
    assert all(pages[path.stem] > 2 for path in CHAPTERS)  # after the cover and the contents
