"""The command line of shrink: sentences first, JSON with --json, one line where it cannot."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapter_twin.workload.tensor_files import write_tensors
from tests.shrink.conftest import LLAMA_WIDTHS, Make

Run = Callable[..., tuple[int, str, str]]
Q = "model.layers.0.self_attn.q_proj.weight"


def test_people_are_told_what_is_gained_and_that_it_is_a_proxy(make: Make, run: Run) -> None:
    about = {"widths": LLAMA_WIDTHS, "base_model_name_or_path": "llama-3.1-8b"}
    same = make("a", [2, 1], **about)
    make("b", [2, 1], deltas=same, noise=0.1, **about)
    words = ("--gpu", "24", "--max-model-len", "4096", "--jobs", "1", "--rank", "2")
    status, out, _ = run("shrink", "adapters", "--merge-above", "0.9", "--out", "smaller", *words)
    assert status == 0
    first, second, *_ = out.splitlines()
    assert first == (
        "Adapters as they are: 2 in slots of rank 16; merged: 1 in slots of rank 8, "
        "written to smaller."
    )
    assert "proxies" in second
    for title in ("Energy kept by rank", "What a-merged keeps", "KV cache, tokens"):
        assert title in out


def test_an_adapter_is_taken_out_of_a_checkpoint(run: Run, tmp_path: Path) -> None:
    for name, weights in (("base", np.zeros((8, 8))), ("tuned", np.ones((8, 8)))):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "model.safetensors", [(Q, "F32", weights)])
    words = ("shrink", "--from", "tuned", "--base", "base", "--out", "adapter")
    status, out, _ = run(*words)
    assert (status, out.splitlines()[0]) == (
        0,
        "An adapter of rank 1, kept share 100 %, left out share 0 %, written to adapter.",
    )
    status, out, _ = run("shrink", "adapter", "--json")
    assert json.loads(out)["adapters"][0]["shrunk_rank"] == 1
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err == "error: adapter: is there; name another folder\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "FOLDERS: missing; name PEFT adapters, or --from and --base"),
        (("--from", "a"), "--from, --base: give both, or none"),
        (("a", "--from", "b", "--base", "c"), "--from: makes one adapter; ask shrink for the rest"),
        (("none",), "error: none: no such folder; name one of PEFT adapters"),
        ((".",), "holds no PEFT adapter; name a folder that does"),
    ],
)
def test_what_cannot_be_read_is_one_line(run: Run, words: tuple[str, ...], message: str) -> None:
    status, _, err = run("shrink", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
