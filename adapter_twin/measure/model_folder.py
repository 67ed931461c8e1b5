"""Model and adapter folders without downloads: a named shape, random weights, synthetic adapters.

A model folder holds no weights: the engine fills the model at start-up (``load_format="dummy"``).
An adapter's weights are written once per rank and hard-linked, so that hundreds cost little disk.
Real model folders and real adapters are accepted in their place.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.tables.datasets import replacing, write_text
from adapter_twin.workload.adapter_folders import PEFT_CONFIG, WEIGHTS, peft_config, peft_rank
from adapter_twin.workload.models import model_config, read_object, shipped_models
from adapter_twin.workload.strict import suggestion

_TRAINED_TOKENS = 1000


def write_model(shape: str, folder: Path) -> Path:
    """Write a model folder of a named shape: configuration and tokenizer, no weights.

    A complete folder is left as it is; one that a kill left incomplete is written again.

    Parameters
    ----------
    shape : str
        One of `adapter_twin.workload.models.shipped_models`.
    folder : pathlib.Path
        Returned as it is given.

    Raises
    ------
    AdapterTwinError
        The shape is unknown, or the folder holds another model.
    """
    known = shipped_models()
    require(shape in known, f"model: no shape {shape!r}{suggestion(shape, known)}")
    config = model_config(shape)
    if (folder / "config.json").exists():
        require(
            check_model(folder) == config,
            f"{folder}: holds another model than {shape}; choose another folder",
        )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", _tokenizer(config["vocab_size"]))
    # every one is named: what a tokenizer class adds of its own would lie beyond the vocabulary
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        **dict.fromkeys(("eos_token", "pad_token"), "</s>"),
        **dict.fromkeys(("bos_token", "unk_token"), "<s>"),
    }
    _write_json(tokenizer, folder / "tokenizer_config.json")
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    _write_json(ends, folder / "generation_config.json")
    # last: its presence says that the folder is complete
    _write_json(config, folder / "config.json")
    return folder


def check_model(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's ``config.json``.

    Raises
    ------
    AdapterTwinError
        There is none, or it is no JSON object.
    """
    return read_object(folder / "config.json", "a model folder")


def write_adapters(model_folder: Path, folder: Path, ranks: Sequence[int]) -> list[Path]:
    """Write synthetic LoRA adapters of all linear layers, one per rank given.

    Complete adapters are left as they are.

    Parameters
    ----------
    model_folder : pathlib.Path
        The base model: a Llama or Qwen2 configuration, or another one with their layers.
    folder : pathlib.Path
        Adapter ``i`` goes to ``folder/adapter-i``.
    ranks : sequence of int
        Rank of each adapter.

    Returns
    -------
    list of pathlib.Path
        The adapters' folders.

    Raises
    ------
    AdapterTwinError
        ``config.json`` is missing or of a model whose linear layers are not known here.
    """
    widths = _linear_layers(model_folder)
    layers = check_model(model_folder)["num_hidden_layers"]
    # Adapters of another model in the same folder must not be taken for this one's.
    model = hashlib.sha256(json.dumps([layers, widths]).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    weights = {rank: folder / f"{model}-rank-{rank}.safetensors" for rank in sorted(set(ranks))}
    for rank, path in weights.items():
        if not path.exists():
            with replacing(path) as temporary:
                _write_weights(layers, widths, rank, temporary)
    adapters = [folder / f"adapter-{index}" for index in range(len(ranks))]
    for adapter, rank in zip(adapters, ranks, strict=True):
        adapter.mkdir(exist_ok=True)
        _link(weights[rank], adapter / WEIGHTS)
        _write_json(_adapter_config(rank, model_folder.name, widths), adapter / PEFT_CONFIG)
    return adapters


def adapter_rank(folder: Path) -> int:
    """Return the rank of a PEFT LoRA adapter.

    Raises
    ------
    AdapterTwinError
        The folder holds none.
    """
    rank = peft_rank(peft_config(folder))
    has_weights = any((folder / name).is_file() for name in (WEIGHTS, "adapter_model.bin"))
    require(has_weights, f"{folder / WEIGHTS}: no such file; give a PEFT adapter")
    return rank


def check_adapters(folders: Iterable[Path], max_lora_rank: int) -> None:
    """Check that every folder holds a PEFT LoRA adapter that fits a slot.

    Raises
    ------
    AdapterTwinError
        Names the first adapter that is none, or whose rank exceeds `max_lora_rank`.
    """
    for folder in folders:
        rank = adapter_rank(folder)
        require(
            rank <= max_lora_rank,
            f"{folder}: rank {rank} exceeds max_lora_rank = {max_lora_rank}; raise max_lora_rank "
            "or leave the adapter out",
        )


def _linear_layers(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every linear layer by its name within a transformer block."""
    config = check_model(model_folder)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        inner, head = config["intermediate_size"], config.get("head_dim") or hidden // heads
        queries, keys = heads * head, config["num_key_value_heads"] * head
    except KeyError as missing:
        raise AdapterTwinError(
            f"{model_folder / 'config.json'}: {missing} missing; give adapters of your own for "
            "a model that is no Llama or Qwen2"
        ) from None
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _write_weights(layers: int, widths: dict[str, tuple[int, int]], rank: int, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(layers):
        for name, (outputs, inputs) in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            # Small, so that outputs stay finite in bf16 whatever the base model's random weights.
            shrink = torch.randn(rank, inputs, generator=draw) * inputs**-0.5
            expand = torch.randn(outputs, rank, generator=draw) * 0.1
            tensors[f"{prefix}.lora_A.weight"] = shrink.to(torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = expand.to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def _adapter_config(rank: int, base_model: str, modules: Iterable[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [module.rpartition(".")[2] for module in modules],
    }


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the disk has no hard links."""
    if target.exists():
        there, wanted = target.stat(), source.stat()
        # A copy is what an earlier call left where links are impossible.
        is_copy = there.st_size == wanted.st_size and there.st_nlink == 1
        if is_copy or target.samefile(source):
            return
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _tokenizer(vocabulary: int) -> str:
    """Return a tokenizer of `vocabulary` entries, of which the first are trained on made-up text.

    The entries beyond the trained ones stand for themselves: every token id can be decoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(2000)]
    lines = (" ".join(draw.choices(words, k=40)) for _ in range(500))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(_TRAINED_TOKENS, vocabulary),
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    content = json.loads(tokenizer.to_str())
    entries = content["model"]["vocab"]
    entries |= {f"<{index}>": index for index in range(len(entries), vocabulary)}
    return json.dumps(content, ensure_ascii=False)


def _write_json(content: dict[str, Any], path: Path) -> None:
    text = json.dumps(content, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
