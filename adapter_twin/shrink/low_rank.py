"""Products of two thin matrices: their singular values, energy by rank, likeness and mean.

An adapter changes a module's weights by ``delta = scaling B A``, of shape (outputs, inputs) and
rank r. Nothing here forms that product: ``B = Q1 R1`` and ``A^T = Q2 R2`` leave the r x r matrix
``R1 R2^T`` to decompose. The *energy* of a delta is the sum of its squared singular values, its
squared Frobenius norm; the best approximation of a rank keeps its largest ones (Eckart and Young).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Factors(NamedTuple):
    """Two matrices whose product ``left @ right`` is meant: (outputs, k) and (k, inputs)."""

    left: NDArray[np.floating[Any]]
    right: NDArray[np.floating[Any]]

    def filled(self, rank: int) -> Factors:
        """Return the same product with zeros up to a rank."""
        missing = (0, rank - self.left.shape[1])
        left = np.pad(self.left, ((0, 0), missing))
        return Factors(left, np.pad(self.right, (missing, (0, 0))))


class Svd(NamedTuple):
    """Singular values in falling order, zeros left out, with the vectors of both sides."""

    left: Matrix
    values: Matrix
    right: Matrix

    def factors(self, rank: int) -> Factors:
        """Return the best approximation of a rank, balanced; zeros fill up what is not there."""
        root = np.sqrt(self.values[:rank])
        largest = Factors(self.left[:, :rank] * root, root[:, None] * self.right[:rank])
        return largest.filled(rank)


def decompose(product: Factors) -> Svd:
    """Return the singular value decomposition of a product.

    Values that are zero but for rounding are left out.

    Examples
    --------
    >>> ones = Factors(np.ones((4, 2)), np.ones((2, 3)))
    >>> np.round(decompose(ones).values, 6)
    array([6.928203])
    """
    q_left, r_left = np.linalg.qr(product.left)
    q_right, r_right = np.linalg.qr(product.right.T)
    left, values, right = np.linalg.svd(r_left @ r_right.T)
    values = _above_rounding(values, r_left, r_right)
    rank = len(values)
    return Svd(q_left @ left[:, :rank], values, right[:rank] @ q_right.T)


def singular_values(product: Factors) -> Matrix:
    """Return the values of `decompose` alone, in a third of the time."""
    r_left = np.asarray(np.linalg.qr(product.left, mode="r"))
    r_right = np.asarray(np.linalg.qr(product.right.T, mode="r"))
    values = np.linalg.svd(r_left @ r_right.T, compute_uv=False)
    return _above_rounding(values, r_left, r_right)


def decompose_dense(delta: Matrix, most: int) -> tuple[Matrix, Svd]:
    """Return all singular values of a dense matrix, and at most `most` of them with vectors.

    Of the smaller side only: eigenvectors of ``delta delta^T``. Squares halve the digits: values
    below ``1e-8`` of the largest, about, count as zero.
    """
    thin = delta if delta.shape[0] <= delta.shape[1] else delta.T
    squares, vectors = np.linalg.eigh(thin @ thin.T)
    squares = squares[::-1]
    values = np.sqrt(squares[squares > squares[0] * len(squares) * np.finfo(float).eps])
    largest = values[:most]
    vectors = vectors[:, ::-1][:, : len(largest)]
    others = vectors.T @ thin / largest[:, None]
    if thin is delta:
        return values, Svd(vectors, largest, others)
    return values, Svd(others.T, largest, vectors.T)


def _above_rounding(values: Matrix, r_left: Matrix, r_right: Matrix) -> Matrix:
    # rounding is relative to the factors: their product may cancel
    scale = np.linalg.norm(r_left) * np.linalg.norm(r_right)
    return values[values > scale * len(values) * np.finfo(float).eps]


def energy(values: Matrix) -> float:
    """Return the energy of some singular values."""
    return float(values @ values)


def needed_rank(values: Matrix, share: float) -> int:
    """Return the smallest rank, at least 1, that keeps a share of the energy.

    >>> needed_rank(np.array([3.0, 1.0]), 0.9), needed_rank(np.array([3.0, 1.0]), 0.91)
    (1, 2)
    """
    lost = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)  # by rank, 0 to all
    allowed = (1 - share) * lost[0] * (1 + 1e-12)  # 1 - 0.9 is a little below 0.1
    return max(int(np.argmax(lost <= allowed)), 1)


def inner_products(modules: Iterable[Mapping[int, Factors]], count: int) -> Matrix:
    """Return the inner products of all pairs of adapters, from their factors.

    ``<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))``, summed over the modules that both have.

    Parameters
    ----------
    modules : iterable of mapping of int to Factors
        For each module the factors of those adapters that change it, by number.
    count : int
        Number of adapters.

    Returns
    -------
    float64, shape (count, count)
    """
    found = np.zeros((count, count))
    for module in modules:
        who = list(module)
        left = np.hstack([module[i].left for i in who])
        right = np.vstack([module[i].right for i in who])
        starts = np.cumsum([0, *(module[i].left.shape[1] for i in who)])[:-1]
        for number, i in enumerate(who):  # with those that follow: the others are the same
            first = starts[number]
            lefts, rights = module[i].left.T @ left[:, first:], module[i].right @ right[first:].T
            pairs = np.add.reduceat((lefts * rights).sum(axis=0), starts[number:] - first)
            found[i, who[number:]] += pairs
            found[who[number + 1 :], i] += pairs[1:]
    return found


def mean(products: Sequence[Factors], count: int) -> Factors:
    """Return the mean of `count` products, of which those that are not given are zero."""
    left = np.hstack([one.left for one in products]) / count
    return Factors(left, np.vstack([one.right for one in products]))
