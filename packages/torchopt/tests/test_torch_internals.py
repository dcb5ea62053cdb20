# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that is used works as expected, and occurs in one package only."""

from __future__ import annotations

import re
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import torchopt
from torchopt import torch_internals as internals

PRIVATE = re.compile(r"\btorch\.(\w+\.)*_[a-zA-Z]|forward_ad\._")


def test_private_names_occur_in_one_package_only() -> None:
    source = Path(torchopt.__file__).parent
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if PRIVATE.search(line.partition("#")[0]) and '"torch._functorch"' not in line
    }
    assert {name.partition("/")[0] for name in found} == {"torch_internals"}


def test_operations_on_lists_are_those_on_tensors() -> None:
    torch.manual_seed(0)
    first, second = ([torch.randn(n, dtype=torch.float64) for n in (3, 2)] for _ in range(2))
    pairs = list(zip(first, second))
    for found, expected in (
        (internals.foreach_add(first, second), [x + y for x, y in pairs]),
        (internals.foreach_add(first, second, alpha=-2), [x - 2 * y for x, y in pairs]),
        (internals.foreach_lerp(first, second, 0.75), [0.25 * x + 0.75 * y for x, y in pairs]),
        (internals.foreach_mul(first, 3.0), [x * 3 for x in first]),
    ):
        torch.testing.assert_close(list(found), expected, rtol=1e-15, atol=1e-15)
    written = [x.clone() for x in first]
    internals.foreach_add_(written, second)
    torch.testing.assert_close(written, [x + y for x, y in pairs], rtol=0.0, atol=0.0)
    internals.foreach_copy_(written, second)
    torch.testing.assert_close(written, second, rtol=0.0, atol=0.0)
    assert all(x._version == 2 for x in written)


def test_forms_of_tensors_are_compared_as_a_whole() -> None:
    first, second = torch.zeros(2, 2, requires_grad=True), torch.zeros(3)
    alike = internals.same_forms([first, second])
    leaked: list[torch.Tensor] = []
    torch.func.grad(lambda x: leaked.append(x) or x.sum())(second)
    assert alike([first, second])
    assert alike([torch.ones(2, 2, requires_grad=True), torch.ones(3)])
    others = {
        "requires_grad": [first.detach(), second],
        "shape": [first, torch.zeros(4)],
        "dtype": [first, second.double()],
        "device": [first, second.to("meta")],
        "strides": [first, torch.zeros(6)[::2]],
        "layout": [first, second.to_sparse()],
        "negative bit": [first, torch.zeros(3, dtype=torch.cfloat).conj().imag],
        "type": [torch.nn.Parameter(first.detach()), second],
        "wrapper of a transform": [first, leaked[0]],
        "inference": [first, torch.inference_mode()(torch.zeros)(3)],
    }
    assert [name for name, tensors in others.items() if alike(tensors)] == []
    assert not internals.same_forms([second, torch.ones(3)])([second, second])
    conjugate = torch.zeros(3, dtype=torch.cfloat)
    assert not internals.same_forms([conjugate])([conjugate.conj()])
    with torch.autocast("cpu"):
        assert not alike([first, second])


def test_the_default_device_is_known() -> None:
    assert internals.default_device() == torch.get_default_device()
    with torch.device("meta"):
        assert internals.default_device() == torch.device("meta")
    torch.set_default_device("meta")
    try:
        assert internals.default_device() == torch.device("meta")
    finally:
        torch.set_default_device(None)
    assert internals.default_device() == torch.device("cpu")


def test_tensors_whose_elements_overlap_are_known() -> None:
    x = torch.zeros(3, 2)
    assert not internals.overlaps_itself(x)
    assert not internals.overlaps_itself(x.t())
    assert internals.overlaps_itself(x[:, :1].expand(3, 2))


def test_gradients_that_somebody_else_sees_are_known() -> None:
    p, q = (torch.ones(4, requires_grad=True) for _ in range(2))
    found = []
    p.register_post_accumulate_grad_hook(
        lambda p: found.append(internals.holds_alone(p.grad, in_hook=True))
    )
    (p * q).sum().backward()
    assert found == [True]
    assert p.grad is not None
    assert internals.holds_alone(p.grad)
    rows = p.grad.view(2, 2)
    assert not internals.holds_alone(p.grad)
    del rows
    array = p.grad.numpy()
    assert not internals.holds_alone(p.grad)
    assert array.shape == (4,)


