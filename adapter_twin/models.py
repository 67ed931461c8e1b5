"""The shapes of the models whose memory the twin can account for."""

from __future__ import annotations

from dataclasses import dataclass

from adapter_twin.errors import AdapterTwinError

BYTES_PER_WEIGHT = 2  # bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a model's ``config.json`` says of its size.

    Attributes
    ----------
    layers, hidden, intermediate, vocabulary : int
    kv_width : int
        Key (or value) width of one layer: KV heads x head size.
    max_model_len : int
        Longest request in tokens.
    adapts_vocabulary : bool
        vLLM also gives its embedding and output layers adapter slots.
    """

    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    max_model_len: int
    adapts_vocabulary: bool

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_width * BYTES_PER_WEIGHT


MODEL_SHAPES = {
    "llama-3.1-8b-instruct": ModelShape(
        layers=32,
        hidden=4096,
        intermediate=14336,
        kv_width=1024,
        vocabulary=128256,
        max_model_len=131072,
        adapts_vocabulary=True,
    ),
    "qwen-2.5-7b-instruct": ModelShape(
        layers=28,
        hidden=3584,
        intermediate=18944,
        kv_width=512,
        vocabulary=152064,
        max_model_len=32768,
        adapts_vocabulary=False,
    ),
}


def model_shape(model: str) -> ModelShape:
    """Return a model's shape.

    Raises
    ------
    AdapterTwinError
        The model is not known.
    """
    if model not in MODEL_SHAPES:
        raise AdapterTwinError(f"model: {model!r} is unknown; use one of {', '.join(MODEL_SHAPES)}")
    return MODEL_SHAPES[model]
