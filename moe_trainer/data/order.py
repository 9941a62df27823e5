"""Which sample stands where in the endless order, as a pure function of seed and position.

    one source      | epoch 0, permuted by (seed, source, 0) | epoch 1, permuted by (seed, source, 1) | ...
    a mixture       | block 0 | block 1 | ...    in each block every source has its share of the places, permuted

A permutation is a Feistel network over the indices (Black and Rogaway, 2002: "Ciphers with arbitrary finite
domains"): any place of it costs the same few products, and nothing of the length of the data is kept.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

ORDER = "feistel/1"
"""Goes into a run's fingerprint of its data: another order would repeat and skip samples of a resumed run."""

_ROUNDS = 8
_BLOCK = 4096
"""Places in which a mixture's shares are exact, up to rounding."""


def permuted(places: np.ndarray, size: int, key: str) -> np.ndarray:
    """What stands at `places` of the permutation of `range(size)` that `key` names.

    A place is encrypted as two halves of its bits; a result beyond `size` is encrypted again, until it is inside.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    seeds = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8")
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        result[outside] = _encrypted(result[outside], np.uint64(half), seeds)
        outside = result >= size
    return result.astype(np.int64)


def _encrypted(values: np.ndarray, half: np.uint64, seeds: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for seed in seeds:
        left, right = right, left ^ (_mixed(right + seed) & mask)
    return left << half | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Order:
    """The endless order of samples over one or more sources."""

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        """`sizes`: samples of each source, at least one; `shares`: positive, of any sum."""
        self._sizes = list(sizes)
        self._places = _apportioned(shares) if len(sizes) > 1 else [1]
        self._seed = seed

    def samples(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and indices of the samples at the positions from `start` on, both int64 [count]."""
        sources, turns = self._turns(np.arange(start, start + count))
        indices = np.empty(count, dtype=np.int64)
        for source, size in enumerate(self._sizes):
            chosen = sources == source
            indices[chosen] = self._shuffled(turns[chosen], size, str(source))
        return sources, indices

    def _turns(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and how many of that source's samples come before."""
        sources, turns = np.zeros_like(positions), positions.copy()
        if len(self._sizes) > 1:
            blocks, places = np.divmod(positions, sum(self._places))
            for block in np.unique(blocks):
                chosen = blocks == block
                by_place, turns_by_place = self._block(int(block))
                sources[chosen], turns[chosen] = by_place[places[chosen]], turns_by_place[places[chosen]]
        return sources, turns

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a block what `_turns` says of it."""
        slots = permuted(np.arange(sum(self._places)), sum(self._places), f"order/{self._seed}/mixture/{number}")
        sources = np.searchsorted(np.cumsum(self._places), slots, side="right")
        turns = np.empty_like(slots)
        for source, count in enumerate(self._places):
            turns[sources == source] = number * count + np.arange(count)
        return sources, turns

    def _shuffled(self, turns: np.ndarray, size: int, name: str) -> np.ndarray:
        """Each epoch of a source is a permutation of its samples."""
        epochs, places = np.divmod(turns, size)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = permuted(places[chosen], size, f"order/{self._seed}/{name}/{epoch}")
        return indices


def _apportioned(shares: Sequence[float]) -> list[int]:
    """Places of a block for each share, at least one: largest remainders (Hamilton's method)."""
    exact = np.asarray(shares, dtype=np.float64) / sum(shares) * _BLOCK
    places = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(places - exact, kind="stable")
    places[by_remainder[: _BLOCK - places.sum()]] += 1
    return np.maximum(places, 1).tolist()
