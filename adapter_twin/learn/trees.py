"""Small trees as a reader wants them: leaves that agree merged, printed as rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LEAF = -1
"""scikit-learn's mark of a node without children."""

SAME = 0.02
"""Leaves whose predictions differ by less, relatively, say the same."""


def rules(tree: Any, names: Sequence[str]) -> str:
    """Return a regression tree of a logarithm as rules for the value itself.

    Parameters
    ----------
    tree : sklearn.tree.DecisionTreeRegressor
        Fitted to logarithms.
    names : sequence of str
        Of the features.
    """
    lines: list[str] = []
    _describe(tree.tree_, 0, names, "", lines)
    return "\n".join(lines) + "\n"


def leaves(tree: Any) -> int:
    """Return the number of leaves that are left once those that agree are merged."""
    lines: list[str] = []
    names = [str(i) for i in range(tree.n_features_in_)]
    _describe(tree.tree_, 0, names, "", lines)
    return sum(": " in line for line in lines)


def _describe(tree: Any, node: int, names: Sequence[str], indent: str, lines: list[str]) -> None:
    low, high = _range(tree, node)
    if high <= low * (1 + SAME):
        value = float(np.exp(tree.value[node].item()))
        lines.append(f"{indent}: {value:.4g}  ({int(tree.n_node_samples[node])} workloads)")
        return
    name, threshold = names[tree.feature[node]], tree.threshold[node]
    for sign, child in (("<=", tree.children_left[node]), (">", tree.children_right[node])):
        lines.append(f"{indent}{name} {sign} {threshold:.4g}")
        _describe(tree, child, names, f"{indent}|   ", lines)


def _range(tree: Any, node: int) -> tuple[float, float]:
    """Return the lowest and highest prediction below a node."""
    if tree.children_left[node] == LEAF:
        value = float(np.exp(tree.value[node].item()))
        return value, value
    ranges = [_range(tree, c) for c in (tree.children_left[node], tree.children_right[node])]
    return min(low for low, _ in ranges), max(high for _, high in ranges)
