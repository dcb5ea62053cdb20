# SPDX-License-Identifier: Apache-2.0
"""Functions of sharded tensors, on a mesh of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torchopt.params.sharded import gathered, largest_absolute


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(x: Tensor, mesh: Any, dim: int | None = 0) -> Any:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return distribute_tensor(x, mesh, [Replicate() if dim is None else Shard(dim)])


def test_the_largest_entry_of_a_sharded_tensor_is_that_of_the_whole(mesh: Any) -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    for shard in (None, 0, 2):
        for dim in (None, 0, -1, (-3, 1)):
            for keepdim in (False, True):
                found: Any = largest_absolute(sharded(x, mesh, shard), dim, keepdim)
                expected = largest_absolute(x, dim, keepdim)
                assert found.shape == expected.shape
                assert torch.equal(found.full_tensor(), expected)
                over = tuple(range(3)) if dim is None else dim
                assert torch.equal(expected, x.abs().amax(over, keepdim))


def test_gathering_can_be_differentiated_twice(mesh: Any) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for leaf in (x.clone().requires_grad_(), sharded(x, mesh).requires_grad_()):
        whole = gathered(leaf) if hasattr(leaf, "full_tensor") else leaf
        (grad,) = torch.autograd.grad((whole**4).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((grad * grad).sum(), leaf)
        results.append((whole, grad, second))
    for got, expected in zip(results[1], results[0]):
        whole = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(whole, expected, rtol=1e-14, atol=0)
