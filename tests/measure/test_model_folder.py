"""Model and adapter folders: true shapes, complete or written again, cheap on disk."""

import json
import os
from pathlib import Path

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.measure import model_folder
from adapter_twin.measure.model_folder import (
    adapter_rank,
    check_adapters,
    check_model,
    write_adapters,
    write_model,
)
from adapter_twin.workload.models import model_config, model_shape


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the two libraries that come with the engine."""
    monkeypatch.setattr(model_folder, "_tokenizer", lambda vocabulary: f"{vocabulary} tokens")
    monkeypatch.setattr(
        model_folder,
        "_write_weights",
        lambda layers, widths, rank, path: path.write_text(f"r{rank}"),
    )


@pytest.fixture
def model(no_engine: None, tmp_path: Path) -> Path:
    return write_model("tiny", tmp_path / "model")


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen-2.5-7b"])
def test_a_published_shape_is_the_one_whose_memory_the_twin_accounts_for(name: str) -> None:
    config, known = model_config(name), model_shape(f"{name}-instruct")
    head = config["hidden_size"] // config["num_attention_heads"]
    assert config["num_hidden_layers"] == known.layers
    assert config["hidden_size"] == known.hidden
    assert config["intermediate_size"] == known.intermediate
    assert config["num_key_value_heads"] * head == known.kv_width
    assert config["vocab_size"] == known.vocabulary
    assert config["max_position_embeddings"] == known.max_model_len


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_complete_model_folder_is_left_as_it_is(model: Path) -> None:
    before = files(model)
    assert write_model("tiny", model) == model
    assert files(model) == before
    assert check_model(model) == model_config("tiny")


def test_an_incomplete_model_folder_is_written_again(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "tokenizer.json").write_text("cut sho")
    write_model("tiny", model)
    assert (model / "tokenizer.json").read_text() == "1024 tokens"


def test_another_model_is_not_written_over(model: Path) -> None:
    with pytest.raises(AdapterTwinError, match=r"holds another model than small"):
        write_model("small", model)


def test_an_unknown_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match=r"^model: no shape 'smal'; did you mean 'small'"):
        write_model("smal", tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(AdapterTwinError, match=r"config\.json: .*give a model folder"):
        check_model(tmp_path)


def test_adapters_of_a_rank_share_their_weights(model: Path, tmp_path: Path) -> None:
    first, second, third = write_adapters(model, tmp_path / "adapters", [8, 16, 8])
    weights = "adapter_model.safetensors"
    assert (first / weights).samefile(third / weights)
    assert (second / weights).read_text() == "r16"
    assert [adapter_rank(folder) for folder in (first, second, third)] == [8, 16, 8]
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        *["q_proj", "k_proj", "v_proj", "o_proj"],
        *["gate_proj", "up_proj", "down_proj"],
    ]


def test_complete_adapters_are_left_and_a_new_rank_replaces_the_old(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    write_adapters(model, folder, [8, 16])
    before = files(folder)
    write_adapters(model, folder, [8, 16])
    assert files(folder) == before
    _, changed = write_adapters(model, folder, [8, 8])
    assert (changed / "adapter_model.safetensors").read_text() == "r8"


def test_weights_are_copied_where_links_are_impossible(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        first, second = write_adapters(model, tmp_path / "adapters", [8, 8])
    weights = "adapter_model.safetensors"
    assert not (first / weights).samefile(second / weights)
    assert (second / weights).read_text() == "r8"


def test_an_adapter_that_does_not_fit_a_slot_is_named(model: Path, tmp_path: Path) -> None:
    adapters = write_adapters(model, tmp_path / "adapters", [8, 16])
    check_adapters(adapters, 16)
    with pytest.raises(AdapterTwinError, match=r"adapter-1: rank 16 exceeds max_lora_rank = 8"):
        check_adapters(adapters, 8)


@pytest.mark.parametrize("config", [{"r": 8}, {"peft_type": "LORA"}, {"peft_type": "IA3", "r": 8}])
def test_a_folder_that_is_no_lora_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        AdapterTwinError, match=r"adapter_config\.json(: no LoRA of PEFT|\.r: missing)"
    ):
        check_adapters([tmp_path], 16)


def test_an_adapter_without_weights_is_refused(model: Path, tmp_path: Path) -> None:
    (adapter,) = write_adapters(model, tmp_path / "adapters", [8])
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterTwinError, match=r"adapter_model\.safetensors: no such file"):
        check_adapters([adapter], 16)


@pytest.mark.live
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", ["tiny", "small", "llama-3.2-1b", "llama-3.1-8b", "qwen-2.5-7b"])
def test_the_engine_reads_every_shape(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from transformers import AutoConfig, AutoTokenizer

    folder = str(write_model(shape, tmp_path))
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert config.model_type in ("llama", "qwen2")
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.decode([2, config.vocab_size - 1])


@pytest.mark.live
@pytest.mark.filterwarnings("default")
def test_adapter_weights_have_the_layout_of_peft(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from safetensors import safe_open

    base = write_model("tiny", tmp_path / "model")
    (adapter,) = write_adapters(base, tmp_path / "adapters", [4])
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        shapes = {name: tuple(weights.get_tensor(name).shape) for name in weights.keys()}  # noqa: SIM118
    layer = "base_model.model.model.layers.1"
    assert len(shapes) == 2 * 7 * model_config("tiny")["num_hidden_layers"]
    assert shapes[f"{layer}.mlp.down_proj.lora_A.weight"] == (4, 320)
    assert shapes[f"{layer}.self_attn.k_proj.lora_B.weight"] == (64, 4)
