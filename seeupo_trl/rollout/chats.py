"""The chat format of each trainer, and a copy of it for a batch that plays beside the training."""

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from .chat_format import ChatFormat


if TYPE_CHECKING:
    from trl import GRPOTrainer


class Chats:
    """
    The chat formats of the trainers that a rollout has played for.

    Args:
        make (`Callable[[GRPOTrainer], ChatFormat]`, *optional*, defaults to [`ChatFormat`]):
            Makes that of a trainer.
    """

    def __init__(self, make: "Callable[[GRPOTrainer], ChatFormat]" = ChatFormat):
        self._make = make
        self._formats: weakref.WeakKeyDictionary[GRPOTrainer, ChatFormat] = weakref.WeakKeyDictionary()
        self._copies: weakref.WeakKeyDictionary[GRPOTrainer, ChatFormat] = weakref.WeakKeyDictionary()

    def of(self, trainer: "GRPOTrainer", in_thread: bool = False) -> ChatFormat:
        """
        That of a trainer.

        Args:
            trainer ([`~trl.GRPOTrainer`]):
                The trainer whose policy plays.
            in_thread (`bool`, *optional*, defaults to `False`):
                One with a copy of the tokenizer, for a thread beside the main one: fast tokenizers work in one thread
                at a time.
        """
        if trainer not in self._formats:
            self._formats[trainer] = self._make(trainer)
        if not in_thread:
            return self._formats[trainer]
        if trainer not in self._copies:
            self._copies[trainer] = copy.deepcopy(self._formats[trainer])
        return self._copies[trainer]
