"""A seed enters, an order of n things leaves, the same on every machine and with every release of numpy.

Two ways: :func:`shuffled` holds the whole order, for a few million things at most; :func:`permuted` computes any slice
of one without the rest, for as many as there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt

import numpy as np
from numpy.typing import NDArray

# Names what decides the order of training windows; a checkpoint of another order must not be gone on from.
ORDER_VERSION = "feistel-1"
_ROUNDS = 12


def shuffled(n: int, seed: int, purpose: str, index: int = 0) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)``, (n,) int64: a pure function of the arguments.

    ``purpose`` keeps draws with one seed apart (the split from the epochs), ``index`` numbers draws of one purpose.
    Random keys are sorted, rather than ``Generator.permutation`` called: numpy promises that the raw stream of a bit
    generator never changes, and makes no such promise for the methods of ``Generator``.
    """
    keys = np.random.PCG64(_seed_sequence(seed, purpose, index)).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def permuted(n: int, start: int, stop: int, seed: int, purpose: str, index: int = 0) -> NDArray[np.int64]:
    """Return places ``start`` to ``stop`` of a permutation of ``range(n)``, (stop - start,) int64, for n to 2**62.

    Time and memory grow with ``stop - start`` alone. A keyed Feistel network over pairs (l, r) with l < a, r < b and
    a * b >= n, each half shifted in turn by a hash of the other, permutes the pairs; one that stands for a number of
    n or more is sent through again until it does not ("cycle walking"): Black and Rogaway, Ciphers with Arbitrary
    Finite Domains, CT-RSA 2002. The hash is the mixing function of SplitMix64: Steele, Lea and Flood, OOPSLA 2014.
    It is meant to mix, not to keep a secret.
    """
    if not 0 <= start <= stop <= n:
        raise ValueError(f"places {start} to {stop} of {n}")
    keys = _seed_sequence(seed, purpose, index).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    places = np.arange(start, stop, dtype=np.uint64)
    a = isqrt(max(0, n - 1)) + 1
    b = -(-n // a) or 1
    found = _through_rounds(places, keys, a, b)
    while (outside := np.flatnonzero(found >= n)).size:
        found[outside] = _through_rounds(found[outside], keys, a, b)
    return found.astype(np.int64)


def _seed_sequence(seed: int, purpose: str, index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, index, int.from_bytes(purpose.encode("utf-8"), "little")])


def _through_rounds(places: NDArray[np.uint64], keys: Iterable[np.uint64], a: int, b: int) -> NDArray[np.uint64]:
    """Send numbers below a * b through the network once."""
    n_left, n_right = np.uint64(a), np.uint64(b)
    left, right = np.divmod(places, n_right)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mixed(right ^ key) % n_left) % n_left
        else:
            right = (right + _mixed(left ^ key) % n_right) % n_right
    mapped: NDArray[np.uint64] = left * n_right + right
    return mapped


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
