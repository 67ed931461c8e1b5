"""The step-time law of a GPU: a roofline of the model, and the grids of vLLM's adapter kernels.

A step is the engine's own work and, per layer, the larger of reading the weights and multiplying
them (with a knee between), reading the KV cache, and the adapter kernels: ``shrink`` to the rank
and ``expand`` back. Each of them launches a grid of (tiles of tokens) x (slots). A block of an idle
slot costs the time to launch it, a block of an active adapter more, and the adapter's own weights
are read. Below `SWITCHES_TILING` tokens ``shrink`` splits its sum into more parts.

The law's constants are a few, in units of their own, and apart from the model's shape: those of the
GPU (`GPU_CONSTANTS`), those of the engine's version (`ENGINE_CONSTANTS`), and those of its adapter
kernels (`ADAPTER_CONSTANTS`), which only versions have whose steps with adapters were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.laws.step_time import (
    FEATURES,
    Floats,
    Number,
    StepObservations,
    StepTimeLaw,
    batch_features,
)
from adapter_twin.workload.engine_versions import WITH_ADAPTERS
from adapter_twin.workload.models import ModelShape

GPU_CONSTANTS = {
    "bandwidth_gb_s": "reading weights",
    "kv_bandwidth_gb_s": "reading the KV cache",
    "compute_tflops": "multiplying",
    "knee": "exponent of the roofline: a larger one is a sharper knee",
    "layer_ms": "launches of a layer",
}
ENGINE_CONSTANTS = {
    "step_ms": "a step",
    "sequence_ms": "each running request: the sampler, so it differs by model",
    "arrival_ms": "each request that arrives",
    "eager_layer_ms": "each layer outside of CUDA graphs, besides",
}
ADAPTER_CONSTANTS = {
    "lora_layer_ms": "each layer with adapter kernels",
    "eager_lora_layer_ms": "the same outside of CUDA graphs",
    "few_adapter_ms": "each adapter in a batch and layer, up to `SWITCHES_TILING` tokens",
    "many_adapter_ms": "the same past them",
    "adapter_reads": "times that an active adapter's padded weights are read",
    "idle_block_ns": "a block of the kernels' grids",
    "shrink_block_ns": "a block of an active adapter, besides, up to `SWITCHES_TILING` tokens",
    "expand_block_ns": "a block of an active adapter, besides",
    "activation_reads": "times that a token's inputs and outputs of adapted layers are read",
    "token_reads": "times that a token reads an adapter's padded weights, which caches hold",
}
"""What the constants are the cost of, by name; those without a unit in it are counts."""

SWITCHES_TILING, LEAVES_GRAPHS = 120.0, 512.0
"""Past this many tokens the adapter kernels' tiling changes (the padded batch has 128 then), and
the batch leaves the CUDA graphs."""

KNEES = (0.5, 30.0)
"""Exponents outside are no knee; powers of them overflow."""

PADDING = 3.5
"""A batch within CUDA graphs is padded to a multiple of 8 tokens: by this much on average."""

TOKEN_BREAKS = (
    *(32.0, 64.0, 96.0, SWITCHES_TILING, 160.0, 192.0, 224.0, 256.0, 320.0, 384.0, 448.0),
    *(LEAVES_GRAPHS, 640.0, 768.0, 1024.0, 1536.0),
)
"""The roofline is compiled to straight lines between these batch sizes."""

MOST_TOKENS = 2048.0
"""The last line goes on past this batch size."""

MODULES, TILE_TOKENS, TILE_RANK, TILE_OUTPUTS = 7, 32, 16, 128
"""Adapted projections of a layer, and the kernels' tiles; ``expand`` takes twice the tokens."""

SPLIT_FEW, SPLIT_MANY = 64, 8
"""``shrink`` splits its sum into this many parts, up to `SWITCHES_TILING` tokens and past them."""

CONSTANTS = (*GPU_CONSTANTS, *ENGINE_CONSTANTS, *ADAPTER_CONSTANTS)

OWN = "sequence_ms"
"""This constant each model has for itself."""

ERROR = 0.04
"""The relative error that a measured step time is taken to have."""

ROUNDS, OUTLIER = 3, 3.0
"""The fit is repeated this often; errors of more than so many median errors count less."""

DRAWS = 40
"""This number of sets of constants is kept: the law's uncertainty."""

CAUTION = 0.9
"""A plan on laws that nobody measured holds for this share of what they may be."""

