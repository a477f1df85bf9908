"""Who trains in which optimizer step of an iteration, and what must fit into a micro-batch."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..distributed.lock_step import LockStep
from ..scoring.interface import Scorer
from ..scoring.turn_buffer import Block, Key, TurnBuffer
from .schedule import update_schedule


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: a mini-batch of a block's pool, in one of the passes over it."""

    block: Block
    minibatch: int
    is_first_of_block: bool


def assign_minibatches(num_trajectories: int, num_minibatches: int, seed: int, iteration: int) -> list[int]:
    """
    Mini-batch of each trajectory of a process: a seeded shuffle, cut into equal parts.

    Args:
        num_trajectories (`int`):
            Trajectories of this process.
        num_minibatches (`int`):
            Optimizer steps in one pass over a turn's pool.
        seed (`int`):
            Seed of the run.
        iteration (`int`):
            Iterations done before this one.

    Returns:
        `list[int]`:
            Mini-batch number, from 0, by trajectory.
    """
    order = list(range(num_trajectories))
    random.Random(f"{seed} {iteration}").shuffle(order)
    minibatch_of = [0] * num_trajectories
    for position, index in enumerate(order):
        minibatch_of[index] = position * num_minibatches // num_trajectories
    return minibatch_of


class UpdatePlan:
    """
    The optimizer steps of an iteration. Steps without a gradient on any process are left out, on all of them.

    Args:
        buffer ([`~seeupo_trl.scoring.turn_buffer.TurnBuffer`]):
            This process's trajectories.
        learns_from (`Callable[[int, int], bool]`):
            Whether a trajectory contributes a gradient with its turn t, or with the block that begins with it.
        lock_step ([`~seeupo_trl.distributed.lock_step.LockStep`]):
            Communication.
        num_minibatches (`int`):
            Optimizer steps in one pass over a block's pool.
        num_passes (`int`):
            Passes over a block's pool.
        update_order (`str`), max_turn_updates (`int`, *optional*):
            See [`~seeupo_trl.update.schedule.update_schedule`].
        seed (`int`), iteration (`int`):
            Seed of the run, and iterations done before this one.

    Attributes:
        blocks (`list[Block]`):
            Blocks with at least one optimizer step, in update order.
        steps (`dict[Block, list[OptimizerStep]]`):
            The optimizer steps on each of them.
    """

    def __init__(
        self,
        buffer: TurnBuffer,
        learns_from: Callable[[int, int], bool],
        lock_step: LockStep,
        *,
        num_minibatches: int,
        num_passes: int,
        update_order: str,
        max_turn_updates: int | None,
        seed: int,
        iteration: int,
    ):
        self._buffer = buffer
        self._lock_step = lock_step
        self._minibatch_of = assign_minibatches(len(buffer), num_minibatches, seed, iteration)
        num_turns = lock_step.max_over_processes(buffer.num_turns)  # T
        order_seed = random.Random(f"{seed} {iteration}").getrandbits(32)
        schedule = update_schedule(num_turns, update_order, max_turn_updates, order_seed)

        # one that learns from any of its turns goes through all of them: their ratios weigh it
        learning = {i for block in schedule for i in buffer.pool(block) if learns_from(i, block.first)}
        self._active = {block: [i for i in buffer.pool(block) if i in learning] for block in schedule}

        own_counts = [[0.0] * num_minibatches for _ in schedule]
        for row, block in zip(own_counts, schedule, strict=True):
            for index in self._active[block]:
                row[self._minibatch_of[index]] += learns_from(index, block.first)
        counts = lock_step.gather(torch.tensor(own_counts).reshape(-1, num_minibatches)).sum(0)
        self.steps: dict[Block, list[OptimizerStep]] = {}
        for row, block in enumerate(schedule):
            minibatches = counts[row].nonzero().flatten().tolist() * num_passes
            if minibatches:
                self.steps[block] = [OptimizerStep(block, m, n == 0) for n, m in enumerate(minibatches)]
        self.blocks = list(self.steps)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the iteration."""
        return sum(map(len, self.steps.values()))

    @property
    def first_step(self) -> OptimizerStep | None:
        """The first optimizer step, which is taken at `theta_k`."""
        return self.steps[self.blocks[0]][0] if self.blocks else None

    @property
    def last_step(self) -> OptimizerStep | None:
        """The last optimizer step."""
        return self.steps[self.blocks[-1]][-1] if self.blocks else None

    def active(self, block: Block) -> list[int]:
        """Trajectories of the block's pool that contribute a gradient, in this block or in another."""
        return self._active[block]

    def members(self, step: OptimizerStep) -> list[int]:
        """Trajectories of this process that a step trains on."""
        return [index for index in self.active(step.block) if self._minibatch_of[index] == step.minibatch]

    def played_from(self, block: Block) -> set[int]:
        """Trajectories that play in `block` or in one that is updated after it."""
        remaining = self.blocks[self.blocks.index(block) :]
        return {index for later in remaining for index in self._buffer.pool(later)}

    def keys(self) -> set[Key]:
        """Turns of the trajectories that contribute a gradient."""
        return {key for block in self.blocks for i in self.active(block) for key in self._buffer.turns_in(i, block)}

    def check_budget(self, scorer: Scorer, budget: int | None) -> None:
        """
        Refuse a trajectory that no micro-batch may hold, before the parameters move and on every process. A turn is
        trained in one micro-batch with the turn that was updated before it.

        Args:
            scorer ([`~seeupo_trl.scoring.interface.Scorer`]):
                Scorer of the policy.
            budget (`int`, *optional*):
                Largest number of tokens of a micro-batch.

        Raises:
            `ValueError`:
                Where a trajectory needs more.
        """
        if budget is None:
            return
        longest, index, label = 0, -1, ""
        previous: dict[int, list[Key]] = {}
        for block in self.blocks:
            for i in self.active(block):
                keys = self._buffer.turns_in(i, block)
                tokens = scorer.num_tokens(self._buffer, previous.get(i, []) + keys)
                longest, index, label = max((longest, index, label), (tokens, i, block.label))
                previous[i] = keys
        over = self._lock_step.max_over_processes(longest)
        if over <= budget:
            return
        where = f"Trajectory {index} of this process has" if longest == over else "A trajectory of another process has"
        where += f" {over} tokens that are trained together" + (f" in turn {label}" if longest == over else "")
        raise ValueError(
            f"{where}, but `max_tokens_per_microbatch={budget}`. Raise it to at least {over}, or shorten the episodes "
            "(`max_turns`, `max_completion_length`, `max_context_length`)."
        )
