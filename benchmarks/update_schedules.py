"""The shapes of iterations and the schedules of their update phase that `update_cost.py` compares."""

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import torch

from seeupo_trl import SeeUPOConfig
from seeupo_trl.scoring.interface import Scores
from seeupo_trl.scoring.rows import Row, RowBatch
from seeupo_trl.scoring.tree_attention import flex_length, tree_block_mask
from seeupo_trl.scoring.trees import TreeScorer
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn
from seeupo_trl.update.entropy_bonus import EntropyBonus
from seeupo_trl.update.turn_updater import TurnUpdater


GROUP_SIZE = 8


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens of the episodes of an iteration."""

    prompt: int
    action: int
    observation: int
    turns: int
    stripped: int = 0  # tokens of an action that later contexts leave out
    groups: int = 1
    groups_without_variance: int = 0
    ragged: bool = False

    def scaled(self, scale: float) -> "Shape":
        lengths = {name: getattr(self, name) for name in ("prompt", "action", "observation", "stripped")}
        lengths = {name: max(round(length * scale), 1 if length else 0) for name, length in lengths.items()}
        return Shape(**{**self.__dict__, **lengths})


SHAPES = {
    "bfcl": Shape(5400, 60, 40, turns=10),
    "think": Shape(800, 400, 40, turns=8, stripped=300),
    "long": Shape(2000, 80, 60, turns=40),
    "mixed": Shape(5400, 60, 40, turns=10, groups=5, groups_without_variance=2, ragged=True),
}
SCHEDULES = ("reference", "rows", "trees", "trees, 4 updates", "trees, 8 updates", "simultaneous")


@dataclass(frozen=True)
class Episodes:
    """Trajectories and their advantages."""

    trajectories: list[Trajectory]
    advantages: list[float]

    @property
    def buffer(self) -> TurnBuffer:
        return TurnBuffer(self.trajectories)


def make_episodes(shape: Shape, vocabulary: int) -> Episodes:
    rng = random.Random(0)

    def tokens(length):
        return [rng.randrange(vocabulary) for _ in range(length)]

    trajectories, advantages = [], []
    for group in range(shape.groups):
        prompt = tokens(shape.prompt)
        for member in range(GROUP_SIZE):
            context, turns = prompt, []
            for _ in range(rng.randint(1, shape.turns) if shape.ragged else shape.turns):
                action = tokens(shape.action)
                turns.append(Turn(context, action))
                context = context + action[shape.stripped :] + tokens(shape.observation)
            trajectories.append(Trajectory(turns))
            advantages.append(0.0 if group < shape.groups_without_variance else (-1.0) ** member)
    return Episodes(trajectories, advantages)


def schedules_of(shape: Shape) -> list[str]:
    """Schedules that make sense for a shape: U updates only where there are more turns."""
    return [name for name in SCHEDULES if "updates" not in name or int(name.split()[1]) < shape.turns]


# --- Schedules -------------------------------------------------------------------------------------------------------


class OneProcess:
    """Backward passes and optimizer steps in one process, as `LockStep` makes them."""

    num_processes = 1

    def __init__(self, model: torch.nn.Module, device: str, learning_rate: float = 1e-6):
        self.model, self.device = model, torch.device(device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)

    def max_over_processes(self, value: int) -> int:
        return value

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def autocast(self):
        return nullcontext()

    def loss_context(self):
        return nullcontext()

    inference = staticmethod(torch.no_grad)

    def micro_batch(self, is_last: bool):
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 0.0


@dataclass
class Recorder:
    """A scorer that computes nothing and remembers what it was asked for."""

    scorer: TreeScorer
    passes: list = field(default_factory=list)  # (batch, whether there is a backward pass)
    trained: list = field(default_factory=list)  # turns of each optimizer step
    seconds: float = 0.0

    def check(self, *args) -> None:
        pass

    def micro_batches(self, buffer, keys, max_rows, together=True):
        keys = list(keys)
        if together:
            self.trained.append(keys)
        start = perf_counter()
        batches = self.scorer.micro_batches(buffer, keys, max_rows, together)
        for batch in batches:
            if not isinstance(batch, RowBatch):
                tree_block_mask(batch.tree.subtree_ends, flex_length(len(batch.tree)), torch.device("cpu"))
                batch.scored()
        self.seconds += perf_counter() - start
        return batches

    def attention(self, batch):
        return nullcontext()

    def score(self, model, batch):
        self.passes.append((batch, torch.is_grad_enabled()))
        if isinstance(batch, RowBatch):
            sizes = {key: end - start for row in batch.rows for key, (start, end) in row.spans.items()}
        else:
            sizes = batch.scored()[2]
        total = sum(sizes.values())
        return Scores(sizes, torch.zeros(total, requires_grad=True), torch.zeros(total)), None


def config_of(schedule: str, shape: Shape) -> SeeUPOConfig:
    options = {"packing": "tree" if "trees" in schedule else "rows"}
    if schedule == "simultaneous":
        options["update_order"] = "simultaneous"
    elif "updates" in schedule:
        options["max_turn_updates"] = int(schedule.split()[1])
    return SeeUPOConfig(
        output_dir="unused",
        per_device_train_batch_size=GROUP_SIZE,
        gradient_accumulation_steps=shape.groups,
        num_generations=GROUP_SIZE,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **options,
    )


def updater_of(episodes: Episodes, config: SeeUPOConfig, lock_step: OneProcess, scorer) -> TurnUpdater:
    return TurnUpdater(
        episodes.buffer,
        episodes.advantages,
        len(episodes.trajectories),
        config,
        lock_step,
        scorer,
        lock_step.model,
        iteration=0,
        entropy_bonus=EntropyBonus(config, 0.0, float("inf")),
    )


def reference_passes(trajectories: list[Trajectory]) -> Iterator[list[tuple[RowBatch, bool]]]:
    """Passes of each turn of the authors' code, last turn first."""
    longest = max(len(t.context_ids + t.action_ids) for trajectory in trajectories for t in trajectory.turns)
    for number in range(max(len(t.turns) for t in trajectories), 0, -1):
        rows = []
        for index, trajectory in enumerate(trajectories):
            turn = trajectory.turns[min(number, len(trajectory.turns)) - 1]
            length = len(turn.context_ids) + len(turn.action_ids)
            ids = (turn.context_ids + turn.action_ids + [0] * longest)[:longest]
            rows.append(Row(ids, {(index, number): (len(turn.context_ids), length)}))
        batches = [RowBatch(rows[start : start + GROUP_SIZE]) for start in range(0, len(rows), GROUP_SIZE)]
        yield [(batch, with_grad) for with_grad in (False, True, False) for batch in batches]
