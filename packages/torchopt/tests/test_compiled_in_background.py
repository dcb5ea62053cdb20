# SPDX-License-Identifier: Apache-2.0
"""C++ code is compiled in threads, with the results, errors and memory layouts of a plain call."""

from __future__ import annotations

import contextvars
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import torchopt
from torchopt.errors import CompilerError
from torchopt.torch_internals import compiled_graph
from torchopt.torch_internals.background import Job, code_in_threads


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_job_runs_in_a_thread_with_the_context_of_who_starts_it() -> None:
    word = contextvars.ContextVar("word", default="none")
    word.set("given")
    job = Job(lambda: (word.get(), threading.get_ident()))
    word.set("later")
    found, thread = job.result()
    assert found == "given"
    assert thread != threading.get_ident()
    assert job.result() == (found, thread)


def test_a_job_that_failed_is_repeated_by_who_needs_it() -> None:
    calls: list[int] = []

    def fails_twice() -> int:
        calls.append(threading.get_ident())
        if len(calls) < 3:
            raise OSError(f"call {len(calls)}")
        return 7

    job = Job(fails_twice)
    with pytest.raises(OSError, match="call 2"):
        job.result()
    assert job.result() == job.result() == 7
    assert calls[0] != calls[1] == calls[2] == threading.get_ident()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_repeats_a_job_that_runs() -> None:
    begun, ends = threading.Event(), threading.Event()
    parent = os.getpid()

    def work() -> int:
        if os.getpid() == parent:
            begun.set()
            ends.wait()
        return os.getpid()

    job = Job(work)
    begun.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if job.result() == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0
    ends.set()
    assert job.result() == parent


def test_only_graphs_of_the_thread_are_compiled_in_threads() -> None:
    from torch._inductor.codecache import CppWrapperCodeCache

    before = CppWrapperCodeCache.load_pybinding
    with code_in_threads() as jobs, ThreadPoolExecutor(1) as others:
        elsewhere = others.submit(CppWrapperCodeCache.load_pybinding)
        with pytest.raises(TypeError, match="argtypes"):  # at once, without a job
            elsewhere.result()
    assert jobs == []
    assert CppWrapperCodeCache.load_pybinding == before


def shapes(found: list[Tensor]) -> list[Any]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in found]


@pytest.mark.slow
def test_the_form_of_results_is_known_before_a_graph_runs() -> None:
    def several(x: Tensor, y: Tensor, image: Tensor, weight: Tensor) -> list[Tensor]:
        z = x @ y
        images = torch.conv2d(image, weight).relu()
        spread = x.sum(0).expand(4, 5)
        found = [z, z.mT.exp(), x, y.mT, z[1:, ::2], x.argmax(1), z > 0, spread, images, x.sum()]
        return [*found, images.transpose(1, 2) + 1, torch.cat([z.mT, z.mT]), z.to(torch.float32)]

    given = [random(4, 5), random(5, 6), random(2, 3, 6, 6), random(4, 3, 3, 3)]
    made = compiled_graph(make_fx(several)(*given), given)
    assert made.results is not None
    expected = shapes(made.results)
    found = list(made.function([*given]))
    assert shapes(found) == expected
    torch.testing.assert_close(found, several(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_a_compiler_that_fails_is_reported_by_each_call(tmp_path: Path) -> None:
    import torch._inductor.config as config

    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *.cpp*) exit 1;; *) exec g++ "$@";; esac\n')
    compiler.chmod(0o755)
    x = random(3).requires_grad_()
    settings = {"cpp.cxx": (str(compiler),), "cpp_cache_precompile_headers": False}
    with config.patch(settings):
        fast = torchopt.second_order.compile(lambda x: (x**7).sum() * 1.75)
        for _ in range(2):
            with pytest.raises(CompilerError, match=r"compile: expected a C\+\+ .*fails.*trace"):
                fast(x)
