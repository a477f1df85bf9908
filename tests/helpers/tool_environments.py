"""Environments of tools as TRL's documentation shows them, and one that fails as its row says."""

import asyncio
import sqlite3
import threading

import tool_calls


class Counter(tool_calls.Counter):
    """Text at the reset, a reward of its own, state that survives the episode."""

    def reset(self, start: int = 0, **row):
        self.value = start
        self.row = row
        return f" Start at {start}."

    def read(self) -> str:
        """
        Reads the counter.

        Returns:
            The counter in words.
        """
        return f"the counter is {self.value}"

    def fail(self, reason: str):
        """
        Fails.

        Args:
            reason: Why.
        """
        self.value -= 1
        raise ValueError(f"failed: {reason}")


class Library:
    """No text at the reset, coroutines beside functions, results that are not text."""

    def __init__(self):
        self.found = []

    def reset(self, shelf=None, **row) -> None:
        self.found = []
        self.shelf = shelf

    async def search(self, words: str, limit: int = 2) -> str:
        """
        Searches.

        Args:
            words: What for.
            limit: Most hits.

        Returns:
            Titles.
        """
        self.found.append(words)
        return "\n".join(f"{words} {number}" for number in range(limit))

    async def borrow(self, title: str) -> dict:
        """
        Borrows a book.

        Args:
            title: Its title.

        Returns:
            The receipt.
        """
        if not self.found:
            raise LookupError("search first")
        return {"title": title, "shelf": self.shelf}

    def count(self) -> int:
        """
        Counts what was found.

        Returns:
            The number.
        """
        return len(self.found)


class Silent:
    """Nothing to call; brings the task itself."""

    def reset(self, **row):
        self.row = row
        return "Say something."


class Database:
    """Holds what works in one thread only."""

    def __init__(self):
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("create table log (text)")

    def reset(self, **row):
        self.connection.execute("delete from log")

    def write(self, text: str) -> int:
        """
        Writes a line.

        Args:
            text: The line.

        Returns:
            Number of lines.
        """
        self.connection.execute("insert into log values (?)", (text,))
        return self._lines()

    def _lines(self) -> int:
        return self.connection.execute("select count(*) from log").fetchone()[0]

    def get_reward(self) -> float:
        return self._lines()


class Unreliable(Counter):
    """Fails as its row says: in how many resets, or where."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.value = 0
        self.free = threading.Event()

    def reset(self, fault=None, **row):
        if fault == "reset" or (fault == "first reset" and type(self).made <= 2):
            raise ConnectionError("no server")
        if fault == "reset hangs":
            self.free.wait(60)
        self.fault = fault
        return super().reset(**row)

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What to add.
        """
        if self.fault == "tool hangs":
            self.free.wait(60)
        return super().increment(step)

    async def wait(self) -> None:
        """Waits for ever."""
        await asyncio.sleep(60)

    def get_reward(self) -> float:
        if self.fault == "reward":
            raise ConnectionError("no judge")
        return super().get_reward()
