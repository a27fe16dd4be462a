"""The other end of ``_e2e_worker``: a process that answers line by line, and why it does not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "adallm.bench._e2e_worker")
LIMIT_S = 1500  # for one answer; a start that compiles everything takes some minutes
_END_S = 60  # to end by itself
_TAIL = 30  # lines of the log that are shown of a failure
# What vLLM's front end says of an engine that died, whose reason is further up.
_SECOND_HAND = ("EngineCore", "Engine core", "EngineDead", "WorkerProc")


class WorkerError(RuntimeError):
    """The worker, or what it runs, has failed."""


class Process:
    """A worker.

    Args:
        environment: of the process.
        log: where its standard error goes.
    """

    def __init__(self, environment: Mapping[str, str], log: Path, command: Sequence[str] = COMMAND) -> None:
        self._log = log
        with log.open("w") as stderr:
            # A session of its own: its end is the end of vLLM's processes too, and they hold the GPU's memory.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(environment),
                text=True,
                start_new_session=True,
            )

    def ask(self, request: Mapping[str, Any], *, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Its answer.

        Raises:
            WorkerError: it has ended, does not answer, or answers with an error.
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        end = time.monotonic() + limit_s
        # Not by the end of the file: a process of vLLM that outlives the worker keeps the pipe open.
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            if self._process.poll() is not None:
                raise WorkerError(self._reason(f"the process ended with {self._process.returncode}"))
            if time.monotonic() > end:
                raise WorkerError(f"no answer in {limit_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._reason(f"the process ended with {self._process.wait()}"))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(self._reason(answer["error"]))
        return answer

    def _reason(self, said: str) -> str:
        return reason(said, self._log.read_text(errors="replace"))

    def tail(self) -> str:
        """The end of the log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_TAIL:])

    def close(self) -> None:
        """End it, and whatever it has started."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


def reason(said: str, log: str) -> str:
    """One line: what was said, or, of an engine in another process, the last error that its log has."""
    first = said.strip().partition("\n")[0]
    if not any(name in said for name in _SECOND_HAND) and not said.startswith("the process ended"):
        return first
    errors = re.findall(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    errors = [error for error in errors if not any(name in error for name in _SECOND_HAND)]
    return f"{errors[-1].strip()} ({first})" if errors else first