def test_versions_are_bumped() -> None:
    tensors = [torch.zeros(2), torch.zeros(3)]
    internals.bump_versions(tensors)
    assert [x._version for x in tensors] == [1, 1]


def test_zero_tensors_are_known() -> None:
    assert internals.is_zero_tensor(torch._efficientzerotensor((2,)))
    assert not internals.is_zero_tensor(torch.zeros(2))


def test_tensors_of_transforms_are_known() -> None:
    x = torch.ones(3)
    seen = []

    def look(row: torch.Tensor) -> torch.Tensor:
        facts = (internals.is_wrapped(row), internals.is_batched(row), internals.is_transforming())
        seen.append(facts)
        return row * 2

    torch.func.vmap(look)(x)
    torch.func.grad(lambda y: look(y).sum())(x)
    assert seen == [(True, True, True), (True, False, True)]
    assert not internals.is_wrapped(x)
    assert not internals.is_transforming()


def test_levels_of_transforms_are_removed() -> None:
    seen = []

    def look(row: torch.Tensor) -> torch.Tensor:
        seen.append((internals.below_transforms(row).shape, internals.plain_entry(row).shape))
        seen.append((internals.is_differentiated(row), internals.is_tracked(row)))
        return row.sum()

    torch.func.vmap(torch.func.grad(look))(torch.ones(4, 2))
    assert seen == [((4, 2), (2,)), (True, True)]


def test_forward_modes_are_counted() -> None:
    assert not internals.in_forward_mode()
    assert internals.count_forward_modes() == 0
    x, seen = torch.ones(2), []

    def inner(y: torch.Tensor) -> torch.Tensor:
        seen.append(internals.count_forward_modes())
        return y * y

    torch.func.jvp(lambda y: torch.func.jvp(inner, (y,), (x,))[1], (x,), (x,))
    assert seen == [2]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert internals.in_forward_mode()
        assert internals.has_tangent(dual)
        assert not internals.has_tangent(x)
        assert internals.any_watched([x, dual])
        with internals.with_forward_mode(False):
            assert not internals.forward_mode_enabled()
    assert internals.forward_mode_enabled()


def test_graphs_are_seen_where_they_are_recorded() -> None:
    x = torch.ones(2, requires_grad=True)
    assert internals.any_watched([torch.ones(2), x])
    with torch.no_grad():
        assert not internals.any_watched([x])


def test_recording_is_seen() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    seen = []
    make_fx(lambda y: (seen.append(internals.is_traced()), y + 1)[1])(torch.ones(2))
    assert seen == [True]
    assert not internals.is_traced()


