"""
What it costs that episodes wait for each other: both schedules of a rollout in simulated time.

The schedules are the package's own, `play_freely` and `play_in_lock_step`. Time is a number: an engine whose decode
step takes 20 ms and 0.2 ms more for each running sequence, responses and environments of lognormal length (sigma 1,
responses of at most 4,000 tokens), episodes of 1 to so many turns. The rollout's own time is not in it.
"""

import math
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from heapq import heappop, heappush
from types import SimpleNamespace

import numpy as np

from seeupo_trl.envs import StopReason
from seeupo_trl.rollout.environment_pool import CallOutcome, EnvironmentPool
from seeupo_trl.rollout.episode import Episode
from seeupo_trl.rollout.free import play_freely
from seeupo_trl.rollout.lock_step import play_in_lock_step
from seeupo_trl.rollout.progress import Progress
from seeupo_trl.rollout.sampler import Request, Response
from seeupo_trl.rollout.settings import RolloutSettings


STEP, STEP_OF_A_ROW = 0.020, 0.0002  # seconds
MAX_TOKENS = 4000


@dataclass(frozen=True)
class Shape:
    """Episodes of 1 to `turns` turns, with mean tokens of a response and mean seconds of an environment's step."""

    name: str
    episodes: int
    turns: int
    tokens: float
    seconds: float


SHAPES = (
    Shape("BFCL, thinking", 128, 10, 500, 0.0),
    Shape("BFCL, no thinking", 128, 10, 80, 0.0),
    Shape("AppWorld", 128, 10, 400, 0.3),
    Shape("slow environments", 128, 10, 200, 2.0),
    Shape("long episodes", 64, 40, 200, 0.5),
)


class Workload:
    """
    Lengths of all responses and steps, which both schedules play.

    Attributes:
        tokens (`list[list[int]]`):
            Tokens of each response, by episode and turn.
        seconds (`list[list[float]]`):
            Seconds of each step.
    """

    def __init__(self, shape: Shape, seed: int):
        rng = np.random.default_rng(seed)
        turns = rng.integers(1, shape.turns, size=shape.episodes, endpoint=True)

        def lognormal(mean):
            return [mean * np.exp(rng.normal(-0.5, 1.0, size=number)) for number in turns]

        self.tokens = [np.clip(row.round(), 1, MAX_TOKENS).astype(int).tolist() for row in lognormal(shape.tokens)]
        self.seconds = [row.tolist() for row in lognormal(shape.seconds)]

    def bound(self) -> float:
        """
        Seconds that no schedule can undercut: those of the longest episode with the engine for itself, or the steps
        that the engine must take (one for each token of the longest episode, and enough for all tokens).
        """
        tokens = [sum(row) for row in self.tokens]
        alone = (sum(seconds) + n * (STEP + STEP_OF_A_ROW) for seconds, n in zip(self.seconds, tokens, strict=True))
        steps = max(max(tokens), math.ceil(sum(tokens) / len(tokens)))
        return max(max(alone), STEP * steps + STEP_OF_A_ROW * sum(tokens))


class Engine:
    """A sampler in simulated time. `now` is the time, in seconds; a request joins at the next step."""

    def __init__(self, workload: Workload):
        self.now = 0.0
        self._workload = workload
        self._joining: list[Request] = []
        self._running: list[tuple[int, int]] = []  # number of the last step, episode
        self._num_steps = 0
        self._end: float | None = None  # of the step that is being taken

    def submit(self, request: Request) -> None:
        self._joining.append(request)

    def poll(self, timeout: float | None) -> list[Response]:
        until = math.inf if timeout is None else self.now + timeout
        while True:
            if self._end is None and not self._begin_step():
                return []
            if self._end > until:
                self.now = until
                return []
            self.now, self._end = self._end, None
            self._num_steps += 1
            responses = []
            while self._running and self._running[0][0] == self._num_steps:
                responses.append(Response(heappop(self._running)[1], [0]))
            if responses:
                return responses

    def generate(self, contexts: list[list[int]], *args: object) -> tuple[list[list[int]], None]:
        """A response for each context, when all of them are there: TRL's `_generate_single_turn`."""
        for context in contexts:
            self.submit(Request(context[0], context, 0))
        missing = len(contexts)
        while missing:
            missing -= len(self.poll(None))
        return [[0] for _ in contexts], None

    def forget(self, key: int) -> None:
        pass

    def close(self) -> None:
        assert not self._joining and not self._running

    def _begin_step(self) -> bool:
        for request in self._joining:
            episode, turn = request.context_ids
            heappush(self._running, (self._num_steps + self._workload.tokens[episode][turn], request.key))
        self._joining.clear()
        if self._running:
            self._end = self.now + STEP + STEP_OF_A_ROW * len(self._running)
        return bool(self._running)


