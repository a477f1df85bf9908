"""Single-player games of TextArena as environments."""

from .environment import TextArenaEnvironment, load_textarena


__all__ = ["TextArenaEnvironment", "load_textarena"]
