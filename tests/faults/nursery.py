"""A process that has imported everything and forks ranks from itself: a start then takes a second
or two less than half of what it costs a new interpreter.

    python -m faults.nursery        # one JSON request a line on stdin, one reply a line on stdout

The ranks are real processes, each in a session of its own, that run ``longpretrain train`` as
``python -m longpretrain`` does. Nothing has started threads or joined a group before the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from faults import hook


def serve() -> None:
    """Answers requests until stdin ends, then takes every child along."""
    children: dict[int, int | None] = {}
    try:
        for line in sys.stdin:
            request = json.loads(line)
            reply: dict[str, Any] = {}
            if "words" in request:
                number = _fork(request)
                children[number] = None
                reply = {"pid": number}
            else:
                _reap(children)
                reply = {"codes": {str(k): v for k, v in children.items() if v is not None}}
            print(json.dumps(reply), flush=True)
    finally:
        for number, code in children.items():
            if code is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(number, signal.SIGKILL)


def _reap(children: dict[int, int | None]) -> None:
    for number, code in children.items():
        if code is None:
            found, status = os.waitpid(number, os.WNOHANG)
            if found:
                children[number] = os.waitstatus_to_exitcode(status)


def _fork(request: Mapping[str, Any]) -> int:
    """A rank; ``environment`` is all of its environment, ``output`` takes what it prints, and
    ``fault`` may spoil its disk or strike it (hook.py).
    """
    number = os.fork()
    if number == 0:
        _be_a_rank(request)
    return number


def _be_a_rank(request: Mapping[str, Any]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(request["environment"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        told = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number, target in ((nothing, 0), (told, 1), (told, 2)):
            os.dup2(number, target)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        from longpretrain.cli import main

        if request["fault"]:
            hook.install_any(request["fault"])
        code = main(["train", *request["words"]])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _import_everything() -> None:
    """What a rank imports by itself before it joins the others, and what DeepSpeed adds later."""
    import torch
    import torch._dynamo  # torch's AdamW does, which is half of what a start costs

    import longpretrain.training  # noqa: F401
    from longpretrain.engine import zero

    torch.set_num_threads(1)
    zero._deepspeed()
    with contextlib.suppress(ImportError):
        import torch.utils.tensorboard


class Nursery:
    """The other end of it; use as a context manager."""

    def __init__(self, environment: Mapping[str, str], root: Path) -> None:
        import subprocess

        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.nursery"],
            cwd=root,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(Exception):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()

    def fork(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        fault: Mapping[str, Any] | None = None,
    ) -> int:
        """Starts a rank and returns its process number."""
        request = {"words": list(words), "environment": dict(environment), "output": str(output)}
        reply = self._ask({**request, "fault": fault})
        return int(reply["pid"])

    def exit_code(self, number: int) -> int | None:
        """Of a rank that has ended; -9 for one that was killed by signal 9."""
        code = self._ask({})["codes"].get(str(number))
        return None if code is None else int(code)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the nursery ended with {self._process.wait(10)}")
        return dict(json.loads(line))


if __name__ == "__main__":
    _import_everything()
    serve()