def test_batches_of_the_legacy_vmap_are_recognised() -> None:
    seen = []

    class Look(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, c: torch.Tensor) -> torch.Tensor:
            taken = internals.taken_off_old_vmap((c,))
            assert taken is not None
            seen.append((internals.is_batched_backward((c,)), taken[1]))
            assert taken[0] is not None
            return taken[2](taken[0][0] * 2)

    x = torch.ones(2, requires_grad=True)
    (got,) = torch.autograd.grad(Look.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert torch.equal(got, 2 * torch.eye(2))
    assert seen == [(True, (0,))]
    assert not internals.is_batched_backward((x,))
    assert internals.taken_off_old_vmap((x,)) is None


def test_autocast_is_seen() -> None:
    assert not internals.any_autocast()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert internals.any_autocast()
    assert internals.counts_for_any_autocast("cpu")


def test_saved_tensor_hooks_are_listed_outermost_first() -> None:
    def pack(x: torch.Tensor) -> torch.Tensor:
        return x

    def second(x: torch.Tensor) -> torch.Tensor:
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(pack, pack), hooks(second, second):
        assert internals.pack_hooks() == [pack, second]
        assert internals.top_saved_tensor_hooks(True)[0] is second
    assert internals.pack_hooks() == []


def test_checkpoints_are_recognised() -> None:
    from torch.utils.checkpoint import checkpoint

    seen = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.extend(internals.checkpoint_of(pack) for pack in internals.pack_hooks())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert [recomputed for _, recomputed in seen] == [False, True]
    assert seen[0][0] is seen[1][0]
    assert internals.checkpoint_of(lambda y: y) is None
    reentrant = []
    checkpoint(
        lambda y: (reentrant.append(internals.reentrant_checkpoint()), y.sin())[1],
        x,
        use_reentrant=True,
    )
    assert reentrant[0] is not None
    assert internals.reentrant_checkpoint() is None


def test_a_backward_pass_is_that_of_torch() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = torch.tensor(3.0, requires_grad=True)
    for create_graph in (False, True):
        loss = (x * x * x).sum()
        got = internals.backward_pass(loss, [x, y], retain_graph=True, create_graph=create_graph)
        assert got[0].tolist() == [3.0, 12.0]
        assert got[1] is None
        assert got[0].requires_grad == create_graph


def test_other_threads_have_their_own_modes() -> None:
    seen = []
    with forward_ad.dual_level():
        thread = threading.Thread(target=lambda: seen.append(internals.is_transforming()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_operations_are_traced_with_their_constants() -> None:
    held = torch.tensor([2.0, 3.0])
    read: list[torch.Tensor] = []
    x = torch.tensor([1.0, 5.0])

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [x * held * torch.tensor(2.0) + held.sum().detach()]

    graph = internals.traced_graph(function, [x.clone()], read.append)
    assert internals.lifted_constants(graph)[0] is held
    assert not internals.draws_numbers(graph)
    assert graph(x, held * 2)[0].tolist() == [18.0, 70.0]
    number = torch.tensor(4.0)
    internals.traced_graph(lambda x: [x * number.item()], [x.clone()], read.append)
    assert read[0] is number
    with pytest.raises(RuntimeError) as error:
        internals.traced_graph(lambda x: [x * x.max().item()], [x.clone()], read.append)
    assert internals.is_host_read(error.value)
    graph = internals.traced_graph(lambda x: [x * torch.rand(2)], [x.clone()], read.append)
    assert internals.draws_numbers(graph)


def test_a_view_that_is_the_same_as_its_tensor_leaves_the_graph() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [x.view(2, 3) * 2.0, x.view(3, 2).view(2, 3), y.view(1, 3)]

    x = torch.arange(6.0).view(2, 3)
    y = torch.arange(3.0).as_strided((1, 3), (7, 1))
    graph = internals.traced_graph(function, (x, y), lambda _: None)
    assert internals.lifted_constants(graph) == []
    views = [n for n in graph.graph.nodes if "view" in str(n.target)]
    found = graph(x, y)
    assert len(views) == 2 + (y.view(1, 3).stride() != y.stride())
    torch.testing.assert_close(found, function(x, y), rtol=0, atol=0)
    assert [z.stride() for z in found] == [z.stride() for z in function(x, y)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "first", "second", "kept"),
    [
        (False, "sin", "cos", 2),
        (True, "sin", "cos", 2),  # they take longer than to be read
        (False, "neg", "square", 2),
        (True, "neg", "square", 0),
    ],
)
def test_a_graph_is_split_where_cotangents_come_in(
    recompute: bool, first: str, second: str, kept: int
) -> None:
    one, other = getattr(torch, first), getattr(torch, second)

    def joint(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        return [one(x) @ w, (c @ w.T) * other(x), one(x).T @ c]

    x, w, c = torch.randn(3, 4), torch.randn(4, 2), torch.randn(3, 2)
    graph = internals.traced_graph(joint, (x, w, c), lambda _: None)
    assert internals.repeats_removed(graph)
    targets = [str(n.target) for n in graph.graph.nodes]
    assert targets.count(f"aten.{first}.default") == 1
    before, after, passed = internals.split_graph(graph, 1, [2], recompute=recompute)
    value, *made = before(x, w)
    assert len([y for y in made if y is not x]) == kept + (not recompute)  # and a view, of w
    found = [value, *after(*made, *((x, w)[i] for i in passed), c)]
    torch.testing.assert_close(found, joint(x, w, c), rtol=0, atol=0)


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (575, 0), (576, 1), (1775, 1), (1776, 2)])
def test_products_that_fit_are_kept_between_the_parts_of_a_graph(room: int, kept: int) -> None:
    def joint(
        x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, c: torch.Tensor
    ) -> list[torch.Tensor]:
        wide = (x @ w).sin()  # 40 multiplications for each of 6 x 25 elements
        thin = (wide @ v).cos()  # 25 for each of 6 x 12, which is not enough
        both = (x @ w[:, :12] + wide.cos() @ v).exp()  # 65 for each of 6 x 12
        return [thin.sum(), c * wide, c * thin, c * both]

    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(6, 40), (40, 25), (25, 12), ()]
    x, w, v, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    graph = internals.traced_graph(joint, (x, w, v, c), lambda _: None)
    before, after, passed = internals.split_graph(graph, 1, [3], recompute=True, room=room)
    value, *made = before(x, w, v)
    assert len(made) == kept
    assert sum(y.nbytes for y in made) <= room
    found = [value, *after(*made, *((x, w, v)[i] for i in passed), c)]
    torch.testing.assert_close(found, joint(x, w, v, c), rtol=0, atol=0)


