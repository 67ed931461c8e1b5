"""Turns of conversations in a log of requests: which one follows which, and after what delay.

Told by a ``session_id``, whose rows follow each other in time, or as in the Qwen-Bailian traces by
``chat_id`` and ``parent_chat_id``. A ``delay`` (milliseconds, as in AIPerf's traces) or ``think_s``
is the time from the answer to the turn; a turn without a time of its own waits for nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError, require

if TYPE_CHECKING:
    import pandas as pd

BAILIAN_BLOCK_TOKENS = 16
"""A hash of a Qwen-Bailian trace stands for this many tokens of a prompt."""

TEXTS = ("conversations", "messages", "turns", "text_input")
"""Conversations as text have one of these columns: ShareGPT, and traces of AIPerf."""


def refuse_texts(frame: pd.DataFrame, path: str | Path) -> None:
    """Refuse conversations as text, whose tokens only the model's tokenizer can count."""
    for column in TEXTS:
        require(
            column not in frame,
            f"{path}: {column} holds text; count its tokens with the model's tokenizer, and give a "
            "row per turn: session_id, arrival_s, prompt_tokens, output_tokens",
        )


def with_times(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a log whose turns without a time have that of the turn before."""
    if "session_id" not in frame:
        return frame
    told = frame[column]
    return frame.assign(**{column: told.fillna(told.groupby(frame["session_id"]).ffill())})


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

    rows = np.arange(len(frame))
    if "parent_chat_id" in frame:
        require("chat_id" in frame, f"{path}: the column chat_id is missing, of parent_chat_id")
        twice = frame["chat_id"].duplicated().any()
        require(not twice, f"{path}: chat_id must differ from row to row")
        place = pd.Series(rows, frame["chat_id"])
        after = place.reindex(frame["parent_chat_id"]).fillna(-1).to_numpy(np.int32)
    elif "session_id" in frame:
        before = pd.Series(rows).groupby(frame["session_id"].to_numpy()).shift(1)
        after = before.fillna(-1).to_numpy(np.int32)
    else:
        return None
    require(bool((after < rows).all()), f"{path}: a parent_chat_id is that of a later request")
    return after


def delays_s(frame: pd.DataFrame, path: str | Path) -> NDArray[np.float64]:
    """Return the time of each turn from the answer before it, 0 where it is not told."""
    column = next((name for name in ("think_s", "delay") if name in frame), None)
    if column is None:
        return np.zeros(len(frame))
    try:
        values = np.nan_to_num(frame[column].to_numpy(np.float64, na_value=np.nan), posinf=-1)
    except (TypeError, ValueError):
        raise AdapterTwinError(f"{path}: {column} holds text; give numbers") from None
    require(bool((values >= 0).all()), f"{path}: {column} must be at least 0 in every row")
    return np.asarray(values / (1e3 if column == "delay" else 1.0))


def accumulate(
    after: NDArray[np.int32], prompt_tokens: NDArray[np.float64], output_tokens: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return whole prompts of turns of which only what is new is told, as AIPerf sends them."""
    whole = prompt_tokens.copy()
    for turn in np.flatnonzero(after >= 0).tolist():
        whole[turn] += whole[after[turn]] + output_tokens[after[turn]]
    return whole