TYPICAL_SLOTS, TYPICAL_RANK, TYPICAL_CONTEXT = 32, 16, 400
TYPICAL_TOKENS = np.array([8.0, 32.0, 128.0])
"""Laws are put in the order of their steps with such batches, all of them decodes."""

Prior = Mapping[str, tuple[float, float]]


class MoreErrors(NamedTuple):
    """Errors that a fit is to make small besides those of step times.

    Attributes
    ----------
    of : callable
        Of the logarithms of `CONSTANTS`.
    group : shape (errors,)
        The workload that each is of.
    """

    of: Callable[[Floats], Floats]
    group: NDArray[np.str_]


class RooflineLaw(StepTimeLaw):
    """Step time of one model on one GPU and engine version.

    Parameters
    ----------
    shape : ModelShape

    Attributes
    ----------
    constants_ : dict of float
        By name.
    draws_ : dict of list
        By name, factors of the constants: each place of the lists is a set that the measurements
        allow as well.
    """

    shape: ModelShape
    constants_: dict[str, Annotated[float, Field(gt=1e-9, le=1e6)]]
    draws_: dict[str, list[Annotated[float, Field(gt=1e-3, le=1e3)]]]

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a fitted law; raise `AdapterTwinError` unless it is one."""
        law = super().from_dict(values)
        needed = CONSTANTS if law.knows_adapters else (*GPU_CONSTANTS, *ENGINE_CONSTANTS)
        for kind in (law.constants_, law.draws_):
            where = "constants_" if kind is law.constants_ else "draws_"
            for name in needed:
                require(name in kind, f"{where}.{name}: missing; add this key")
        require(
            min(map(len, law.draws_.values())) > 0, "draws_: must not be empty; calibrate again"
        )
        knee, (low, high) = law.constants_["knee"], KNEES
        require(
            low <= knee <= high, f"constants_.knee: must be from {low:g} to {high:g}, got {knee}"
        )
        return law

    @property
    def token_breaks_(self) -> Sequence[float]:  # type: ignore[override]
        """The coefficients change past these batch sizes."""
        return TOKEN_BREAKS

    @property
    def knows_adapters(self) -> bool:
        """Whether steps with adapters are known."""
        return not ADAPTER_CONSTANTS.keys().isdisjoint(self.constants_)

    @property
    def arrival_ms(self) -> float:
        """What a request costs the engine's process when it arrives."""
        return self.constants_["arrival_ms"]

    def fit(
        self, observed: StepObservations, prior: Prior, also: MoreErrors | None = None
    ) -> RooflineLaw:
        """Fit to measured step times, as far from the prior as they ask for.

        Parameters
        ----------
        observed : StepObservations
            The sum of their weights is the number of independent observations that they count for.
        prior : mapping
            For each of `CONSTANTS` a value, and the standard deviation of its logarithm.
        also : MoreErrors, optional
            To be small as well: see `adapter_twin.calibrate.through_twin`.
        """
        slopes, errors = fit_together([self], [observed], prior, [also])
        groups = [np.empty(0, str) if also is None else also.group, observed.group]
        self.draws_ = _bootstrap(slopes, errors, np.concatenate(groups))
        return self

    def drawn(self, draw: int) -> RooflineLaw:
        """Return the law with one draw of its constants; they begin anew past the last."""
        factors = {name: draws[draw % len(draws)] for name, draws in self.draws_.items()}
        law = RooflineLaw(self.shape)
        law.constants_ = {n: value * factors[n] for n, value in self.constants_.items()}
        return law

    def typical_ms(self) -> float:
        """Return the geometric mean of the steps of typical batches."""
        tokens, engine = TYPICAL_TOKENS, (TYPICAL_SLOTS * self.knows_adapters, TYPICAL_RANK)
        context_tokens, adapters = TYPICAL_CONTEXT * tokens, np.minimum(tokens, engine[0])
        batches = batch_features(tokens, tokens, context_tokens, adapters)
        coefficients = self.for_engine(*engine)[np.searchsorted(TOKEN_BREAKS, tokens)]
        return float(np.exp(np.log((coefficients * batches).sum(axis=-1)).mean()))

    def in_order(self) -> list[RooflineLaw]:
        """Return the draws, those with the shortest steps first."""
        laws = [self.drawn(draw) for draw in range(min(map(len, self.draws_.values())))]
        return sorted(laws, key=RooflineLaw.typical_ms)

    def cautious(self) -> RooflineLaw:
        """Return the draw whose steps are longer than those of a share `CAUTION` of all draws."""
        laws = self.in_order()
        return laws[math.ceil(CAUTION * len(laws)) - 1]

    def representatives(self, count: int) -> list[RooflineLaw]:
        """Return draws at even quantiles of all, so that their mean is that of all."""
        laws = self.in_order()
        return [laws[(2 * i + 1) * len(laws) // (2 * count)] for i in range(count)]

    def doubts(self) -> dict[str, float]:
        """Return each constant's share of the uncertainty of typical steps, the largest first."""
        shares = {}
        for name, factors in self.draws_.items():
            off = copy(self)
            off.constants_ = self.constants_ | {name: self.constants_[name] * 1.01}
            slope = math.log(off.typical_ms() / self.typical_ms()) / math.log(1.01)
            shares[name] = (slope * float(np.log(factors).std())) ** 2
        total = sum(shares.values()) or 1.0
        return {n: shares[n] / total for n in sorted(shares, key=shares.__getitem__, reverse=True)}

    def for_engine(self, max_loras: Number, max_lora_rank: Number) -> Floats:
        """Return the coefficients in ms for an engine, or for each of several.

        Raises
        ------
        AdapterTwinError
            The engine has slots, and no step with adapters was measured.
        """
        require(
            self.knows_adapters or not np.any(max_loras),
            "engine.max_loras: what adapters cost on this version of vLLM was not measured; ask "
            f"for vLLM {WITH_ADAPTERS} (gpu: l40s-vllm{WITH_ADAPTERS}), or simulate 0 slots",
        )
        c = dict.fromkeys(ADAPTER_CONSTANTS, 0.0) | self.constants_
        shape, layers = self.shape, self.shape.layers
        slots, ranks = (np.asarray(x, float)[..., None] for x in (max_loras, max_lora_rank))
        low = np.array((0.0, *TOKEN_BREAKS))
        high = np.array((*TOKEN_BREAKS, MOST_TOKENS))
        few, eager = high <= SWITCHES_TILING, low >= LEAVES_GRAPHS
        padding = np.where(eager, 0.0, PADDING)
        at_low, at_high = (self._roofline_ms(tokens + padding) for tokens in (low, high))
        per_token = (at_high - at_low) / (high - low)
        ms = np.zeros(
            (*np.broadcast_shapes(slots.shape[:-1], ranks.shape[:-1]), len(low), len(FEATURES))
        )
        launch, tokens, decodes, context, adapters, adapters_tokens = np.moveaxis(ms, -1, 0)[:6]
        launch += c["step_ms"] + layers * (c["layer_ms"] + eager * c["eager_layer_ms"])
        launch += at_low - per_token * low
        tokens += per_token
        decodes += c["sequence_ms"]
        context += shape.kv_bytes_per_token() / c["kv_bandwidth_gb_s"] / 1e6
        inputs, outputs = adapted_widths(shape)
        # A value of each layer takes this to read; without slots no adapter kernel is launched.
        read_ms = (slots > 0) * layers * shape.value_bytes / c["bandwidth_gb_s"] / 1e6
        weights_ms = ranks * (inputs + outputs) * read_ms
        # Blocks of the two grids per layer, for each token and for the tile that is half empty.
        splits = np.where(few, SPLIT_FEW, SPLIT_MANY)
        shrink_tile = splits * MODULES * np.ceil(ranks / TILE_RANK)
        expand_tile = outputs / TILE_OUTPUTS
        shrink, expand = shrink_tile / TILE_TOKENS, expand_tile / (2 * TILE_TOKENS)
        idle_ms = 1e-6 * layers * slots * c["idle_block_ns"]
        shrink_ms = 1e-6 * layers * (slots > 0) * np.where(few, c["shrink_block_ns"], 0.0)
        expand_ms = 1e-6 * layers * (slots > 0) * c["expand_block_ns"]
        per_layer = np.where(eager, c["eager_lora_layer_ms"], c["lora_layer_ms"])
        launch += layers * (slots > 0) * per_layer
        launch += idle_ms * ((shrink + expand) * padding + (shrink_tile + expand_tile) / 2)
        tokens += idle_ms * (shrink + expand)
        tokens += c["activation_reads"] * (inputs + outputs) * read_ms
        tokens += c["token_reads"] * weights_ms
        adapters += layers * (slots > 0) * np.where(few, c["few_adapter_ms"], c["many_adapter_ms"])
        adapters += c["adapter_reads"] * weights_ms
        adapters_tokens += shrink_ms * shrink + expand_ms * expand
        adapters += (
            adapters_tokens * padding + (shrink_ms * shrink_tile + expand_ms * expand_tile) / 2
        )
        return ms

    def _roofline_ms(self, tokens: Floats) -> Floats:
        """Return what the model's matrices take for batches without attention or adapters."""
        c, shape = self.constants_, self.shape
        others = shape.vocabulary * shape.hidden * shape.value_bytes
        read_ms = (shape.linear_parameters * shape.linear_bits / 8 + others) / c["bandwidth_gb_s"]
        compute_ms = 2 * shape.linear_parameters * tokens / c["compute_tflops"]
        knee = c["knee"]
        return np.asarray(((read_ms / 1e6) ** knee + (compute_ms / 1e9) ** knee) ** (1 / knee))


def fit_together(
    laws: Sequence[RooflineLaw],
    observed: Sequence[StepObservations],
    prior: Prior,
    also: Sequence[MoreErrors | None],
) -> tuple[Floats, Floats]:
    """Fit laws of several models on one GPU and engine, which share all but `OWN`, in place.

    Parameters
    ----------
    laws : sequence of RooflineLaw
    observed, also : sequence
        For each law, as for its ``fit``.
    prior : mapping
        Of the constants.

    Returns
    -------
    slopes : float64, shape (errors, logarithms)
        Of the errors where the fit ends.
    errors : float64, shape (errors,)
        Of the prior, then for each law `also` and `observed`.
    """
    from scipy.optimize import least_squares

    work = [steps.means_by_regime(TOKEN_BREAKS) for steps in observed]
    value, spread = np.array([prior[name] for name in CONSTANTS]).T
    shared, own = len(CONSTANTS), CONSTANTS.index(OWN)
    start = np.concatenate([np.log(value), np.full(len(laws) - 1, np.log(value[own]))])
    spread = np.concatenate([spread, np.full(len(laws) - 1, spread[own])])
    robust = [np.ones(len(steps.step_ms)) for steps in observed]

    def missed(logarithms: Floats) -> list[Floats]:
        errors = []
        for i, (law, steps) in enumerate(zip(laws, observed, strict=True)):
            its = logarithms[:shared].copy()
            its[own] = logarithms[shared + i - 1] if i else its[own]
            law.constants_ = dict(zip(CONSTANTS, np.exp(its).tolist(), strict=True))
            errors.append(law.expected_ms(steps, work[i]) / steps.step_ms - 1)
        return errors

    def errors(logarithms: Floats) -> Floats:
        parts = [(logarithms - start) / spread]
        for i, missed_by in enumerate(missed(logarithms)):
            its = also[i]
            if its is not None:
                parts.append(its.of(np.log(list(laws[i].constants_.values()))))
            parts.append(missed_by * np.sqrt(observed[i].weight) * robust[i] / ERROR)
        return np.concatenate(parts)

    found = least_squares(errors, start, x_scale=spread)
    for _ in range(ROUNDS):
        for i, missed_by in enumerate(map(np.abs, missed(found.x))):
            outlying = OUTLIER * np.median(missed_by) / np.maximum(missed_by, 1e-9)
            robust[i] = np.sqrt(np.minimum(1, outlying))
        found = least_squares(errors, found.x, x_scale=spread)
    missed(found.x)  # the last that the search tried need not be what it found
    return found.jac, found.fun


def _bootstrap(slopes: Floats, errors: Floats, group: NDArray[np.str_]) -> dict[str, list[float]]:
    """Return factors of the constants, drawn by Bayesian bootstrap over groups of observations.

    Each draw is one step of the fit with other weights of the groups and another prior.
    """
    rng = np.random.default_rng(0)
    number = np.unique(group, return_inverse=True)[1]
    of_prior = len(errors) - len(group)
    factors = []
    for _ in range(DRAWS):
        weight = rng.standard_exponential(number.max() + 1)[number]
        weight = np.concatenate([np.ones(of_prior), weight])
        noise = np.concatenate([rng.standard_normal(of_prior), np.zeros(len(group))])
        weighted = slopes * weight[:, None]
        factors.append(np.exp(-np.linalg.solve(slopes.T @ weighted, weighted.T @ (errors + noise))))
    return dict(zip(CONSTANTS, np.round(np.transpose(factors), 4).tolist(), strict=True))


def adapted_widths(shape: ModelShape) -> tuple[int, int]:
    """Return the inputs and the outputs of the adapted projections of a layer, in total."""
    queries, wide = shape.heads * shape.head_size, shape.intermediate
    inputs = 5 * shape.hidden + queries + wide
    return inputs, queries + 2 * shape.kv_width + 2 * wide + 2 * shape.hidden
