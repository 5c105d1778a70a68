"""Order: which row a task's n-th example is, as a pure function of (seed, task, n) that needs no memory.

Each epoch is one permutation of the rows, which is computed and not stored. A Feistel network permutes the numbers
below a power of four. It is applied repeatedly until the result is in range, which makes it a permutation of the rows
(cycle walking; Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from openimp.modalities.media import ExampleRng

ROUNDS = 6


def rows_at(seed: int, task: str, rows: int, positions: np.ndarray) -> np.ndarray:
    """The rows (int64) at positions (int64, from 0) in a task's endless order. Each epoch has every row once."""
    epochs, positions_in_epoch = np.divmod(positions, rows)
    result = np.empty_like(positions_in_epoch)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        result[in_epoch] = permute(positions_in_epoch[in_epoch], rows, seed_key(seed, task, int(epoch)))
    return result


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Applies the permutation of 0..n-1 that `key` selects to each index."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    value = index.astype(np.uint64)
    out_of_range = np.ones(len(value), bool)
    while out_of_range.any():
        left = value[out_of_range] >> shift
        right = value[out_of_range] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        value[out_of_range] = (left << shift) | right
        out_of_range &= value >= n
    return value.astype(np.int64)


def seed_key(seed: int, *parts: str | int) -> int:
    """Derives one number from a seed and its purpose. Unlike `hash`, it is the same in all processes and versions."""
    words = [seed, *(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts)]
    return int.from_bytes(np.random.SeedSequence(words).generate_state(4, np.uint32).tobytes(), "little")


def example_rng(key: int, position: int, sync: bool = False) -> ExampleRng:
    """The random generator of the example at a position in the task's order, the same on all ranks and workers.

    With `sync`, all modalities of the example start at the same moment.
    """
    rng = ExampleRng(np.random.Philox(key=key, counter=[0, 0, 0, position]))
    rng.sync_start = rng.random() if sync else None
    return rng


def uniform(key: int, positions: Sequence[int], draws: int) -> np.ndarray:
    """Random numbers from 0 to below 1, (draws, positions). Those of a position do not depend on the others."""
    return (_random_words(key, positions, draws).T >> np.uint64(11)) * 2.0**-53


def random_bytes(key: int, positions: Sequence[int], count: int) -> np.ndarray:
    """Random bytes, (positions, count). Those of a position do not depend on the others."""
    return _random_words(key, positions, -(-count // 8)).view(np.uint8)[:, :count]


def _random_words(key: int, positions: Sequence[int], count: int) -> np.ndarray:
    """Random uint64, (positions, count)."""
    word_keys = np.random.SeedSequence(key).generate_state(count, np.uint64)
    return _mix(_mix(np.array(positions, np.uint64))[:, None] + word_keys)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: each output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def batch_digest(names: Iterable[str]) -> int:
    """Sum of the 48-bit hashes of the examples' names. The digests of all ranks add up to the whole batch's."""
    return sum(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") for name in names)
