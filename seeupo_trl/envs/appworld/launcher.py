"""The process that AppWorld's servers are forked from, seen from here; `worker.py` is what runs in it."""

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any, TextIO

from .install import ROOT_VARIABLE


# The rest of the environment may hold keys and tokens, which are none of the model's business.
INHERITED_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")
ANSWER_TIMEOUT = 60.0  # seconds; it answers in milliseconds
DIRECTORY_LENGTH = 80  # characters; the path of a Unix socket may have 104 (macOS) or 108 (Linux)


class AppWorldServerError(RuntimeError):
    """A server did not start, died, or answered with an error: a fault of the environment."""


class AppWorldTimeoutError(AppWorldServerError, TimeoutError):
    """A server, or the wait for one, took too long: a fault of the environment."""


class Launcher:
    """
    The process that has imported AppWorld, and that servers are forked from (`worker.py`).

    Args:
        python (`Path`):
            Interpreter of AppWorld's environment.
        start_timeout (`float`):
            Seconds it may take to start.
        memory_limit (`int`, *optional*):
            Most bytes of address space of a server.

    Raises:
        [`AppWorldServerError`]:
            When the process does not start.
    """

    def __init__(self, python: Path, *, start_timeout: float, memory_limit: int | None):
        self.directory = Path(tempfile.mkdtemp(prefix="appworld-"))
        if len(os.fsencode(self.directory)) > DIRECTORY_LENGTH:
            self.directory.rmdir()
            raise AppWorldServerError(
                f"The path {self.directory} is too long for a Unix socket in it. Set TMPDIR to a shorter directory."
            )
        self._lock = threading.Lock()
        self._log = self.directory / "log"
        self._connection, other_end = socket.socketpair()
        environment = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        paths = dict.fromkeys(("HOME", ROOT_VARIABLE, "APPWORLD_CACHE"), str(self.directory))
        worker = Path(__file__).with_name("worker.py")
        with other_end, open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [python, "-I", worker, str(memory_limit or 0)],
                stdin=other_end,
                stdout=other_end,
                stderr=log,
                cwd=self.directory,
                env={**environment, **paths},
                start_new_session=True,
            )
        self._answers = self._connection.makefile("r")
        self.close = weakref.finalize(
            self, _end_launcher, self._process, self._connection, self._answers, self.directory, os.getpid()
        )
        self._read(start_timeout)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def request(self, verb: str, argument: Any) -> str:
        """
        Send one of the commands of `worker.py`.

        Args:
            verb (`str`):
                `"start"`, `"poll"` or `"stop"`.
            argument (`Any`):
                A directory or a process id.
        """
        with self._lock:
            try:
                self._connection.sendall(f"{verb} {argument}\n".encode())
            except OSError as error:
                raise AppWorldServerError(f"The process that starts AppWorld's servers has died: {error}.") from error
            return self._read(ANSWER_TIMEOUT)

    def _read(self, timeout: float) -> str:
        self._connection.settimeout(timeout)
        try:
            answer = self._answers.readline()
        except TimeoutError as error:
            log_end = end_of(self._log)
            self.close()
            raise AppWorldTimeoutError(
                f"The process that starts AppWorld's servers did not answer within {timeout:g} seconds.{log_end}"
            ) from error
        except OSError as error:
            answer = f"{error}"
        if not answer.endswith("\n"):
            raise AppWorldServerError(f"The process that starts AppWorld's servers has died.{end_of(self._log)}")
        return answer.strip()


def _end_launcher(
    process: subprocess.Popen, connection: socket.socket, answers: TextIO, directory: Path, owner: int
) -> None:
    if os.getpid() != owner:  # a fork of the process that started it
        return
    try:
        connection.shutdown(socket.SHUT_RDWR)  # at which it kills its servers and ends
    except OSError:
        pass  # it has ended already
    answers.close()
    connection.close()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(directory, ignore_errors=True)


def end_of(log: Path) -> str:
    """The last lines of a log, for an error message."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return " The end of its log:\n" + "\n".join(lines[-15:]) if lines else " Its log is empty."
