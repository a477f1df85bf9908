"""
Single requests to a colocated vLLM engine: it goes on by steps, and environments work between them.

Where an engine is spread over a group of processes (`vllm_tensor_parallel_size`), all of them must hand in the same
requests before the same step. So they exchange what each has to hand in, and then take the same steps.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .sampler import Request, Response
from .turn_ends import TurnEnds
from .vllm import kept_awake
from .vllm_settings import sampling_params_of


if TYPE_CHECKING:
    from trl import GRPOTrainer

STEPS = 8  # of a group's engine between two exchanges
REST = 0.005  # seconds between two exchanges when no process of a group has a request


@dataclass
class _News:
    """What a process of a group tells the others before the next steps."""

    requests: list[Request] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    is_closed: bool = False


class VllmEngineSampler:
    """
    Answers single requests with the trainer's colocated engine.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer with `vllm_mode="colocate"`, whose weights are pushed if they have changed. Making a sampler is a
            collective operation.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.
    """

    def __init__(self, trainer: "GRPOTrainer", ends: TurnEnds):
        from vllm.sampling_params import RequestOutputKind

        vllm = trainer.vllm_generation
        self._awake = ExitStack()
        self._awake.enter_context(kept_awake(trainer))
        self._params = sampling_params_of(trainer, ends)
        self._params.output_kind = RequestOutputKind.FINAL_ONLY
        self._engine = vllm.llm.llm_engine
        self._ends = ends
        self._news = _News()
        self._asked: dict[str, tuple[int, int]] = {}  # requests of all processes in the engine: process and episode
        self._counter = vllm.llm.request_counter
        self._group = vllm.tp_group if vllm.tensor_parallel_size > 1 else None
        self._process = 0 if self._group is None else torch.distributed.get_rank(self._group)

    def submit(self, request: Request) -> None:
        """Hand a request in."""
        self._news.requests.append(request)

    def poll(self, timeout: float | None) -> list[Response]:
        """
        Take steps until a response is there or `timeout` seconds are over. In a group, all processes of which call it
        as long as any has requests, it takes a few steps only.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            self._exchange()
            responses = self._steps()
            in_time = until is None or time.monotonic() < until
            mine = any(process == self._process for process, _ in self._asked.values())
            if responses or not mine or not in_time:
                return responses

    def forget(self, key: int) -> None:
        """Give up the request of an episode."""
        self._news.forgotten.append(key)

    def close(self) -> None:
        """Give up all requests. In a group: when all of its processes have closed."""
        mine = [key for process, key in self._asked.values() if process == self._process]
        self._news = _News(forgotten=mine, is_closed=True)
        while not self._exchange():
            self._steps()
            self._news.is_closed = True
        self._awake.close()

    def _exchange(self) -> bool:
        """Hand in what is new, the same on all processes of a group. Returns whether all have closed."""
        news, self._news = [self._news], _News()
        if self._group is not None:
            mine, news = news[0], [None] * torch.distributed.get_world_size(self._group)
            torch.distributed.all_gather_object(news, mine, group=self._group)
        for process, told in enumerate(news):
            self._forget(process, set(told.forgotten))
            for request in told.requests:
                self._hand_in(process, request)
        return all(told.is_closed for told in news)

    def _hand_in(self, process: int, request: Request) -> None:
        name = str(next(self._counter))
        params = self._params.clone()
        params.seed = request.seed
        self._engine.add_request(name, {"prompt_token_ids": request.context_ids}, params)
        self._asked[name] = (process, request.key)

    def _forget(self, process: int, keys: set[int]) -> None:
        names = [name for name, asked in self._asked.items() if asked[0] == process and asked[1] in keys]
        if names:
            self._engine.abort_request(names)
        for name in names:
            del self._asked[name]

    def _steps(self) -> list[Response]:
        """Take a step, in a group several; returns the responses of this process."""
        if not self._asked:
            if self._group is not None:
                time.sleep(REST)
            return []
        responses = []
        for _ in range(1 if self._group is None else STEPS):
            outputs = [output for output in self._engine.step() if output.finished]
            for output in outputs:
                process, key = self._asked.pop(output.request_id, (None, None))
                if process == self._process:
                    responses.append(self._response(key, output))
            if outputs:
                break
        return responses

    def _response(self, key: int, output: Any) -> Response:
        from trl.generation.vllm_generation import extract_logprobs

        logprobs, _ = extract_logprobs([output])
        ids = list(output.outputs[0].token_ids)
        length = self._ends.length_of(ids)
        return Response(key, ids[:length], [token[0] for token in logprobs[0][:length]])
