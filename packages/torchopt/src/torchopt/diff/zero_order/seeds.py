# SPDX-License-Identifier: Apache-2.0
"""Streams of random numbers, derived from a seed."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["common_draws", "draw_seed", "member_seed", "member_seeds", "seeded"]

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def member_seed(seed: int, member: int) -> int:
    """Return the 32-bit seed of one member of the family of streams that `seed` determines.

    Torch's CPU generator uses 32 bits of a seed. For a given `seed` the map is a bijection of
    `member` modulo 2**32 (the finaliser of MurmurHash3), so different members have different
    streams.

    Example:
        >>> len({member_seed(7, i) for i in range(100_000)})
        100000
    """
    return member_seeds(seed)(member)


def member_seeds(seed: int) -> Callable[[int], int]:
    """Return `member_seed` for one family, as a function of the member."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK64  # splitmix64: spread the bits of the family's seed
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31

    def of(member: int) -> int:
        h = (z + member) & _MASK32
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK32
        return h ^ (h >> 16)

    return of


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Return a seed drawn from `generator`, by default torch's own CPU generator."""
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device).item())


class seeded:  # noqa: N801 - a class, since it is faster than a generator function
    """Seed torch's generators of the CPU and of the devices of `like`; restore them on exit.

    Entering the context returns a function that seeds them again.
    """

    def __init__(self, seed: int, like: Sequence[Tensor]) -> None:
        self._seed = seed
        self._devices = {leaf.device for leaf in like if leaf.device.type != "cpu"}
        self._forks = contextlib.ExitStack()

    def __enter__(self) -> Callable[[int], None]:
        self._state = torch.default_generator.get_state()
        for device in self._devices:
            index = 0 if device.index is None else device.index
            fork = torch.random.fork_rng([index], device_type=device.type)
            self._forks.enter_context(fork)
        self._seed_all(self._seed)
        return self._seed_all

    def _seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        for device in self._devices:
            with device:
                torch.get_device_module(device).manual_seed(seed)

    def __exit__(self, *error: object) -> None:
        self._forks.close()
        torch.default_generator.set_state(self._state)


def common_draws(
    seed: int, like: Sequence[Tensor], *, outside: bool = True
) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Seed all global generators, which are those of `seeded`, Python's and numpy's.

    They are restored on exit. Entering the context returns a function that seeds them again.

    Args:
        seed: The seed.
        like: Tensors on the devices whose generators are seeded.
        outside: Whether something may draw from the generators of Python and numpy; if nothing
            does, they are left alone, which saves 0.2 ms.
    """
    return _all_draws(seed, like) if outside else seeded(seed, like)


@contextlib.contextmanager
def _all_draws(seed: int, like: Sequence[Tensor]) -> Iterator[Callable[[int], None]]:
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    kept = None if numpy is None else numpy.random.get_state()
    try:
        with seeded(seed, like) as seed_torch:

            def seed_all(seed: int) -> None:
                seed_torch(seed)
                random.seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed & _MASK32)

            seed_all(seed)
            yield seed_all
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(kept)
