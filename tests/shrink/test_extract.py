"""An adapter out of two dense checkpoints: its rank, its energy, and what it cannot hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError
from adapter_twin.shrink.extract import extract
from adapter_twin.shrink.peft_weights import PeftWeights
from adapter_twin.workload.tensor_files import write_tensors
from tests.shrink.conftest import of_spectrum

Q, DOWN, NORM = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj", "norm")
)
SHAPES: dict[str, tuple[int, ...]] = {Q: (40, 40), DOWN: (40, 90), NORM: (40,)}

Tensors = dict[str, NDArray[np.float64]]


def write(folder: Path, tensors: Tensors, sharded: bool = False) -> Path:
    folder.mkdir()
    told = [(name, "F64", one) for name, one in tensors.items()]
    if not sharded:
        write_tensors(folder / "model.safetensors", told)
        return folder
    names = {name: f"model-{i}.safetensors" for i, (name, _, _) in enumerate(told)}
    for one in told:
        write_tensors(folder / names[one[0]], [one])
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.fixture
def base() -> Tensors:
    draw = np.random.default_rng(1)
    return {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def deltas() -> Tensors:
    draw = np.random.default_rng(2)
    return {
        Q: of_spectrum([3.0, 2, 1], 40, 40, draw),
        DOWN: of_spectrum([4.0, 1], 40, 90, draw),
        NORM: np.full(40, 0.5),
    }


@pytest.fixture
def folders(tmp_path: Path, base: Tensors, deltas: Tensors) -> list[Path]:
    tuned = {name: one + deltas[name] for name, one in base.items()}
    return [write(tmp_path / "tuned", tuned, sharded=True), write(tmp_path / "base", base)]


def test_the_change_of_every_linear_layer_is_found_and_written(
    folders: list[Path], deltas: Tensors, tmp_path: Path
) -> None:
    found = extract(*folders, energy=1 - 1e-9, out=tmp_path / "adapter")
    assert [(row["name"], row["needed_rank"]) for row in found["modules"]] == [(DOWN, 2), (Q, 3)]
    assert (found["rank"], found["kept_share"]) == (3, pytest.approx(1, abs=1e-9))
    written = PeftWeights(tmp_path / "adapter")
    assert written.rank == 3
    assert written.config["target_modules"] == ["down_proj", "q_proj"]
    for name in (Q, DOWN):
        factors = written.factors(f"base_model.model.{name.removesuffix('.weight')}")
        np.testing.assert_allclose(factors.left @ factors.right, deltas[name], atol=1e-6)


def test_energy_kept_and_left_out_are_those_of_the_spectra(folders: list[Path]) -> None:
    found = extract(*folders, rank=1)
    shares = {row["name"]: row["kept_share"] for row in found["modules"]}
    assert shares == {Q: pytest.approx(9 / 14, abs=1e-6), DOWN: pytest.approx(16 / 17, abs=1e-6)}
    assert found["kept_share"] == pytest.approx(25 / 31, abs=1e-6)
    assert found["left_out"] == [NORM]
    assert found["left_out_share"] == pytest.approx(10 / 41, abs=1e-6)


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ({NORM: np.ones(40)}, "is not as in"),
        ({Q: np.ones((40, 41))}, f"{Q} is not as in .*base; give its own base"),
        ({}, "no linear layer differs from the base"),
    ],
)
def test_checkpoints_that_do_not_go_together_are_refused(
    tmp_path: Path, base: Tensors, tuned: Tensors, message: str
) -> None:
    changed: dict[str, Any] = {**base, **tuned} if Q in tuned or not tuned else tuned
    with pytest.raises(AdapterTwinError, match=message):
        extract(write(tmp_path / "tuned", changed), write(tmp_path / "base", base))


def test_an_index_that_leads_out_of_its_folder_is_refused(folders: list[Path]) -> None:
    index = {"weight_map": {Q: "../base/model.safetensors"}}
    (folders[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterTwinError, match="no such file; give a checkpoint in safetensors"):
        extract(*folders)


def test_a_change_that_no_rank_of_vllm_holds_is_refused(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    base = {Q: draw.standard_normal((600, 600))}
    tuned = {Q: base[Q] + of_spectrum([1.0] * 600, 600, 600, draw)}
    folders = [write(tmp_path / "tuned", tuned), write(tmp_path / "base", base)]
    with pytest.raises(AdapterTwinError, match="needs rank 594 for it, and vLLM takes 512 at most"):
        extract(*folders)