@pytest.mark.parametrize(("softmaxes", "fits"), [(0, False), (319, False), (320, True)])
@pytest.mark.parametrize("is_read", [False, True])
def test_softmaxes_that_fit_are_kept_between_the_parts_of_a_graph(
    softmaxes: int, fits: bool, is_read: bool
) -> None:
    def joint(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        scores = (x @ w).sin()  # 40 multiplications for each of 5 x 8 elements
        weights = scores.softmax(-1)
        value = weights.square().sum() + (scores.cos().sum() if is_read else 0.0)
        return [value, c * weights]

    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(5, 40), (40, 8), ()]
    x, w, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    graph = internals.traced_graph(joint, (x, w, c), lambda _: None)
    before, after, passed = internals.split_graph(
        graph, 1, [2], recompute=True, room=10_000, softmaxes=softmaxes
    )
    value, *made = before(x, w)
    # With the softmax, the product before it is not needed.
    assert [y.shape for y in made] == [(5, 8)]
    is_kept = fits and not is_read
    targets = {str(n.target) for n in after.graph.nodes}
    assert ("aten._softmax.default" in targets) is not is_kept
    found = [value, *after(*made, *((x, w)[i] for i in passed), c)]
    torch.testing.assert_close(found, joint(x, w, c), rtol=0, atol=0)


@pytest.mark.parametrize(("written", "kept"), [("nothing", 2), ("other", 2), ("first", 1)])
def test_products_that_are_written_to_are_not_kept(written: str, kept: int) -> None:
    def joint(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        first, second, other = x @ w, x.sin() @ w, x.cos()
        if written != "nothing":
            (first if written == "first" else other).view(-1).mul_(2)
        value = first.sin() + second.cos() + other[:, :5]
        return [value.sum(), c * value]

    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(6, 40), (40, 5), ()]
    x, w, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    graph = internals.traced_graph(joint, (x, w, c), lambda _: None)
    before, after, passed = internals.split_graph(graph, 1, [2], recompute=True, room=10_000)
    value, *made = before(x, w)
    assert len(made) == kept
    found = [value, *after(*made, *((x, w)[i] for i in passed), c)]
    torch.testing.assert_close(found, joint(x, w, c), rtol=0, atol=0)


def test_operations_on_what_was_written_to_are_not_merged() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = x.clone()
        return [y.sin(), y.add_(1.0).sin()]

    graph = internals.traced_graph(function, (torch.randn(3),), lambda _: None)
    assert not internals.repeats_removed(graph)
    x = torch.randn(3)
    torch.testing.assert_close(graph(x), function(x), rtol=0, atol=0)


def test_tensors_with_and_without_a_negation_differ_in_nothing_else() -> None:
    for plain, negated in zip(*map(list, internals.with_and_without_negation())):
        assert negated.is_neg()
        assert not plain.is_neg()
    pairs = [
        sorted((type(x).__name__, str(x.dtype), tuple(x.shape), x.requires_grad) for x in made)
        for made in internals.with_and_without_negation()
    ]
    assert pairs[0] == pairs[1]


def test_a_graph_is_compiled() -> None:
    x = torch.tensor([1.0, 5.0])
    graph = internals.traced_graph(lambda x: [x.sin() * x], [x.clone()], [].append)
    torch.testing.assert_close(internals.compiled_graph(graph, [x]).function([x])[0], x.sin() * x)


def test_collective_operations_have_their_own_limits() -> None:
    limit = timedelta(days=365)
    for kind in ("AllreduceOptions", "AllgatherOptions", "BroadcastOptions"):
        assert internals.collective_options(kind, limit).timeout == limit


