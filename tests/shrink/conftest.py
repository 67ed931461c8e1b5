"""Synthetic PEFT adapters of known spectra."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapter_twin.workload.tensor_files import write_tensors

Make = Callable[..., dict[str, NDArray[np.float64]]]
WIDTHS = {"q_proj": (48, 48), "v_proj": (24, 48)}
"""Outputs and inputs of the adapted modules."""
LLAMA_WIDTHS = {"v_proj": (16, 4096)}
"""A module whose inputs are as wide as those of Llama 3.1 8B."""
CONFIG = {
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "lora_alpha": 32,
    "peft_type": "LORA",
    "r": 16,
    "target_modules": ["q_proj", "v_proj"],
    "use_rslora": False,
}


def tensor(layer: int, module: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{module}"


def of_spectrum(
    values: Sequence[float], outputs: int, inputs: int, draw: np.random.Generator
) -> NDArray[np.float64]:
    """Return a matrix of these singular values and random vectors."""
    left = np.linalg.qr(draw.standard_normal((outputs, len(values))))[0]
    right = np.linalg.qr(draw.standard_normal((inputs, len(values))))[0]
    return (left * values) @ right.T


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write an adapter of given singular values, of the same ones in every module.

    Unless told otherwise the factors are mixed by a random matrix: no one can see the spectrum in
    them. What is returned are the scaled dense products, by module.
    """

    def write(
        name: str,
        values: Sequence[float],
        seed: int = 0,
        dtype: str = "F64",
        deltas: Mapping[str, NDArray[np.float64]] | None = None,
        noise: float = 0.0,
        mixed: bool = True,
        widths: Mapping[str, tuple[int, int]] = WIDTHS,
        **changes: Any,
    ) -> dict[str, NDArray[np.float64]]:
        config = {**CONFIG, **changes}
        r, alpha = config["r"], config["lora_alpha"]
        scaling = alpha / (np.sqrt(r) if config["use_rslora"] else r)
        draw, tensors, dense = np.random.default_rng(seed), [], {}
        for layer in (0, 1):
            for module, (outputs, inputs) in widths.items():
                at = tensor(layer, module)
                delta = of_spectrum(values, outputs, inputs, draw) if deltas is None else deltas[at]
                delta = delta + noise * draw.standard_normal(delta.shape) / np.sqrt(delta.size)
                left, sizes, right = np.linalg.svd(delta, full_matrices=False)
                mix = draw.standard_normal((r, r)) if mixed else np.eye(r)
                b = left[:, :r] * sizes[:r] / scaling @ mix
                a = np.linalg.inv(mix) @ right[:r]
                tensors += [(f"{at}.lora_B.weight", dtype, b), (f"{at}.lora_A.weight", dtype, a)]
                dense[at] = scaling * b @ a
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        write_tensors(folder / "adapter_model.safetensors", tensors)
        return dense

    return write
