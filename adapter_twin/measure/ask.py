"""Requests to a server on this machine: bounded in time and size, and past any proxy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from adapter_twin.errors import AdapterTwinError, one_line, require

if TYPE_CHECKING:
    import aiohttp

MOST_BYTES = 2**18
"""An answer is read up to this size; a page of the metrics that are asked for has some 2,000."""


def ask(url: str, within_s: float, body: dict[str, str] | None = None) -> tuple[int, str]:
    """Get a page, or post a body to it; return the status and what the server answers.

    Parameters
    ----------
    url : str
    within_s : float
        For the whole answer, however slowly it drips.
    body : dict, optional

    Raises
    ------
    AdapterTwinError
        There is no answer in time, or it is none of HTTP, or too long.
    """
    import aiohttp

    async def call() -> tuple[int, str]:
        method = "GET" if body is None else "POST"
        timeout = aiohttp.ClientTimeout(total=within_s)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, url, json=body, allow_redirects=False) as answer,
        ):
            return answer.status, await read_text(answer)

    try:
        return asyncio.run(call())
    except TimeoutError:
        raise AdapterTwinError(f"{url}: no answer within {within_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise AdapterTwinError(f"{url}: {one_line(error)}") from None


async def read_text(response: aiohttp.ClientResponse) -> str:
    """Read an answer to its end; raise `AdapterTwinError` if it is longer than `MOST_BYTES`."""
    content = bytearray()
    async for received in response.content.iter_any():
        content += received
        require(len(content) <= MOST_BYTES, f"an answer of more than {MOST_BYTES} bytes")
    return content.decode(errors="replace")
