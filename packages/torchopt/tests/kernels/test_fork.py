# SPDX-License-Identifier: Apache-2.0
"""A forked child can step, despite locks of other threads and lost thread teams."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")

START = """
import os, signal, sys, threading, time
import torch, torchopt

def outcome(child):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "done" if status == 0 else "failed"
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"

"""

SHARED_BUFFERS = """
torch.set_num_threads(1)
n = 1 << 18
stepper = torchopt.sgd(0.1, momentum=0.9)
params, grads, x = (torch.zeros(n),), (torch.ones(n),), torch.ones(n, requires_grad=True)
stop = False

def work():  # frees results of native updates in backward passes, without the interpreter
    state = stepper.init(params)
    while not stop:
        updates, state = stepper.update(grads, state, inplace=False)
        loss = (updates[0] * x).sum()
        del updates
        torch.autograd.grad(loss, x)

worker = threading.Thread(target=work)
worker.start()
small, ones = (torch.zeros(3),), (torch.ones(3),)
fresh = stepper.init(small)
for _ in range(150):
    found = outcome(lambda: stepper.update(ones, fresh, inplace=False))
    if found != "done":
        break
stop = True
worker.join()
print(found)
"""

TEAM_OF_THREADS = """
torch.set_num_threads(2)
n = 400_000
stepper = torchopt.adam(0.1)
params, grads = (torch.zeros(n),), (torch.ones(n),)
state = stepper.init(params)
stepper.update(grads, state, inplace=False)
print(outcome(lambda: stepper.update(grads, state, inplace=False)))
"""

STEP_OF_ANOTHER_THREAD = """
torch.set_num_threads(1)
params = [torch.zeros(1_000_000, requires_grad=True)]
params[0].grad = torch.ones(1_000_000)
optimizer = torchopt.Adam(params, lr=0.1)
optimizer.step()
stop = False

def work():
    while not stop:
        optimizer.step()

def child():
    optimizer.step()
    optimizer.state_dict()

worker = threading.Thread(target=work)
worker.start()
for _ in range(20):
    found = outcome(child)
    if found != "done":
        break
stop = True
worker.join()
print(found)
"""


@pytest.mark.parametrize(
    "program",
    [SHARED_BUFFERS, TEAM_OF_THREADS, STEP_OF_ANOTHER_THREAD],
    ids=["shared buffers", "team of threads", "step of another thread"],
)
def test_a_child_steps(program: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(START + program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stdout.strip() == "done", ran.stderr[-2000:]
