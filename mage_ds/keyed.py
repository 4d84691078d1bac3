"""Counter-based random numbers: a pure function of (seed, purpose, index, step).

Random numbers belong to samples and pictures, not to ranks, workers or the order of calls, so a run that is
resumed on another number of GPUs draws the same crops, masks and noise. The bits are Philox's raw words, whose
stream numpy never changes; turning them into floats is done here for the same reason.
"""

import hashlib

import numpy as np

_WORD = 2**64


def _digest(*parts) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()


def seed_of(seed: int, *parts) -> int:
    """A seed (63 bits) for a foreign generator, from `seed` and any printable parts."""
    return int.from_bytes(_digest(seed, *parts)[:8], "little") >> 1


def _bits(seed: int, purpose: str, index: int, step: int, count: int) -> np.ndarray:
    key = np.frombuffer(_digest(seed, purpose), dtype=np.uint64)
    # The lowest counter word runs over the draws; the others name the sample, so streams never overlap.
    counter = np.array([0, step % _WORD, index % _WORD, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniform(seed: int, purpose: str, index, step=0, size: int = 1) -> np.ndarray:
    """Uniform numbers in the open interval (0, 1).

    Args: index: int array (B,), samples or pictures; step: int or int array (B,), an epoch or a decoding step;
    size: numbers for each index.
    Returns: float64 (B, size).
    """
    index = np.atleast_1d(np.asarray(index, dtype=np.int64))
    step = np.broadcast_to(np.asarray(step, dtype=np.int64), index.shape)
    words = [_bits(seed, purpose, int(i), int(s), size) for i, s in zip(index, step, strict=True)]
    raw = np.stack(words) if words else np.empty((0, size), dtype=np.uint64)
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # 52 bits + 1/2: 0 and 1 cannot occur


def permutation(seed: int, purpose: str, index: int, n: int) -> np.ndarray:
    """Permutation of range(n), int64 (n,): the stable order of n random 64-bit words."""
    return np.argsort(_bits(seed, purpose, index, 0, n), kind="stable")
