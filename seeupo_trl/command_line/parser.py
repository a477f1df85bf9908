"""How the commands report mistakes in their options: a line, with the nearest option where one is unknown."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..recipes.mistakes import UsageError, nearest


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a [`UsageError`]."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            kind = "option" if name.startswith("-") else "argument"
            self.error(f"unknown {kind}: {unknown[0]}.{nearest(name, self._option_string_actions)}")
        return options

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        raise UsageError(f"{message}{end} See `{self.prog} --help`.")
