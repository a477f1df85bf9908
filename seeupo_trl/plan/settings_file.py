"""A file of settings, YAML or JSON: a mapping of names to values, or an error that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_settings(path: str | Path, read: Callable[[str], Any] = yaml.safe_load) -> dict[str, Any]:
    """
    The settings in a file.

    Args:
        path (`str` or `Path`):
            The file.
        read (`Callable`, *optional*, defaults to `yaml.safe_load`):
            Makes values of the text; `json.loads` for a file that is strictly JSON.

    Raises:
        `ValueError`:
            When there is no such file, or it does not hold a mapping of names to values.
    """
    try:
        values = read(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text (UTF-8).") from error
    except (yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
        kind = "YAML" if read is yaml.safe_load else "JSON"
        raise ValueError(f"{path} is not {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ValueError(f"{path} {what}; it must contain a YAML mapping, lines of `name: value`.")
    wrong = next((name for name in values if not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(f"{path} has the key {wrong!r}, which is no name of a setting.")
    return values
