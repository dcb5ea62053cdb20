# SPDX-License-Identifier: Apache-2.0
"""Pictures show what the graph is: its functions, names, inner steps and fused steps."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torchopt
from torchopt.visual import Graph, make_dot, make_graph, resize_graph
from torchopt.visual.graph import Cluster


def unrolled(num_steps: int, optimizer: Any = torchopt.MetaAdam) -> tuple[torch.Tensor, list[Any]]:
    """Return the loss after some inner steps, and a snapshot before and after each."""
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    x = torch.randn(4, 2)
    inner = optimizer(net, lr=0.1)

    def snapshot(prefix: str) -> Any:
        return torchopt.extract_state_dict(net, enable_visual=True, visual_prefix=prefix)

    states = [snapshot("step0.")]
    for step in range(1, num_steps + 1):
        inner.step(net(x).pow(2).mean())
        states.append(snapshot(f"step{step}."))
    return net(x).pow(2).mean(), states


def functions_of(var: torch.Tensor) -> Counter[str]:
    """Count the functions of a graph, found another way: by recursion."""
    seen: set[Any] = set()

    def visit(function: Any) -> None:
        if function is not None and function not in seen:
            seen.add(function)
            for source, _ in function.next_functions:
                visit(source)

    visit(var.grad_fn)
    return Counter(f.name().rpartition("::")[2] for f in seen)


def all_clusters(clusters: tuple[Cluster, ...] | list[Cluster]) -> Iterator[Cluster]:
    for cluster in clusters:
        yield cluster
        yield from all_clusters(cluster.clusters)


def labels(graph: Graph, kind: str) -> list[str]:
    return [node.label for node in graph.nodes if node.kind == kind]


def test_every_function_is_drawn_once_and_every_edge_follows_the_values() -> None:
    a = torch.randn(3, requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    loss = ((a * b).exp() + a).sum()
    graph = make_graph(loss, {"a": a, "b": b})
    drawn = Counter(labels(graph, "function")) + Counter(AccumulateGrad=len(labels(graph, "leaf")))
    assert drawn == functions_of(loss)
    assert sorted(labels(graph, "leaf")) == ["a\n(3)", "b\n(3)"]
    text = {i: node.label for i, node in enumerate(graph.nodes)}
    edges = {(text[e.tail], text[e.head]) for e in graph.edges}
    assert edges == {
        ("a\n(3)", "MulBackward0"),
        ("b\n(3)", "MulBackward0"),
        ("MulBackward0", "ExpBackward0"),
        ("ExpBackward0", "AddBackward0"),
        ("a\n(3)", "AddBackward0"),
        ("AddBackward0", "SumBackward0"),
        ("SumBackward0", "()"),
    }


def test_inner_steps_and_fused_steps_are_clusters() -> None:
    loss, states = unrolled(2)
    graph = make_graph(loss, [*states, {"loss": loss}])
    assert [c.label for c in graph.clusters] == ["inner step 1", "inner step 2"]
    assert [c.clusters[0].label for c in graph.clusters] == ["fused adam step"] * 2
    text = "\n".join(labels(graph, "named"))
    named = re.findall(r"^step.*$", text, re.M)
    assert sorted(named) == ["step1.bias", "step1.weight", "step2.bias", "step2.weight"]
    for number, step in enumerate(graph.clusters, start=1):
        inside = [graph.nodes[i] for i in step.clusters[0].nodes]
        assert [n.kind for n in inside].count("fused") == 1
        weights = "\n".join(n.label for n in inside if n.kind == "named")
        assert weights.count(f"step{number}.") == weights.count("step") == 2
        # the backward pass of the inner loss is part of the step
        assert any(graph.nodes[i].label == "MmBackward0" for i in step.nodes)
    members = Counter(i for c in all_clusters(graph.clusters) for i in c.nodes)
    assert set(members.values()) == {1}
    outside = [n for i, n in enumerate(graph.nodes) if i not in members]
    assert "step0.weight\n(1, 2)" in {n.label for n in outside if n.kind == "leaf"}
    assert labels(graph, "output") == ["loss\n()"]


def test_steps_of_the_functional_interface_can_be_framed() -> None:
    params: Any = {"w": torch.ones(3, requires_grad=True)}
    start = params["w"]
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = torchopt.sgd(lr)
    state = optimizer.init(params)
    steps = {}
    for number in (1, 2, 3):
        loss = (params["w"] ** 2).sum()
        grads = {"w": torch.autograd.grad(loss, params["w"], create_graph=True)[0]}
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        steps[f"step {number}"] = params
    graph = make_graph(params, {"start": start, "lr": lr}, steps=steps)
    assert [c.label for c in graph.clusters] == ["step 1", "step 2", "step 3"]
    assert len({len(c.nodes) for c in graph.clusters[1:]}) == 1
    assert sorted(labels(graph, "leaf")) == ["lr\n()", "start\n(3)"]
    unlabelled = make_graph(params, steps=list(steps.values()))
    assert [c.label for c in unlabelled.clusters] == [f"inner step {i}" for i in (1, 2, 3)]
    assert [c.nodes for c in unlabelled.clusters] == [c.nodes for c in graph.clusters]


def test_attributes_and_saved_tensors_are_shown_when_asked() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y = x.sum(dim=1).exp().sum()
    plain = make_graph(y)
    assert labels(plain, "saved") == []
    shown = make_graph(y, show_attrs=True, show_saved=True)
    sums = [label for label in labels(shown, "function") if label.startswith("SumBackward1")]
    assert "dim: (1,)" in sums[0]
    assert "keepdim: False" in sums[0]
    assert "result\n(2)" in labels(shown, "saved")
    cut = make_graph(y, show_attrs=True, max_attr_chars=5)
    attributes = [a for label in labels(cut, "function") for a in label.split("\n")[1:]]
    assert attributes
    assert max(len(a.partition(": ")[2]) for a in attributes) == 5


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent


def test_functions_written_in_python_always_show_what_they_saved() -> None:
    x = torch.ones(4, requires_grad=True)
    graph = make_graph(Square.apply(x).sum(), {"x": x})
    assert labels(graph, "saved") == ["saved\n(4)"]
    loss, states = unrolled(1)
    assert labels(make_graph(loss, states), "saved") == []  # ours only when asked
    assert len(labels(make_graph(loss, states, show_saved=True), "saved")) > 0


def test_a_view_has_a_dotted_edge_from_its_base() -> None:
    base = torch.randn(4, requires_grad=True) * 2
    view = base[1:3]
    graph = make_graph(view)
    dotted = [e for e in graph.edges if e.style == "dotted"]
    assert [(graph.nodes[e.tail].kind, graph.nodes[e.head].kind) for e in dotted] == [
        ("base", "output")
    ]


def test_a_graph_that_was_freed_or_is_deep_can_be_drawn() -> None:
    x = torch.ones(2, requires_grad=True)
    y = (x * x).sum()
    y.backward()
    freed = make_graph(y, show_saved=True, show_attrs=True)
    assert "MulBackward0\nother: freed\nself: freed" in labels(freed, "function")
    assert labels(freed, "saved") == []
    deep = x
    for _ in range(3000):
        deep = deep + 1
    assert len(make_graph(deep).nodes) == 3002


@pytest.mark.parametrize(
    "make_params",
    [
        lambda net: dict(net.named_parameters()),
        lambda net: net.named_parameters(),
        lambda net: list(net.named_parameters()),
        lambda net: torchopt.extract_state_dict(net, enable_visual=True),
        lambda net: [{"weight": net.weight}, ("bias", net.bias)],
        lambda net: iter([net.named_parameters()]),
    ],
)
def test_names_are_taken_in_every_documented_form(make_params: Any) -> None:
    net = nn.Linear(2, 1)
    graph = make_graph(net(torch.ones(1, 2)).sum(), make_params(net))
    assert sorted(labels(graph, "leaf")) == ["bias\n(1)", "weight\n(1, 2)"]


def test_a_tree_of_outputs_is_drawn_in_one_picture() -> None:
    x = torch.ones(2, requires_grad=True)
    shared = x.exp()
    graph = make_graph({"a": shared.sum(), "b": [shared.prod(), x]}, {"x": x})
    assert labels(graph, "function").count("ExpBackward0") == 1
    assert len(labels(graph, "output")) == 2


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({torch.ones(1): "x"}, TypeError, "swap the two"),
        ({"x": 1.0}, TypeError, "got str and float"),
        (3, TypeError, "got int"),
        ("x", TypeError, "got str"),
    ],
)
def test_bad_names_are_refused(params: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_graph(torch.ones(1, requires_grad=True), params)


def test_a_snapshot_without_names_and_no_tensor_are_refused() -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="enable_visual=True"):
        make_graph(net.weight, torchopt.extract_state_dict(net))
    with pytest.raises(TypeError, match="expected a tensor or a tree of tensors"):
        make_graph([])
    with pytest.raises(TypeError, match="step 'one'"):
        make_graph(net.weight, steps={"one": 3})


def test_dot_text_is_read_by_graphviz() -> None:
    dot = shutil.which("dot")
    if dot is None:
        pytest.skip("the program dot is not installed")
    loss, states = unrolled(2)
    source = make_graph(loss, [*states, {'a "quoted"\\name': states[0].params[0]["bias"]}]).to_dot()
    svg = subprocess.run([dot, "-Tsvg"], input=source, capture_output=True, text=True, check=True)
    assert svg.stdout.count('class="cluster"') == 4
    assert "a &quot;quoted&quot;\\name" in svg.stdout
    assert svg.stderr == ""


def test_mermaid_text_names_every_node_edge_and_cluster() -> None:
    loss, states = unrolled(2)
    graph = make_graph(loss, states)
    text = graph.to_mermaid()
    assert text.startswith("flowchart TD\n")
    assert len(re.findall(r"^  n\d+[\[(]", text, re.M)) == len(graph.nodes)
    assert len(re.findall(r"^  n\d+ (?:-->|---|-\.->) n\d+$", text, re.M)) == len(graph.edges)
    assert text.count("subgraph") == sum(1 for _ in all_clusters(graph.clusters)) == 4
    assert len(re.findall(r"^ +end$", text, re.M)) == 4
    awkward = make_graph(torch.ones(1, requires_grad=True), {"": torch.ones(1)}).to_mermaid()
    assert '"(1)"' in awkward


def test_make_dot_is_a_digraph_with_the_same_statements() -> None:
    graphviz = pytest.importorskip("graphviz")
    loss, states = unrolled(1)
    dot = make_dot(loss, states)
    assert isinstance(dot, graphviz.Digraph)
    for statement in make_graph(loss, states).to_dot().splitlines()[3:-1]:
        assert statement in dot.source
    assert make_dot(loss, states, True, True, 20).source.count("orange") > 0


def test_resize_grows_with_the_picture() -> None:
    pytest.importorskip("graphviz")
    x = torch.ones(1, requires_grad=True)
    dot = make_dot(x * 2)
    resize_graph(dot)
    assert dot.graph_attr["size"] == "12.0,12.0"
    resize_graph(dot, size_per_element=10.0, min_size=1.0)
    expected = 10.0 * len(dot.body)
    assert dot.graph_attr["size"] == f"{expected},{expected}"


def test_without_graphviz_make_dot_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(ImportError, match=r"pip install graphviz.*to_mermaid"):
        make_dot(x)
    assert make_graph(x).to_dot().startswith("digraph {")
