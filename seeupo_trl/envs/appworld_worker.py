"""
The process of one AppWorld server. It is run by the Python of AppWorld's own environment, never imported here:

    python -I appworld_worker.py SOCKET PARENT_PIPE MEMORY_LIMIT

It serves what `appworld serve environment` serves, but on a Unix socket (that command listens on all network
interfaces, and executes code for whoever asks), with a memory limit, and not longer than its parent lives.
"""

import os
import resource
import signal
import sys
import threading


def die_with_parent(pipe: int) -> None:
    """
    Kill this process group when the other end of a pipe is closed, by whatever the parent died of.

    A thread waits for that. On Linux the kernel also sends a signal whose default is to kill: it arrives even while
    code in C holds the interpreter's lock, when no thread runs.
    """
    # AppWorld replaces these functions while code of a model runs
    read, kill_group = os.read, os.killpg

    def wait() -> None:
        while read(pipe, 1):
            pass
        kill_group(0, signal.SIGKILL)

    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=wait, daemon=True).start()


def main(socket: str, pipe: int, memory_limit: int) -> None:
    """
    Serve until killed.

    Args:
        socket (`str`):
            Path of the Unix socket to listen on.
        pipe (`int`):
            File descriptor of the pipe whose other end the parent holds.
        memory_limit (`int`):
            Most bytes of address space, 0 for no limit. Code that asks for more gets a `MemoryError`.
    """
    die_with_parent(pipe)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_limit and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))

    import uvicorn
    from appworld.apps import build_main_app
    from appworld.serve.environment import app

    build_main_app()  # imports all apps, which takes seconds, before the first task wants them
    uvicorn.run(app, uds=socket, log_level="error")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
