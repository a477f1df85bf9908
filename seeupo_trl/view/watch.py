"""
Following a run that is going on: the page is served to this machine alone, and reloads itself when files change.

The server listens on the loopback interface and answers GET only. It looks at the `Host` of every request, so that no
page of the internet whose name suddenly means 127.0.0.1 (DNS rebinding) can read a run through the reader's browser.
"""

import hashlib
import json
import sys
import threading
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..trajectory_log import find_files
from .page import render
from .run import read_run, run_directory, state_files


_ADDRESS = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class RunServer(ThreadingHTTPServer):
    """
    Serves the page of a run at `/`, and which state of its files that is at `/version`.

    Args:
        run_dir (`Path`):
            As in [`~seeupo_trl.trajectory_log.find_files`]; may be without trajectories as yet.
        port (`int`, *optional*, defaults to `0`):
            Port on 127.0.0.1; 0 takes a free one.
        selection (`dict`, *optional*):
            Arguments of [`~seeupo_trl.view.run.read_run`].
    """

    daemon_threads = True

    def __init__(self, run_dir: Path, port: int = 0, selection: dict[str, Any] | None = None):
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except OSError as error:
            raise OSError(
                f"Port {port} of {_ADDRESS} cannot be used ({error.strerror}): choose another --port, or none for a "
                "free one."
            ) from error
        self.run_dir = run_dir
        self._selection = selection or {}
        self._pages: dict[str, str] = {}  # by query, of one version
        self._version = ""
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{_ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> set[str]:
        """What a browser calls this server."""
        names = {_ADDRESS, "localhost"}
        return {f"{name}:{self.server_port}" for name in names} | (names if self.server_port == 80 else set())

    def state(self) -> dict[str, Any]:
        """The `"version"` of the run's files, and when one of them `"changed"` last, in seconds since 1970."""
        try:
            paths = find_files(self.run_dir)
        except FileNotFoundError:
            paths = []
        digest, changed = hashlib.sha256(), None
        for path in [*paths, *state_files(run_directory(self.run_dir))]:
            try:
                status = path.stat()
            except OSError:  # replaced or deleted at this moment
                continue
            digest.update(repr((str(path), status.st_mtime_ns, status.st_size)).encode("utf-8", "surrogateescape"))
            changed = max(changed or 0.0, status.st_mtime)
        return {"version": digest.hexdigest(), "changed": changed}

    def page(self, query: str) -> str:
        """
        The page of the run as it is now.

        Args:
            query (`str`):
                `iteration=...` lists the episodes of these iterations, an empty one those of the selection.

        Raises:
            `ValueError`:
                When an iteration is no integer.
        """
        wanted = parse_qs(query)
        selection = dict(self._selection)
        if "iteration" in wanted:
            selection["iterations"] = [int(text) for text in wanted["iteration"]]
        # what changes while it is read makes another version
        with self._lock:
            state = self.state()
            if state["version"] != self._version:
                self._pages, self._version = {}, state["version"]
            if query not in self._pages:
                self._pages[query] = self._render(selection, state)
            return self._pages[query]

    def _render(self, selection: dict[str, Any], state: dict[str, Any]) -> str:
        try:
            run = read_run(self.run_dir, **selection)
        except (OSError, ValueError) as error:
            return render([], self.run_dir.resolve().name, notices=[str(error)], watch=state)
        return render(run.rows.to_pylist(), run.title, run.note, run.charts, run.notices, watch=state)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: RunServer
    server_version, sys_version = "seeupo_trl", ""
    timeout = 30

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if [host.lower() for host in self.headers.get_all("Host", [])] not in [[host] for host in self.server.hosts]:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, f"This is {self.server.url} and nothing else.\n")
            return False
        if self.command != "GET":
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "GET only.\n", {"Allow": "GET"})
            return False
        return True

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        if target.path == "/version":
            self._answer(HTTPStatus.OK, json.dumps(self.server.state()), {"Content-Type": "application/json"})
        elif target.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, f"Only {self.server.url} is here.\n")
        else:
            try:
                page = self.server.page(target.query)
            except ValueError as error:
                self._answer(HTTPStatus.BAD_REQUEST, f"{error}\n")
            else:
                self._answer(HTTPStatus.OK, page, {"Content-Type": "text/html; charset=utf-8"})

    def _answer(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        length = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in {**length, **_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing: the page asks every other second."""


def watch(run_dir: Path, port: int = 0, open_browser: bool = False, **selection: Any) -> None:
    """
    Follow a run until Ctrl-C.

    Args:
        run_dir (`Path`), port (`int`, *optional*, defaults to `0`):
            As in [`RunServer`].
        open_browser (`bool`, *optional*, defaults to `False`):
            Whether to open the page in the default browser.
        selection:
            Arguments of [`~seeupo_trl.view.run.read_run`].

    Raises:
        `FileNotFoundError`:
            When the directory does not exist.
        `OSError`:
            When the port cannot be used.
    """
    if not run_dir.exists():
        raise FileNotFoundError(f"{run_dir} does not exist. Give the `output_dir` of a run.")
    with RunServer(run_dir, port, selection) as server:
        print(f"Following {run_dir} at {server.url} (this machine only; Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nNo longer following.")
