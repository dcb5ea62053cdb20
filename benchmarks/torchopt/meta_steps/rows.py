# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: names, sizes and NumPy arrays, which both sides can read."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.machine import load

ROWS = {
    "maml sgd": {"kind": "maml", "optimizer": "sgd", "lr": 0.1, "steps": 5},
    "maml adam": {"kind": "maml", "optimizer": "adam", "lr": 0.01, "steps": 5},
    "one task, 10": {"kind": "task", "optimizer": "adam", "lr": 0.01, "steps": 10},
    "one task, 50": {"kind": "task", "optimizer": "adam", "lr": 0.01, "steps": 50},
    "one task, 500": {"kind": "task", "optimizer": "adam", "lr": 0.001, "steps": 500},
    "maml-rl": {"kind": "rl", "optimizer": "sgd", "lr": 1.0, "steps": 3},
    "learned loss": {"kind": "learned", "optimizer": "sgd", "lr": 0.1, "steps": 10, "unroll": 5},
    "conv4": {"kind": "conv", "optimizer": "sgd", "lr": 0.1, "steps": 5},
    "transformer": {"kind": "transformer", "optimizer": "adam", "lr": 0.001, "steps": 4},
}
# With a small eps the second derivative of Adam's step is the rounding of gradients near zero.
OPTIONS: dict[str, dict[str, float]] = {"sgd": {}, "adam": {"eps": 1e-3}}
HEADS, MOVES = 4, 10


def _layers(rng: Any, *sizes: int) -> dict[str, Any]:
    out = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        out[f"w{i}"] = rng.randn(a, b) / a**0.5
        out[f"b{i}"] = np.zeros(b)
    return out


def numbers(kind: str) -> dict[str, Any]:
    """Return the initial parameters and the data of a kind of row."""
    rng = np.random.RandomState(0)
    if kind == "maml":
        found = {
            "params": _layers(rng, 64, 64, 64, 10),
            "inner": [rng.randn(16, 25, 64), rng.randint(0, 10, (16, 25))],
            "outer": [rng.randn(16, 50, 64), rng.randint(0, 10, (16, 50))],
        }
    elif kind == "conv":
        params = {f"k{i}": rng.randn(16, 16 if i else 1, 3, 3) / (9 * 16) ** 0.5 for i in range(4)}
        found = {
            "params": {**params, "w0": rng.randn(16, 5) / 4, "b0": np.zeros(5)},
            "inner": [rng.randn(8, 10, 1, 28, 28), rng.randint(0, 5, (8, 10))],
            "outer": [rng.randn(8, 10, 1, 28, 28), rng.randint(0, 5, (8, 10))],
        }
    elif kind == "task":
        x, y = rng.randn(2, 32, 32), rng.randint(0, 10, (2, 32))
        found = {
            "params": _layers(rng, 32, 64, 64, 10),
            "inner": [x[0], y[0]],
            "outer": [x[1], y[1]],
        }
    elif kind == "rl":
        weights = -np.log(rng.rand(40, 10, 5, 10).clip(1e-9))
        found = {
            "params": {"logits": np.zeros((10, 5))},
            "inner": [weights / weights.sum(-1, keepdims=True), 1 + rng.randn(40, 10, 5)],
        }
        found["outer"] = found["inner"]
    elif kind == "learned":
        x = rng.randn(2, 64, 8)
        found = {
            "params": _layers(rng, 8, 32, 1),
            "meta": _layers(rng, 2, 32, 1),
            "inner": [x[0], np.sin(x[0].sum(-1))],
            "outer": [x[1], np.sin(x[1].sum(-1))],
        }
    else:
        d = 64
        params = {"embed": rng.randn(32, d) / d**0.5, "out": rng.randn(d, 32) / d**0.5}
        for i in range(6):
            params |= {
                f"qkv{i}": rng.randn(d, 3 * d) / d**0.5,
                f"proj{i}": rng.randn(d, d) / d**0.5,
                f"up{i}": rng.randn(d, 4 * d) / d**0.5,
                f"down{i}": rng.randn(4 * d, d) / (4 * d) ** 0.5,
            }
        tokens = rng.randint(0, 32, (2, 4, 33))
        found = {
            "params": params,
            "inner": [tokens[0, :, :-1], tokens[0, :, 1:]],
            "outer": [tokens[1, :, :-1], tokens[1, :, 1:]],
        }
    return found


def in_single(values: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a dict or list of arrays as tensors in single precision; integers stay integers."""
    if isinstance(values, dict):
        return {k: in_single(v, convert) for k, v in values.items()}
    if isinstance(values, list):
        return [in_single(v, convert) for v in values]
    return convert(values.astype("float32") if values.dtype.kind == "f" else values)


def measure(step: Callable[[], Any], seconds: float, least: int = 3) -> dict[str, Any]:
    """Return the time of the first call, and the shortest and the median of the others, in ms."""
    started = time.perf_counter()
    answer = step()
    first = time.perf_counter() - started
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < 200):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    found = {"answer": answer, "first_s": first}
    if times:
        times.sort()
        found |= {"min_ms": 1e3 * times[0], "median_ms": 1e3 * times[len(times) // 2]}
    return found


def serve(make: Callable[[dict[str, Any], str], Callable[[], Any]]) -> None:
    """Measure the rows of the command line, write gradients to a folder, and print JSON lines.

    The command line is a folder, the seconds for each time (0 for first calls alone), the most
    seconds for a row, the ways of execution with commas between, and the rows.

    Args:
        make: Maps a row and a way of execution to a function that returns the meta-gradient, a
            list of arrays.
    """
    folder, seconds, most, ways, *names = sys.argv[1:]
    signal.signal(signal.SIGALRM, _late)
    for name in names:
        for way in ways.split(","):
            line: dict[str, Any] = {"row": name, "way": way}
            least = 0 if float(seconds) == 0 else 1 if way == "eager" else 3
            signal.alarm(int(most))
            try:
                found = measure(make(ROWS[name], way), float(seconds), least)
                answer = found.pop("answer")
                np.savez(Path(folder) / f"{name}-{way}.npz", *map(np.asarray, answer))
                line |= found
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            signal.alarm(0)
            line["load"] = load()
            print(json.dumps(line), flush=True)


def _late(signal: int, frame: Any) -> None:
    raise TimeoutError("not done in the time for a row")
