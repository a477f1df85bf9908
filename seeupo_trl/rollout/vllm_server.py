"""
Single requests to a vLLM server: many at once, from every process, with no collective operation during a rollout.

A request that gets no answer, or one that is none, is sent again with the same seed. A server that was started anew is
not asked again: it has lost the trainer's weights.
"""

import asyncio
import itertools
import json
import logging
import math
import re
import threading
import time
import weakref
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from trl.generation.vllm_client import parse_logprobs

from .sampler import Request, Response
from .turn_ends import TurnEnds
from .vllm_settings import payload_of


if TYPE_CHECKING:
    from aiohttp import ClientSession
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

PAUSE = 0.5  # seconds before a request is sent again; twice as many before each further time, at most 8
ATTEMPTS = 3  # for a request that is answered, but wrongly or too late
_START_TIME = re.compile(r"^process_start_time_seconds ([\d.e+]+)", re.MULTILINE)

# when the server of a trainer was started, as it said when it first got the trainer's weights
_start_times: "weakref.WeakKeyDictionary[GRPOTrainer, float]" = weakref.WeakKeyDictionary()


class ServerError(RuntimeError):
    """A vLLM server does not answer as it should."""


class VllmServerSampler:
    """
    Answers single requests with a vLLM server.

    Args:
        url (`str`):
            Address of the server.
        payload (`dict`):
            What it is asked for a response, without the prompt and the seed.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.
        request_timeout (`float`):
            Seconds that the server has for a response; `math.inf` for no limit.
        patience (`float`):
            Seconds for which a server that cannot be reached is tried again.

    Raises:
        `ServerError`:
            From `poll`, when the server cannot be reached, refuses a request, answers wrongly or too late three times,
            or was started anew.

    `start_time` is when the server was started, in seconds since 1970; `None` if it does not say.
    """

    is_independent = True

    def __init__(self, url: str, payload: dict[str, Any], ends: TurnEnds, request_timeout: float, patience: float):
        self._url = url
        self._payload = payload
        self._ends = ends
        self._request_timeout = None if request_timeout == math.inf else request_timeout
        self._patience = patience
        self._outcomes: SimpleQueue[tuple[int, Response | Exception]] = SimpleQueue()
        self._numbers = itertools.count()
        self._tasks: dict[int, tuple[int, Any]] = {}  # by episode: number of its request, and its task
        self._session: ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run_and_close, args=[self._loop], daemon=True, name="seeupo-vllm-requests").start()
        try:
            self.start_time = self._run(self._open()).result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, trainer: "GRPOTrainer", ends: TurnEnds, request_timeout: float) -> "VllmServerSampler":
        """
        The sampler of a trainer, whose weights are pushed if they have changed. A collective operation.

        Args:
            trainer ([`~trl.GRPOTrainer`]):
                A trainer with `vllm_mode="server"`.
            ends, request_timeout:
                As in [`VllmServerSampler`].

        Raises:
            `ServerError`:
                When the server was started anew since the trainer's first rollout.
        """
        payload = payload_of(trainer, ends)
        url = server_url(trainer)
        sampler = cls(url, payload, ends, request_timeout, trainer.vllm_generation.server_timeout)
        if _start_times.setdefault(trainer, sampler.start_time) != sampler.start_time:
            sampler.close()
            raise ServerError(_started_anew(url))
        return sampler

    def submit(self, request: Request) -> None:
        """Send a request."""
        number = next(self._numbers)
        self._tasks[request.key] = (number, self._run(self._answer(number, request)))

    def poll(self, timeout: float | None) -> list[Response]:
        """Wait for responses."""
        responses = []
        while self._tasks:
            try:
                number, outcome = self._outcomes.get(timeout=0.0 if responses else timeout)
            except Empty:
                break
            if isinstance(outcome, Exception):
                raise outcome
            if self._tasks.get(outcome.key, (None, None))[0] == number:  # else it was given up
                del self._tasks[outcome.key]
                responses.append(outcome)
        return responses

    def forget(self, key: int) -> None:
        """Give up the request of an episode. The server stops when the connection is closed."""
        _, task = self._tasks.pop(key, (None, None))
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Give up all requests."""
        for key in list(self._tasks):
            self.forget(key)
        if self._session is not None:
            self._run(self._session.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self) -> float | None:
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        self._session = ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None))
        return await self._when_started()

    async def _when_started(self) -> float | None:
        """When the server was started, in seconds since 1970; `None` if it does not say."""
        async with self._session.get(f"{self._url}/metrics") as answer:
            found = _START_TIME.search(await answer.text())
        return None if found is None else float(found[1])

    async def _answer(self, number: int, request: Request) -> None:
        try:
            outcome = await self._response(request)
        except Exception as error:
            outcome = error
        self._outcomes.put((number, outcome))

    async def _response(self, request: Request) -> Response:
        """The response to a request, which is sent again when there is none."""
        from aiohttp import ClientConnectionError, ClientPayloadError

        pauses, attempts = _pauses(), 0
        unreachable_since = None
        while True:
            try:
                return await asyncio.wait_for(self._post(request), self._request_timeout)
            except (ClientConnectionError, ClientPayloadError) as error:
                unreachable_since = unreachable_since or time.monotonic()
                if time.monotonic() - unreachable_since > self._patience:
                    raise ServerError(
                        f"The vLLM server at {self._url} cannot be reached any more: {type(error).__name__}: {error}. "
                        f"It was tried for {self._patience:g} seconds (`vllm_server_timeout`). Start the server again "
                        "and resume the run from its last checkpoint."
                    ) from error
            except (_WrongAnswer, TimeoutError) as error:
                attempts += 1
                reason = str(error) or f"no response within {self._request_timeout:g} seconds (`request_timeout`)"
                if attempts == ATTEMPTS:
                    raise ServerError(
                        f"The vLLM server at {self._url} did not answer a request in {ATTEMPTS} attempts. The last: "
                        f"{reason}."
                    ) from error
                logger.warning("A request to the vLLM server is sent again: %s.", reason)
            await asyncio.sleep(next(pauses))
            await self._check_start_time()

    async def _check_start_time(self) -> None:
        from aiohttp import ClientError

        try:
            start_time = await self._when_started()
        except ClientError:
            return  # it is not there yet
        if start_time != self.start_time:
            raise ServerError(_started_anew(self._url))

    async def _post(self, request: Request) -> Response:
        payload = {**self._payload, "prompt": request.context_ids, "seed": request.seed}
        async with self._session.post(f"{self._url}/v1/completions", json=payload) as answer:
            if 400 <= answer.status < 500:
                raise ServerError(
                    f"The vLLM server at {self._url} refused a request of {len(request.context_ids)} tokens with "
                    f"status {answer.status}: {(await answer.text())[:500]}"
                )
            if answer.status != 200:
                raise _WrongAnswer(f"status {answer.status}: {(await answer.text())[:500]}")
            try:
                return self._read(request, json.loads(await answer.text()))
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                raise _WrongAnswer(f"an answer that is none ({type(error).__name__}: {error})") from error

    def _read(self, request: Request, answer: dict[str, Any]) -> Response:
        (choice,) = answer["choices"]
        if choice["prompt_token_ids"] != request.context_ids:
            raise ValueError("it answers another context")
        ids = choice["token_ids"]
        (logprobs,), (offered,) = parse_logprobs([choice["logprobs"]])
        rows = zip(ids, logprobs, offered, strict=True)
        logps = [row[tokens.index(token)] for token, row, tokens in rows]  # other tokens may be likelier
        if not all(isinstance(logp, float | int) and math.isfinite(logp) for logp in logps):
            raise ValueError("a log-probability is not a number")
        length = self._ends.length_of(ids)
        return Response(request.key, ids[:length], logps[:length])


class _WrongAnswer(Exception):
    """The server answered, but not with a response."""


def server_url(trainer: "GRPOTrainer") -> str:
    """
    Address of a trainer's vLLM server.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer with `vllm_mode="server"`.
    """
    generation = trainer.vllm_generation
    url = generation.server_base_url or f"http://{generation.server_host}:{generation.server_port}"
    return url.rstrip("/")


def reason_against_server(trainer: "GRPOTrainer") -> str | None:
    """
    Why the processes cannot send their own requests to a trainer's vLLM server. A collective operation.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer with `vllm_mode="server"`.
    """
    import requests

    try:
        reached = requests.get(f"{server_url(trainer)}/health", timeout=10).status_code == 200
    except requests.RequestException:
        reached = False
    accelerator = trainer.accelerator
    missing = int(accelerator.gather(torch.tensor([not reached], device=accelerator.device)).sum())
    if missing:
        return (
            f"{missing} of {accelerator.num_processes} processes cannot reach the vLLM server at "
            f"{server_url(trainer)}; give an address that all of them can reach as `vllm_server_base_url`"
        )
    return None


def _started_anew(url: str) -> str:
    return (
        f"The vLLM server at {url} was started anew during the run, so it has lost the trainer's weights. Resume the "
        "run from its last checkpoint."
    )


def _pauses() -> Iterator[float]:
    pause = PAUSE
    while True:
        yield pause
        pause = min(2 * pause, 8.0)


def _run_and_close(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
