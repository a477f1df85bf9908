"""Ctrl-C in the middle of a test, and what comes of it in other threads."""

import os
import signal
import threading
import time


def interrupt():
    """Ctrl-C, which the main thread hears of also while it waits; soon it does."""
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def living():
    """Threads of environments that play, or may play again."""
    return {thread for thread in threading.enumerate() if thread.name == "seeupo-environment"}
