"""Every random draw is a pure function of (seed, purpose, step).

There is no generator state to save: whoever knows the three numbers can repeat the draw. That is what makes
resuming exact by construction, and what gives two recipes with the same seed the same data order.
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


def generator(seed: int, purpose: str, step: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch generator on `device`, seeded with `derive(seed, purpose, step)`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, purpose, step))


def permutation(count: int, seed: int, purpose: str, step: int = 0) -> np.ndarray:
    """A random order of 0 … count - 1, int64 (count,), the same on every machine and for every library version:
    the ranks of PCG64's raw words, whose stream numpy guarantees."""
    import numpy as np

    words = np.random.PCG64(derive(seed, purpose, step)).random_raw(count)
    return np.argsort(words, kind="stable")
