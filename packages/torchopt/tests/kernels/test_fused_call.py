# SPDX-License-Identifier: Apache-2.0
"""Native calls that check, allocate and compute: what they refuse, skip, allocate and cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rule_cases import CHAIN, DECAYED, RULES, all_hypers, fused_step_, fused_update, make_inputs
from torch import Tensor

import torchopt
from torchopt import _C
from torchopt.kernels import buffers, devices
from torchopt.kernels.devices import EXCHANGE
from torchopt.kernels.fused_step import StepCache
from torchopt.optimizers.native import with_backend
from torchopt.torch_internals import with_and_without_negation
from torchopt.tree import tree_leaves

NAMES = sorted(RULES)
SHAPES = ((3, 2), (), (0,), (1500,), (17000,))
needs_exchange = pytest.mark.skipif(EXCHANGE is None, reason="this torch has no C interface")


@pytest.fixture(params=["exchange", "methods"])
def reading(request: pytest.FixtureRequest) -> Iterator[str]:
    """Read tensors through torch's C interface, or their Python methods as with an older torch."""
    if request.param == "exchange" and EXCHANGE is None:
        pytest.skip("this torch has no C interface")
    devices._learn_tensors(EXCHANGE if request.param == "exchange" else None)
    yield request.param
    devices._learn_tensors(EXCHANGE)


def call(tensors: list[Any], size: int = 1, **changes: Any) -> Any:
    """Return the result of `_C.fused_call` for SGD, whose update is minus the gradient."""
    arguments: dict[str, Any] = {
        "rule": "sgd",
        "kind": _C.UPDATE,
        "needed": None,
        "step": 1,
        "hypers": (1.0, 0.0, 0.0),
        "maximize": False,
        "num_threads": 1,
        "record": False,
    }
    found = _C.fused_call(tensors=tensors, size=size, **{**arguments, **changes})
    return found if changes.get("record") or found is None else found[0]