class Calls:
    """Calls of environments in simulated time, in place of `PendingCalls`; a function returns its seconds."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._calls: list[tuple[float, int, float]] = []  # when it ends, key, seconds

    def __len__(self) -> int:
        return len(self._calls)

    def make(self, key: int, instance: None, function) -> None:
        seconds = function()
        heappush(self._calls, (self._engine.now + seconds, key, seconds))

    def wait(self, timeout: float | None) -> list[tuple[int, CallOutcome]]:
        if not self._calls:
            return []
        until = math.inf if timeout is None else self._engine.now + timeout
        self._engine.now = max(self._engine.now, min(self._calls[0][0], until))
        outcomes = []
        while self._calls and self._calls[0][0] <= self._engine.now:
            _, key, seconds = heappop(self._calls)
            future: Future = Future()
            future.set_result(None)
            outcomes.append((key, CallOutcome(future, None, seconds)))
        return outcomes

    def give_up(self) -> None:
        assert not self._calls


class Environments(EnvironmentPool):
    """Environments that only take their time."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.pool = self
        self._engine = engine

    def pending_calls(self, timeout: float | None) -> Calls:
        return Calls(self._engine)


class Ends:
    """Every response is whole."""

    def applied_to(self, trainer):
        return nullcontext()

    def length_of(self, token_ids: list[int]) -> int:
        return len(token_ids)


class Batch:
    """Stands in for `RolloutBatch`: episodes without messages, whose contexts are their number and their turn's."""

    def __init__(self, workload: Workload):
        self.engine = Engine(workload)
        self.episodes = [Episode(key, {}) for key in range(len(workload.tokens))]
        self.environments = Environments(self.engine)
        self.settings = RolloutSettings()
        self.progress = Progress()
        self.ends = Ends()
        self.trainer = SimpleNamespace(
            accelerator=SimpleNamespace(num_processes=1, is_main_process=True),
            args=SimpleNamespace(disable_tqdm=True),
            use_vllm=True,
            _generate_single_turn=self.engine.generate,
        )
        self._workload = workload

    def begin(self, episode: Episode):
        return lambda: 0.0, False

    def begun(self, episode: Episode, outcome: CallOutcome) -> None:
        episode.context_ids = [episode.key, 0]

    def request(self, episode: Episode) -> Request:
        return Request(episode.key, episode.context_ids, 0)

    def act(self, episode: Episode, action_ids: list[int], logps: None) -> None:
        episode.turns.append(action_ids)

    def step(self, episode: Episode):
        return lambda: self._workload.seconds[episode.key][len(episode.turns) - 1]

    def answered(self, episode: Episode, outcome: CallOutcome) -> None:
        episode.context_ids = [episode.key, len(episode.turns)]
        if len(episode.turns) == len(self._workload.tokens[episode.key]):
            episode.stop_reason = StopReason.completed


def seconds_of(schedule: str, workload: Workload) -> float:
    """
    Simulated seconds of a rollout.

    Args:
        schedule (`str`):
            `"free"` or `"lock step"`.
        workload ([`Workload`]):
            What is played.
    """
    batch = Batch(workload)
    with batch.progress.shown(batch.trainer, len(batch.episodes)):
        if schedule == "free":
            play_freely(batch, batch.engine)
        else:
            play_in_lock_step(batch)
    assert [len(episode.turns) for episode in batch.episodes] == [len(row) for row in workload.tokens]
    return batch.engine.now


def undelayed_seconds(workload: Workload) -> float:
    """Seconds of a rollout in which every request joins at the first step after it: no schedule is asked."""
    now, end = 0.0, 0.0
    requests = [(0.0, episode, 0) for episode in range(len(workload.tokens))]
    missing: dict[tuple[int, int], int] = {}
    while requests or missing:
        if not missing:
            now = max(now, requests[0][0])
        while requests and requests[0][0] <= now:
            _, episode, turn = heappop(requests)
            missing[episode, turn] = workload.tokens[episode][turn]
        now += STEP + STEP_OF_A_ROW * len(missing)
        missing = {row: number - 1 for row, number in missing.items()}
        for episode, turn in [row for row, number in missing.items() if number == 0]:
            del missing[episode, turn]
            answer = now + workload.seconds[episode][turn]
            end = max(end, answer)
            if turn + 1 < len(workload.tokens[episode]):
                heappush(requests, (answer, episode, turn + 1))
    return end


def barrier_table(num_seeds: int) -> None:
    """Print both schedules' seconds, means over seeds."""
    print(f"\nEpisodes that wait for each other, and episodes that do not; simulated seconds, {num_seeds} seeds\n")
    print("| episodes | turns | tokens | environment | lock step | free | gain | undelayed | bound | free / bound |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        workloads = [Workload(shape, seed) for seed in range(num_seeds)]
        rows = [
            (seconds_of("lock step", w), seconds_of("free", w), undelayed_seconds(w), w.bound()) for w in workloads
        ]
        lock_step, free, undelayed, bound = np.array(rows).T
        gain, distance = lock_step / free, free / bound
        print(
            f"| {shape.episodes}, {shape.name} | 1 to {shape.turns} | {shape.tokens:g} | {shape.seconds:g} s "
            f"| {lock_step.mean():.0f} | {free.mean():.0f} "
            f"| **{gain.mean():.1f}** ({gain.min():.1f} to {gain.max():.1f}) "
            f"| {undelayed.mean():.0f} | {bound.mean():.0f} | {distance.mean():.2f} |",
            flush=True,
        )
