"""Turns of conversations in a log of requests: which one follows which, and after what delay.

Rows of one ``session_id`` follow each other in time; in Qwen-Bailian traces a row follows that of
its ``parent_chat_id``. A ``delay`` (milliseconds, as in AIPerf's traces) or ``think_s`` is the time
from the answer to the turn; a turn without a time of its own waits for nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError, require

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("session_id", "chat_id", "parent_chat_id", "think_s", "delay")
"""These columns tell of turns."""

BAILIAN_BLOCK_TOKENS = 16
"""A hash of a Qwen-Bailian trace stands for this many tokens of a prompt."""


def times(frame: pd.DataFrame, column: str) -> pd.Series[Any]:
    """Return when requests come; a turn that does not tell has the time of the one before."""
    told = frame[column]
    if "session_id" in frame:
        told = told.fillna(told.groupby(frame["session_id"]).ffill())
    return told


def predecessors(frame: pd.DataFrame, path: str | Path) -> NDArray[np.int32] | None:
    """Return the row that each one follows, -1 for none; None where no column tells.

    Parameters
    ----------
    frame : pandas.DataFrame
        In order of arrival.
    path : path-like
        Of the log, for messages.
    """
    import pandas as pd

    rows = pd.Series(np.arange(len(frame)))
    if {"chat_id", "parent_chat_id"} <= set(frame):
        twice = bool(frame["chat_id"].duplicated().any())
        require(not twice, f"{path}: chat_id must differ from row to row")
        told = rows.set_axis(frame["chat_id"]).reindex(frame["parent_chat_id"])
    elif "session_id" in frame:
        told = rows.groupby(frame["session_id"].to_numpy()).shift(1)
    else:
        return None
    after = told.fillna(-1).to_numpy(np.int32)
    require(bool((after < rows).all()), f"{path}: a parent_chat_id is that of a later request")
    return after


def delays_s(frame: pd.DataFrame, path: str | Path) -> NDArray[np.float64]:
    """Return the time of each turn from the answer before it, 0 where it is not told."""
    for column, unit_s in (("think_s", 1.0), ("delay", 1e-3)):
        if column in frame:
            try:
                told_s = unit_s * frame[column].fillna(0).to_numpy(np.float64)
            except (TypeError, ValueError):
                raise AdapterTwinError(f"{path}: {column} holds text; give numbers") from None
            fits = bool((np.isfinite(told_s) & (told_s >= 0)).all())
            require(fits, f"{path}: {column} must be at least 0 in every row")
            return np.asarray(told_s)
    return np.zeros(len(frame))
