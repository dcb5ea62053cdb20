# SPDX-License-Identifier: Apache-2.0
"""Chains that users build are native calls where they have a kernel's shape, and the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt import transform
from torchopt.errors import KernelUnavailableError
from torchopt.kernels import native
from torchopt.optimizers.native import with_backend
from torchopt.tree import tree_leaves

chain = torchopt.chain
Make = Callable[[], Any]

CHAINS: dict[str, Make] = {
    "adam": lambda: chain(transform.scale_by_adam(), transform.scale(-0.1)),
    "lion, decayed": lambda: chain(
        transform.scale_by_lion(), transform.add_decayed_weights(0.1), transform.scale(-0.1)
    ),
    "clipped": lambda: chain(
        torchopt.clip_grad_norm(1.0), transform.trace(0.9, 0.2), transform.scale(-0.1)
    ),
    "then noise-free": lambda: chain(
        transform.scale_by_nadam(), transform.scale(-0.1), transform.centralize()
    ),
    "rmsprop with momentum": lambda: chain(
        transform.scale_by_rms(), transform.trace(0.9), transform.scale(-0.1)
    ),
    "to maximize": lambda: chain(
        transform.scale(-1.0), transform.scale_by_amsgrad(), transform.scale(-0.1)
    ),
    "scheduled": lambda: chain(
        transform.scale_by_radam(b2=0.9), transform.scale_by_schedule(lambda k: -0.1 / (1 + k))
    ),
    "averaged": lambda: chain(transform.scale_by_asgd(0.1, 0.1, 0.75, 1), transform.scale(-1.0)),
    "flat": lambda: chain.flat(transform.scale_by_adan.flat(), transform.scale.flat(-0.1)),
    "flat, clipped": lambda: chain.flat(
        torchopt.clip.clip_by_value(0.5), transform.scale_by_rss(), transform.scale(-0.1)
    ),
}
OTHERS: dict[str, Make] = {
    "no rule": lambda: chain(transform.scale(2.0), transform.scale(-0.1)),
    "decay after a schedule": lambda: chain(
        transform.scale_by_schedule(lambda k: 0.5),
        transform.add_decayed_weights(0.1),
        transform.scale(-0.1),
    ),
    "no kernel": lambda: chain(transform.scale_by_yogi(), transform.scale(-0.1)),
    "adam, then momentum without a step size": lambda: chain(
        transform.scale_by_adam(), transform.ema(0.5), transform.scale(-0.1)
    ),
}


def tree(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 2, generator=generator, dtype=torch.float64),
        "b": (torch.randn(4, generator=generator, dtype=torch.float64), None),
    }


def roll(impl: Any, inplace: bool, missing: int = -1) -> list[Tensor]:
    params = tree(0)
    state = impl.init(params)
    for k in range(3):
        grads = tree(k + 1)
        if k == missing:
            grads["a"] = None
        updates, state = impl.update(grads, state, params=params, inplace=inplace)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return [x for x in tree_leaves((params, state)) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("missing", [-1, 1])
def test_native_chains_are_their_members_one_by_one(
    name: str, inplace: bool, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = roll(with_backend(CHAINS[name](), "reference"), inplace, missing)
    calls = []
    monkeypatch.setattr(
        "torchopt.transform.fused.attempt",
        lambda *a, **k: (calls.append(1), native.attempt(*a, **k))[1],
    )
    got = roll(CHAINS[name](), inplace, missing)
    assert len(calls) >= 3
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "name", ["adam", "adamax", "adan", "ademamix", "amsgrad", "asgd", "nadam", "radam"]
)
def test_counts_of_other_dtypes_are_read_as_numbers(
    name: str, inplace: bool, kind: torch.dtype
) -> None:
    """A caller may cast all tensors of a state; kernels would read the bytes of other numbers."""
    results = []
    for backend in ("auto", "reference"):
        impl = with_backend(getattr(torchopt, name)(lr=0.1), backend)
        params = tree(0)
        state = tuple(
            member._replace(count=[x if x is None else x.to(kind) for x in member.count])
            if "count" in member._fields
            else member
            for member in impl.init(params)
        )
        for k in range(3):
            updates, state = impl.update(tree(k + 1), state, params=params, inplace=inplace)
            params = torchopt.apply_updates(params, updates, inplace=False)
        results.append([x.double() for x in tree_leaves((params, state)) if isinstance(x, Tensor)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CHAINS)
def test_derivatives_of_native_chains(name: str) -> None:
    trees = [tree(k) for k in range(2)]

    def loss(impl: Any, x: Tensor) -> Tensor:
        params: Any = trees[0]
        state = impl.init(params)
        for k in range(2):
            grads = {"a": torch.sin(x * (k + 1)), "b": (trees[k]["b"][0] * x.sum(), None)}
            updates, state = impl.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return sum((p.sum() for p in tree_leaves(params)), torch.zeros(()))

    x = tree(9)["a"].requires_grad_()
    native_chain, plain = CHAINS[name](), with_backend(CHAINS[name](), "reference")
    a, b = (torch.autograd.grad(loss(impl, x), x)[0] for impl in (native_chain, plain))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    batch = torch.stack([x.detach(), x.detach() + 1])
    torch.testing.assert_close(
        torch.func.vmap(lambda y: loss(native_chain, y))(batch),
        torch.stack([loss(plain, y) for y in batch]),
    )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_other_chains_run_member_by_member(name: str, inplace: bool) -> None:
    impl = OTHERS[name]()
    if name != "adam, then momentum without a step size":
        with pytest.raises(KernelUnavailableError, match="one fused rule") as refused:
            with_backend(impl, "native")
        assert len(str(refused.value)) < 400
    want = roll(with_backend(impl, "reference"), inplace)
    torch.testing.assert_close(roll(impl, inplace), want, rtol=1e-12, atol=0)


def test_a_native_chain_that_is_asked_for_raises_where_there_is_none() -> None:
    impl = with_backend(CHAINS["adam"](), "native")
    params = {"w": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(KernelUnavailableError, match="got torch.complex64"):
        impl.update(params, impl.init(params))
    torch.testing.assert_close(roll(impl, True), roll(CHAINS["adam"](), True))


def test_native_chains_can_be_pickled() -> None:
    impl = CHAINS["clipped"]()
    again = pickle.loads(pickle.dumps(impl))
    torch.testing.assert_close(roll(again, False), roll(impl, False), rtol=0, atol=0)


def test_a_rule_of_a_user_is_not_a_kernel_of_its_base() -> None:
    from torchopt.optimizers.adam import Adam
    from torchopt.transform.base import as_transformation

    class Doubled(Adam):
        def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
            u, new = super().apply(c, g, state, p)
            return u * 2, new

    doubled = chain(
        as_transformation(Doubled(0.9, 0.999, 1e-8, 0.0), already_flattened=False),
        transform.scale(-0.1),
    )
    params = {"w": torch.ones(2, dtype=torch.float64)}
    updates, _ = doubled.update(params, doubled.init(params))
    torch.testing.assert_close(updates["w"], torch.full((2,), -0.2, dtype=torch.float64))
