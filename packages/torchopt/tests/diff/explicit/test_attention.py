# SPDX-License-Identifier: Apache-2.0
"""Attention with all derivatives, in memory that is linear in the sequence length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchopt
from torchopt.diff import attention as chunked
from torchopt.diff.explicit.memory import CountBytes

plain = nn.functional.scaled_dot_product_attention


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def derivatives(function: Any, tensors: list[Tensor], **settings: Any) -> list[Tensor]:
    mask = {"attn_mask": tensors[3]} if len(tensors) > 3 else {}
    value = function(*tensors[:3], **mask, **settings)
    out = [value]
    for _ in range(3):
        scalar = sum((x**2).sum() for x in out[-len(tensors) :])
        out += torch.autograd.grad(scalar, tensors, create_graph=True)  # type: ignore[arg-type]
    return out


MASKS: dict[str, Any] = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.arange(42).reshape(6, 7) % 3 > 0},
    "of keys": {"attn_mask": torch.tensor([True, True, False, True, True, True, False])[None]},
    "of one dimension": {"attn_mask": torch.arange(7) % 3 > 0},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("name", [*MASKS, "added"])
def test_attention_equals_that_of_torch_up_to_the_third_derivative(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_BYTES", 2 * 2 * 7 * 8 * 2)  # two queries at a time
    tensors = [draw(2, 2, 6, 3, seed=0), draw(2, 2, 7, 3, seed=1), draw(2, 2, 7, 3, seed=2)]
    tensors += [draw(6, 7, seed=3)] if name == "added" else []
    tensors = [x.requires_grad_() for x in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(plain, tensors, **MASKS.get(name, {}))
    got = derivatives(chunked.attention, tensors, **MASKS.get(name, {}))
    for x, y in zip(expected, got, strict=True):
        assert (x - y).abs().max() <= 1e-12 * (1 + x.abs().max())


def test_heads_of_queries_may_share_keys() -> None:
    q, k = draw(1, 4, 5, 3, seed=0), draw(1, 2, 5, 3, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain(q, k, k, enable_gqa=True)
    got = chunked.attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_forward_over_reverse_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_BYTES", 2 * 7 * 8 * 2)
    found = []
    for function in (plain, chunked.attention):
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            q = forward_ad.make_dual(draw(2, 6, 3, seed=0).requires_grad_(), draw(2, 6, 3, seed=4))
            k = draw(2, 7, 3, seed=1)
            (g,) = torch.autograd.grad((function(q, k, k) ** 3).sum(), q)
            found.append(forward_ad.unpack_dual(g).tangent)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_memory_is_linear_in_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_BYTES", 2**16)
    peaks = []
    for length in (256, 512):
        tensors = [draw(1, length, 8, seed=i).requires_grad_() for i in range(3)]
        with CountBytes() as count:
            out = chunked.attention(*tensors)
            grads = torch.autograd.grad((out**3).sum(), tensors, create_graph=True)
            torch.autograd.grad(sum((g**2).sum() for g in grads), tensors)  # type: ignore[arg-type]
        peaks.append(count.peak)
    assert peaks[1] < 2.1 * peaks[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attend(x, x, x, need_weights=False)[0]
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [Attending, lambda: nn.GRU(4, 3, batch_first=True)])
def test_layers_with_fast_kernels_work_in_every_mode(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = make().to(dtype)
    x, scale = draw(2, 3, 4, seed=0).to(dtype), torch.ones((), dtype=dtype, requires_grad=True)

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out = torchopt.params.functional_call(module, p, batch)
        out = out[0] if isinstance(out, tuple) else out
        return (out * scale).pow(2).mean()

    params = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    found = []
    for derivative, keep in [
        ("reverse", "all"),
        ("reverse", 1),
        ("mixed", "steps"),
        ("forward", 1),
    ]:
        start = {k: p.detach() for k, p in params.items()} if derivative == "forward" else params
        inner = torchopt.inner_loop(
            loss, torchopt.sgd(0.5), steps=2, derivative=derivative, keep=keep
        )
        total = sum((p**2).sum() for p in inner(start, x, scale).params.values())
        found.append(torch.autograd.grad(total, scale)[0])
    assert found[0].abs() > 1e-4
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("derivative", ["reverse", "mixed"])
def test_recurrent_layers_are_traced(kind: type[nn.RNNBase], derivative: str) -> None:
    torch.manual_seed(0)
    module = kind(4, 3, batch_first=True).double()

    def loss(p: Any, batch: Tensor) -> Tensor:
        return torchopt.params.functional_call(module, p, batch)[0].pow(2).mean()

    found = []
    for execute in ("trace", "eager", "trace"):  # the first call of the module is a trace
        params = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
        inner = torchopt.inner_loop(
            loss, torchopt.sgd(0.5), steps=2, derivative=derivative, execute=execute
        )
        total = sum((p**3).sum() for p in inner(params, draw(2, 3, 4, seed=0)).params.values())
        found.append(torch.autograd.grad(total, list(params.values())))
    for traced, eager, again in zip(*found):
        assert eager.norm() > 1e-6
        torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(again, eager, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("size", [2 * 7 * 8 * 2, 2**22], ids=["chunks", "whole"])
def test_a_query_that_sees_no_key_gets_zeros_and_no_derivative_is_nan(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_BYTES", size)
    seen = torch.ones(6, 7, dtype=torch.bool)
    seen[2], seen[3, :4] = False, False
    mask = seen if dtype == torch.bool else torch.zeros(6, 7, dtype=dtype).masked_fill(
        ~seen, float("-inf")
    )  # fmt: skip
    tensors = [draw(2, n, 3, seed=n).requires_grad_() for n in (6, 7, 7)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain(*tensors, attn_mask=mask)
    values = derivatives(lambda *t: chunked.attention(*t, attn_mask=mask), tensors)
    torch.testing.assert_close(values[0], expected, rtol=1e-13, atol=1e-13)
    assert not values[0][:, 2].any()
    # The other queries have the derivatives that they have alone.
    rest = [0, 1, 3, 4, 5]
    alone = [tensors[0].detach()[:, rest].requires_grad_(), *tensors[1:]]
    others = derivatives(lambda *t: plain_weights(*t, seen[rest]), alone)
    for i, (x, y) in enumerate(zip(values, others, strict=True)):
        if i == 0 or i % 3 == 1:
            assert not x[:, 2].any()
            x = x[:, rest]
        assert (x - y).abs().max() <= 1e-12 * (1 + y.abs().max())


def plain_weights(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = q @ k.mT / q.size(-1) ** 0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("derivative", ["reverse", "mixed"])
def test_chunks_are_computed_again_in_the_autocast_of_the_loss(
    derivative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (draw(2, n, 4, seed=n).float() for n in (6, 7, 7))
    monkeypatch.setattr(chunked, "_BYTES", 2 * 2 * 7 * 2)
    chunk, seen = chunked._chunk, []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return chunk(*args, **kwargs)

    monkeypatch.setattr(chunked, "_chunk", watched)

    def gradient(enabled: bool) -> Tensor:
        def loss(p: Tensor, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = nn.functional.scaled_dot_product_attention(q @ p, k @ p, v)
            return out.float().square().mean()

        p = draw(4, 4, seed=5).float().requires_grad_()
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=2, derivative=derivative)
        total = inner(p, None).params.square().sum()
        seen.clear()
        return torch.autograd.grad(total, p)[0]

    expected = gradient(False)
    assert len(seen) > 3
    assert not any(seen)
    # bfloat16 has 8 bits, of which the roundings of two steps and their slopes take three.
    assert (gradient(True) - expected).norm() < 2**-5 * expected.norm()
    assert len(seen) > 3
    assert all(seen)
