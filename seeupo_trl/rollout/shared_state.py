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
    What calls of environments have to leave as it is where this context is entered.

    It is looked at before and after each call. A call that replaces something for itself and puts it back is seen by
    any other that begins or ends meanwhile, and by none where environments play one after another.

    Args:
        settings ([`~seeupo_trl.rollout.settings.RolloutSettings`]):
            Says whether environments play one after another: then they may replace what they like.
    """

    def __init__(self, settings: RolloutSettings):
        self._is_shared = settings.max_concurrent_envs > 1

    def __enter__(self) -> "SharedState":
        self._before = _shared()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        if error_type is None:
            self.check()
        elif issubclass(error_type, SharedStateError):
            self._restore_streams()

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
        if not self._is_shared:
            return
        replaced = [name for name, new, old in zip(_NAMES, _shared(), self._before, strict=True) if new != old]
        if replaced:
            self._restore_streams()
            raise SharedStateError(
                f"Environments that play at the same time replace {' and '.join(replaced)} for one another, as "
                "`contextlib.redirect_stdout` and `os.chdir` do: these belong to the whole process, so results of one "
                "episode would show in another. Set `max_concurrent_envs=1` to play one after another, or pass the "
                "output and the directory on without them (`subprocess.run(..., capture_output=True, cwd=...)`, an "
                "`IsolatedEnvironment`). What is to be replaced for good belongs in the script, before training."
            )

    def _restore_streams(self) -> None:
        sys.stdout, sys.stderr, _ = self._before


_NAMES = ("sys.stdout", "sys.stderr", "the working directory")


def _shared() -> tuple[Any, Any, str | None]:
    try:
        directory = os.getcwd()
    except OSError:  # it was deleted
        directory = None
    return sys.stdout, sys.stderr, directory
