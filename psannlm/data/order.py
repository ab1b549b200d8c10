"""Pseudo-random permutations from a seed, identical on every machine and with every release of numpy.

:func:`shuffled` stores the whole permutation, for up to a few million items; :func:`permuted` computes any slice of a
permutation without the rest, for any number of items.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt

import numpy as np
from numpy.typing import NDArray

# Version of the order of training windows, stored in checkpoints: a run cannot resume in another order.
ORDER_VERSION = "feistel-1"
_ROUNDS = 12


def shuffled(n: int, seed: int, purpose: str, index: int = 0) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)``, (n,) int64: a pure function of the arguments.

    ``purpose`` separates permutations of one seed (split, epochs), ``index`` numbers those of one purpose. Random keys
    are sorted instead of calling ``Generator.permutation``, because numpy guarantees only the raw stream of a bit
    generator to stay the same, not the methods of ``Generator``.
    """
    keys = np.random.PCG64(_seed_sequence(seed, purpose, index)).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def permuted(n: int, start: int, stop: int, seed: int, purpose: str, index: int = 0) -> NDArray[np.int64]:
    """Return positions ``start`` to ``stop`` of a permutation of ``range(n)``, (stop - start,) int64, for n to 2**62.

    Time and memory grow with ``stop - start`` alone. A keyed Feistel network over pairs (l, r) with l < a, r < b and
    a * b >= n, each half shifted in turn by a hash of the other, permutes the pairs; a result of n or more is permuted
    again until it is below n ("cycle walking"): Black and Rogaway, Ciphers with Arbitrary
    Finite Domains, CT-RSA 2002. The hash is :func:`splitmix64`: well mixed, not cryptographic.
    """
    if not 0 <= start <= stop <= n:
        raise ValueError(f"positions {start} to {stop} are not within {n}")
    return permuted_at(n, np.arange(start, stop, dtype=np.int64), seed, purpose, index)


def permuted_at(n: int, positions: NDArray[np.int64], seed: int, purpose: str, index: int = 0) -> NDArray[np.int64]:
    """Return the given positions of the permutation of :func:`permuted`, in the shape of ``positions``."""
    keys = _seed_sequence(seed, purpose, index).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    a = isqrt(max(0, n - 1)) + 1
    b = -(-n // a) or 1
    found = _through_rounds(positions.astype(np.uint64), keys, a, b)
    while (outside := np.flatnonzero(found >= n)).size:
        found[outside] = _through_rounds(found[outside], keys, a, b)
    return found.astype(np.int64)


def _seed_sequence(seed: int, purpose: str, index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, index, int.from_bytes(purpose.encode("utf-8"), "little")])


def _through_rounds(positions: NDArray[np.uint64], keys: Iterable[np.uint64], a: int, b: int) -> NDArray[np.uint64]:
    """Permute numbers below a * b by one pass through the network."""
    n_left, n_right = np.uint64(a), np.uint64(b)
    left, right = np.divmod(positions, n_right)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + splitmix64(right ^ key) % n_left) % n_left
        else:
            right = (right + splitmix64(left ^ key) % n_right) % n_right
    mapped: NDArray[np.uint64] = left * n_right + right
    return mapped


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of each number."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
