"""The step law: seconds that a step takes, by what it runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.state import Batch


class StepLaw(NamedTuple):
    """Step and scheduling time of one engine configuration, in seconds."""

    token_breaks: NDArray[np.float64]  # the regime changes past these batch sizes
    # regimes x (1, tokens, decodes, context tokens, adapters, adapters x tiles, tiles; with
    # adapters in the batch: 1, tokens); where a policy merges, the regimes again without adapters
    coefficients: NDArray[np.float64]
    tile: int  # tokens per tile of the adapter kernels
    per_waiting: float  # what each waiting request costs the engine's process besides scheduling
    scheduling: NDArray[np.float64]  # (1, running, waiting requests scanned)


@helper
def step_seconds(law: StepLaw, batch: Batch, running: int, waiting: int) -> tuple[float, float]:
    """Return the durations (model, scheduling) of a step in seconds.

    Parameters
    ----------
    law : StepLaw
    batch : Batch
    running, waiting : int
        Requests, once the batch is chosen.
    """
    regime = 0
    while regime < len(law.token_breaks) and batch.tokens > law.token_breaks[regime]:
        regime += 1
    adapters = batch.adapters
    if batch.merged:
        adapters = 0
        regime += len(law.token_breaks) + 1
    c = law.coefficients[regime]
    tiles = (batch.tokens + law.tile - 1) // law.tile
    model = (
        c[0]
        + c[1] * batch.tokens
        + c[2] * batch.decodes
        + c[3] * batch.context_tokens
        + (c[4] + c[5] * tiles) * adapters
        + c[6] * tiles
        + law.per_waiting * waiting
    )
    if adapters > 0:
        model += c[7] + c[8] * batch.tokens
    s = law.scheduling
    return model, s[0] + s[1] * running + s[2] * batch.scanned
