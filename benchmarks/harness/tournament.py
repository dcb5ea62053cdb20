# SPDX-License-Identifier: Apache-2.0
"""Let rivals take turns at the same cases, so that noise of the machine affects all alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.machine import load
from benchmarks.harness.process import CaseError, RivalProcess
from benchmarks.harness.rival import Report, Rival, RivalError

Cell = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: number of turns of every rival at every case.
        seconds: time of one turn; a turn has at least one sample.
        sample_seconds: length of one sample of a statement that may be repeated.
        slow_seconds: a case ends early for a rival whose turns took longer than this in total.
    """

    rounds: int = 7
    seconds: float = 0.03
    sample_seconds: float = 0.003
    slow_seconds: float = 1.5


class Tournament:
    """The processes of the rivals that can take part, and the reasons of those that cannot."""

    def __init__(
        self,
        rivals: Sequence[Rival],
        suite: str,
        *,
        environment: dict[str, str] | None = None,
        report: Report | None = None,
    ) -> None:
        self.processes: list[RivalProcess] = []
        self.rivals: dict[str, dict[str, Any]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        for rival in rivals:
            entry: dict[str, Any] = {"label": rival.label}
            try:
                process = RivalProcess.start(rival, suite, environment=environment, report=report)
            except RivalError as error:
                entry.update(available=False, reason=str(error))
                if report is not None:
                    report(f"{rival.label} is not available: {error}")
            else:
                entry.update(available=True, **process.description)
                self.processes.append(process)
            self.rivals[rival.name] = entry

    def __enter__(self) -> Tournament:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stop()

    def play(
        self,
        case: dict[str, Any],
        effort: Effort,
        *,
        collect: Iterable[bool] = (False,),
        reference: str | None = None,
    ) -> list[Cell]:
        """Check one case on every rival, time it in turns, and return a cell per rival.

        Args:
            case: the argument of the suite's `prepare`.
            effort: how long to measure.
            collect: measure with the garbage collector off, on, or both.
            reference: the rival whose digest the others must have, if the suite returns digests;
                rivals with another digest are reported and not timed.
        """
        cells: list[Cell] = []
        self._facts.clear()
        ready = self._prepare(case, reference, cells)
        for on in collect:
            cells += self._measure(case, effort, on, ready)
        for process in ready:
            process.ask("drop")
        return cells

    def ask(self, rival: str, function: str, case: dict[str, Any]) -> Cell:
        """Return a cell with the result of a function of the suite in a rival's process."""
        process = next(p for p in self.processes if p.rival.name == rival)
        try:
            answer = process.ask("call", name=function, case=case, timeout=1200)
        except CaseError as error:
            return _failure(case, rival, error.kind, str(error))
        return {**case, "rival": rival, "gc": False, "status": "ok", **answer}

    def _prepare(
        self, case: dict[str, Any], reference: str | None, cells: list[Cell]
    ) -> list[RivalProcess]:
        digests: dict[str, str] = {}
        ready: list[RivalProcess] = []
        for process in self.processes:
            name = process.rival.name
            try:
                answer = process.ask("prepare", case=case)
            except CaseError as error:
                cells.append(_failure(case, name, error.kind, str(error)))
                continue
            self._facts[name] = answer["facts"]
            if answer["digest"] is not None:
                digests[name] = answer["digest"]
            ready.append(process)
        expected = digests.get(reference or "")
        if expected is None:
            return ready
        wrong = {name for name, digest in digests.items() if digest != expected}
        for name in sorted(wrong):
            reason = f"the answer differs from that of {reference}"
            cells.append(_failure(case, name, "different", reason))
        return [process for process in ready if process.rival.name not in wrong]

    def _measure(
        self, case: dict[str, Any], effort: Effort, collect: bool, ready: list[RivalProcess]
    ) -> list[Cell]:
        turns: dict[str, list[dict[str, Any]]] = {process.rival.name: [] for process in ready}
        failed: dict[str, CaseError] = {}
        for _ in range(effort.rounds):
            for process in ready:
                name = process.rival.name
                slow = sum(turn["min"] * turn["timings"] for turn in turns[name])
                if name in failed or (slow > effort.slow_seconds and len(turns[name]) >= 2):
                    continue
                try:
                    turn = process.ask(
                        "measure",
                        seconds=effort.seconds,
                        sample_seconds=effort.sample_seconds,
                        collect=collect,
                    )
                except CaseError as error:
                    failed[name] = error
                else:
                    turns[name].append(turn)
        return [
            _failure(case, name, failed[name].kind, str(failed[name]))
            if name in failed
            else measured(case, name, collect, turns[name], self._facts[name])
            for name in turns
        ]


def measured(
    case: dict[str, Any],
    rival: str,
    collect: bool,
    turns: list[dict[str, Any]],
    facts: dict[str, Any],
) -> Cell:
    """Return the cell of a case from the turns of a rival."""
    return {
        **case,
        "rival": rival,
        "gc": collect,
        "status": "ok",
        **facts,
        "load": load(),
        "min": min(turn["min"] for turn in turns),
        "median": statistics.median(turn["median"] for turn in turns),
        "minima": [turn["min"] for turn in turns],
        "timings": sum(turn["timings"] for turn in turns),
    }


def _failure(case: dict[str, Any], rival: str, kind: str, reason: str) -> Cell:
    return {**case, "rival": rival, "gc": False, "status": kind, "reason": reason}
