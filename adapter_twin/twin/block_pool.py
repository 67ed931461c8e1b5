"""vLLM's pool of KV blocks with prefix caching: which are free, and what can be found in them.

A full block can be found by its content, that is by all tokens up to its end and the adapter that
computed them. It is kept when no request holds it any more, until it is taken for something else:
blocks that hold nothing first, then the one given back longest ago, and of one request's blocks the
last first. Equal contents can stand in several blocks; the oldest of these is found.

Content is told by a number. The sequence of a request, prompt and output, consists of pieces (see
`adapter_twin.workload.trace.Contents`), the last of which is its own and has no end. The number of
a block is that of the piece it ends in, which stands for all pieces before as well, plus the
block's place in the sequence.

Sources: ``BlockPool`` in ``vllm/v1/core/block_pool.py``, ``FullAttentionManager`` in
``vllm/v1/core/single_type_kv_cache_manager.py`` (0.32.0).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.state import Limits, Pool, append, remove
from adapter_twin.workload.trace import Trace

NOTHING = -1
"""The content of a block in which nothing can be found."""


def new_pool(trace: Trace, blocks: int, seats: int, blocks_per_seat: int) -> Pool:
    """Lay out a pool of free blocks, in which nothing can be found.

    Parameters
    ----------
    trace : Trace
    blocks : int
        None (0) where prefixes are not cached.
    seats : int
        Most requests that run at once.
    blocks_per_seat : int
        Most blocks of a request.
    """
    free = np.arange(blocks + 1, dtype=np.int32)
    nodes = np.arange(blocks + _buckets(blocks), dtype=np.int32)  # an empty list is its sentinel
    first_piece, piece_end, piece_content = _pieces(trace)
    return Pool(
        references=np.zeros(blocks, np.int32),
        contents=np.full(blocks, NOTHING, np.int64),
        free_next=np.roll(free, -1),
        free_previous=np.roll(free, 1),
        alike_next=nodes,
        alike_previous=nodes.copy(),
        table=np.zeros((seats, blocks_per_seat), np.int32),
        seats=np.arange(seats, dtype=np.int32),
        first_piece=first_piece[:-1],
        last_piece=first_piece[1:] - 1,
        piece_end=piece_end,
        piece_content=piece_content,
    )


def _buckets(blocks: int) -> int:
    """Return a power of two, at least as many as blocks."""
    return 1 << max(blocks - 1, 0).bit_length()


def _pieces(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Return each request's first piece, and of each piece its end and the number of its content.

    The number of a piece is a hash of the one before it and of what it is. So the k-th pieces of
    all requests are numbered at once.
    """
    n = len(trace)
    request = np.arange(n)
    chain = _hash(trace.adapter.astype(np.uint64))
    if trace.contents is None:
        first, shared_end = np.zeros(n + 1, np.int64), np.empty(0, np.int32)
        shared_content = np.empty(0, np.uint64)
    else:
        first, shared_end = trace.contents.first, trace.contents.end
        what = _hash(trace.contents.piece.astype(np.uint64)) ^ shared_end.astype(np.uint64)
        shared_content = np.empty(len(what), np.uint64)
        count = np.diff(first)
        for k in range(int(count.max(initial=0))):
            longer = count > k
            place = first[:-1][longer] + k
            chain[longer] = shared_content[place] = _hash(_hash(chain[longer]) ^ what[place])
    own = _hash(_hash(chain) ^ request.astype(np.uint64))
    number = np.insert(shared_content, first[1:], own)
    end = np.insert(shared_end, first[1:], np.iinfo(np.int32).max)
    # two bits less: a block's place can be added
    return first + np.arange(n + 1), end.astype(np.int32), (number >> np.uint64(2)).astype(np.int64)


def _hash(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well-mixed numbers (the finaliser of SplitMix64)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@helper
def _content(limits: Limits, pool: Pool, request: int, place: int) -> int:
    """Return the content of a full block of a request."""
    end = (place + 1) * limits.block_size
    low, high = pool.first_piece[request], pool.last_piece[request]
    while low < high:
        middle = (low + high) // 2
        if pool.piece_end[middle] < end:
            low = middle + 1
        else:
            high = middle
    return int(pool.piece_content[low] + place)


@helper
def _bucket(pool: Pool, content: int) -> int:
    """Return the sentinel of the blocks whose content shares a bucket with this one."""
    blocks = len(pool.contents)
    return int(blocks + (content & (len(pool.alike_next) - blocks - 1)))


@helper
def find_prefix(limits: Limits, pool: Pool, request: int, seat: int, most: int) -> int:
    """Find the first blocks of a request, at most n of them, and note them at a seat.

    Returns
    -------
    int
        Blocks found.
    """
    for place in range(most):
        content = _content(limits, pool, request, place)
        sentinel = _bucket(pool, content)
        block = pool.alike_next[sentinel]
        while block != sentinel and pool.contents[block] != content:
            block = pool.alike_next[block]
        if block == sentinel:
            return place
        pool.table[seat, place] = block
    return most


@helper
def count_free(pool: Pool, seat: int, found: int) -> int:
    """Return how many of the blocks found no request holds."""
    free = 0
    for place in range(found):
        free += pool.references[pool.table[seat, place]] == 0
    return free


@helper
def hold_found(pool: Pool, seat: int, found: int) -> None:
    """Hold the blocks found."""
    for place in range(found):
        block = pool.table[seat, place]
        if pool.references[block] == 0:
            remove(pool.free_next, pool.free_previous, block)
        pool.references[block] += 1


@helper
def take_free(pool: Pool, seat: int, held: int, wanted: int) -> None:
    """Take free blocks, so that n are held; what could be found in them is lost."""
    sentinel = len(pool.contents)
    for place in range(held, wanted):
        block = pool.free_next[sentinel]
        remove(pool.free_next, pool.free_previous, block)
        if pool.contents[block] != NOTHING:
            pool.contents[block] = NOTHING
            remove(pool.alike_next, pool.alike_previous, block)
        pool.references[block] = 1
        pool.table[seat, place] = block


@helper
def make_findable(
    limits: Limits, pool: Pool, request: int, seat: int, findable: int, full: int
) -> None:
    """Let the full blocks of a request be found, besides those that can be already."""
    for place in range(findable, full):
        block = pool.table[seat, place]
        content = _content(limits, pool, request, place)
        pool.contents[block] = content
        append(pool.alike_next, pool.alike_previous, block, _bucket(pool, content))


@helper
def give_back(pool: Pool, seat: int, held: int) -> int:
    """Give back the blocks of a request, its last one first.

    Returns
    -------
    int
        Blocks that are free now.
    """
    free, sentinel = 0, len(pool.contents)
    first = pool.free_next[sentinel]
    for i in range(held):
        block = pool.table[seat, held - 1 - i]
        pool.references[block] -= 1
        if pool.references[block] == 0:
            free += 1
            behind = first if pool.contents[block] == NOTHING else sentinel
            append(pool.free_next, pool.free_previous, block, behind)
    return free