def test_torch_has_the_c_interface_since_2_10() -> None:
    """The tests below are skipped without it, so the check must look in the right place."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert (EXCHANGE is not None) == (version >= (2, 10))


@needs_exchange
def test_plain_tensors_use_the_kernel() -> None:
    x = torch.tensor([[1.0, -2.0]])
    (out,) = call([x])
    assert type(out) is Tensor
    assert out.tolist() == [[-1.0, 2.0]]
    assert out.stride() == x.stride()
    assert not out.requires_grad
    assert call([x], record=True)[1] is False
    (out,), graph = call([x.requires_grad_()], record=True)
    assert graph is True
    assert out.tolist() == [[-1.0, 2.0]]
    assert not out.requires_grad
    assert call([torch.nn.Parameter(x)])[0].tolist() == [[-1.0, 2.0]]


@needs_exchange
def test_other_tensors_use_torch() -> None:
    class Subclass(Tensor):
        pass

    z = torch.tensor([1.0 + 2.0j])
    x = torch.ones(2, 3)
    for other in (
        x.t(),
        x[:, ::2],
        x.expand(4, 2, 3),
        x.as_subclass(Subclass),
        x.to_sparse(),
        x.to("meta"),
        x.to(torch.int32),
        x.to(torch.complex64),
        z.conj().imag,  # contiguous, with a pending negation
        torch._neg_view(x),
        None,
        3.0,
    ):
        assert call([other]) is None
    assert call([x, x.double()], 2) is None
    assert call([x], step=torch.tensor(1.0)) is None
    assert call([x], step=torch.tensor([1])) is None
    seen = []
    torch.func.vmap(lambda row: (seen.append(call([row])), row)[1])(x)
    torch.func.grad(lambda y: (seen.append(call([y])), y.sum())[1])(x)
    assert seen == [None, None]


@pytest.mark.parametrize("by_trial", [True, False])
def test_a_pending_negation_is_seen(by_trial: bool) -> None:
    try:
        assert (
            _C.learn_negation(*(with_and_without_negation() if by_trial else ([], []))) == by_trial
        )
        for plain, negated in zip(*with_and_without_negation()):
            assert _C.are_disjoint([plain])
            assert not _C.are_disjoint([negated])
    finally:
        assert _C.learn_negation(*with_and_without_negation())
    assert not _C.learn_negation([1.0], [2.0])  # type: ignore[list-item]
    assert _C.learn_negation(*with_and_without_negation())


def test_invalid_calls_are_refused() -> None:
    x = torch.ones(2)
    if EXCHANGE is None:
        assert call([x]) is None
        return
    with pytest.raises(ValueError, match="too few tensors"):
        call([x], 2)
    with pytest.raises(ValueError, match="no rule named 'sdg'"):
        call([x], rule="sdg")
    with pytest.raises(ValueError, match="wrong number of hyper-parameters"):
        call([x], hypers=(1.0,))
    with pytest.raises(ValueError, match="makes new tensors"):
        call([x, x], kind=_C.STEP)
    with pytest.raises(ValueError, match="too few answers"):
        call([x, x], kind=_C.UPDATE_VJP, needed=[])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chain", [CHAIN, DECAYED], ids=["plain", "decayed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cotangents_that_are_zero_or_not_needed_are_skipped(
    name: str, chain: dict[str, float], dtype: torch.dtype, reading: str
) -> None:
    """Every choice of one output and one input, against the derivative with nothing skipped."""
    grads, states, params = make_inputs(name, dtype, SHAPES, zeros=False)
    roles = [[x.requires_grad_() for x in role] for role in (grads, *states, params)]
    updates, new = fused_update(name, grads, states, params, 3, all_hypers(name, chain))
    outputs = [updates, *new]
    generator = torch.Generator().manual_seed(5)
    for output in outputs:
        weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in output]
        flat = [x for role in outputs for x in role]
        padded = [
            w
            for role in outputs
            for w in (weights if role is output else [torch.zeros_like(x) for x in role])
        ]
        every = [x for role in roles for x in role]
        want = torch.autograd.grad(flat, every, padded, retain_graph=True, allow_unused=True)
        for r, role in enumerate(roles):
            got = torch.autograd.grad(output, role, weights, retain_graph=True, allow_unused=True)
            for a, b in zip(got, want[r * len(role) : (r + 1) * len(role)], strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_where_cotangents_are_zero(name: str, reading: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((3,),), zeros=False)
    hypers = all_hypers(name, DECAYED)

    def update(g: Tensor) -> Tensor:  # leaves the new state without a cotangent
        return fused_update(name, [g], states, params, 3, hypers)[0][0]

    g = grads[0].requires_grad_()
    assert torch.autograd.gradcheck(update, (g,))
    assert torch.autograd.gradgradcheck(update, (g,))


@pytest.mark.parametrize("name", NAMES)
def test_reading_by_methods_gives_the_same_bits(name: str) -> None:
    results = []
    for exchange in (EXCHANGE, None):
        devices._learn_tensors(exchange)
        try:
            grads, states, params = make_inputs(name, torch.float32, SHAPES)
            hypers = all_hypers(name, DECAYED)
            found = fused_update(name, grads, states, params, 3, hypers)
            cache = StepCache()
            numbers = [hypers[key] for key in RULES[name].all_hypers]
            assert fused_step_(cache, name, params, grads, states, 3, numbers)
            assert fused_step_(cache, name, params, grads, states, torch.tensor(4), numbers)
            results.append([*tree_leaves(found), *params, *(x for role in states for x in role)])
        finally:
            devices._learn_tensors(EXCHANGE)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_that_look_like_plain_ones_are_not_misread(reading: str) -> None:
    z = torch.tensor([2.0 + 3.0j])
    shown = z.conj().imag  # its value is -3, with +3 in memory
    p = torch.zeros(1, requires_grad=True)
    optimizer = torchopt.SGD([p], lr=1.0)
    for value in (torch.ones(1), shown, torch._neg_view(torch.tensor([5.0]))):
        p.grad = value
        optimizer.step()
    assert p.tolist() == [-1.0 + 3.0 + 5.0]


def test_a_parameter_cut_at_the_same_address_is_noticed(reading: str) -> None:
    whole = torch.zeros(4)
    p = whole.clone().requires_grad_()
    memory = p.data
    optimizer = torchopt.SGD([p], lr=1.0)
    p.grad = torch.ones(4)
    optimizer.step()
    p.data = p.data[:2]
    p.grad = torch.ones(2)
    optimizer.step()
    assert memory.tolist() == [-2.0, -2.0, -1.0, -1.0]


def test_a_state_that_the_caller_changes_is_noticed() -> None:
    """The next step notices counts that a caller changes in the state."""
    p = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    q = [x.detach().clone().requires_grad_() for x in p]
    fast, slow = (
        torchopt.Optimizer(ps, with_backend(torchopt.adam(0.1), backend))
        for ps, backend in ((p, "auto"), (q, "reference"))
    )
    for _ in range(3):
        for optimizer, ps in ((fast, p), (slow, q)):
            for x in ps:
                x.grad = x.detach().cos()
            optimizer.step()
            optimizer.state_dict()[0][0].count[1] = torch.tensor(7)
    torch.testing.assert_close(p, q, rtol=1e-13, atol=0)


def test_parameters_on_two_devices_take_their_counts_there() -> None:
    p = [torch.ones(2, requires_grad=True), torch.ones(2, device="meta", requires_grad=True)]
    optimizer = torchopt.Adam(p, lr=0.1)
    for _ in range(2):
        for x in p:
            x.grad = torch.ones_like(x)
        optimizer.step()
    counts = optimizer.state_dict()[0][0].count
    assert [c.device.type for c in counts] == ["cpu", "meta"]
    assert int(counts[0]) == 2


def test_threads_may_step_one_optimizer_each() -> None:
    def run(seed: int, out: dict[int, list[Tensor]]) -> None:
        generator = torch.Generator().manual_seed(seed)
        params = [torch.randn(n, generator=generator).requires_grad_() for n in (50, 20000)]
        optimizer = torchopt.Adam(params, lr=0.1)
        for _ in range(20):
            for p in params:
                p.grad = p.detach().sin()
            optimizer.step()
        t = torchopt.adam(0.1)
        plain = tuple(p.detach() for p in params)
        state = t.init(plain)
        for _ in range(20):
            updates, state = t.update(tuple(p.cos() for p in plain), state, inplace=False)
        out[seed] = [*plain, *updates]

    alone: dict[int, list[Tensor]] = {}
    for seed in range(4):
        run(seed, alone)
    together: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=run, args=(s, together)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, values in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(values, together[seed], strict=True))


@needs_exchange
class TestBuffers:
    """Memory is reused only when nothing can access it any more."""

    SIZE = 5000

    @pytest.fixture(autouse=True)
    def empty(self) -> Iterator[None]:
        buffers.release()
        yield
        buffers.release()

    def make(self) -> Tensor:
        out: Tensor = call([torch.arange(float(self.SIZE))])[0]
        return out

    @pytest.mark.parametrize(
        "keep",
        [
            lambda x: x,
            lambda x: x.detach(),
            lambda x: x[7:9],
            lambda x: x.numpy(),
            lambda x: x.untyped_storage(),
            lambda x: torch.from_dlpack(x),
            lambda x: x.requires_grad_().square().sum(),  # the graph keeps it
        ],
        ids=["itself", "alias", "view", "numpy", "storage", "dlpack", "graph"],
    )
    def test_memory_in_use_is_not_reused(self, keep: Any) -> None:
        x = self.make()
        address = x.data_ptr()
        user = keep(x)
        del x
        fresh = [self.make() for _ in range(3)]
        assert all(y.data_ptr() != address for y in fresh)
        del user
        assert self.make().data_ptr() == address

    def test_cached_memory_is_counted_bounded_and_released(self) -> None:
        kept, used = buffers.usage()
        assert kept == 0
        many = [self.make() for _ in range(4)]
        one = (buffers.usage().used - used) // 4
        assert one >= 4 * self.SIZE
        del many
        assert buffers.usage() == (4 * one, used)
        previous = buffers.set_limit(2 * one)
        try:
            assert buffers.usage() == (2 * one, used)
            many = [self.make() for _ in range(4)]
            assert buffers.usage() == (0, used + 4 * one)
            del many
            assert buffers.usage() == (2 * one, used)
        finally:
            assert buffers.set_limit(previous) == 2 * one
        buffers.release()
        assert buffers.usage() == (0, used)
        with pytest.raises(ValueError, match="expected a number of bytes"):
            buffers.set_limit(-1)

    def test_unused_sizes_are_evicted_first(self) -> None:
        del_me = call([torch.ones(100)])[0]
        del del_me
        x = self.make()
        one = buffers.usage().used
        previous = buffers.set_limit(4 * self.SIZE + 256)
        try:
            del x
            assert buffers.usage().kept <= 4 * self.SIZE + 256
            assert buffers.usage().kept > 4 * self.SIZE  # the newer one stayed
        finally:
            buffers.set_limit(previous)
        assert one > 0

    def test_steps_whose_states_replace_one_another_need_no_more_memory(self) -> None:
        t = torchopt.adam(0.1)
        params = tuple(torch.ones(self.SIZE) for _ in range(3))
        state, grads = t.init(params), params
        addresses = []
        for _ in range(6):
            updates, state = t.update(grads, state, inplace=False)
            addresses.append({x.data_ptr() for x in (*updates, *state[0].mu, *state[0].nu)})
        assert addresses[3] | addresses[4] == addresses[4] | addresses[5]

    def test_another_thread_may_drop_the_last_reference(self) -> None:
        box = [self.make()]
        address = box[0].data_ptr()
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert self.make().data_ptr() == address

    def test_tensors_can_be_saved_shared_and_changed(self, tmp_path: Any) -> None:
        x = self.make()
        want = x.clone()
        torch.save(x, tmp_path / "x.pt")
        assert torch.equal(torch.load(tmp_path / "x.pt"), want)
        x.share_memory_()
        assert x.is_shared()
        x.add_(1.0)
        assert torch.equal(x, want + 1.0)
        assert x._version == 1
