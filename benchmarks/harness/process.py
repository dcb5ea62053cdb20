# SPDX-License-Identifier: Apache-2.0
"""The parent's side of a rival's process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from typing import IO, Any

from benchmarks.harness.rival import ROOT, Place, Report, Rival, RivalError, prepare

# Keep freed memory instead of returning it to the system; otherwise page faults would dominate the
# times of large results. All rivals get the same setting.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

# One thread each: nothing here is parallel, and idle pools disturb the other rivals.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class CaseError(Exception):
    """A rival could not do a case. `kind` is "unsupported", "error" or "crashed"."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class RivalProcess:
    """A rival's process; started on entry, and again after a crash."""

    def __init__(self, rival: Rival, place: Place, suite: str, environment: dict[str, str]) -> None:
        self.rival = rival
        self._place = place
        self._suite = suite
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None

    @classmethod
    def start(
        cls,
        rival: Rival,
        suite: str,
        *,
        environment: dict[str, str] | None = None,
        report: Report | None = None,
    ) -> RivalProcess:
        """Install a rival if needed and return its process, ready for requests.

        Raises:
            RivalError: it cannot be installed or imported; the text gives the reason.
        """
        variables = KEEP_MEMORY if environment is None else environment
        process = cls(rival, prepare(rival, report), suite, variables)
        try:
            process.description = process.ask("describe", timeout=300)
        except CaseError as error:
            process.stop()
            raise RivalError(str(error)) from error
        process._check_origin()
        return process

    description: dict[str, Any]

    def _check_origin(self) -> None:
        """Make sure that an isolated rival was not imported from somewhere else."""
        if not self._place.isolated:
            return
        origin = str(self.description["file"])
        if not any(origin.startswith(str(path) + os.sep) for path in self._place.paths):
            self.stop()
            raise RivalError(
                f"expected {self.rival.label} from {self._place.paths[0]}, but it was imported "
                f"from {origin}"
            )

    def _command(self) -> list[str]:
        flags = ["-s", *(["-S"] if self._place.isolated else [])]
        return [
            *(self._place.python, *flags, "-m"),
            *("benchmarks.harness.worker", self._suite, self.rival.module),
        ]

    def _launch(self) -> subprocess.Popen[str]:
        variables = {
            key: value for key, value in os.environ.items() if not key.startswith("PYTHON")
        }
        variables.update(ONE_THREAD)
        variables.update(self._environment)
        variables["PYTHONHASHSEED"] = "0"
        variables["PYTHONPATH"] = os.pathsep.join([*map(str, self._place.paths), str(ROOT)])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop()
        return subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=variables,
        )

    def ask(self, action: str, *, timeout: float = 600.0, **request: Any) -> dict[str, Any]:
        """Send one request and return the reply.

        Raises:
            CaseError: the rival does not support it, failed, crashed or took too long.
        """
        if self._process is None:
            self._process = self._launch()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": action, **request}) + "\n")
            process.stdin.flush()
            line = self._read_line(process.stdout, timeout)
        except BrokenPipeError:
            line = ""
        if not line:
            raise CaseError("crashed", self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if not reply.pop("ok"):
            raise CaseError(reply["kind"], reply["reason"])
        return reply

    def _read_line(self, stream: IO[str], timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while True:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if ready:
                return stream.readline()
            self.stop()
            raise CaseError("error", f"no answer within {timeout:.0f} s")

    def _last_words(self) -> str:
        """Return how the process ended, from its status and standard error."""
        process, errors = self._process, self._errors
        assert process is not None
        assert errors is not None
        status = process.wait(timeout=30)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        self.stop()
        return f"the process ended with status {status}" + (f": {lines[-1]}" if lines else "")

    def stop(self) -> None:
        """End the process; the next request starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None
