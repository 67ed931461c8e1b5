"""Facts that come with the package: small JSON files below ``data/``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / "_data"
REPOSITORY = Path.cwd() if _IN_WHEEL.is_dir() else _PACKAGE.parent
"""This is the checkout; an installed wheel has none and takes the folder in which it is used."""
SHIPPED = _IN_WHEEL if _IN_WHEEL.is_dir() else REPOSITORY / "data"
"""This folder holds what the package itself needs of ``data/``."""


@cache
def facts(kind: str) -> dict[str, Any]:
    """Return the files of a folder of facts (``engines``, ``gpus``, ``models``), by name.

    They are for reading: all who ask get the same ones.

    Parameters
    ----------
    kind : str

    Examples
    --------
    >>> facts("engines")["vllm-0.8.5"]["extra_vocabulary"]
    256
    """
    paths = sorted((SHIPPED / kind).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
