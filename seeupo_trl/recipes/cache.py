"""
A cache of models on disk: each entry is a directory that is there as a whole or not at all.

Entries are made in a directory of an unpredictable name that nobody else may read, and renamed when they are whole.
Processes that make the same entry at the same time do not disturb one another: the first one's stays.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def default_cache_dir() -> Path:
    """`$SEEUPO_TRL_CACHE` where it is set, else `~/.cache/seeupo_trl`."""
    return Path(os.environ.get("SEEUPO_TRL_CACHE") or "~/.cache/seeupo_trl").expanduser()


def made_once(entry: Path, make: Callable[[Path], None]) -> Path:
    """
    An entry of the cache, made where it is not there yet.

    Args:
        entry (`Path`):
            Directory of the entry. Its name has to tell everything that it was made of.
        make (`Callable[[Path], None]`):
            Fills the empty directory that it is given.

    Returns:
        `Path`:
            `entry`, which is whole.

    Raises:
        `PermissionError`:
            When the entry belongs to another user, whose model would be trained unseen.
    """
    if not entry.is_dir():
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=entry.parent))
        try:
            make(temporary)
            _rename_unless_there(temporary, entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if os.name == "posix" and entry.stat().st_uid != os.geteuid():
        raise PermissionError(
            f"{entry} was made by another user. Give a directory of your own, by --cache_dir or $SEEUPO_TRL_CACHE."
        )
    return entry


def _rename_unless_there(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        # another process was faster
        if not target.is_dir():
            raise
