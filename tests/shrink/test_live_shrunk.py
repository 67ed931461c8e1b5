"""A shrunk adapter in a real vLLM: the same log-probabilities as those of the one it is made of."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_twin.measure.model_folder import write_model
from adapter_twin.shrink.shrink import shrink
from adapter_twin.workload.tensor_files import write_tensors

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

RANK, TRUE_RANK = 32, 5


def write_weights(folder: Path, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Give a Llama's folder random weights; return outputs and inputs of its linear layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (
        config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value")
    )
    widths = {"self_attn.q_proj": (q, hidden), "self_attn.o_proj": (hidden, q)}
    widths |= {f"self_attn.{name}_proj": (kv, hidden) for name in "kv"}
    widths |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
    widths["mlp.down_proj"] = (hidden, inner)
    layers = [f"model.layers.{layer}" for layer in range(config["num_hidden_layers"])]
    linear = {f"{at}.{name}": shape for at in layers for name, shape in widths.items()}
    vocabulary = (config["vocab_size"], hidden)
    dense = {**linear, "model.embed_tokens": vocabulary, "lm_head": vocabulary}
    norms = [f"{at}.{name}_layernorm" for at in layers for name in ("input", "post_attention")]
    draw = np.random.default_rng(0)
    tensors = [
        (f"{name}.weight", "F32", draw.standard_normal(shape) / np.sqrt(shape[1]))
        for name, shape in dense.items()
    ]
    tensors += [(f"{name}.weight", "F32", np.ones(hidden)) for name in (*norms, "model.norm")]
    write_tensors(folder / "model.safetensors", tensors)
    return linear


def write_adapter(folder: Path, linear: dict[str, tuple[int, int]]) -> None:
    """Write an adapter of a lower rank than its factors show, with rsLoRA's scaling."""
    draw = np.random.default_rng(1)
    tensors = []
    for name, (outputs, inputs) in linear.items():
        b = draw.standard_normal((outputs, TRUE_RANK)) @ draw.standard_normal((TRUE_RANK, RANK))
        sides = {"B": b / RANK, "A": draw.standard_normal((RANK, inputs)) / inputs**0.5}
        at = f"base_model.model.{name}.lora"
        tensors += [(f"{at}_{side}.weight", "F32", values) for side, values in sides.items()]
    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    targets = sorted({name.rpartition(".")[2] for name in linear})
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "use_rslora": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "target_modules": targets}))


def test_live_a_shrunk_adapter_gives_the_logits_of_the_one_it_is_made_of(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    model = write_model("tiny", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    write_adapter(tmp_path / "adapters" / "a", write_weights(model, config))
    (row,) = shrink([tmp_path / "adapters"], energy=1 - 1e-9, out=tmp_path / "smaller")["adapters"]
    assert (row["rank"], row["shrunk_rank"]) == (RANK, TRUE_RANK)
    script = Path(__file__).with_name("vllm_logits.py")
    folders = [str(tmp_path / name / "a") for name in ("adapters", "smaller")]
    words = [sys.executable, str(script), str(model), *folders]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    base, whole, smaller = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert base.shape[1] == config["vocab_size"]
    assert np.abs(whole - base).max() > 0.1  # the adapter changes something
    assert np.abs(whole - smaller).max() < 1e-4  # of float32, through two layers
