"""Safetensors files: what is written is read again, each element type rounded to the nearest."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.workload.tensor_files import FLOATS, TensorFile, write_tensors


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_written_is_read_again(dtype: str, tmp_path: Path) -> None:
    values = np.array([[1.0, -0.5, 0.0], [2.0**-10, 3.0, 96.0]])
    write_tensors(tmp_path / "file", [("a", dtype, values), ("b", dtype, values[0])])
    file = TensorFile(tmp_path / "file")
    np.testing.assert_array_equal(file.read("a"), values)
    np.testing.assert_array_equal(file.read("b"), values[0])
    size = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert size % 8 == 0  # so that tensors are aligned


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even(tmp_path: Path) -> None:
    step = 2.0**-7  # of bfloat16 from 1 to 2
    values = np.array([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - 0.49 * step])
    write_tensors(tmp_path / "file", [("a", "BF16", values)])
    wanted = [1, 1 + 2 * step, 1 + step, -1]
    assert TensorFile(tmp_path / "file").read("a").tolist() == wanted


def test_a_file_written_by_the_specification_is_read(tmp_path: Path) -> None:
    about = {"a": {"dtype": "F16", "shape": [2], "data_offsets": [2, 6]}}
    about["b"] = {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}
    header = json.dumps(about).encode()
    raw = struct.pack("<Q", len(header)) + header + b"\x80\x3f" + struct.pack("<2e", 1.5, -2)
    (tmp_path / "file").write_bytes(raw)
    file = TensorFile(tmp_path / "file")
    assert (file.read("a").tolist(), file.read("b").tolist()) == ([1.5, -2], 1)


@pytest.mark.parametrize(("dtype", "value"), [("F16", 1e5), ("BF16", 3.4e38), ("F32", 1e39)])
def test_weights_beyond_their_type_are_refused(dtype: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match=f"a: a weight is beyond {dtype}"):
        write_tensors(tmp_path / "file", [("a", dtype, np.array([value]))])
