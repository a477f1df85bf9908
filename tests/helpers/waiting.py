"""Waiting for what other threads and processes do."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Wait until something is so, and say whether it is."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def is_running(pid: int) -> bool:
    """Whether there is a process of that number, and no zombie."""
    try:
        os.kill(pid, 0)
        is_linux = Path("/proc").is_dir()
        return not is_linux or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
