"""The browser that prints and tests the book."""

import shutil

from playwright.sync_api import Browser, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")

# Nothing may be fetched behind the pages' back either: what a test sees is the book's own doing.
QUIET = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-domain-reliability --disable-sync --no-first-run --no-pings"
)


def launch(playwright: Playwright) -> Browser:
    """Start the Chromium of this machine, else the one that Playwright has installed."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    return playwright.chromium.launch(executable_path=path, args=QUIET.split())
