"""Safetensors files without torch: headers that are checked, tensors read one at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: ``dtype``, ``shape``
and ``data_offsets`` by tensor), and the tensors' bytes without holes (the format's public
specification). numpy has no bfloat16: its bits are the upper half of a float32's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapter_twin.errors import AdapterTwinError, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST_HEADER_BYTES = 100_000_000
"""The safetensors format allows no larger header."""

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Element types that are read and written, as numpy has them; others are passed over."""
_OTHERS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2}
_OTHERS |= {"I32": 4, "U32": 4, "I64": 8, "U64": 8}
_BYTES = {**_OTHERS, **{name: int(kind[-1]) for name, kind in FLOATS.items()}}


def read_header(path: Path) -> dict[str, Any]:
    """Return what the header of a safetensors file says, by tensor; its places are not checked.

    Raises
    ------
    AdapterTwinError
        The file has no such header.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(size)) if size <= LARGEST_HEADER_BYTES else None
    except (OSError, RuntimeError, ValueError, OverflowError):
        header = None
    if not isinstance(header, dict):
        raise AdapterTwinError(f"{path}: no safetensors file; save it again")
    return header


class TensorPlace(NamedTuple):
    """Where a tensor lies in its file: element type, shape, and first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """A safetensors file whose header has been checked against its size.

    Attributes
    ----------
    path : pathlib.Path
    places : dict of str to TensorPlace
        By tensor.

    Raises
    ------
    AdapterTwinError
        No safetensors file, or tensors that overlap, leave holes or end before or after it does.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        header.pop("__metadata__", None)
        self.path = path
        try:
            told = [(name, _told(about)) for name, about in header.items()]
        except (LookupError, TypeError, ValueError):
            raise AdapterTwinError(f"{path}: its header is damaged; save it again") from None
        with path.open("rb") as file:
            first = end = 8 + int.from_bytes(file.read(8), "little")
        self.places: dict[str, TensorPlace] = {}
        for name, (dtype, shape, start, stop) in sorted(told, key=lambda one: one[1][2:]):
            fits = first + start == end and stop - start == _BYTES[dtype] * prod(shape)
            require(fits, f"{path}: the place of {name} is damaged in its header; save it again")
            self.places[name] = TensorPlace(dtype, shape, end)
            end = first + stop
        require(
            end == path.stat().st_size,
            f"{path}: its tensors do not end where the file does; fetch or save it again",
        )

    def read(self, name: str) -> NDArray[np.float64]:
        """Return a tensor of finite floats in double precision; raises `AdapterTwinError`."""
        import numpy as np

        dtype, shape, start = self.places[name]
        known = dtype in FLOATS
        require(known, f"{self.path}: {name} is {dtype}; save it as one of {', '.join(FLOATS)}")
        raw = np.fromfile(self.path, FLOATS[dtype], prod(shape), offset=start)
        if dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        values = raw.astype(np.float64).reshape(shape)
        finite = bool(np.isfinite(values).all())
        require(finite, f"{self.path}: {name} holds NaN or infinite weights; leave it out")
        return values


def _told(about: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Return element type, shape, first and last byte as a header tells them."""
    dtype, shape, (start, stop) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    if dtype not in _BYTES or any(type(one) is not int or one < 0 for one in (*shape, start, stop)):
        raise ValueError(dtype)
    return dtype, shape, start, stop


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, str, NDArray[np.floating[Any]]]]
) -> None:
    """Write a safetensors file.

    Parameters
    ----------
    path : pathlib.Path
    tensors : iterable of (str, str, ndarray)
        Name, element type (one of `FLOATS`) and values, which are rounded to the nearest.

    Raises
    ------
    AdapterTwinError
        A value is beyond its element type.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, end = [], 0
    for name, dtype, values in tensors:
        blob = _rounded(values, dtype, f"{path}: {name}").tobytes()
        about = {"dtype": dtype, "shape": values.shape, "data_offsets": (end, end + len(blob))}
        header[name], end = about, end + len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)


def _rounded(values: NDArray[np.floating[Any]], dtype: str, what: str) -> NDArray[Any]:
    import numpy as np

    with np.errstate(over="ignore"):
        if dtype == "BF16":
            bits = values.astype(np.float32).view(np.uint32)
            rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")
            finite = (rounded & 0x7F80) != 0x7F80
        else:
            rounded = values.astype(FLOATS[dtype])
            finite = np.isfinite(rounded)
    require(bool(finite.all()), f"{what}: a weight is beyond {dtype}; save the adapter as F32")
    return rounded
