"""A real browser, and the built book that it opens.

The environment with vLLM collects these tests without Playwright, hence the late import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from adapter_twin.tables import datasets

BUILD = datasets.REPOSITORY / "book" / "_build"

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def missing(what: str) -> NoReturn:
    """Fail where these tests are asked for, skip where they are run by the way."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium without a window."""
    from playwright.sync_api import Error, sync_playwright

    from book.browser import launch

    with sync_playwright() as playwright:
        try:
            chromium = launch(playwright)
        except Error as error:
            missing(f"no Chromium that starts: {error.message.splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built pages."""
    if not (BUILD / "html" / "index.html").exists():
        missing("the book is not built: make book, or make reproduce")
    return BUILD / "html"


@pytest.fixture(scope="session")
def pdf() -> Path:
    """The printed book."""
    if not (BUILD / "adapter-twin.pdf").exists():
        missing("the book is not printed: make pdf")
    return BUILD / "adapter-twin.pdf"
