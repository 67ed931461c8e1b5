"""A real browser, and the built book that it opens.

The environment with vLLM collects these tests without Playwright, hence the late import.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from adapter_twin import datasets

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Nothing may be fetched behind the pages' back either: what a test sees is the book's own doing.
QUIET = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-domain-reliability --disable-sync --no-first-run --no-pings"
)


def missing(what: str) -> NoReturn:
    """Fail where these tests are asked for, skip where they are run by the way."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The Chromium of this machine, else the one that Playwright has installed."""
    from playwright.sync_api import Error, sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=path, args=QUIET.split())
        except Error as error:
            missing(f"no Chromium that starts: {error.message.splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built pages."""
    folder = datasets.REPOSITORY / "book" / "_build" / "html"
    if not (folder / "index.html").exists():
        missing("the book is not built: make book, or make reproduce")
    return folder
