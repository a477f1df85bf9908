"""
Single requests to the policy: what a rollout asks for, and what it gets, whatever plays behind it.

A rollout hands in a request when it is the policy's turn in an episode and asks now and then which responses are
there; they come in any order. So no episode waits for another. Which response a request gets depends on the policy,
the context and the request's own seed, not on what else is asked at the same time.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """
    One response to be sampled.

    Args:
        key (`int`):
            The episode. It has at most one request at a time.
        context_ids (`list[int]`):
            Token ids of the context, at least one.
        seed (`int`):
            Seed of the response.
    """

    key: int
    context_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Response:
    """
    What the policy answered.

    Args:
        key (`int`):
            The episode.
        action_ids (`list[int]`):
            Token ids, up to and including the one that ends the turn. Without such an end they were cut, at
            `max_completion_length` tokens or where the backend has no more room.
        logps (`list[float]`, *optional*):
            Their log-probabilities under the sampler; `None` where it reports none.
    """

    key: int
    action_ids: list[int]
    logps: list[float] | None = None


class Sampler(Protocol):
    """
    A backend that answers single requests, for one rollout: parameters do not change while it is in use.

    `submit` hands a request in and returns at once. `poll` works on the requests, or waits for them, until a response
    is there or `timeout` seconds are over (`None`: until a response is there; it returns at once without requests),
    and returns the responses that came since the last call. `forget` says that an episode has ended: a request of it
    is given up, and nothing is kept of it. `close` gives everything up.

    One that samples from a copy of the parameters, works in any thread and leaves PyTorch's own random numbers alone
    may say so with `is_independent = True`: then the trainer may update the parameters while it is in use, see
    [`seeupo_trl.rollout.ahead`]. It reports log-probabilities, and its `poll` keeps to its `timeout`.
    """

    def submit(self, request: Request) -> None: ...

    def poll(self, timeout: float | None) -> list[Response]: ...

    def forget(self, key: int) -> None: ...

    def close(self) -> None: ...
