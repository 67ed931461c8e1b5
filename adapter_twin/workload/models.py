"""Models: what a ``config.json`` says of a model's size, of those shipped and of any folder.

The shipped ones are ``data/models``; `tiny` and `small` are Llamas for a CPU: `tiny` for tests,
`small` with steps long enough for the model, and not Python, to decide their time on one core.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.workload.shipped import facts
from adapter_twin.workload.strict import (
    Count,
    Integer,
    Positive,
    Size,
    Whole,
    dataclass,
    keys,
    read,
    suggestion,
)

Config = dict[str, Any]
Length = Annotated[Count, Field(lt=2**31)]

_FUSED = ("Phi3ForCausalLM",)  # one projection for q, k and v, and one for gate and up
_DENSE = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("GraniteForCausalLM", *_FUSED),
)
_EXPERTS = {"MixtralForCausalLM": "num_local_experts", "Qwen3MoeForCausalLM": "num_experts"}
_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@keys
class _Rope(TypedDict, total=False):
    factor: Annotated[float, Field(gt=0, le=1e6)] | None
    original_max_position_embeddings: Length | None


@keys
class _Bits(TypedDict, total=False):
    num_bits: Size | None
    group_size: Integer | None


@keys
class _Quantisation(_Bits, total=False):
    quant_method: str | None
    bits: Size | None
    config_groups: dict[str, dict[str, Any]] | None


@keys
class _Kinds(TypedDict, total=False):
    """What keys of a ``config.json`` may hold, those beside the sizes."""

    architectures: list[str] | None
    layer_types: list[str] | None
    head_dim: Size | None
    num_key_value_heads: Size | None
    sliding_window: Length | None
    torch_dtype: str | None
    dtype: str | None
    rope_scaling: _Rope | None
    quantization_config: _Quantisation | None
    text_config: dict[str, Any] | None


_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model's size, by its ``config.json``.

    Attributes
    ----------
    architecture : str
        The first of ``architectures``.
    layers, hidden, intermediate, vocabulary : int
    heads, kv_heads, head_size : int
        Queries are ``heads * head_size`` wide, keys and values ``kv_heads * head_size``.
    max_model_len : int
        Longest request in tokens.
    sliding_window : int, optional
        Attention reaches back this many tokens only.
    parameters : int
        Of all layers and the vocabulary.
    experts : int
        Feed-forward networks of a layer to choose from; 0 is one, always used.
    linear_bits : float
        Of a weight of a layer's matrices, scales included: 16, or fewer where they are quantised.
    value_bytes : int
        Of all other weights, of activations, and of keys and values.

    Examples
    --------
    >>> shape = model_shape("llama-3.1-8b")
    >>> shape.kv_width, shape.kv_bytes_per_token()
    (1024, 131072)
    """

    architecture: str
    layers: Count
    hidden: Count
    intermediate: Count
    vocabulary: Count
    heads: Count
    kv_heads: Count
    head_size: Count
    max_model_len: Count
    sliding_window: Count | None = None
    parameters: Count
    linear_parameters: Count
    experts: Whole = 0
    linear_bits: Positive = 16.0
    value_bytes: Count = 2

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the shape off a ``config.json``.

        Parameters
        ----------
        config : mapping
            Its content.

        Raises
        ------
        AdapterTwinError
            A key is missing, or the model is of a kind whose memory is not known here.
        """
        read(_Kinds, config, "config.json")
        whole, config = config, {**config, **(config.get("text_config") or {})}
        read(_Kinds, config, "config.json")
        architecture = _architecture(config)
        _require_known(architecture, config)
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        head_size = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        experts = _size(config, _EXPERTS[architecture]) if architecture in _EXPERTS else 0
        width = "moe_intermediate_size" if "moe_intermediate_size" in config else None
        intermediate = _size(config, width or "intermediate_size")
        layers, vocabulary = _size(config, "num_hidden_layers"), _size(config, "vocab_size")
        q, kv = heads * head_size, kv_heads * head_size
        networks = max(experts, 1)
        linear = layers * (2 * hidden * (q + kv) + 3 * networks * hidden * intermediate)
        small = layers * (2 * hidden + experts * hidden) + hidden
        if architecture == "Qwen2ForCausalLM" or config.get("attention_bias"):
            small += layers * (q + 2 * kv)
        if architecture.startswith("Qwen3"):
            small += layers * 2 * head_size  # norms of queries and keys
        embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
        slides = config.get("use_sliding_window", True)
        dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
        require(dtype in _DTYPE_BYTES, f"torch_dtype: {dtype}{suggestion(dtype, _DTYPE_BYTES)}")
        return cls(
            architecture=architecture,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            vocabulary=vocabulary,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            max_model_len=_longest(config),
            sliding_window=(config.get("sliding_window") if slides else None) or None,
            parameters=linear + small + embeddings,
            linear_parameters=linear,
            experts=experts,
            linear_bits=_linear_bits(whole.get("quantization_config")),
            # vLLM runs float32 checkpoints in 16 bits as well
            value_bytes=min(_DTYPE_BYTES[dtype], 2),
        )

    @property
    def kv_width(self) -> int:
        """Key (or value) width of one layer."""
        return self.kv_heads * self.head_size

    @property
    def fused(self) -> bool:
        """Whether one matrix makes queries, keys and values, and one gate and up."""
        return self.architecture in _FUSED

    @property
    def weights_bytes(self) -> float:
        """Memory of the weights."""
        others = self.parameters - self.linear_parameters
        return self.linear_parameters * self.linear_bits / 8 + others * self.value_bytes

    def kv_bytes_per_token(self, kv_cache_dtype: str = "auto", gpus: int = 1) -> int:
        """Return the memory of a token's keys and values in all layers, on each of `gpus`.

        Parameters
        ----------
        kv_cache_dtype : {"auto", "fp8"}
        gpus : int
            vLLM's ``tensor_parallel_size``; of fewer heads each GPU has a copy.
        """
        width = max(self.kv_heads // gpus, 1) * self.head_size
        return 2 * self.layers * width * (1 if kv_cache_dtype == "fp8" else self.value_bytes)


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the architecture; the text part of a nested file may tell its type alone."""
    named = (config.get("architectures") or [None])[0]
    by_type = _TYPES.get(str(config.get("model_type")))
    return by_type if "text_config" in config and by_type else str(named or by_type)


