"""The cache of models that the examples convert and warm up."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from seeupo_trl.recipes.cache import default_cache_dir, made_once


RACE = """
import sys
from pathlib import Path
from seeupo_trl.recipes.cache import made_once

def make(directory):
    (directory / "model").write_text(sys.argv[2])
    print("filled", flush=True)
    sys.stdin.readline()

print(made_once(Path(sys.argv[1]), make).joinpath("model").read_text(), flush=True)
"""


def write(directory: Path) -> None:
    (directory / "model").write_text("weights")


def test_entry_is_made_once(tmp_path):
    entry = made_once(tmp_path / "cache" / "entry", write)
    assert made_once(entry, lambda directory: pytest.fail("made again")) == entry
    assert [path.name for path in entry.parent.iterdir()] == ["entry"]


def test_the_cache_lies_at_home_unless_a_variable_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", None):
        monkeypatch.setenv("SEEUPO_TRL_CACHE", value) if value == "" else monkeypatch.delenv("SEEUPO_TRL_CACHE")
        assert default_cache_dir() == tmp_path / ".cache" / "seeupo_trl"
    monkeypatch.setenv("SEEUPO_TRL_CACHE", "~/models")
    assert default_cache_dir() == tmp_path / "models"


def test_failure_leaves_nothing(tmp_path):
    def fail(directory):
        write(directory)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        made_once(tmp_path / "entry", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_cache_is_of_its_user_alone(tmp_path):
    entry = made_once(tmp_path / "cache" / "entry", write)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (entry.parent, entry)] == [0o700, 0o700]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_entry_of_another_user_is_refused(tmp_path):
    entry = made_once(tmp_path / "entry", write)
    os.chown(entry, 12345, 12345)
    with pytest.raises(PermissionError, match="made by another user.*--cache_dir or \\$SEEUPO_TRL_CACHE"):
        made_once(entry, write)


def test_two_processes_make_the_same_entry(tmp_path):
    start = [sys.executable, "-c", RACE, str(tmp_path / "entry")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*start, name], **pipes) for name in ("first", "second")]
    assert [process.stdout.readline() for process in processes] == ["filled\n"] * 2
    # both have filled a directory of their own; the first to rename wins, and the other takes what is there
    assert [process.communicate("\n")[0] for process in processes] == ["first\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
