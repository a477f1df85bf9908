"""
AppWorld's own server, in processes that are started, checked, restarted and stopped here.

AppWorld (`appworld==0.1.3.post1`) needs libraries that TRL cannot be installed with, so it lives in a virtual
environment of its own and is never imported here: its server answers over HTTP, on a Unix socket. A server holds one
world, therefore concurrency is a pool of processes.

Code of the model runs inside the server's process, where it can replace what it likes, and some of what it does stays
(AppWorld itself keeps about 1 MB of each task). So every episode gets a process of its own: one process imports
AppWorld, and servers are forked from it: quickly, and sharing some of its memory.

What a server did wrong and what the model's code did wrong are told apart: [`AppWorldServerError`] is a fault of the
environment, [`BrokenByCodeError`] says that the code hung or killed its server.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from .install import find_python, find_root
from .launcher import AppWorldServerError, AppWorldTimeoutError, Launcher, end_of


MAX_ANSWER_BYTES = 64 * 2**20


class BrokenByCodeError(Exception):
    """The code that was to be executed hung its server, killed it, or left it unable to answer."""


class AppWorldServer:
    """
    One server process and the world in it, for one episode. Starts in the constructor.

    Args:
        launcher ([`Launcher`]):
            Forks the process.
        root (`Path`):
            Directory with AppWorld's `data`.
        execution_timeout (`int`):
            Seconds after which AppWorld interrupts code.
        request_timeout (`float`):
            Seconds after which the server counts as hung.
        keep_outputs (`Path`, *optional*):
            Directory for the files that AppWorld writes. `None` deletes them with the server.

    Raises:
        [`AppWorldServerError`]:
            When the process does not start. So do all methods when the server does not answer as it should.
    """

    def __init__(
        self,
        launcher: Launcher,
        root: Path,
        *,
        execution_timeout: int,
        request_timeout: float,
        keep_outputs: Path | None,
    ):
        self._launcher = launcher
        self._execution_timeout = execution_timeout
        self._request_timeout = request_timeout
        self._task_id: str | None = None
        # A root of its own: the data may be read-only, and others cannot reach the socket.
        self._directory = Path(tempfile.mkdtemp(dir=launcher.directory))
        (self._directory / "data").symlink_to(root / "data")
        if keep_outputs is not None:
            keep_outputs.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._directory / "experiments").mkdir()
            (self._directory / "experiments" / "outputs").symlink_to(keep_outputs.resolve())
        self.pid = int(launcher.request("start", self._directory))
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._request_timeout
        while not self._answers():
            if self._launcher.request("poll", self.pid) != "running":
                raise AppWorldServerError(
                    f"AppWorld's server did not start: {self._exit_status()}.{self._end_of_log()}"
                )
            if time.monotonic() > deadline:
                raise AppWorldTimeoutError(
                    f"AppWorld's server did not start within {self._request_timeout:g} seconds.{self._end_of_log()}"
                )
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return bool(self._request("GET", "/"))
        except (OSError, http.client.HTTPException):
            return False

    def initialize(self, task_id: str) -> dict[str, Any]:
        """
        Begin the episode.

        Args:
            task_id (`str`):
                Id of the task.

        Returns:
            `dict`: `instruction`, `supervisor` (names, email and phone number) and `datetime` of the task.
        """
        self._task_id = task_id
        experiment = f"seeupo-{uuid.uuid4().hex}"
        return self._post("initialize", experiment_name=experiment, timeout_seconds=self._execution_timeout)

    def execute(self, code: str) -> str:
        """
        Run code in the world, and return what it printed, or its traceback.

        Args:
            code (`str`):
                Python code.

        Raises:
            [`BrokenByCodeError`]:
                When the code hung or ended the server, or left it unable to answer.
            [`AppWorldServerError`]:
                When the server had died before, or was killed from outside (also by the out-of-memory killer).
        """
        if self._launcher.request("poll", self.pid) != "running":
            raise AppWorldServerError(f"AppWorld's server has died: {self._exit_status()}.{self._end_of_log()}")
        try:
            return self._request("POST", "/execute", {"task_id": self._task_id, "code": code})
        except TimeoutError as error:
            raise BrokenByCodeError(f"it did not end within {self._request_timeout:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:
            status = self._exit_status()
            if status in ("it closed the connection", "signal SIGKILL"):
                raise AppWorldServerError(f"AppWorld's server has died: {status}.{self._end_of_log()}") from error
            raise BrokenByCodeError(f"it ended its process ({status})") from error
        except AppWorldServerError as error:
            # The process is new, it could begin the task, and nothing but the model's code has run in it.
            raise BrokenByCodeError("AppWorld could not return its output") from error

    def task_completed(self) -> bool:
        """Whether the task was marked as complete."""
        return self._post("task_completed")

    def evaluate(self) -> dict[str, Any]:
        """AppWorld's evaluation of the state: `success`, `difficulty`, and lists of `passes` and `failures`."""
        return self._post("evaluate", suppress_errors=True)

    def stop(self) -> None:
        """Kill the server with its process group, and delete its files."""
        self._launcher.request("stop", self.pid)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _post(self, method: str, **arguments: Any) -> Any:
        try:
            return self._request("POST", f"/{method}", {"task_id": self._task_id, **arguments})
        except TimeoutError as error:
            raise AppWorldTimeoutError(
                f"AppWorld's server did not answer /{method} of task {self._task_id} within "
                f"{self._request_timeout:g} seconds."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise AppWorldServerError(
                f"AppWorld's server has died, at /{method} of task {self._task_id}: "
                f"{self._exit_status()}.{self._end_of_log()}"
            ) from error

    def _request(self, verb: str, path: str, body: dict | None = None) -> Any:
        connection = _UnixConnection(self._directory / "socket", self._request_timeout)
        try:
            connection.request(verb, path, body and json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES + 1)
        finally:
            connection.close()
        if len(answer) > MAX_ANSWER_BYTES:
            raise AppWorldServerError(f"AppWorld's server answered {path} with more than {MAX_ANSWER_BYTES} bytes.")
        if response.status != 200:
            raise AppWorldServerError(
                f"AppWorld's server answered {path} of task {self._task_id} with status "
                f"{response.status}.{self._end_of_log()}"
            )
        answer = json.loads(answer)
        return answer.get("output", answer)

    def _exit_status(self) -> str:
        deadline = time.monotonic() + 5.0  # connections break a moment before the process has ended
        while (code := self._launcher.request("poll", self.pid)) == "running" and time.monotonic() < deadline:
            time.sleep(0.02)
        if code == "running":
            return "it closed the connection"
        return f"signal {signal.Signals(-int(code)).name}" if int(code) < 0 else f"exit code {code}"

    def _end_of_log(self) -> str:
        return end_of(self._directory / "log")


class AppWorldServers:
    """
    A pool of AppWorld servers. An environment leases one for an episode, and gives it back.

    Each episode gets a fresh process, and at most `num_servers` run at a time. They are stopped when they are given
    back, by [`close`], when the object is deleted, when the interpreter exits, and also when this process is killed.

    Args:
        num_servers (`int`, *optional*, defaults to `8`):
            Most servers at a time, which is the most episodes at a time in this process. Not less than the
            `max_concurrent_envs` of the trainer.
        python (`str` or `PathLike`, *optional*):
            Python interpreter of the virtual environment AppWorld is installed in. Defaults to
            `$SEEUPO_APPWORLD_PYTHON`.
        root (`str` or `PathLike`, *optional*):
            Directory that AppWorld's data was downloaded to. Defaults to `$APPWORLD_ROOT`.
        execution_timeout (`int`, *optional*, defaults to `60`):
            Seconds after which AppWorld interrupts code of the model, which then reads of it.
        request_timeout (`float`, *optional*, defaults to `90.0`):
            Seconds after which a server that does not answer is killed, because not all code can be interrupted. Must
            be more than `execution_timeout`, and less than the `env_timeout` of the trainer.
        start_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that importing AppWorld may take, once for all servers: about 5 s of computation.
        lease_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds to wait for a server while all are leased.
        memory_limit (`int`, *optional*, defaults to `4 * 2**30`):
            Most bytes of address space of a server (Linux). Code that asks for more gets a `MemoryError`. `None` is no
            limit.
        keep_outputs (`str` or `PathLike`, *optional*):
            Directory where the files that AppWorld writes in each episode are kept. `None` deletes them.

    Raises:
        `ImportError`:
            When AppWorld is not installed.
        `FileNotFoundError`:
            When its data is missing.
    """

    def __init__(
        self,
        num_servers: int = 8,
        *,
        python: str | os.PathLike | None = None,
        root: str | os.PathLike | None = None,
        execution_timeout: int = 60,
        request_timeout: float = 90.0,
        start_timeout: float = 120.0,
        lease_timeout: float = 60.0,
        memory_limit: int | None = 4 * 2**30,
        keep_outputs: str | os.PathLike | None = None,
    ):
        for name, value in (("num_servers", num_servers), ("execution_timeout", execution_timeout)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1.")
        if not request_timeout > execution_timeout:
            raise ValueError(
                f"request_timeout is {request_timeout:g}, execution_timeout {execution_timeout}; it must be more, or "
                "servers are killed before AppWorld interrupts the code."
            )
        self.num_servers = num_servers
        self.root = find_root(root)
        self.lease_timeout = lease_timeout
        self._python = find_python(python)
        self._launcher_options = {"start_timeout": start_timeout, "memory_limit": memory_limit}
        self._server_options = {
            "execution_timeout": execution_timeout,
            "request_timeout": request_timeout,
            "keep_outputs": None if keep_outputs is None else Path(keep_outputs).expanduser(),
        }
        self._places = threading.Semaphore(num_servers)
        self._lock = threading.Lock()
        self._launcher: Launcher | None = None
        self._closed = False

    def start(self) -> None:
        """Import AppWorld now, instead of in the first episode. Returns when that is done."""
        self._launch()

    def lease(self) -> AppWorldServer:
        """
        A new server for one episode. Give it back by [`give_back`].

        Raises:
            [`AppWorldTimeoutError`]:
                When all servers stay leased for `lease_timeout` seconds.
            [`AppWorldServerError`]:
                When the server does not start.
        """
        if not self._places.acquire(timeout=self.lease_timeout):
            raise AppWorldTimeoutError(
                f"All {self.num_servers} AppWorld servers were in use for {self.lease_timeout:g} seconds. An "
                "environment keeps its server until it is reset or closed, or its task is completed: raise "
                "`num_servers`, or lower the trainer's `max_concurrent_envs` to it."
            )
        try:
            return AppWorldServer(self._launch(), self.root, **self._server_options)
        except BaseException:
            self._places.release()
            raise

    def give_back(self, server: AppWorldServer) -> None:
        """Stop a leased server, which may have died, and let another one take its place."""
        try:
            server.stop()
        except AppWorldServerError:
            pass  # the process it was forked from is gone, and took it along
        finally:
            self._places.release()

    def close(self) -> None:
        """Stop all servers, also leased ones. Nothing can be leased afterwards."""
        with self._lock:
            self._closed = True
            if self._launcher is not None:
                self._launcher.close()

    def _launch(self) -> Launcher:
        with self._lock:
            if self._closed:
                raise AppWorldServerError("The pool of AppWorld servers is closed.")
            if self._launcher is None or not self._launcher.is_alive:
                self._launcher = Launcher(self._python, **self._launcher_options)
            return self._launcher


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float):
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
