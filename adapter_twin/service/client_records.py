"""Records of a measured run, as the twin writes them, so that one set of metrics serves both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapter_twin.twin.records import Gaps, Records

if TYPE_CHECKING:
    import pandas as pd


def to_records(requests: pd.DataFrame) -> Records:
    """Return a run's requests as the records that `adapter_twin.service.metrics` reads.

    As in ``vllm bench serve``, a request begins when it is sent, and completed ones count the
    tokens that the server reports. Preemptions, loads and the engine's scheduling are not seen from
    outside.
    """
    sent_s, end_s = requests["sent_s"].to_numpy(), requests["end_s"].to_numpy()
    done = np.isfinite(end_s)
    prompt, output = (
        np.where(done, requests[f"reported_{name}"], requests[name]).astype(np.int32)
        for name in ("prompt_tokens", "output_tokens")
    )
    unknown = np.full(len(requests), np.nan)
    return Records(
        arrival_s=np.where(np.isfinite(sent_s), sent_s, requests["scheduled_s"]),
        adapter=requests["adapter"].to_numpy(np.int32),
        prompt_tokens=prompt,
        output_tokens=output,
        scheduled_s=unknown,
        first_token_s=requests["first_token_s"].to_numpy(),
        end_s=end_s,
        preemptions=np.zeros(len(requests), np.int32),
        load_wait_s=unknown,
        rejected=np.zeros(len(requests), np.bool_),
        refused=np.zeros(len(requests), np.bool_),
        cached_tokens=np.full(len(requests), -1, np.int32),
    )


def to_gaps(requests: pd.DataFrame) -> Gaps:
    """Return the inter-token gaps of the completed requests."""
    done = requests[requests["end_s"].notna()]
    firsts_s, gaps_ms = done["first_token_s"], done["itl_ms"]
    gap_s = np.concatenate([*gaps_ms, np.empty(0)]) / 1e3
    ends_s = (at + np.cumsum(ms) / 1e3 for at, ms in zip(firsts_s, gaps_ms, strict=True))
    end_s = np.concatenate([*ends_s, np.empty(0)])
    return Gaps(gap_s, np.ones(len(gap_s), np.int64), end_s)
