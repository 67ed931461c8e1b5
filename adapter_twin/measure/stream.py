"""Streamed completions: what a request asks for, and its answer, held against that."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.measure.vllm_server import error_message

MOST_EVENT_BYTES = 2**18
"""An event of a stream is read up to this size; vLLM's have some 250 bytes."""


_TOKEN = b'"choices":[{'  # cannot occur in a text, whose quotes are escaped


class Asked(NamedTuple):
    """What one request asks for."""

    model: str
    prompt_tokens: int
    output_tokens: int

    def body(self, rng: np.random.Generator, vocabulary: int) -> bytes:
        """Return the request as JSON, with a random prompt."""
        request = {
            "model": self.model,
            "prompt": rng.integers(vocabulary, size=self.prompt_tokens).tolist(),
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(request).encode()


async def read_stream(
    chunks: AsyncIterator[bytes], now_s: Callable[[], float], chunk_s: list[float], asked: Asked
) -> tuple[int, int]:
    """Read a streamed completion to its end, and return its prompt and output tokens.

    Parameters
    ----------
    chunks : async iterator of bytes
        The response's body as it arrives.
    now_s : callable
    chunk_s : list of float
        Gets the time of each chunk with a token as it arrives.
    asked : Asked

    Raises
    ------
    AdapterTwinError
        The server reports an error, answers with other tokens or another model than asked, or
        sends no stream of a completion.
    """
    usage = None
    model_told = f'"model":{json.dumps(asked.model)}'.encode()
    rest = b""
    async for received in chunks:
        time_s = now_s()
        *events, rest = (rest + received).split(b"\n\n")
        require(len(rest) <= MOST_EVENT_BYTES, f"an event of more than {MOST_EVENT_BYTES} bytes")
        for event in events:
            if event.startswith(b":") or event == b"data: [DONE]":
                continue
            # vLLM's own token is told at sight: to parse them all would cost the client its time.
            is_whole = event.startswith(b"data: {") and event.endswith(b"}]}")
            is_token = is_whole and _TOKEN in event and model_told in event
            content = {"choices": [event.decode()]} if is_token else _content(event)
            if "error" in content:
                raise AdapterTwinError(error_message(event[6:].decode()))
            model = content.get("model", asked.model)
            require(model == asked.model, f"answered by {model!r}, {asked.model!r} was asked")
            if content.get("choices"):
                chunk_s.append(time_s)
                # else a stream without an end would be read for ever
                most = asked.output_tokens
                require(len(chunk_s) <= most, f"more chunks than the {most} tokens asked for")
            usage = content.get("usage") or usage
    require(usage is not None and bool(chunk_s) and not rest, "the stream ended early")
    counts = isinstance(usage, dict) and [usage.get(f"{what}_tokens") for what in _COUNTED]
    require(
        counts == [asked.prompt_tokens, asked.output_tokens],
        f"{counts} prompt and output tokens counted, {list(asked[1:])} asked",
    )
    return asked.prompt_tokens, asked.output_tokens


_COUNTED = ("prompt", "completion")


def _content(event: bytes) -> dict[str, Any]:
    """Return what an event of a stream tells."""
    with suppress(ValueError, RecursionError):
        content = json.loads(event.removeprefix(b"data: "))
        if event.startswith(b"data: ") and isinstance(content, dict):
            return content
    raise AdapterTwinError(f"no event of a completion: {event[:60]!r}")
