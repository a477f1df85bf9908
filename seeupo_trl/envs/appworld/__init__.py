"""AppWorld, everyday tasks that are solved by writing Python code, as an environment."""

from .environment import AppWorldEnvironment, load_appworld, opening_messages


__all__ = ["AppWorldEnvironment", "load_appworld", "opening_messages"]