def _require_known(architecture: str, config: Mapping[str, Any]) -> None:
    """Refuse kinds of models whose weights, KV cache or adapters are laid out otherwise."""
    kinds = {
        "latent attention (MLA)": config.get("kv_lora_rank"),
        "attention of several kinds in turn": len(set(config.get("layer_types") or ())) > 1,
        "state-space layers": config.get("mamba_d_state") or config.get("ssm_cfg"),
        "an encoder for images": config.get("vision_config"),
        "an encoder for sound": config.get("audio_config"),
    }
    for kind, found in kinds.items():
        require(not found, f"model: {architecture} has {kind}, which the memory law does not know")
    known = (*_DENSE, *_EXPERTS)
    require(
        architecture in known,
        f"model: {architecture} is not among the architectures that the memory law knows: "
        f"{', '.join(known)}",
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    require(
        isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**24,
        f"config.json: {key} must be a whole number above 0, and small, got {one_line(value, 40)}",
    )
    assert isinstance(value, int)
    return value


def _longest(config: Mapping[str, Any]) -> int:
    """Return the longest request as vLLM derives it: stretched positions count."""
    longest = _size(config, "max_position_embeddings")
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in ("linear", "dynamic", "yarn"):
        longest = scaling.get("original_max_position_embeddings") or longest
        return int(longest * (scaling.get("factor") or 1))
    return longest


def _linear_bits(quantisation: Mapping[str, Any] | None) -> float:
    """Return the bits of a weight of a layer's matrices: its own, and its part of the scales."""
    if not quantisation:
        return 16.0
    method = str(quantisation.get("quant_method"))
    if method == "compressed-tensors":
        groups = list((quantisation.get("config_groups") or {}).values())
        quantisation = (groups[0].get("weights") if groups else None) or {}
        read(_Bits, quantisation, "config.json.quantization_config.weights")
        quantisation = {"bits": quantisation.get("num_bits"), **quantisation}
    elif "fp8" in method:
        return 8.0
    elif method == "bitsandbytes":
        quantisation = {"bits": 4 if quantisation.get("load_in_4bit") else 8}
    elif method not in ("awq", "gptq"):
        raise AdapterTwinError(
            f"model: weights quantised by {method!r} are not known here; use awq, gptq, fp8, "
            "bitsandbytes or compressed-tensors"
        )
    bits = quantisation.get("bits")
    require(isinstance(bits, int), f"config.json: quantization_config names no bits for {method}")
    assert isinstance(bits, int)
    group = quantisation.get("group_size") or 0
    return float(bits) + ((16 + bits) / group if group > 0 else 0)


def _key(model: str) -> str:
    """Return a name without what people write differently: owner, case, hyphens."""
    return re.sub(r"[^a-z0-9.]", "", model.rstrip("/").rsplit("/", 1)[-1].lower())


@cache
def _published() -> dict[str, Config]:
    """Return the ``config.json`` of the shipped models, by the keys of their published names."""
    return {
        _key(name): about["config"] | about.get("differing", {}).get(name, {})
        for about in facts("models").values()
        for name in about["huggingface"]
    }


def shipped_models() -> list[str]:
    """Return the names of the shipped models."""
    return list(facts("models"))


def same_model(one: str, other: str) -> bool:
    """Return whether two names, Hugging Face's or ours, are of the same model."""
    return _key(one) == _key(other)


def model_config(model: str) -> Config:
    """Return a model's ``config.json``.

    Parameters
    ----------
    model : str
        A shipped name, a Hugging Face name of it, or the path of a model folder.

    Raises
    ------
    AdapterTwinError
        There is none.
    """
    path = Path(model) / "config.json"
    if model in facts("models"):
        return dict(facts("models")[model]["config"])
    if _key(model) in _published():
        return _published()[_key(model)]
    if not path.is_file():
        near = suggestion(model, shipped_models())
        raise AdapterTwinError(
            f"model: {model!r} is neither shipped nor a folder with a config.json{near}"
        )
    return read_object(path, "a model folder")


def read_object(path: Path, kind: str) -> Config:
    """Return the JSON object in a file of `kind`.

    Raises
    ------
    AdapterTwinError
        There is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        not_json = f"no valid JSON ({one_line(error)})"
        reason = error.strerror if isinstance(error, OSError) else not_json
        raise AdapterTwinError(f"{path}: {reason}; give {kind}") from None
    require(isinstance(content, dict), f"{path}: holds no JSON object; give {kind}")
    return dict(content)


@cache
def model_shape(model: str) -> ModelShape:
    """Return a model's shape.

    Parameters
    ----------
    model : str
        As for `model_config`.

    Raises
    ------
    AdapterTwinError
        The model is not known, or of a kind that is not.
    """
    return ModelShape.of_config(model_config(model))
