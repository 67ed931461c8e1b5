"""Steps of dense models, made of the operator tables of the package ``aiconfigurator-core``.

The tables hold measured times of single operators on each GPU under several engines: matrix
products by their sizes, attention of decodes by batch and context, in bf16. Those of a dense
model, summed over its layers, are the step of an engine that costs nothing: decodes of a batch,
and the matrices alone of a prefill. Norms, activations and rotations have no tables.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.laws.step_time import Floats
from adapter_twin.workload.models import ModelShape, model_shape

DECODES = tuple(2**power for power in range(10))
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
PREFILLS = (1024, 2048, 4096, 8192)
"""Steps are made of these batches of decodes, of contexts in tokens, and of prefills in tokens."""


class Steps(NamedTuple):
    """Steps of one model, as sums of measured operators.

    Attributes
    ----------
    law : RooflineLaw
    tokens, context : shape (steps,)
        Tokens of the batch, and those in the KV caches that they attend to; a prefill has none.
    ms : shape (steps,)
    """

    law: RooflineLaw
    tokens: Floats
    context: Floats
    ms: Floats

    def errors(self, constants: Mapping[str, float]) -> Floats:
        """Return the relative errors of the law with some constants."""
        shape, self.law.constants_ = self.law.shape, dict(constants)
        kv_ms = shape.kv_bytes_per_token() * self.context / constants["kv_bandwidth_gb_s"] / 1e6
        matrices_ms = self.law._roofline_ms(self.tokens)
        expected_ms = shape.layers * constants["layer_ms"] + matrices_ms + kv_ms
        return np.asarray(expected_ms / self.ms - 1)


class Tables(NamedTuple):
    """Measured operators of one engine on one GPU.

    Attributes
    ----------
    version : str
        Of the engine.
    products : pandas.DataFrame
        Milliseconds by outputs and inputs, a column for each number of tokens.
    attention : pandas.Series
        Milliseconds by heads, KV heads, head size, batch and context.
    """

    version: str
    products: pd.DataFrame
    attention: pd.Series

    @classmethod
    def read(cls, folder: Path, engine: str) -> Tables:
        """Read the newest version of which there are both."""
        versions = {path.parent.name for path in folder.glob(f"gemm/{engine}/*/gemm_perf.parquet")}
        paths = folder.glob(f"attention/{engine}/*/generation_attention_perf.parquet")
        version = max(versions & {path.parent.name for path in paths}, key=_numbers)
        path = folder / "gemm" / engine / version / "gemm_perf.parquet"
        products = pd.read_parquet(path).query("gemm_dtype == 'bfloat16'")
        path = folder / "attention" / engine / version / "generation_attention_perf.parquet"
        attention = pd.read_parquet(path).query(
            "attn_dtype == 'bfloat16' and kv_cache_dtype == 'bfloat16'"
        )
        if "window_size" in attention:
            attention = attention.query("window_size == 0")
        attention = attention.assign(context=attention.isl + attention.step)
        sizes = ["num_heads", "num_key_value_heads", "head_dim", "batch_size", "context"]
        return cls(
            version,
            products.groupby(["n", "k", "m"]).latency.median().unstack(),
            attention.groupby(sizes).latency.median(),
        )

    def product_ms(self, inputs: int, outputs: int, tokens: Sequence[int]) -> Floats:
        """Return what a matrix takes, between measured ones linear in both sizes."""
        rows, columns = ({*self.products.index.get_level_values(name)} for name in ("n", "k"))
        parts = [
            row * column * self.products.loc[(n, k), list(tokens)].to_numpy(float)
            for n, row in _around(rows, outputs)
            for k, column in _around(columns, inputs)
        ]
        return np.asarray(np.sum(parts, axis=0))

    def matrices_ms(self, shape: ModelShape, tokens: Sequence[int], sampled: bool) -> Floats:
        """Return what a model's matrices take, where all tokens or one are sampled from."""
        queries = shape.heads * shape.head_size
        sizes = [
            (shape.hidden, queries + 2 * shape.kv_width),
            (queries, shape.hidden),
            (shape.hidden, 2 * shape.intermediate),
            (shape.intermediate, shape.hidden),
        ]
        layer_ms = np.sum([self.product_ms(*size, tokens) for size in sizes], axis=0)
        head_ms = self.product_ms(shape.hidden, shape.vocabulary, tokens if sampled else (1,))
        return np.asarray(shape.layers * layer_ms + head_ms)

    def attention_ms(self, shape: ModelShape) -> Floats:
        """Return what a layer's attention takes, by `DECODES` and `CONTEXTS`; NaN: no such."""
        known = self.attention.xs((shape.kv_heads, shape.head_size), level=(1, 2))
        by_context = known.unstack().reindex(columns=CONTEXTS)
        parts = [
            weight * by_context.loc[heads].reindex(DECODES).to_numpy(float)
            for heads, weight in _around({*known.index.get_level_values(0)}, shape.heads)
        ]
        return np.asarray(np.sum(parts, axis=0))

    def steps(self, model: str) -> Steps:
        """Return a model's decodes and prefills."""
        shape = model_shape(model)
        decodes_ms = self.matrices_ms(shape, DECODES, True)[:, None]
        decodes_ms = decodes_ms + shape.layers * self.attention_ms(shape)
        batch, context = np.meshgrid(DECODES, CONTEXTS, indexing="ij")
        tokens = np.concatenate([batch.ravel(), PREFILLS]).astype(float)
        contexts = np.concatenate([(batch * context).ravel(), np.zeros(len(PREFILLS))])
        ms = np.concatenate([decodes_ms.ravel(), self.matrices_ms(shape, PREFILLS, False)])
        there = np.isfinite(ms)
        return Steps(RooflineLaw(shape), tokens[there], contexts[there], ms[there])


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _around(sizes: Iterable[int], size: int) -> Iterator[tuple[int, float]]:
    """Yield the sizes on whose line another lies, each with its weight; past the last goes on."""
    known = sorted(sizes)
    at = min(max(bisect_right(known, size) - 1, 0), len(known) - 2)
    low, high = known[at], known[at + 1]
    weight = (size - low) / (high - low)
    yield from ((one, share) for one, share in ((low, 1 - weight), (high, weight)) if share)
