"""
AppWorld's own server, in processes that are started, checked, restarted and stopped here.

AppWorld (`appworld==0.1.3.post1`) needs libraries that TRL cannot be installed with, so it lives in a virtual
environment of its own and is never imported here: its server answers over HTTP, on a Unix socket. A server holds one
world, therefore concurrency is a pool of processes. Code of the model runs inside a server process.

What a server did wrong and what the model's code did wrong are told apart: [`AppWorldServerError`] is a fault of the
environment, [`BrokenByCodeError`] says that the code hung or killed its server.
"""

import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

VERSION = "0.1.3.post1"
PYTHON_VARIABLE = "SEEUPO_APPWORLD_PYTHON"
ROOT_VARIABLE = "APPWORLD_ROOT"
INSTALL = f"""
    python3.11 -m venv ~/appworld/venv
    ~/appworld/venv/bin/pip install appworld=={VERSION}
    ~/appworld/venv/bin/appworld install
    ~/appworld/venv/bin/appworld download data --root ~/appworld
    export {PYTHON_VARIABLE}=~/appworld/venv/bin/python {ROOT_VARIABLE}=~/appworld
"""

# The rest of the environment may hold keys and tokens, which are none of the model's business.
INHERITED_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")
MAX_ANSWER_BYTES = 64 * 2**20
SOCKET_PATH_LENGTH = 100  # the limit of the operating systems is 104 (macOS) or 108 (Linux)

PROBE = """
import importlib.metadata, importlib.util, json, os
spec = importlib.util.find_spec("appworld")
folder = spec and spec.submodule_search_locations[0]
print(json.dumps({
    "version": importlib.metadata.version("appworld") if spec else None,
    "unpacked": bool(spec) and os.path.isfile(os.path.join(folder, "apps", "supervisor", "apis.py")),
}))
"""


class AppWorldServerError(RuntimeError):
    """A server did not start, died, or answered with an error: a fault of the environment."""


class AppWorldTimeoutError(AppWorldServerError, TimeoutError):
    """A server, or the wait for one, took too long: a fault of the environment."""


class BrokenByCodeError(Exception):
    """The code that was to be executed hung its server, killed it, or left it unable to answer."""


def find_python(python: str | os.PathLike | None = None) -> Path:
    """
    The Python interpreter AppWorld is installed for.

    Args:
        python (`str` or `PathLike`, *optional*):
            Path of the interpreter. Defaults to `$SEEUPO_APPWORLD_PYTHON`.

    Raises:
        `ImportError`:
            When there is no such interpreter, or AppWorld is not (or not completely) installed for it, or in another
            version; the message has the commands that install it.
    """
    python = python or os.environ.get(PYTHON_VARIABLE)
    if not python:
        raise ImportError(
            f"AppWorld needs a virtual environment of its own, and none is named: {PYTHON_VARIABLE} is not set and no "
            f"`python` was given. Run\n{INSTALL}"
        )
    path = Path(python).expanduser()
    try:
        probe = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ImportError(f"{path} is not a Python interpreter that runs: {error}. Run\n{INSTALL}") from error
    found = json.loads(probe.stdout)
    if found["version"] is None:
        raise ImportError(f"AppWorld is not installed for {path}. Run\n{INSTALL}")
    if found["version"] != VERSION:
        raise ImportError(f"AppWorld {found['version']} is installed for {path}; need {VERSION}. Run\n{INSTALL}")
    if not found["unpacked"]:
        appworld = path.with_name("appworld")
        raise ImportError(f"AppWorld is installed for {path}, but not unpacked. Run\n\n    {appworld} install\n")
    return path


def find_root(root: str | os.PathLike | None = None) -> Path:
    """
    The directory whose `data` holds AppWorld's tasks.

    Args:
        root (`str` or `PathLike`, *optional*):
            The directory. Defaults to `$APPWORLD_ROOT`.

    Raises:
        `FileNotFoundError`:
            When the data is not there; the message has the commands that download it.
    """
    root = root or os.environ.get(ROOT_VARIABLE)
    if not root:
        raise FileNotFoundError(
            f"Where AppWorld's data is, is not known: {ROOT_VARIABLE} is not set and no `root` was given. "
            f"Run\n{INSTALL}"
        )
    path = Path(root).expanduser().resolve()
    for part in ("datasets", "tasks", "api_docs"):
        if not (path / "data" / part).is_dir():
            raise FileNotFoundError(
                f"AppWorld's data is not in {path}: there is no directory data/{part}. Run\n\n"
                f"    appworld download data --root {path}\n\n"
                f"with the `appworld` of its virtual environment, or if there is none yet:\n{INSTALL}"
            )
    return path