def test_operations_of_a_backend_are_aborted_if_there_is_one() -> None:
    group = torch.distributed.ProcessGroup(torch.distributed.HashStore(), 0, 1)
    internals.abort_on(group, "cuda")  # there is none
    ended = []
    internals.abort_on(SimpleNamespace(_get_backend=lambda d: _Backend(d, ended)), "cuda")
    assert ended == ["cuda"]


class _Backend:
    def __init__(self, device: torch.device, ended: list[str]) -> None:
        self.device, self.ended = device, ended

    def abort(self) -> None:
        self.ended.append(self.device.type)


def test_remote_calls_are_seen_and_meet(tmp_path: Path) -> None:
    from torch.distributed import rpc

    assert not internals.rpc_agent_is_set(rpc.api)
    assert not internals.rpc_agent_is_set(object())
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{tmp_path}/store")
    rpc.init_rpc("worker0", rank=0, world_size=1, rpc_backend_options=options)
    try:
        assert internals.rpc_agent_is_set(rpc.api)
        internals.rpc_barrier(rpc.api, set())
        internals.rpc_barrier(rpc.api, {"worker0"})
    finally:
        rpc.shutdown()


def test_the_gradient_of_weight_norm_is_corrected() -> None:
    """Its saved tensors have private names; their meaning is that of the formula."""
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(3, 4, dtype=torch.float64, generator=draw, requires_grad=True)
    g = torch.rand(1, 4, dtype=torch.float64, generator=draw, requires_grad=True)

    def gradient(v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = torch._weight_norm(v, g, 1).pow(3).sum()
        assert internals.correct_second_derivatives([loss], ()) == []
        return torch.autograd.grad(loss, (v, g), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (v, g))
    plain = internals.weight_norm(v, g, 1).pow(3).sum()
    for found, expected in zip(gradient(v, g), torch.autograd.grad(plain, (v, g))):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_hooks_of_a_node_are_listed() -> None:
    node = (torch.ones(2, requires_grad=True) * 2).grad_fn
    assert internals.hooks_of_node(node) == []

    def hook(*_: object) -> None:
        return None

    assert node is not None
    node.register_prehook(hook)
    assert [list(hooks.values()) for hooks in internals.hooks_of_node(node)] == [[hook]]
    node.register_hook(hook)
    assert [list(hooks.values()) for hooks in internals.hooks_of_node(node)] == [[hook], [hook]]


def test_no_view_returns_a_tensor_that_is_not_a_view() -> None:
    x = torch.arange(6.0).view(2, 3)
    y = internals.no_view(x)
    assert x._is_view()
    assert not y._is_view()
    assert y.data_ptr() == x.data_ptr()


def test_vmaps_are_known_among_transforms() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append([internals.inner_transforms_are_vmaps(k) for k in range(3)])
        return x.sum()

    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(torch.ones(2, 2))
    assert seen == [[False, True, True]]


def test_a_function_may_run_in_a_vmap_again() -> None:
    assert internals.vmap_again() is None
    later = []

    def look(x: torch.Tensor) -> torch.Tensor:
        again = internals.vmap_again()
        assert again is not None
        later.append(again(lambda: internals.below_transforms(x.sum()).clone()))
        return x

    x = torch.arange(6.0).view(2, 3)
    torch.func.vmap(look)(x)
    assert torch.equal(later[0](), x.sum(1))


def test_weights_of_a_recurrent_layer_follow_from_its_parameters() -> None:
    layer = torch.nn.GRU(2, 3)
    passed = ("_flat_weights", "_flat_weight_refs")
    assert internals.weights_that_follow(layer) == passed
    own = [w.detach() * 2 for w in internals.listed_weights(layer)]
    layer._flat_weights = list(own)  # the layer uses it from now on
    assert internals.weights_that_follow(layer) == ()
    x, expected = torch.ones(1, 2), layer(torch.ones(1, 2))[0]
    layer._parameters["bias_hh_l0"] = torch.nn.Parameter(torch.ones(9))  # as in functional_call
    assert internals.weights_that_follow(layer) == passed
    assert not torch.equal(layer(x)[0], expected)
    assert internals.listed_weights(layer)[3] is layer.bias_hh_l0

    class Refused(torch.nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            raise AssertionError("computed")

    made = Refused()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", made, unsafe=True)
    assert internals.weights_that_follow(layer) == passed
