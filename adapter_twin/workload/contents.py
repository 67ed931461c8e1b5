"""What requests share of their tokens: system prompts, blocks, earlier turns, samples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Contents:
    """What the requests of a trace begin with, in pieces that other requests may share.

    The sequence of a request, its prompt and then its output, begins with its pieces; what comes
    after them is its own. Requests whose first pieces are equal have the same tokens there: such is
    a system prompt (one piece), a prompt given as hashes of its blocks (a piece each), or the turn
    of a conversation that repeats the turns before it (a piece for each prompt and each output).

    Attributes
    ----------
    first : int64, shape (requests + 1,)
        Index of each request's first piece; the last entry is the number of pieces.
    piece : int64, shape (pieces,)
        Equal numbers at equal ends, after equal pieces, are equal tokens.
    end : int32, shape (pieces,)
        Tokens of the sequence up to the end of the piece, increasing within a request.
    """

    first: NDArray[np.int64]
    piece: NDArray[np.int64]
    end: Ints

    def take(self, requests: NDArray[np.int64]) -> Contents:
        """Return the contents of some of the requests."""
        start, counts = self.first[requests], np.diff(self.first)[requests]
        first = np.concatenate(([0], np.cumsum(counts)))
        chosen = np.arange(first[-1]) + np.repeat(start - first[:-1], counts)
        return Contents(first, self.piece[chosen], self.end[chosen])


def of_blocks(blocks: list[list[int]], block_tokens: int, prompt_tokens: Ints) -> Contents:
    """Return the pieces that hashes of a prompt's blocks stand for; the last may be cut short."""
    counts = np.array([len(hashes) for hashes in blocks])
    first = np.concatenate(([0], np.cumsum(counts)))
    place = np.arange(first[-1]) - np.repeat(first[:-1], counts)
    end = np.minimum(block_tokens * (place + 1), np.repeat(prompt_tokens, counts))
    rising = np.concatenate(([True], (np.diff(end) > 0) | (place[1:] == 0)))[: len(end)]
    kept = np.concatenate(([0], np.cumsum(rising)))
    pieces = np.concatenate([*map(np.asarray, blocks), np.empty(0)]).astype(np.int64)
    return Contents(kept[first], pieces[rising], end[rising].astype(np.int32))


def of_samples(prompt_tokens: Ints, samples: int) -> Contents:
    """Return the contents of requests of which each n in a row have the same prompt."""
    n = len(prompt_tokens)
    return Contents(np.arange(n + 1), 1 + np.arange(n) // samples, prompt_tokens)


def of_turns(after: Ints, prompt_tokens: Ints, output_tokens: Ints) -> Contents:
    """Return the contents of conversations, whose turns repeat all prompts and outputs before.

    Parameters
    ----------
    after : int32, shape (requests,)
        Index of the earlier request that each one follows, -1 for none. A prompt that is too short
        to repeat that one's prompt and output repeats nothing.
    prompt_tokens, output_tokens : int32, shape (requests,)
    """
    prompt, until = prompt_tokens.tolist(), (prompt_tokens + output_tokens).tolist()
    turns = list[list[int]]()
    for request, before in enumerate(after.tolist()):
        repeats = before >= 0 and prompt[request] > until[before]
        turns.append([*(turns[before] if repeats else ()), request])
    counts = np.array([len(own) for own in turns], np.int64)
    repeated = np.fromiter(chain.from_iterable(turns), np.int64, counts.sum()).repeat(2)
    is_output = np.arange(len(repeated)) % 2
    end = prompt_tokens[repeated] + is_output * output_tokens[repeated]
    first = np.concatenate(([0], 2 * np.cumsum(counts)))
    return Contents(first, 1 + 2 * repeated + is_output, end.astype(np.int32))


def whole_prompts(after: Ints, new_tokens: Ints, output_tokens: Ints) -> Ints:
    """Return the prompts of turns that repeat all before them, given what is new in each."""
    prompt, output = new_tokens.tolist(), output_tokens.tolist()
    for turn, before in enumerate(after.tolist()):
        if before >= 0:
            prompt[turn] += prompt[before] + output[before]
    return np.array(prompt, np.int32)


def behind_prefix(contents: Contents | None, requests: int, tokens: int) -> Contents:
    """Return contents that begin with n tokens more, which are the same ones for all requests.

    What is computed with one adapter is of no use to another one all the same.
    """
    if contents is None:
        contents = Contents(np.zeros(requests + 1, np.int64), np.zeros(0, np.int64), _NO_ENDS)
    first = contents.first
    return Contents(
        first + np.arange(requests + 1),
        np.insert(contents.piece, first[:-1], 0),
        np.insert(contents.end, first[:-1], tokens),
    )


_NO_ENDS = np.zeros(0, np.int32)
