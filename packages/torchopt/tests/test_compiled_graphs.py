# SPDX-License-Identifier: Apache-2.0
"""Graphs that are rewritten for the compiler give the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import avg_pool2d

from torchopt.torch_internals import compiled_graph
from torchopt.torch_internals.compiling import _is_softmax, _lowered, _options

aten = torch.ops.aten


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rewritten(function: Any, *given: Tensor) -> list[Any]:
    """Check that the rewritten graph gives the same results; return its operations."""
    graph = make_fx(function)(*given)
    made = _lowered(graph, given)
    torch.testing.assert_close(made(*given), function(*given), rtol=1e-12, atol=1e-12)
    return [node.target for node in made.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("sizes", "stays"),
    [
        ((3, 4, 5), False),
        ((200, 300, 1), False),
        ((1, 300, 200), False),
        ((300, 2, 200), False),
        ((40, 50, 60), True),
        ((1100, 1000, 1), True),
        ((0, 4, 5), True),
        ((3, 0, 5), True),
    ],
)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_thin_and_small_products_become_sums(
    sizes: tuple[int, int, int], stays: bool, batch: tuple[int, ...]
) -> None:
    rows, inner, columns = sizes
    first, second = random(*batch, inner, rows).mT, random(*batch, inner, columns)
    multiply, target = (torch.bmm, aten.bmm) if batch else (torch.mm, aten.mm)
    found = rewritten(lambda a, b: [multiply(a, b)], first, second)
    assert (target.default in found) == stays


def test_a_batch_of_small_products_is_rewritten_if_it_is_small_as_a_whole() -> None:
    for batch, stays in ((1, False), (16, True)):
        first, second = random(batch, 25, 64), random(batch, 64, 10)
        found = rewritten(lambda a, b: [torch.bmm(a, b)], first, second)
        assert (aten.bmm.default in found) == stays


def test_other_products_are_not_rewritten() -> None:
    for dtype in (torch.int64, torch.complex128, torch.bfloat16):
        x = torch.ones(3, 3, dtype=dtype)
        assert aten.mm.default in rewritten(lambda a, b: [torch.mm(a, b)], x, x.clone())


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (3, 7, 5), (2, 1, 7, 9)])
@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({"kernel_size": 2}, False),
        ({"kernel_size": (3, 2), "stride": (3, 2)}, False),
        ({"kernel_size": 2, "count_include_pad": False}, False),
        ({"kernel_size": 2, "stride": 1}, True),
        ({"kernel_size": 2, "padding": 1}, True),
        ({"kernel_size": 2, "ceil_mode": True}, True),
        ({"kernel_size": 2, "divisor_override": 3}, True),
    ],
)
def test_windows_that_tile_an_image_become_dimensions(
    shape: tuple[int, ...], options: dict[str, Any], stays: bool
) -> None:
    def pooled(x: Tensor, c: Tensor) -> list[Tensor]:
        value, pull = torch.func.vjp(lambda x: avg_pool2d(x, **options), x)
        return [value, *pull(c)]

    x = random(*shape)
    found = rewritten(pooled, x, random(*avg_pool2d(x, **options).shape))
    assert (aten.avg_pool2d.default in found) == stays
    assert (aten.avg_pool2d_backward.default in found) == stays


@pytest.mark.parametrize(
    ("shape", "dim", "lines", "stays"),
    [
        ((5, 7), 1, (5, 1), False),
        ((5, 7), -2, (1, 7), False),
        ((2, 4, 3), 1, (2, 1, 3), False),
        ((6,), 0, (1,), False),
        ((5, 7), 1, (5, 2), True),
        ((5, 7), 1, (4, 1), True),
        ((3, 33), 1, (3, 1), True),
    ],
)
def test_entries_of_short_lines_are_changed_by_a_mask(
    shape: tuple[int, ...], dim: int, lines: tuple[int, ...], stays: bool
) -> None:
    def changed(x: Tensor, index: Tensor, source: Tensor) -> list[Tensor]:
        return [x.scatter_add(dim, index, source), x.scatter(dim, index, 2.5)]

    index = torch.randint(0, shape[dim], lines, generator=torch.Generator().manual_seed(1))
    found = rewritten(changed, random(*shape), index, random(*lines))
    assert (aten.scatter_add.default in found) == stays
    assert (aten.scatter.value in found) == stays


def test_the_derivative_of_a_cross_entropy_is_a_mask() -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x, labels)

    def slopes(x: Tensor, labels: Tensor) -> list[Tensor]:
        return [torch.func.vmap(torch.func.grad(loss))(x, labels)]

    labels = torch.tensor([[0, 2, -100], [1, 1, 2]])
    found = rewritten(slopes, random(2, 3, 4), labels)
    assert not {aten.scatter_add.default, aten.scatter.value} & set(found)


@pytest.mark.parametrize("index", [4, -1])
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "compiled"]
)
def test_a_place_outside_of_a_short_line_raises(index: int, compiled: bool) -> None:
    def added(x: Tensor, index: Tensor, source: Tensor) -> list[Tensor]:
        return [x.scatter_add(1, index, source)]

    given = [random(2, 4), torch.tensor([[0], [3]]), random(2, 1)]
    graph = make_fx(added)(*given)
    run: Any = compiled_graph(graph, given).function if compiled else None
    wrong = [given[0], torch.tensor([[0], [index]]), given[2]]
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(wrong) if compiled else _lowered(graph, given)(*wrong)


def test_number_literals_become_constants() -> None:
    found = rewritten(lambda x: [x * torch.tensor(2.5, dtype=torch.float64)], random(3))
    assert aten.full.default in found


def second_derivative(groups: int, size: int, **options: Any) -> tuple[Any, list[Tensor]]:
    """Return the derivative of the gradients of a convolution, and its arguments."""

    def convolved(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, groups=groups, **options)

    def pulled(x: Tensor, w: Tensor, c: Tensor) -> Any:
        return torch.func.vjp(convolved, x, w)[1](c)

    def twice(x: Tensor, w: Tensor, c: Tensor, *along: Tensor) -> list[Tensor]:
        return [*torch.func.vjp(pulled, x, w, c)[1](along)]

    x, w = random(3, 4, size, size), random(6, 4 // groups, 3, 3)
    return twice, [x, w, convolved(x, w).cos(), x.sin(), w.cos()]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"padding": 1}, 6),
        ({"stride": 2}, 9),
        ({"stride": 2, "padding": 1}, 8),
        ({"dilation": 2, "padding": (1, 2)}, 7),
    ],
)
def test_a_second_derivative_of_a_convolution_has_no_kernels_of_cotangents(
    options: dict[str, Any], size: int, groups: int
) -> None:
    twice, given = second_derivative(groups, size, **options)
    found = rewritten(twice, *given)
    assert found.count(aten.convolution.default) == 3  # the cotangent of c, and that of x
    assert found.count(aten.convolution_backward.default) == 1


def exchanged(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return x.transpose(0, 1), c.transpose(0, 1)


def with_a_rest(x: Tensor, c: Tensor) -> list[Tensor]:
    """Return what no weight's gradient is: its convolution would have more cotangents."""
    return [torch.conv2d(*exchanged(x, c), stride=2)]


