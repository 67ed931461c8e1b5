"""The files of models: whole, and of the size that is published."""

import json
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "data" / "models").glob("*.json"))
ATTENTION_BIAS = {"qwen2"}  # of queries, keys and values, whatever `attention_bias` says
HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3_text"}
FOUR_NORMS = {"gemma2", "gemma3_text"}


def _attention(config):
    """Weights of a layer's attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        keys, values = config["qk_nope_head_dim"], config["v_head_dim"]
        assert config["q_lora_rank"] is None
        queries = hidden * heads * (keys + rope)
        compressed = hidden * (latent + rope) + latent
        return queries + compressed + latent * heads * (keys + values) + heads * values * hidden
    head = config.get("head_dim") or hidden // heads
    query, key = heads * head, config["num_key_value_heads"] * head
    count = 2 * hidden * query + 2 * hidden * key
    if config["model_type"] in ATTENTION_BIAS:
        count += query + 2 * key
    if config["model_type"] == "gpt_oss":
        count += query + 2 * key + hidden + heads  # biases, and a sink for each head
    if config["model_type"] in HEAD_NORMS:
        count += 2 * head
    return count


def _feed_forward(config, layer):
    """Weights of a layer's feed-forward part with all its experts."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if layer < config.get("first_k_dense_replace", 0):
        return 3 * hidden * inner
    experts = config.get("num_local_experts") or config.get("num_experts")
    experts = experts or config.get("n_routed_experts", 0)
    if not experts:
        return 3 * hidden * inner
    inner = config.get("moe_intermediate_size", inner)
    count = experts * hidden + 3 * hidden * inner * (experts + config.get("n_shared_experts", 0))
    if config["model_type"] == "gpt_oss":
        count += experts + experts * (2 * inner + hidden)
    return count


def _vision(config):
    """Weights of a SigLIP tower and of the projection from it."""
    tower, text = config["vision_config"], config["text_config"]["hidden_size"]
    hidden, inner = tower["hidden_size"], tower["intermediate_size"]
    patch = tower["patch_size"]
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
    embedding = hidden * (3 * patch**2 + 1) + (tower["image_size"] // patch) ** 2 * hidden
    return tower["num_hidden_layers"] * layer + embedding + 2 * hidden + hidden * text + hidden


def parameters(config):
    """Count what a model's ``config.json`` says that it has."""
    if "text_config" in config:
        return parameters(config["text_config"]) + _vision(config)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    norms = hidden * (4 if config["model_type"] in FOUR_NORMS else 2)
    return (
        embeddings
        + hidden
        + layers * (norms + _attention(config))
        + sum(_feed_forward(config, layer) for layer in range(layers))
    )


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_are_files():
    assert {"tiny", "small", "llama-3.1-8b", "qwen-2.5-7b"} <= {path.stem for path in FILES}


def test_a_model_has_the_published_number_of_parameters(path):
    model = json.loads(path.read_text())
    counted = parameters(model["config"])
    if model["source"] == "of this project":
        assert counted == model["parameters"]
    assert counted == pytest.approx(model["parameters"], rel=0.005)


def test_a_file_says_where_it_is_from(path):
    model = json.loads(path.read_text())
    assert model["source"]
    assert model["parameters_source"]
    assert bool(model["huggingface"]) == (model["source"] != "of this project")
    assert set(model.get("differing", {})) <= set(model["huggingface"])


def test_a_config_names_what_decides_shape_and_memory(path):
    config = json.loads(path.read_text())["config"]
    assert config["architectures"]
    assert config["model_type"]
    text = config.get("text_config", config)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ):
        assert text[key] > 0
    assert isinstance(text["tie_word_embeddings"], bool)
    assert "rope_theta" in text or text["model_type"] == "llama"
    if "layer_types" in text:
        assert len(text["layer_types"]) == text["num_hidden_layers"]


def test_what_differs_leaves_the_shape(path):
    model = json.loads(path.read_text())
    free = {"max_position_embeddings", "rope_theta", "torch_dtype", "sliding_window"}
    for values in model.get("differing", {}).values():
        assert set(values) <= free


def test_no_name_is_in_two_files():
    names = [name for path in FILES for name in json.loads(path.read_text())["huggingface"]]
    assert len(names) == len(set(names))
