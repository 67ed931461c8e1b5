"""Models: the ``config.json`` of the shapes that can be profiled, and what the memory law needs.

Those of published models hold the values of their own ``config.json``; `tiny` and `small` are
Llamas for a CPU: `tiny` for tests, `small` with steps long enough for the model, and not Python, to
decide their time on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapter_twin.errors import require

BYTES_PER_WEIGHT = 2  # bf16


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_ANY = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_LLAMA = _ANY | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_CPU_LLAMA = _LLAMA | {
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA3 = _LLAMA | {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
_ROPE = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_QWEN = _ANY | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _CPU_LLAMA | _sizes(128, 320, 2, 2, 1),
    "small": _CPU_LLAMA | _sizes(256, 704, 4, 4, 2),
    "llama-3.2-1b": _LLAMA3
    | _sizes(2048, 8192, 16, 32, 8)
    | {"head_dim": 64, "tie_word_embeddings": True, "rope_scaling": _ROPE | {"factor": 32.0}},
    "llama-3.1-8b": _LLAMA3
    | _sizes(4096, 14336, 32, 32, 8)
    | {"rope_scaling": _ROPE | {"factor": 8.0}},
    "qwen-2.5-7b": _QWEN | _sizes(3584, 18944, 28, 28, 4),
}
"""Each shape's ``config.json`` by name, for models with random weights."""


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
        vLLM also gives its embedding and output layers adapter slots (Llama, until 0.10).
    """

    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    max_model_len: int
    adapts_vocabulary: bool = False

    @classmethod
    def of_config(cls, config: dict[str, Any], *, adapts_vocabulary: bool = False) -> ModelShape:
        """Read the shape off a ``config.json``."""
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim", config["hidden_size"] // heads)
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            kv_width=config.get("num_key_value_heads", heads) * head_size,
            vocabulary=config["vocab_size"],
            max_model_len=config["max_position_embeddings"],
            adapts_vocabulary=adapts_vocabulary,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_width * BYTES_PER_WEIGHT


MODEL_SHAPES = {name: ModelShape.of_config(config) for name, config in MODEL_CONFIGS.items()} | {
    # the models of the published measurements, on vLLM 0.8.5
    "llama-3.1-8b-instruct": ModelShape.of_config(
        MODEL_CONFIGS["llama-3.1-8b"], adapts_vocabulary=True
    ),
    "qwen-2.5-7b-instruct": ModelShape.of_config(MODEL_CONFIGS["qwen-2.5-7b"]),
}


def model_shape(model: str) -> ModelShape:
    """Return a model's shape; raise `AdapterTwinError` if the model is not known."""
    require(
        model in MODEL_SHAPES, f"model: {model!r} is unknown; use one of {', '.join(MODEL_SHAPES)}"
    )
    return MODEL_SHAPES[model]
