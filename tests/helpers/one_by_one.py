"""A sampler for tests: the trainer's own generation, one request at a time and in the worst order."""

import random

import pytest
import torch
from trl import GRPOTrainer

from seeupo_trl import SeeUPOTrainer
from seeupo_trl.rollout.sampler import Request, Response


ORDERS = ("first", "last", "random", "all at once")


class OneByOne:
    """
    Answers the oldest request first, or the newest, or any, or waits until it has nothing else to do and answers all.
    """

    def __init__(self, trainer, ends, order="last"):
        self.trainer, self.ends, self.order = trainer, ends, order
        self.pending: list[Request] = []
        self.forgotten, self.is_closed, self.random = [], False, random.Random(0)

    def submit(self, request):
        assert not self.is_closed
        assert request.key not in [other.key for other in self.pending]
        self.pending.append(request)

    def poll(self, timeout):
        if not self.pending or (self.order == "all at once" and timeout is not None):
            return []
        if self.order == "all at once":
            chosen, self.pending = self.pending[::-1], []
        else:
            index = {"first": 0, "last": -1, "random": self.random.randrange(len(self.pending))}[self.order]
            chosen = [self.pending.pop(index)]
        return [self.response(request) for request in chosen]

    def response(self, request):
        torch.manual_seed(request.seed)
        self.trainer.answering = request.key
        with self.ends.applied_to(self.trainer):
            (ids,), logps = self.trainer._generate_single_turn([request.context_ids], None, {}, 1)
        length = self.ends.length_of(list(ids))
        return Response(request.key, list(ids[:length]), None if logps is None else logps[0][:length])

    def forget(self, key):
        self.forgotten.append(key)
        self.pending = [request for request in self.pending if request.key != key]

    def close(self):
        self.is_closed = True


def play_one_by_one(patch: pytest.MonkeyPatch, order: str = "last") -> list[OneByOne]:
    """Have all trainers answer single requests so; returns the samplers that will have been made."""
    samplers = []

    def rollout_sampler(trainer, ends, settings):
        samplers.append(OneByOne(trainer, ends, order))
        return samplers[-1]

    for trainer_class in (GRPOTrainer, SeeUPOTrainer):
        patch.setattr(trainer_class, "rollout_sampler", rollout_sampler, raising=False)
    return samplers