class AppWorldServer:
    """
    One server process and the world in it. Starts in the constructor, when everything it needs is imported.

    Args:
        python (`Path`):
            Interpreter of AppWorld's environment.
        root (`Path`):
            Directory with AppWorld's `data`.
        execution_timeout (`int`):
            Seconds after which AppWorld interrupts code.
        request_timeout (`float`):
            Seconds after which the server counts as hung.
        start_timeout (`float`):
            Seconds the server may take to start.
        memory_limit (`int`, *optional*):
            Most bytes of address space.
        keep_outputs (`Path`, *optional*):
            Where the files of all episodes are kept.

    Raises:
        [`AppWorldServerError`]:
            When the process does not start. So do all methods when the server does not answer as it should.
    """

    def __init__(
        self,
        python: Path,
        root: Path,
        *,
        execution_timeout: int,
        request_timeout: float,
        start_timeout: float,
        memory_limit: int | None,
        keep_outputs: Path | None,
    ):
        self.episodes = 0
        self._execution_timeout = execution_timeout
        self._request_timeout = request_timeout
        self._keep_outputs = keep_outputs is not None
        self._task_id: str | None = None
        self._experiment: str | None = None

        # A root of its own: the data may be read-only, and the socket is out of reach of other users.
        self._directory = Path(tempfile.mkdtemp(prefix="appworld-"))
        self._socket = self._directory / "socket"
        self._log = self._directory / "log"
        pipe, self._pipe = os.pipe()
        try:
            if len(os.fsencode(self._socket)) > SOCKET_PATH_LENGTH:
                raise AppWorldServerError(
                    f"The path {self._socket} is too long for a Unix socket. Set TMPDIR to a shorter directory."
                )
            (self._directory / "data").symlink_to(root / "data")
            if keep_outputs is not None:
                keep_outputs.mkdir(parents=True, exist_ok=True)
                (self._directory / "experiments").mkdir()
                (self._directory / "experiments" / "outputs").symlink_to(keep_outputs.resolve())
            self._process = self._launch(python, pipe, memory_limit or 0)
        except BaseException:
            os.close(self._pipe)
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        finally:
            os.close(pipe)
        try:
            self._wait_until_ready(start_timeout)
        except BaseException:
            self.stop()
            raise

    def _launch(self, python: Path, pipe: int, memory_limit: int) -> subprocess.Popen:
        worker = Path(__file__).with_name("appworld_worker.py")
        environment = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        with open(self._log, "wb") as log:
            return subprocess.Popen(
                [python, "-I", worker, self._socket, str(pipe), str(memory_limit)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env={
                    **environment,
                    "HOME": str(self._directory),
                    ROOT_VARIABLE: str(self._directory),
                    "APPWORLD_CACHE": str(self._directory),
                },
                pass_fds=[pipe],
                start_new_session=True,
            )

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self.is_healthy():
            if self._process.poll() is not None:
                raise AppWorldServerError(f"AppWorld's server did not start: {self._obituary()}")
            if time.monotonic() > deadline:
                raise AppWorldTimeoutError(
                    f"AppWorld's server did not start within {timeout:g} seconds. {self._last_words()}"
                )
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Process id of the server, which is also that of its process group."""
        return self._process.pid

    def is_healthy(self) -> bool:
        """Whether the process lives and answers."""
        if self._process.poll() is not None:
            return False
        try:
            return self._request("GET", "/", timeout=min(self._request_timeout, 10.0)) is not None
        except (OSError, http.client.HTTPException, AppWorldServerError):
            return False

    def initialize(self, task_id: str) -> dict[str, Any]:
        """
        Begin an episode.

        Args:
            task_id (`str`):
                Id of the task.

        Returns:
            `dict`: `instruction`, `supervisor` (names, email and phone number) and `datetime` of the task.
        """
        self._delete_outputs()
        self._task_id = task_id
        self._experiment = f"seeupo-{uuid.uuid4().hex}"
        self.episodes += 1
        return self._post(
            "initialize", experiment_name=self._experiment, timeout_seconds=self._execution_timeout
        )

    def execute(self, code: str) -> str:
        """
        Run code in the world, and return what it printed, or its traceback.

        Args:
            code (`str`):
                Python code.

        Raises:
            [`BrokenByCodeError`]:
                When the code hung or killed the server, or left it unable to answer.
            [`AppWorldServerError`]:
                When the server had died before, or was killed from outside (also by the out-of-memory killer).
        """
        if self._process.poll() is not None:
            raise AppWorldServerError(f"AppWorld's server has died: {self._obituary()}")
        try:
            return self._request("POST", "/execute", {"task_id": self._task_id, "code": code})
        except TimeoutError as error:
            raise BrokenByCodeError(f"it did not end within {self._request_timeout:g} seconds") from error
        except _TooLongError as error:
            raise BrokenByCodeError("it printed far too much") from error
        except (OSError, http.client.HTTPException) as error:
            if self._exit_code() in (None, -signal.SIGKILL):
                raise AppWorldServerError(f"AppWorld's server has died: {self._obituary()}") from error
            raise BrokenByCodeError(f"it ended its process ({self._obituary()})") from error
        except AppWorldServerError as error:
            # Either the code made a mess of its world, or nothing works here.
            self.initialize(self._task_id)
            raise BrokenByCodeError("AppWorld could not return its output") from error

    def task_completed(self) -> bool:
        """Whether the task was marked as complete."""
        return self._post("task_completed")

    def evaluate(self) -> dict[str, Any]:
        """AppWorld's evaluation of the present state: `success`, `difficulty`, and lists of `passes` and `failures`."""
        return self._post("evaluate", suppress_errors=True)

    def close_world(self) -> None:
        """End the episode, and delete its files."""
        self._post("close")
        self._delete_outputs()

    def stop(self) -> None:
        """Kill the server with its process group, and delete its files."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _delete_outputs(self) -> None:
        if self._experiment is not None and not self._keep_outputs:
            shutil.rmtree(self._directory / "experiments" / "outputs" / self._experiment, ignore_errors=True)

    def _post(self, method: str, **arguments: Any) -> Any:
        try:
            return self._request("POST", f"/{method}", {"task_id": self._task_id, **arguments})
        except TimeoutError as error:
            raise AppWorldTimeoutError(
                f"AppWorld's server did not answer /{method} of task {self._task_id} within "
                f"{self._request_timeout:g} seconds."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            self._exit_code()
            raise AppWorldServerError(
                f"AppWorld's server has died, at /{method} of task {self._task_id}: {self._obituary()}"
            ) from error

    def _request(self, verb: str, path: str, body: dict | None = None, timeout: float | None = None) -> Any:
        connection = _UnixConnection(self._socket, timeout or self._request_timeout)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(verb, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES + 1)
        finally:
            connection.close()
        if len(answer) > MAX_ANSWER_BYTES:
            raise _TooLongError(f"AppWorld's server answered {path} with more than {MAX_ANSWER_BYTES} bytes.")
        if response.status != 200:
            raise AppWorldServerError(
                f"AppWorld's server answered {path} of task {self._task_id} with status {response.status}. "
                f"{self._last_words()}"
            )
        answer = json.loads(answer)
        return answer.get("output", answer.get("message"))

    def _exit_code(self) -> int | None:
        """How the process ended; its connections break a moment before that is known."""
        try:
            return self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return None

    def _obituary(self) -> str:
        code = self._process.poll()
        if code is None:
            manner = "it closed the connection"
        else:
            manner = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{manner}. {self._last_words()}"

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return "The end of its log:\n" + "\n".join(lines[-15:]) if lines else "Its log is empty."


class AppWorldServers:
    """
    A pool of AppWorld servers. An environment leases one for an episode, and gives it back.

    A server is started when it is first needed (or all at once by [`start`]); one that died, hung or failed is killed
    and another one started in its place. All are stopped by [`close`], when the object is deleted, when the
    interpreter exits, and on their own when this process is killed.

    Args:
        num_servers (`int`, *optional*, defaults to `8`):
            Most servers at a time, which is the most episodes at a time: about 300 MB each. Not less than the
            `max_concurrent_envs` of the trainer.
        python (`str` or `PathLike`, *optional*):
            Python interpreter of the virtual environment AppWorld is installed in. Defaults to
            `$SEEUPO_APPWORLD_PYTHON`.
        root (`str` or `PathLike`, *optional*):
            Directory that AppWorld's data was downloaded to. Defaults to `$APPWORLD_ROOT`.
        execution_timeout (`int`, *optional*, defaults to `60`):
            Seconds after which AppWorld interrupts code of the model, which then reads of it.
        request_timeout (`float`, *optional*, defaults to `90.0`):
            Seconds after which a server that does not answer is killed, because code cannot always be interrupted.
            Must be more than `execution_timeout`, and less than the `env_timeout` of the trainer.
        start_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds a server may take to start: about 5 s of computation.
        lease_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds to wait for a server while all are leased.
        memory_limit (`int`, *optional*, defaults to `4 * 2**30`):
            Most bytes of address space of a server (Linux). `None` is no limit.
        max_episodes (`int`, *optional*, defaults to `100`):
            Episodes after which a server is replaced: AppWorld keeps about 1 MB of each.
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
        max_episodes: int = 100,
        keep_outputs: str | os.PathLike | None = None,
    ):
        for name, value in (
            ("num_servers", num_servers),
            ("execution_timeout", execution_timeout),
            ("max_episodes", max_episodes),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1.")
        if request_timeout <= execution_timeout:
            raise ValueError(
                f"request_timeout is {request_timeout:g}, execution_timeout {execution_timeout}; it must be more, or "
                "servers are killed before AppWorld interrupts the code."
            )
        self.num_servers = num_servers
        self.root = find_root(root)
        self.lease_timeout = lease_timeout
        self.max_episodes = max_episodes
        self._python = find_python(python)
        self._server_options = {
            "execution_timeout": execution_timeout,
            "request_timeout": request_timeout,
            "start_timeout": start_timeout,
            "memory_limit": memory_limit,
            "keep_outputs": None if keep_outputs is None else Path(keep_outputs).expanduser(),
        }
        self._changed = threading.Condition()
        self._closed = False
        self._places = num_servers  # for servers that do not exist yet
        self._idle: list[AppWorldServer] = []
        self._servers: set[AppWorldServer] = set()
        weakref.finalize(self, _stop_all, self._servers, os.getpid())

    def start(self) -> None:
        """Start all servers that are not running yet, as many at a time as there are processors."""
        with ThreadPoolExecutor(min(self.num_servers, os.cpu_count() or 1)) as threads:
            started = [threads.submit(self._start) for _ in range(self._take_places())]
        for server in [future.result() for future in started]:
            self._put(server)

    def lease(self) -> AppWorldServer:
        """
        A healthy server for one episode. Give it back by [`give_back`].

        Raises:
            [`AppWorldTimeoutError`]:
                When all servers stay leased for `lease_timeout` seconds.
            [`AppWorldServerError`]:
                When a server does not start.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._idle or self._places, self.lease_timeout):
                raise AppWorldTimeoutError(
                    f"All {self.num_servers} AppWorld servers were in use for {self.lease_timeout:g} seconds. An "
                    "environment keeps its server until its episode ends: raise `num_servers`, or lower the "
                    "trainer's `max_concurrent_envs` to it."
                )
            if self._closed:
                raise AppWorldServerError("The pool of AppWorld servers is closed.")
            server = self._idle.pop() if self._idle else None
            if server is None:
                self._places -= 1
        if server is not None and not server.is_healthy():
            logger.warning("An idle AppWorld server (process %d) does not answer; it is replaced.", server.pid)
            self._servers.discard(server)
            server.stop()
            server = None
        return server or self._start()

    def give_back(self, server: AppWorldServer) -> None:
        """End the episode on a leased server. If that fails, or it is time, the server is stopped."""
        try:
            server.close_world()
            healthy = True
        except AppWorldServerError as error:
            logger.warning("An AppWorld server (process %d) is replaced. %s", server.pid, error)
            healthy = False
        if healthy and server.episodes < self.max_episodes:
            self._put(server)
        else:
            self.discard(server)

    def discard(self, server: AppWorldServer) -> None:
        """Stop a leased server. Another one is started when it is needed."""
        self._servers.discard(server)
        server.stop()
        with self._changed:
            self._places += 1
            self._changed.notify()

    def close(self) -> None:
        """Stop all servers, also leased ones. Nothing can be leased afterwards."""
        with self._changed:
            self._closed = True
            self._idle.clear()
            self._changed.notify_all()
        _stop_all(self._servers, os.getpid())

    def _take_places(self) -> int:
        with self._changed:
            places, self._places = self._places, 0
        return places

    def _start(self) -> AppWorldServer:
        """Start a server in a place that was taken."""
        try:
            server = AppWorldServer(self._python, self.root, **self._server_options)
        except BaseException:
            with self._changed:
                self._places += 1
                self._changed.notify()
            raise
        with self._changed:
            closed = self._closed
            if not closed:
                self._servers.add(server)
        if closed:
            server.stop()
            raise AppWorldServerError("The pool of AppWorld servers is closed.")
        return server

    def _put(self, server: AppWorldServer) -> None:
        with self._changed:
            self._idle.append(server)
            self._changed.notify()


class _TooLongError(Exception):
    pass


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float):
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _stop_all(servers: set[AppWorldServer], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that started them
        return
    while servers:
        servers.pop().stop()
