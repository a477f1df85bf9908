"""
What all threads of a process share, and environments that play at the same time must not replace: standard output and
the working directory. `contextlib.redirect_stdout` and `os.chdir` replace them for every thread, so that one episode
reads what another printed, or finds another's files. Nothing would fail: the policy would learn from wrong results.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from .settings import RolloutSettings


class SharedStateError(RuntimeError):
    """Environments that play at the same time replace what they share: the script's mistake, which ends the run."""


class SharedState:
    """
    What calls of environments have to leave as it is in this context.

    It is looked at before and after each call. A call that replaces something for itself and puts it back is seen by
    any other that begins or ends meanwhile, and by none where environments play one after another.

    Args:
        settings ([`~seeupo_trl.rollout.settings.RolloutSettings`]):
            Says whether environments play one after another: then they may replace what they like.
    """

    def __init__(self, settings: RolloutSettings):
        self._is_shared = settings.max_concurrent_envs > 1
        self._before: tuple[Any, Any, str | None] | None = None  # nothing is looked at

    def __enter__(self) -> "SharedState":
        self._before = _shared() if self._is_shared else None
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        if error_type is None:
            self.check()
        elif issubclass(error_type, SharedStateError):
            sys.stdout, sys.stderr, _ = self._before
            return
        self._before = None  # when a call that was given up returns, the script may have replaced something itself

    def guarded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, with a look before and after."""

        def call() -> Any:
            self.check()
            try:
                return function()
            finally:
                self.check()

        return call

    def check(self) -> None:
        """
        Raises:
            [`SharedStateError`]:
                When something is not what it was.
        """
        before = self._before
        if before is None:
            return
        replaced = [name for name, new, old in zip(_NAMES, _shared(), before, strict=True) if new != old]
        if replaced:
            sys.stdout, sys.stderr, _ = before
            raise SharedStateError(
                f"Environments that play at the same time replace {' and '.join(replaced)} for one another, as "
                "`contextlib.redirect_stdout` and `os.chdir` do: these belong to the whole process, so results of one "
                "episode would show in another. Set `max_concurrent_envs=1` to play one after another, or pass the "
                "output and the directory on without them (`subprocess.run(..., capture_output=True, cwd=...)`, an "
                "`IsolatedEnvironment`). What is to be replaced for good belongs in the script, before training."
            )


_NAMES = ("sys.stdout", "sys.stderr", "the working directory")


def _shared() -> tuple[Any, Any, str | None]:
    try:
        directory = os.getcwd()
    except OSError:  # it was deleted
        directory = None
    return sys.stdout, sys.stderr, directory
