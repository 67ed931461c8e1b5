"""Requests to a server: bounded in time and size, and on this machine past any proxy."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapter_twin.errors import AdapterTwinError, one_line, require

if TYPE_CHECKING:
    import aiohttp

LOOPBACK = ("localhost", "127.0.0.1", "::1")

MOST_BYTES = 2**18
"""An answer is read up to this size; a page of the metrics that are asked for has some 2,000."""


def ask(
    url: str,
    within_s: float,
    body: dict[str, str] | None = None,
    *,
    most_bytes: int = MOST_BYTES,
) -> tuple[int, str]:
    """Get a page, or post a body to it; return the status and what the server answers.

    Parameters
    ----------
    url : str
    within_s : float
        For the whole answer, however slowly it drips.
    body : dict, optional
    most_bytes : int
        Of the answer.

    Raises
    ------
    AdapterTwinError
        There is no answer in time, or it is none of HTTP, or too long.
    """
    import aiohttp

    async def call() -> tuple[int, str]:
        method = "GET" if body is None else "POST"
        timeout = aiohttp.ClientTimeout(total=within_s)
        elsewhere = urlsplit(url).hostname not in LOOPBACK
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=elsewhere) as session,
            session.request(method, url, json=body, allow_redirects=False) as answer,
        ):
            return answer.status, await read_text(answer, most_bytes)

    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own
            return thread.submit(asyncio.run, call()).result()
    except TimeoutError:
        raise AdapterTwinError(f"{url}: no answer within {within_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise AdapterTwinError(f"{url}: {one_line(error)}") from None


async def read_text(response: aiohttp.ClientResponse, most_bytes: int = MOST_BYTES) -> str:
    """Read an answer to its end; raise `AdapterTwinError` if it is longer."""
    content = bytearray()
    async for received in response.content.iter_any():
        content += received
        require(len(content) <= most_bytes, f"an answer of more than {most_bytes} bytes")
    return content.decode(errors="replace")
