"""
The process that AppWorld's servers are forked from. It is run by the Python of AppWorld's own environment, never
imported here:

    python -I worker.py MEMORY_LIMIT

It imports AppWorld once, which takes seconds, and then obeys lines on its standard input. Each is answered by a line:

- `start DIRECTORY`: fork a server that listens on the Unix socket `DIRECTORY/socket`. Answers its process id.
- `poll PID`: answers `running`, or the exit code (negative: the signal that killed it).
- `stop PID`: kill the server with its process group. Answers the exit code, that of an earlier death if it was dead.

When the input ends, because the process at the other end closed it or died of whatever, all servers are killed and
the working directory is deleted.

A server is what `appworld serve environment` serves, but not on a port of all network interfaces, where it would
execute code for whoever asks.
"""

import ctypes
import gc
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback


PR_SET_PDEATHSIG = 1  # of Linux's prctl

exit_codes: dict[int, int | None] = {}  # of all servers that were not stopped yet; None while they run


def start(directory: str, memory_limit: int) -> str:
    """Fork a server."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            serve(directory, memory_limit, parent)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # it has done so itself
    exit_codes[pid] = None
    return str(pid)


def poll(pid: int) -> str:
    """How a server ended, or `running`."""
    if exit_codes[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            exit_codes[pid] = os.waitstatus_to_exitcode(status)
            kill_group(pid)
    return "running" if exit_codes[pid] is None else str(exit_codes[pid])


def stop(pid: int) -> str:
    """Kill a server and what it has started, and say how it ended."""
    if poll(pid) == "running":
        kill_group(pid)
        exit_codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return str(exit_codes.pop(pid))


def kill_group(pid: int) -> None:
    """Kill all processes of a server."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nothing is left of it


def serve(directory: str, memory_limit: int, parent: int) -> None:
    """Serve until killed, or until the process it was forked from is gone."""
    os.setpgid(0, 0)
    log = os.open(os.path.join(directory, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 256)
    os.chdir(directory)
    os.environ.update(HOME=directory, APPWORLD_ROOT=directory, APPWORLD_CACHE=directory)
    if sys.platform == "linux":
        # comes even while code in C holds the interpreter's lock
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if memory_limit:
            resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=end_with, args=(parent, os.getppid, os.killpg, time.sleep), daemon=True).start()

    import uvicorn
    from appworld.serve.environment import app

    uvicorn.run(app, uds=os.path.join(directory, "socket"), log_level="error")


def end_with(parent: int, parent_now, kill_group_now, sleep) -> None:
    """Kill this process group when the parent is gone. AppWorld replaces such functions while code of a model runs."""
    while parent_now() == parent:
        sleep(1.0)
    kill_group_now(0, signal.SIGKILL)


def main(memory_limit: int) -> None:
    """Obey until the input ends."""
    requests = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed goes to the log

    from appworld.apps import build_main_app
    from appworld.serve.environment import app  # noqa: F401 - imported here once for all servers

    build_main_app()
    gc.collect()
    gc.freeze()  # leaves these objects' pages shared
    try:
        print("ready", file=answers)
        for line in requests:
            verb, argument = line.rstrip("\n").split(" ", 1)
            if verb == "start":
                answer = start(argument, memory_limit)
            else:
                answer = {"poll": poll, "stop": stop}[verb](int(argument))
            print(answer, file=answers)
    except OSError:
        pass  # the other end is gone, in the middle of a request
    finally:
        for pid in list(exit_codes):
            stop(pid)
        shutil.rmtree(os.getcwd(), ignore_errors=True)
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
