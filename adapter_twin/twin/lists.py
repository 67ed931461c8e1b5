"""Lists over arrays, for compiled code: linked ones, and unordered ones with an index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import helper

Links = NDArray[np.int32]


@helper
def append(following: Links, preceding: Links, node: int, sentinel: int) -> None:
    """Put `node` at the end of the list of `sentinel`, or before it if that is a member."""
    last = preceding[sentinel]
    following[last], preceding[node] = node, last
    following[node], preceding[sentinel] = sentinel, node


@helper
def remove(following: Links, preceding: Links, node: int) -> None:
    """Take `node` out of its list."""
    before, after = preceding[node], following[node]
    following[before], preceding[after] = after, before


@helper
def add_member(members: Links, index: Links, n: int, item: int) -> None:
    """Add to an unordered list of `n` members."""
    members[n], index[item] = item, n


@helper
def drop_member(members: Links, index: Links, n: int, item: int) -> None:
    """Remove from an unordered list of `n` members."""
    last = members[n - 1]
    members[index[item]], index[last] = last, index[item]
