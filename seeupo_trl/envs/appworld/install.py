"""Where AppWorld and its data are, or the commands that get them."""

import json
import os
import subprocess
from pathlib import Path


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

PROBE = """
import importlib.metadata, importlib.util, json, os
spec = importlib.util.find_spec("appworld")
folder = spec and spec.submodule_search_locations[0]
print(json.dumps({
    "version": importlib.metadata.version("appworld") if spec else None,
    "unpacked": bool(spec) and os.path.isfile(os.path.join(folder, "apps", "supervisor", "apis.py")),
}))
"""


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
    path = Path(os.path.abspath(Path(python).expanduser()))  # not resolved: a link is what makes it the environment's
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
