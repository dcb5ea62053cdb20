# SPDX-License-Identifier: Apache-2.0
"""Trees survive packing into bytes, and each tensor gets its own memory."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

from torchopt.distributed import packed
from torchopt.tree import tree_leaves

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
TYPES += (torch.int64, torch.int8, torch.bool)
SHAPES = ((), (1,), (3,), (2, 3), (0,), (2, 0), (1, 1, 2))


@pytest.mark.parametrize("copies", [1, 2, 300])
def test_trees_survive_packing(copies):
    generator = torch.Generator().manual_seed(copies)
    tree = {
        "tensors": [
            torch.randint(0, 2, shape, generator=generator).to(dtype)
            for dtype in TYPES
            for shape in SHAPES
            for _ in range(copies)
        ],
        "others": [None, 3, "text", torch.nn.Parameter(torch.ones(2)), torch.eye(3).to_sparse()],
    }
    back = packed.unpack(packed.pack(tree))
    assert back["others"][:3] == [None, 3, "text"]
    for x, y in zip(tree_leaves(tree), tree_leaves(back)):
        if isinstance(x, torch.Tensor):
            assert (x.shape, x.dtype, x.layout) == (y.shape, y.dtype, y.layout)
            assert torch.equal(x.to_dense(), y.to_dense())
            assert not y.requires_grad


def test_unpacked_tensors_do_not_share_entries_or_versions():
    first, second, *_ = packed.unpack(packed.pack([torch.zeros(2) for _ in range(5)]))
    kept = second * torch.ones(2, requires_grad=True)
    first.add_(1.0)
    kept.sum().backward()  # the second tensor has its own version
    assert second.tolist() == [0.0, 0.0]
    assert first.untyped_storage().nbytes() == 8


@pytest.mark.parametrize("is_enabled", [True, False])
def test_unpacking_searches_no_garbage_and_leaves_the_collector_as_it_was(is_enabled):
    """A search looks at every object of the process; 100,000 tensors would cause several."""
    data, searches = packed.pack([torch.zeros(1) for _ in range(5000)]), []
    gc.collect()
    before = gc.isenabled()
    gc.enable() if is_enabled else gc.disable()
    gc.callbacks.append(lambda phase, info: searches.append(phase))
    try:
        packed.unpack(data)
        during = searches.count("start")
        with pytest.raises(pickle.UnpicklingError):
            packed.unpack(b"no tree")
        assert gc.isenabled() == is_enabled
    finally:
        gc.callbacks.pop()
        gc.enable() if before else gc.disable()
    assert during <= is_enabled  # one afterwards


def test_bytes_grow_with_the_numbers_and_not_with_the_tensors():
    def size(count: int) -> int:
        return len(packed.pack([torch.zeros(1) for _ in range(count)]))

    assert size(3000) - size(2000) < 20 * 1000  # 4 bytes of content, and a place in the tree