def of_every_second_channel(x: Tensor, c: Tensor) -> list[Tensor]:
    a, b = exchanged(x, c)
    return [torch.cat([torch.conv2d(a[:4:2], b[:4:2]), torch.conv2d(a[2:], b[2:])], 1)]


def of_a_transposed_one(x: Tensor, c: Tensor) -> list[Tensor]:
    def spread(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv_transpose2d(x, w, dilation=2, output_padding=1)

    def pulled(x: Tensor, w: Tensor) -> Any:
        value, pull = torch.func.vjp(spread, x, w)
        return pull(value.sin())

    return [*torch.func.vjp(pulled, x, c)[1]((x, c))]


@pytest.mark.parametrize("function", [with_a_rest, of_every_second_channel, of_a_transposed_one])
def test_other_convolutions_with_exchanged_dimensions_stay(function: Any) -> None:
    given = [random(4, 4, 6, 6), random(4, 4, 5, 5)]
    lowered = _lowered(make_fx(function)(*given), given)
    torch.testing.assert_close(lowered(*given), function(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_second_derivative_of_a_convolution_is_compiled() -> None:
    twice, given = second_derivative(2, 6, padding=1)
    found = compiled_graph(make_fx(twice)(*given), given).function([*given])
    torch.testing.assert_close(list(found), twice(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_images_of_grouped_convolutions_keep_their_layout(groups: int) -> None:
    def pulled(x: Tensor, w: Tensor, c: Tensor) -> list[Tensor]:
        _, pull = torch.func.vjp(lambda x: torch.conv2d(x, w, groups=groups), x)
        return [*pull(c)]

    x, w = random(2, 4, 5, 5), random(4, 4 // groups, 3, 3)
    options = _options(make_fx(pulled)(x, w, random(2, 4, 3, 3)), in_cpp=True)
    assert options.get("layout_optimization", True) == (groups == 1)


@pytest.mark.slow
def test_graphs_that_write_to_their_own_tensors_are_compiled() -> None:
    def written(x: Tensor) -> list[Tensor]:
        y = x.clone()
        y.add_(1.0)
        return [torch.mm(y, y)]

    given = random(3, 3)
    found = compiled_graph(make_fx(written)(given), [given]).function([given])
    torch.testing.assert_close(list(found), written(given), rtol=1e-13, atol=0)


@pytest.mark.slow
def test_results_that_are_arguments_or_views_of_them_are_returned() -> None:
    def mixed(x: Tensor, y: Tensor) -> list[Tensor]:
        z = x @ y
        return [x, y.mT, z, z.mT, z, x[0], z * torch.tensor([1.0, 2.0], dtype=torch.float64)]

    given = [random(2, 2), random(2, 2) + 1.0]
    found = compiled_graph(make_fx(mixed)(*given), given).function([*given])
    torch.testing.assert_close(list(found), mixed(*given), rtol=1e-13, atol=0)


def corrected(x: Tensor, y: Tensor, k: Tensor) -> list[Tensor]:
    """Return a large tensor divided by a number that depends on a count."""
    return [x / (1.0 - 0.9**k)]


def after_a_step(x: Tensor, y: Tensor, k: Tensor) -> list[Tensor]:
    """Return a product with weights that were changed before, which are a result too."""
    w = y[:9] - 0.1 * y[1:]
    return [torch.mm(x[:100].view(100, 1), w.view(1, 9)), w]


def along_rows(x: Tensor, y: Tensor, k: Tensor) -> list[Tensor]:
    """Return rows that are multiplied by the exponentials of a column."""
    return [y.exp().unsqueeze(1) * x.view(10, 100)]


def after_a_product(x: Tensor, y: Tensor, k: Tensor) -> list[Tensor]:
    """Return an error function, and its product with something that takes another loop."""
    values = x.view(10, 100).erf()
    return [values + 1.0, (values.mT @ values) @ values.mT * values.mT]


def without_repeats(x: Tensor, y: Tensor, k: Tensor) -> list[Tensor]:
    """Return loops that read nothing, numbers, sums or short results repeatedly."""
    short = x.view(10, 100) + y.unsqueeze(1)
    return [x.exp() * x, x.erf() + 1.0, x * 2.0, x / x.sum(), y * k.exp(), short]


REPEATS = [
    *((function, 1) for function in (corrected, after_a_step, along_rows, after_a_product)),
    (without_repeats, 0),
]


@pytest.mark.parametrize(("function", "count"), REPEATS)
def test_a_result_that_larger_loops_read_is_stored(function: Any, count: int) -> None:
    found = rewritten(function, random(1000), random(10), random(1)[0].abs() + 1.0)
    assert found.count(torch.ops._inductor_test.realize.default) == count


@pytest.mark.slow
@pytest.mark.parametrize("function", [function for function, _ in REPEATS])
def test_a_graph_with_stored_results_is_compiled(function: Any) -> None:
    given = [random(1000), random(10), random(1)[0].abs() + 1.0]
    found = compiled_graph(make_fx(function)(*given), given).function([*given])
    torch.testing.assert_close(list(found), function(*given), rtol=1e-12, atol=1e-12)


def test_patterns_of_attention_are_loaded_for_graphs_with_a_softmax() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [torch.softmax(q @ k.mT, -1) @ v]

    def loss(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x.tanh() @ x.mT, torch.arange(len(x)))

    q, k, v = random(3, 2, 4, 5)
    graphs = [
        (make_fx(attention)(q, k, v), [q, k, v], True),
        (make_fx(lambda x: [torch.func.grad(loss)(x)])(q[0]), [q[0]], False),
    ]
    for graph, given, has in graphs:
        assert any(map(_is_softmax, _lowered(graph, given).graph.nodes)) == has
