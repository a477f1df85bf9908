"""
A Python whose imports are done, for scripts that tests start and for the processes of `torchrun`.

Importing torch, transformers and TRL takes longer than most launched tests. Here a server imports them once, and a
started process is a fork of it: its standard streams, environment, directory, arguments, signals and exit status are
those of the process that was started. Every local rank has a server of its own, so that ranks differ in what a start
draws, as the hashes of strings. Linux only; elsewhere processes start as usual.

`warm_python.py serve SOCKET` is a server, `warm_python.py start DIRECTORY -u SCRIPT ...` a started process.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path


START_TIMEOUT = 60.0  # seconds until a server listens, on a busy machine


# ---- For tests ----


def interpreter() -> list[str]:
    """The beginning of a command that runs a script."""
    if not hasattr(os, "pidfd_open"):
        return [sys.executable, "-u"]
    _serve(0)
    return [str(_directory() / "python"), "-u"]


def environment(num_processes: int) -> dict[str, str]:
    """Environment variables with which `torchrun` starts that many processes so."""
    if not hasattr(os, "pidfd_open"):
        return {}
    for rank in range(num_processes):
        _serve(rank)
    return {"PYTHON_EXEC": interpreter()[0]}


@cache
def _directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="warm_python"))
    executable = directory / "python"
    executable.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} start {directory} "$@"\n')
    executable.chmod(0o700)
    return directory


@cache
def _serve(rank: int) -> None:
    command = [sys.executable, __file__, "serve", str(_socket(_directory(), rank))]
    # it ends when the pipe is closed, however this process ends
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env)
    atexit.register(server.communicate)


def _socket(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}"


# ---- A started process ----


def start(directory: Path, arguments: list[str]) -> None:
    """Have a process forked, hand signals on to it, and end as it ends."""
    connection = _connect(_socket(directory, int(os.environ.get("LOCAL_RANK", "0"))))
    request = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    socket.send_fds(connection, [b"?"], [0, 1, 2])
    with connection.makefile("rw") as stream:
        stream.write(json.dumps(request) + "\n")
        stream.flush()
        pid = int(stream.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        status = int(stream.readline())
    if os.WIFSIGNALED(status):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return connection


# ---- The server ----


def serve(path: Path) -> dict | None:
    """Fork for every connection; returns what to run in a started process, and nothing at the end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    import_everything()
    guards = set()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            for guard in guards:
                os.waitpid(guard, 0)
            return None
        connection, _ = listener.accept()
        guard = os.fork()
        if guard == 0:
            listener.close()
            return _guard(connection)
        connection.close()
        guards.add(guard)
        guards -= {one for one in guards if os.waitpid(one, os.WNOHANG) != (0, 0)}


def _guard(connection: socket.socket) -> dict:
    """Fork once more: the child returns, and this process stays to tell its end, or to end it with its client."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    stream = connection.makefile("rw")
    request = json.loads(stream.readline())
    pid = os.fork()
    if pid == 0:
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        stream.close()
        connection.close()
        return request
    for descriptor in streams:
        os.close(descriptor)
    stream.write(f"{pid}\n")
    stream.flush()
    end = os.pidfd_open(pid)
    ready, _, _ = select.select([end, connection], [], [])
    if end not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        stream.write(f"{status}\n")
        stream.flush()
    finally:
        os._exit(0)


def run(request: dict) -> None:
    """Be the process that was started."""
    import runpy

    os.setsid()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    unbuffered, script, *arguments = request["arguments"]
    assert unbuffered == "-u", request["arguments"]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def import_everything() -> None:
    import importlib
    import importlib.util

    import torch

    torch.set_num_threads(1)
    names = ["datasets", "deepspeed", "peft", "transformers.models.qwen3.modeling_qwen3", "trl.trainer.grpo_trainer"]
    for name in [*names, "seeupo_trl.seeupo_trainer", "seeupo_trl.rollout", "seeupo_trl.plan.memory"]:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)


if __name__ == "__main__":
    _, mode, where, *rest = sys.argv
    if mode == "start":
        start(Path(where), rest)
    wanted = serve(Path(where))
    if wanted is not None:
        run(wanted)
