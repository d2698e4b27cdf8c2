"""Every random draw is a pure function of (seed, purpose, step).

There is no generator state to save: whoever knows the three numbers can repeat the draw. That is what makes
resuming exact by construction, and what gives two recipes with the same seed the same data order (of the images that
they train on, where a recipe skips easy ones).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit integer, the same on every machine, that depends on all three arguments and looks random in each."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A fresh torch generator, seeded with `derive(seed, purpose, step)`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, step))


def permutation(count: int, seed: int, purpose: str, step: int = 0) -> np.ndarray:
    """A random order of 0 … count - 1, int64 (count,), the same on every machine and for every library version:
    the ranks of PCG64's raw words, whose stream numpy guarantees."""
    import numpy as np

    words = np.random.PCG64(derive(seed, purpose, step)).random_raw(count)
    return np.argsort(words, kind="stable")


def words(key: int) -> tuple[int, int]:
    """The lower and the upper 32 bits of a key, as int32 has them."""
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def random_bytes(key: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """Uint8 (count,), on the device of `key`, int32 (2,): the same on all of them, since byte i is a function of (key,
    stream, i) alone; of several keys (K, 2) those of each (K, count). Threefry-2x32 of 20 rounds (Salmon et al., 2011),
    so fit to be computed in pieces, and again."""
    import torch

    pairs = torch.arange((count + 127) // 128 * 16, dtype=torch.int32, device=key.device)
    low, high = key[..., :1], key[..., 1:]
    keys = (low, high, low ^ high ^ 0x1BD11BDA)
    a = pairs + low
    b = (high + stream).expand_as(a)
    for four in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[four % 2]:
            a = a + b
            b = (b << turn | b >> 32 - turn & (1 << turn) - 1) ^ a
        a, b = a + keys[(four + 1) % 3], b + keys[(four + 2) % 3] + (four + 1)
    # Of 128 bytes, 16 i + j is byte i of pair j.
    words = torch.stack([a.unflatten(-1, (-1, 16)), b.unflatten(-1, (-1, 16))], -2)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=key.device)[:, None]
    return (words[..., None, :] >> shifts & 255).to(torch.uint8).flatten(key.dim() - 1)[..., :count]
