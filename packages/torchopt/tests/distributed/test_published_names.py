# SPDX-License-Identifier: Apache-2.0
"""Names, signatures and single-process behaviour are those of torchopt 0.7."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import torchopt
import torchopt.distributed as todist
from torchopt.diff.zero_order import Rademacher, ZeroOrder

ON_FUNCTION = "(partitioner=None, reducer=None, timeout=-1.0)"
ON_CALL = "(func, *, args=None, kwargs=None, partitioner=None, reducer=None, timeout=-1.0)"
SIGNATURES = {
    "TensorDimensionPartitioner": "(dim, *, exclusive=False, keepdim=False, workers=None)",
    "api.parallelize_sync": ON_FUNCTION,
    "autograd.backward": "(autograd_ctx_id, tensors, retain_graph=False, inputs=None)",
    "autograd.context": "()",
    "autograd.grad": ("(autograd_ctx_id, outputs, inputs, retain_graph=False, allow_unused=False)"),
    "autograd.is_available": "()",
    "barrier": "(worker_names=None)",
    "dim_partitioner": "(dim=0, *, exclusive=False, keepdim=True, workers=None)",
    "get_local_rank": "()",
    "get_local_world_size": "()",
    "get_rank": "()",
    "get_worker_id": "(id=None)",
    "get_world_info": "()",
    "get_world_rank": "()",
    "get_world_size": "()",
    "is_available": "()",
    "mean_reducer": "(results)",
    "not_on_rank": "(*ranks)",
    "on_rank": "(*ranks)",
    "parallelize": ON_FUNCTION,
    "parallelize_async": ON_FUNCTION,
    "parallelize_sync": ON_FUNCTION,
    "rank_non_zero_only": "(func)",
    "rank_zero_only": "(func)",
    "remote_async_call": ON_CALL,
    "remote_sync_call": ON_CALL,
    "sum_reducer": "(results)",
    "world.rank_all": "(func)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    value = todist
    for part in name.split("."):
        value = getattr(value, part)
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_auto_init_rpc_begins_with_the_published_parameters():
    parameters = list(inspect.signature(todist.auto_init_rpc).parameters.values())
    published = ["worker_init_fn", "worker_name_format", "backend", "rpc_backend_options"]
    assert [p.name for p in parameters[:4]] == published
    assert [p.kind.name for p in parameters[1:4]] == [
        "POSITIONAL_OR_KEYWORD",
        "KEYWORD_ONLY",
        "KEYWORD_ONLY",
    ]


def test_modules_have_their_published_names():
    assert todist.rpc is torch.distributed.rpc
    assert todist.dist is torch.distributed
    assert todist.api.batch_partitioner is todist.batch_partitioner
    assert todist.world.get_world_info is todist.get_world_info
    assert todist.autograd.get_gradients is not None
    assert callable(todist.api.exclusive_batch_partitioner)
    assert todist.is_available()
    assert torchopt.distributed is todist


def four_local_of_twelve(monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
    }.items():
        monkeypatch.setenv(name, value)


def test_world_information_follows_the_environment(monkeypatch):
    assert tuple(todist.get_world_info()) == (0, 1, 0, 1)
    four_local_of_twelve(monkeypatch)
    info = todist.get_world_info()
    assert info == todist.WorldInfo(1, 12, 1, 4)
    assert (info.rank, info.worker_name) == (1, "worker01")
    assert (todist.get_rank(), todist.get_world_rank()) == (1, 1)
    assert (todist.get_local_rank(), todist.get_local_world_size()) == (1, 4)
    assert todist.get_worker_id(3) == 3
    assert todist.on_rank(1, 2)(abs)(-5) == 5
    assert todist.on_rank(0)(abs)(-5) is None
    assert todist.not_on_rank(1)(abs)(-5) is None
    assert todist.not_on_rank()(abs)(-5) == 5
    assert todist.rank_zero_only(abs)(-5) is None
    assert todist.rank_non_zero_only(abs)(-5) == 5


def test_a_function_of_the_driver_runs_on_rank_0(monkeypatch):
    assert todist.get_backend() is None
    drive = todist.driver(lambda x, y=0: x + y)
    assert drive(2, y=3) == 5
    four_local_of_twelve(monkeypatch)
    assert drive(2, y=3) is None


def test_an_estimate_in_one_process_is_that_of_its_engine():
    """For a quadratic of one number, both differences of signs are exact."""
    x = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    engine = ZeroOrder(Rademacher(), "antithetic", num_samples=3, sigma=0.25)
    square = todist.zero_order(engine)(lambda x: (x**2).sum())
    value = square(x)
    (2 * value).backward()
    assert value.item() == 2.25
    torch.testing.assert_close(x.grad, torch.full_like(x, 6.0), rtol=1e-14, atol=0)


def test_names_are_formatted_by_keyword():
    todist.auto_init_rpc(worker_name_format=lambda **facts: f"w{facts['world_rank']}")
    assert todist.get_world_info().worker_name == "w0"
    todist.auto_init_rpc()
    assert todist.get_world_info().worker_name == "worker0"


def shapes(calls):
    """Return rank, and the tensors in the arguments as nested lists, of each call."""
    listed = []
    for rank, args, kwargs in calls:
        plain = torchopt.tree.tree_map(
            lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, (args, kwargs)
        )
        listed.append((rank, *plain))
    return listed


def test_partitioners_make_the_published_calls(monkeypatch):
    four_local_of_twelve(monkeypatch)
    batch = todist.batch_partitioner
    assert shapes(batch(torch.arange(3), k=1)) == [(i, ([i],), {"k": 1}) for i in range(3)]
    fourteen = shapes(batch(torch.arange(14)))
    assert [call[0] for call in fourteen] == list(range(12))
    assert fourteen[-1] == (11, ([11, 12, 13],), {})  # the remainder goes to the last
    assert shapes(batch(1, a="x")) == [(1, (1,), {"a": "x"})]  # without tensors, the call runs here
    assert batch(torch.ones(0)) == []
    one_each = todist.dim_partitioner(0, exclusive=True, keepdim=False)
    assert shapes(one_each(torch.arange(2), k=torch.ones(2, 1))) == [
        (0, (0,), {"k": [1.0]}),
        (1, (1,), {"k": [1.0]}),
    ]
    taking_turns = todist.dim_partitioner(1, exclusive=True, workers=[3, 5])
    assert shapes(taking_turns(torch.arange(3).view(1, 3))) == [
        (3, ([[0]],), {}),
        (5, ([[1]],), {}),
        (3, ([[2]],), {}),
    ]
    halves = todist.dim_partitioner(-1, workers=[3, 5])
    assert shapes(halves(torch.arange(6).view(2, 3))) == [
        (3, ([[0], [3]],), {}),
        (5, ([[1, 2], [4, 5]],), {}),
    ]
    with pytest.raises(
        ValueError, match=r"Batch size mismatch on dim=0. Expected 5, got 4 \(shape"
    ):
        batch(torch.arange(5), {"a": torch.ones(4)})
    with pytest.raises(ValueError, match="keepdim=False should be used with exclusive=True."):
        todist.dim_partitioner(keepdim=False)
    with pytest.raises(ValueError, match="keepdim=False should be used with exclusive=True."):
        todist.TensorDimensionPartitioner(0)
    with pytest.raises(IndexError, match="dimension 0 to split, got one of shape"):
        batch(torch.ones(()))
    with pytest.raises(ValueError, match="at least one worker"):
        todist.dim_partitioner(workers=[])


def test_partitioners_are_pickled():
    for partitioner in (
        todist.batch_partitioner,
        todist.dim_partitioner(1, exclusive=True, keepdim=False, workers=[0, "worker1"]),
    ):
        again = pickle.loads(pickle.dumps(partitioner))
        assert again == partitioner
        assert hash(again) == hash(partitioner)
        assert repr(again) == repr(partitioner)
    assert todist.batch_partitioner != todist.dim_partitioner(1)


def test_reducers():
    results = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 8.0])]
    assert torch.equal(todist.mean_reducer(iter(results)), torch.tensor([2.0, 5.0]))
    assert torch.equal(todist.sum_reducer(iter(results)), torch.tensor([4.0, 10.0]))
    weighted = todist.weighted_mean_reducer(results, [3.0, 1.0])
    assert torch.equal(weighted, torch.tensor([1.5, 3.5]))
    calls = [(0, (torch.ones(2),), {}), (0, (), {"x": torch.ones(6)})]
    trees = [{"a": results[0]}, {"a": results[1]}]
    bound = todist.weighted_mean_reducer.bind(calls)(trees)
    assert torch.equal(bound["a"], torch.tensor([2.5, 6.5]))
    by_name = todist.WeightedReducer(lambda call: call[1][0]).bind([(0, (1,), {}), (0, (3,), {})])
    assert by_name([torch.tensor(0.0), torch.tensor(4.0)]) == 3.0
    columns = [(0, (torch.ones(2, 1),), {}), (0, (torch.ones(2, 3),), {})]
    for dim in (-1, 1):
        by_column = todist.WeightedReducer(dim=dim).bind(columns)
        assert torch.equal(by_column(results), torch.tensor([2.5, 6.5]))
    # A scalar has no dimension that could give a weight, but the next argument has one.
    behind = [(0, (torch.tensor(7.0), torch.ones(2, n)), {}) for n in (1, 3)]
    assert torch.equal(
        todist.WeightedReducer(dim=-2).bind(behind)(results), torch.tensor([2.0, 5.0])
    )
    assert torch.equal(
        todist.WeightedReducer(dim=-1).bind(behind)(results), torch.tensor([2.5, 6.5])
    )
    with pytest.raises(ValueError, match="0 results and 0 weights"):
        todist.weighted_mean_reducer([])


# --- one process ----------------------------------------------------------------------------------


def test_parallelized_functions_are_plain_calls_in_one_process():
    seen = []

    @todist.parallelize()
    def mean(x, label=""):
        seen.append((len(x), label))
        return x.mean(dim=0)

    x = torch.arange(8.0, requires_grad=True)
    value = mean(x, label="a")
    assert (value.item(), seen) == (3.5, [(8, "a")])
    value.backward()
    assert torch.equal(x.grad, torch.full((8,), 1 / 8))
    assert mean.__name__ == "mean"

    @todist.parallelize_async(todist.dim_partitioner(0, exclusive=True), None)
    def double(x):
        return 2 * x

    assert [y.item() for y in double(torch.arange(3)).wait()] == [0, 2, 4]
    with pytest.raises(ZeroDivisionError):
        todist.remote_sync_call(lambda: 1 // 0, partitioner=0)
    failed = todist.remote_async_call(lambda: 1 // 0, partitioner=0)
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    assert todist.remote_sync_call(max, args=(1, 2), partitioner=0) == [2]
    with pytest.raises(ValueError, match="Invalid partitioner: 3.5"):
        todist.remote_sync_call(max, partitioner=3.5)


def test_functions_cannot_change_the_caller_s_module():
    @todist.parallelize(todist.batch_partitioner, todist.sum_reducer)
    def adapted(net, x):
        inner = torchopt.MetaSGD(net, lr=0.5)
        inner.step((net(x) ** 2).mean())
        return (net(x) ** 2).mean()

    net = torch.nn.Linear(2, 1)
    start = list(net.parameters())
    adapted(todist.share(net), torch.ones(3, 2)).backward()
    assert all(p is q for p, q in zip(net.parameters(), start))
    assert all(p.grad.abs().sum() > 0 for p in start)
    net.zero_grad()
    # A module that is not shared arrives detached from the caller's, as with real remote calls.
    adapted(net, torch.ones(3, 2)).backward()
    assert all(p.grad is None for p in start)


def test_contexts_without_remote_calls():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = torch.tensor(3.0, requires_grad=True)
    with todist.autograd.context() as context_id:
        todist.autograd.backward(context_id, [(x**2).sum(), y * 2], inputs=[x])
        assert torch.equal(x.grad, torch.tensor([2.0, 4.0]))
        assert y.grad is None
        (gx,) = todist.autograd.grad(context_id, (x**3).sum(), x)
        assert torch.equal(gx, torch.tensor([3.0, 12.0]))
        assert todist.autograd.grad(context_id, x.sum(), [x, y], allow_unused=True)[1] is None
        with pytest.raises(RuntimeError, match="allow_unused=True"):
            todist.autograd.grad(context_id, x.sum(), [y])
        with pytest.raises(
            RuntimeError, match="'inputs' argument to backward\\(\\) cannot be empty"
        ):
            todist.autograd.backward(context_id, x.sum(), inputs=[])
        with pytest.raises(RuntimeError, match="without RPC"):
            todist.autograd.get_gradients(context_id)


def test_several_processes_need_an_open_world(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="auto_init_rpc"):
        todist.remote_sync_call(max, args=(1, 2))
    main = todist.auto_init_rpc(backend="gloo")(lambda: None)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RuntimeError, match="expected MASTER_ADDR in the environment"):
        main()
