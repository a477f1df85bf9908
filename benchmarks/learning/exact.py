"""
Which settings improve the policy in every iteration: small problems without any noise.

A problem has a few turns and a few actions. All of its trajectories are written down, each weighted by its probability
under the policy, so advantages, surrogates and the objective `J(theta)` are exact, in float64. Updates are made by the
package's own code: `update_schedule`, `TurnWeights`, `sequence_log_ratios` and `turn_loss` are what the trainer calls.
Only three things are new here: the probabilities in place of samples, the policy (a table of action probabilities
whose rows several histories, or several turns, may share), and the exact maximiser of a turn's surrogate.

    python benchmarks/learning/exact.py                     # one or two minutes; writes results/exact.jsonl
    python benchmarks/learning/exact.py --instances 2000 --seed 1

Many random instances are held in one set of tensors and never touch one another.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter

import torch

from seeupo_trl.scoring.turn_buffer import Block
from seeupo_trl.update.loss import Actions, LossSettings, turn_loss
from seeupo_trl.update.objective import sequence_log_ratios
from seeupo_trl.update.schedule import update_schedule
from seeupo_trl.update.turn_weights import TurnWeights


RESULTS = Path(__file__).parent / "results" / "exact.jsonl"
ROUNDING = 1e-8  # of J; the package bounds a ratio inside M at e^-20, which is 2e-9 where it should be 0
TIE = 1e-9  # slopes that differ by less than this share of the largest one are equal
KINDS = ("table", "features", "shared")
SHAPES = ((3, 2), (2, 3))  # turns and actions of the random instances, as many of each


@dataclass
class Problems:
    """
    `I` instances with `N` trajectories of `T` turns in all.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Reward of each trajectory.
        actions (`torch.Tensor` of shape `(N, T)`), rows (`torch.Tensor` of shape `(N, T)`):
            The action of each turn, and the row of the table that it is drawn from.
        lengths (`torch.Tensor` of shape `(N, T)`):
            Number of tokens of each action: the first one decides, the others follow from it.
        instance (`torch.Tensor` of shape `(N,)`), task (`torch.Tensor` of shape `(N,)`):
            Number of the instance, and of the task within all instances, whose trajectories make up a group.
        start (`torch.Tensor` of shape `(R, A)`):
            Log-probabilities of the first policy.
        row_instance (`torch.Tensor` of shape `(R,)`):
            Instance that each row belongs to.
    """

    rewards: torch.Tensor
    actions: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    instance: torch.Tensor
    task: torch.Tensor
    start: torch.Tensor
    row_instance: torch.Tensor

    @property
    def num_instances(self) -> int:
        """`I`."""
        return int(self.instance.max()) + 1

    def by_instance(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of one value a trajectory over each instance, `(N,)` to `(I,)`."""
        return _sums(values, self.instance, self.num_instances)

    def log_probs(self, table: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the trajectories' actions, `(N, T)`."""
        return table[self.rows, self.actions]

    def probabilities(self, table: torch.Tensor) -> torch.Tensor:
        """Probabilities of the trajectories, `(N,)`; those of an instance add up to 1, its tasks equally likely."""
        played = self.log_probs(table).sum(1).exp()
        return played / self.by_instance(played)[self.instance]

    def objective(self, table: torch.Tensor) -> torch.Tensor:
        """`J` of each instance, `(I,)`."""
        return self.by_instance(self.probabilities(table) * self.rewards)

    def optimum(self) -> torch.Tensor:
        """
        Largest `J` that a table can have, `(I,)`. Where every history has its own row it is the best reward; else the
        best of all deterministic tables and, where a trajectory meets a row twice, of a grid of tables.
        """
        num_rows = torch.bincount(self.row_instance)
        assert (num_rows == num_rows[0]).all()
        rows, actions = int(num_rows[0]), self.start.shape[1]
        meets_a_row_twice = any(
            (self.rows[:, t] == self.rows[:, u]).any() for t in range(self.rows.shape[1]) for u in range(t)
        )
        own_row = {(t, row): set() for t in range(self.rows.shape[1]) for row in self.rows[:, t].tolist()}
        for n in range(len(self.rewards)):
            for t in range(self.rows.shape[1]):
                own_row[t, int(self.rows[n, t])].add((int(self.task[n]), *self.actions[n, :t].tolist()))
        if not meets_a_row_twice and all(len(histories) == 1 for histories in own_row.values()):
            num_tasks = int(self.task.max()) + 1
            best = torch.full((num_tasks,), -torch.inf, dtype=torch.float64)
            best = best.scatter_reduce(0, self.task, self.rewards, "amax")
            tasks_of = torch.stack([self.instance[self.task == task][0] for task in range(num_tasks)])
            return _sums(best, tasks_of, self.num_instances) / torch.bincount(tasks_of)
        eye = torch.eye(actions, dtype=torch.float64).tolist()
        choices = eye if not meets_a_row_twice else [*eye, *_simplex_grid(actions, 20 if actions == 2 else 8)]
        best = torch.full((self.num_instances,), -torch.inf, dtype=torch.float64)
        for chosen in product(choices, repeat=rows):
            table = torch.tensor(chosen, dtype=torch.float64).repeat(self.num_instances, 1)
            best = torch.maximum(best, self.objective(table.log()))
        return best


def _sums(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    return values.new_zeros(size).index_add(0, index, values)


def _simplex_grid(actions: int, parts: int) -> list[list[float]]:
    counts = [c for c in product(range(parts + 1), repeat=actions) if sum(c) == parts]
    return [[c / parts for c in count] for count in counts]


def problem(
    rewards: dict[tuple[int, ...], float] | list[dict[tuple[int, ...], float]],
    rows: "dict[tuple[int, ...], int]",
    start: list[list[float]],
    lengths: tuple[int, ...] | None = None,
) -> Problems:
    """
    One instance from plain numbers.

    Args:
        rewards (`dict` or `list[dict]`):
            Reward of each sequence of actions, for each task.
        rows (`dict`):
            Row of the table by history (the actions so far), the same for all tasks.
        start (`list[list[float]]`):
            Probabilities of the actions in each row.
        lengths (`tuple[int, ...]`, *optional*):
            Number of tokens of each action, 1 where not given.
    """
    tasks = [rewards] if isinstance(rewards, dict) else rewards
    played = [(n, actions, r) for n, task in enumerate(tasks) for actions, r in task.items()]
    lengths = lengths or (1,) * len(start[0])
    return Problems(
        rewards=torch.tensor([r for _, _, r in played], dtype=torch.float64),
        actions=torch.tensor([actions for _, actions, _ in played]),
        rows=torch.tensor([[rows[actions[:t]] for t in range(len(actions))] for _, actions, _ in played]),
        lengths=torch.tensor([[lengths[action] for action in actions] for _, actions, _ in played]),
        instance=torch.zeros(len(played), dtype=torch.long),
        task=torch.tensor([n for n, _, _ in played]),
        start=torch.tensor(start, dtype=torch.float64).log(),
        row_instance=torch.zeros(len(start), dtype=torch.long),
    )


def joined(problems: list[Problems]) -> Problems:
    """Several instances as one set of tensors."""
    rows = [0, *torch.tensor([len(p.start) for p in problems]).cumsum(0).tolist()]
    tasks = [0, *torch.tensor([int(p.task.max()) + 1 for p in problems]).cumsum(0).tolist()]
    return Problems(
        rewards=torch.cat([p.rewards for p in problems]),
        actions=torch.cat([p.actions for p in problems]),
        rows=torch.cat([p.rows + first for p, first in zip(problems, rows, strict=False)]),
        lengths=torch.cat([p.lengths for p in problems]),
        instance=torch.cat([p.instance + n for n, p in enumerate(problems)]),
        task=torch.cat([p.task + first for p, first in zip(problems, tasks, strict=False)]),
        start=torch.cat([p.start for p in problems]),
        row_instance=torch.cat([p.row_instance + n for n, p in enumerate(problems)]),
    )


def random_problems(
    kind: str, instances: int, seed: int = 0, turns: int = 3, actions: int = 2, longest: int = 1
) -> Problems:
    """
    Random instances: rewards uniform in [0, 1] or, every second time, 1 for a quarter of the trajectories; a policy
    with normally distributed logits.

    Args:
        kind (`str`):
            `"table"`: every history has a row of its own. `"features"`: every turn has rows of its own, two from the
            second turn on, which its histories share. `"shared"`: all turns share two rows.
        instances (`int`), seed (`int`), turns (`int`), actions (`int`):
            `I`, the seed, `T` and the number of actions.
        longest (`int`, *optional*, defaults to `1`):
            Actions have 1 to so many tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> list:
        return torch.randint(high, shape, generator=generator).tolist()

    histories = [h for t in range(turns) for h in product(range(actions), repeat=t)]
    trajectories = list(product(range(actions), repeat=turns))
    problems = []
    for number in range(instances):
        rewards = torch.rand(len(trajectories), generator=generator, dtype=torch.float64)
        if number % 2:
            order = rewards.argsort()
            rewards = torch.zeros_like(rewards)
            rewards[order[: max(1, len(trajectories) // 4)]] = 1.0
        if kind == "table":
            rows = {history: row for row, history in enumerate(histories)}
        elif kind == "features":
            rows = {h: 0 if not h else 2 * len(h) - 1 + integers(2, 1)[0] for h in histories}
        else:
            rows = {h: integers(2, 1)[0] for h in histories}
        num_rows = {"table": len(histories), "features": 2 * turns - 1, "shared": 2}[kind]
        start = torch.randn(num_rows, actions, generator=generator, dtype=torch.float64).softmax(1)
        lengths = tuple(1 + n for n in integers(longest, actions))
        rewards = dict(zip(trajectories, rewards.tolist(), strict=True))
        problems.append(problem(rewards, rows, start.tolist(), lengths))
    return joined(problems)


@dataclass(frozen=True)
class Method:
    """
    How an iteration updates the policy.

    Args:
        order (`str`):
            An `update_order` of the package, `"grpo"` (the clipped terms of all turns added up and maximised together,
            each with the advantage as its weight: GRPO, and PPO with group-relative advantages) or `"reinforce"` (the
            plain policy gradient).
        weight (`str`):
            `"exact"` (`M` of Eq. 8), `"bounded"` (the same within 0.2 of 1, the package's default) or `"advantage"`
            (`M = A`).
        ratio (`str`):
            `"product"` or `"geometric"`, in the surrogate and in `M`.
        old_policy (`str`):
            Denominator, as in the package.
        epsilon (`float`):
            Clipping range; infinite for none.
        update (`str`):
            `"maximise"` (the exact maximum of the surrogate, a tie leaves the policy where it is), `"ascend"` (25
            steps on the surrogate, none of which lowers it), `"kl"` (the exact maximum of the surrogate minus
            `temperature` times the KL divergence from the policy before), `"sgd"`, `"adam"`, or `"adam-own"` (Adam
            with a state of its own for each turn, so that no momentum leaks from one turn into the next).
        steps (`int`), lr (`float`):
            Of an optimizer, for each block of turns.
        temperature (`float`):
            Of `"kl"`.
        iterations (`int`):
            How many are made.
        group_std (`bool`):
            Whether advantages are divided by the standard deviation of their group (GRPO's default, which the package
            refuses) in place of the batch's.
    """

    order: str = "reverse"
    weight: str = "exact"
    ratio: str = "product"
    old_policy: str = "iteration"
    epsilon: float = 0.2
    update: str = "maximise"
    steps: int = 1
    lr: float = 0.1
    temperature: float = 0.1
    iterations: int = 40
    group_std: bool = False

    @property
    def settings(self) -> LossSettings:
        """The numbers in the package's loss."""
        return LossSettings(self.epsilon, self.epsilon, surrogate_ratio=self.ratio)


@dataclass
class Iteration:
    """What an update needs of one iteration: the trajectories that the policy plays, and how likely each is."""

    problems: Problems
    weights: TurnWeights
    probabilities: torch.Tensor  # (N,) under theta_k, 0 for trajectories that it never plays
    dead: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (N,) a turn updated so far excludes it

    def products(self) -> torch.Tensor:
        """`M / A` of each trajectory, `(N,)`."""
        relative = [self.weights.relative(index) for index in range(len(self.dead))]
        return torch.tensor(relative, dtype=torch.float64)

    def log_ratios(
        self, new: torch.Tensor, old: torch.Tensor, block: Block, ratio: str, alive: torch.Tensor
    ) -> torch.Tensor:
        """Log-ratios of a block's actions under two tables, by the package's function, `(n,)`."""
        actions = self.actions(new, old, block, alive)
        return sequence_log_ratios(actions.new, actions.old, actions.lengths, ratio)

    def actions(self, new: torch.Tensor, old: torch.Tensor, block: Block, alive: torch.Tensor) -> Actions:
        """The actions of `alive` trajectories in a block, as the package's loss takes them."""
        turns = slice(block.first - 1, block.last)
        lengths = self.problems.lengths[alive, turns]  # (n, turns of the block)
        starts = lengths.flatten().cumsum(0) - lengths.flatten()
        size = int(lengths.sum())

        def tokens(table: torch.Tensor) -> torch.Tensor:
            values = self.problems.log_probs(table)[alive, turns].flatten()
            return values.new_zeros(size).index_put((starts,), values)

        return Actions(lengths.sum(1), tokens(new), tokens(old), entropies=torch.zeros(size, dtype=torch.float64))

    def surrogates(
        self, new: torch.Tensor, old: torch.Tensor, blocks: list[Block], method: Method, weights: torch.Tensor
    ) -> torch.Tensor:
        """The package's `J_t`, exactly, summed over blocks, of each instance, `(I,)`."""
        alive = (self.probabilities > 0).nonzero().flatten()
        total = torch.zeros(len(alive), dtype=torch.float64)
        for block in blocks:
            total = total - turn_loss(self.actions(new, old, block, alive), weights[alive], method.settings).losses
        return _sums(total * self.probabilities[alive], self.problems.instance[alive], self.problems.num_instances)


class Learner:
    """
    A policy that is updated iteration by iteration.

    Args:
        problems ([`Problems`]), method ([`Method`]):
            What it plays, and how it learns.
        samples (`int`, *optional*):
            Episodes of each task in an iteration, in place of the true distribution.
        seed (`int`, *optional*, defaults to `0`):
            Of samples.
    """

    def __init__(self, problems: Problems, method: Method, samples: int | None = None, seed: int = 0):
        self.problems = problems
        self.method = method
        self.table = problems.start.clone()  # (R, A), log-probabilities
        self.samples = samples
        self.generator = torch.Generator().manual_seed(seed)
        self.number = 0
        self._optimizers: dict[int, tuple[torch.Tensor, torch.optim.Optimizer]] = {}
        self._logits = problems.start.clone().requires_grad_()

    def objective(self) -> torch.Tensor:
        """`J` of each instance now."""
        return self.problems.objective(self.table)

    def advantages(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Eq. 9 with expectations in place of means, `(N,)`; those of a sample, where there is one."""
        p = self.problems
        num_tasks = int(p.task.max()) + 1

        def expected(values: torch.Tensor, group: torch.Tensor, size: int) -> torch.Tensor:
            return _sums(values * probabilities, group, size) / _sums(probabilities, group, size)

        advantages = p.rewards - expected(p.rewards, p.task, num_tasks)[p.task]
        advantages = torch.where(advantages.abs() < 1e-12, 0.0, advantages)
        group, size = (p.task, num_tasks) if self.method.group_std else (p.instance, p.num_instances)
        std = expected(advantages**2, group, size).sqrt()[group]
        return torch.where(std > 1e-12, advantages / std, 0.0)

    def begin(self) -> Iteration:
        """Play: the trajectories under theta_k and their weights."""
        p, probabilities = self.problems, self.problems.probabilities(self.table)
        if self.samples is not None:
            probabilities = self._sampled(probabilities)
        advantages = self.advantages(probabilities)
        weights = TurnWeights(advantages.tolist(), 0.2 if self.method.weight == "bounded" else None)
        return Iteration(p, weights, probabilities, torch.zeros(len(p.rewards), dtype=torch.bool))

    def _sampled(self, probabilities: torch.Tensor) -> torch.Tensor:
        drawn = torch.zeros_like(probabilities)
        sizes = torch.bincount(self.problems.task)
        assert (sizes == sizes[0]).all(), "tasks of one size, next to one another"
        by_task = probabilities.view(-1, int(sizes[0]))
        picks = torch.multinomial(by_task, self.samples, replacement=True, generator=self.generator)
        drawn = torch.zeros_like(by_task).scatter_add(1, picks, torch.ones_like(picks, dtype=torch.float64))
        tasks = torch.stack([self.problems.instance[:: int(sizes[0])]]).flatten()
        return (drawn / self.samples / torch.bincount(tasks)[tasks][:, None]).flatten()

    def iterate(self) -> Iteration:
        """One iteration of Algorithm 1 (or of the method that it is compared with); returns what it was."""
        method, iteration, start = self.method, self.begin(), self.table
        turns = self.problems.rows.shape[1]
        if method.order in ("grpo", "reinforce"):
            groups = [[Block(t, t) for t in range(1, turns + 1)]]
        else:
            groups = [[block] for block in update_schedule(turns, method.order, seed=self.number)]
        alive = (iteration.probabilities > 0).nonzero().flatten()
        for blocks in groups:
            old = self.table if method.old_policy == "turn" else start
            self.table = self._updated(iteration, old, blocks)
            if method.weight != "advantage":
                log_ratios = iteration.log_ratios(self.table, old, blocks[0], method.ratio, alive)
                for index, log_ratio in zip(alive.tolist(), log_ratios.tolist(), strict=True):
                    iteration.weights.multiply(index, log_ratio)
                # the package bounds a ratio from below, so that it stays a number; here 0 is 0
                iteration.dead[alive] |= log_ratios == -torch.inf
        self.number += 1
        return iteration

    def _weights(self, iteration: Iteration) -> torch.Tensor:
        weights = torch.tensor([iteration.weights[i] for i in range(len(self.problems.rewards))], dtype=torch.float64)
        return weights.masked_fill(iteration.dead, 0.0)

    def _updated(self, iteration: Iteration, old: torch.Tensor, blocks: list[Block]) -> torch.Tensor:
        """The table after the update of a group of blocks."""
        method, weights = self.method, self._weights(iteration)
        if method.order == "reinforce":
            alive = (iteration.probabilities > 0).nonzero().flatten()

            def surrogates(table: torch.Tensor) -> torch.Tensor:
                logps = self.problems.log_probs(table)[alive].sum(1)
                values = iteration.probabilities[alive] * weights[alive] * logps
                return _sums(values, self.problems.instance[alive], self.problems.num_instances)
        else:

            def surrogates(table: torch.Tensor) -> torch.Tensor:
                return iteration.surrogates(table, old, blocks, method, weights)

        if method.update in ("maximise", "kl"):
            if blocks[0].first != blocks[0].last:
                return self._ascended(surrogates)
            kl = method.temperature if method.update == "kl" else None
            return maximiser(self.problems, iteration.probabilities * weights, old, self.table, blocks, method, kl)
        if method.update == "ascend":
            return self._ascended(surrogates)
        return self._stepped(surrogates, blocks[0])

    def _ascended(self, surrogates) -> torch.Tensor:
        """Gradient ascent with a step size for each instance; a step that would lower its surrogate is not taken."""
        logits = self.table.clone()
        size = torch.ones(self.problems.num_instances, dtype=torch.float64)
        for _ in range(25):
            logits.requires_grad_()
            before = surrogates(logits.log_softmax(1))
            (gradient,) = torch.autograd.grad(before.sum(), logits)
            with torch.no_grad():
                logits = logits.detach()
                tried = logits + size[self.problems.row_instance, None] * gradient
                better = surrogates(tried.log_softmax(1)) > before
                logits = torch.where(better[self.problems.row_instance, None], tried, logits)
                size = torch.where(better, 1.5 * size, 0.5 * size)
        return logits.log_softmax(1)

    def _stepped(self, surrogates, block: Block) -> torch.Tensor:
        """Steps of an optimizer that is kept through the run, as the trainer's is."""
        own = block.first if self.method.update == "adam-own" else 0
        if own not in self._optimizers:
            kind = torch.optim.SGD if self.method.update == "sgd" else torch.optim.Adam
            self._optimizers[own] = kind([self._logits], lr=self.method.lr)
        optimizer = self._optimizers[own]
        before = self._logits.detach().clone()
        for _ in range(self.method.steps):
            optimizer.zero_grad()
            (-surrogates(self._logits.log_softmax(1)).sum()).backward()
            optimizer.step()
        if own:
            # rows that this turn does not read stay where they are
            read = torch.zeros(len(before), dtype=torch.bool)
            read[self.problems.rows[:, own - 1]] = True
            with torch.no_grad():
                self._logits.copy_(torch.where(read[:, None], self._logits, before))
        return self._logits.detach().log_softmax(1)


def maximiser(
    problems: Problems,
    weighted: torch.Tensor,
    old: torch.Tensor,
    table: torch.Tensor,
    blocks: list[Block],
    method: Method,
    temperature: float | None = None,
) -> torch.Tensor:
    """
    The table that maximises the surrogate of single turns exactly (with `temperature`: minus so many KL divergences).

    In the probabilities of a row the clipped surrogate is concave and piecewise linear, so probability is given to the
    steepest piece first. Actions that the policy never takes stay so, a row that no trajectory weighs stays as it
    is, and between equal slopes the policy stays where it is.

    Args:
        problems ([`Problems`]):
            With actions of one token, or with product ratios.
        weighted (`torch.Tensor` of shape `(N,)`):
            Probability under theta_k times `M`.
        old (`torch.Tensor` of shape `(R, A)`), table (`torch.Tensor` of shape `(R, A)`):
            Log-probabilities in the denominator, and of the policy now.
        blocks (`list[Block]`):
            The turns whose surrogates are added up.
        method ([`Method`]):
            For its clipping range.
        temperature (`float`, *optional*):
            Weight of the KL divergence from the policy now, in units of the visits of a row.
    """
    if method.ratio == "geometric" and int(problems.lengths.max()) > 1:
        raise ValueError("The exact maximum is known for product ratios only; use `update='ascend'`.")
    size, num_actions = old.numel(), old.shape[1]
    turns = [block.first - 1 for block in blocks]
    cells = (problems.rows[:, turns] * num_actions + problems.actions[:, turns]).flatten()
    values = weighted[:, None].expand(-1, len(turns)).flatten()
    gains = _sums(values.clamp(min=0), cells, size).view_as(old)
    losses = _sums(values.clamp(max=0), cells, size).view_as(old)
    p_old, p_now = old.exp(), table.exp()
    slope = torch.where(p_old > 0, 1 / p_old, 0.0)
    seen = ((gains > 0) | (losses < 0)).any(1)

    if temperature is not None:
        visits = _sums(problems.probabilities(old)[:, None].expand(-1, len(turns)).flatten(), cells, size)
        visits = visits.view_as(old).sum(1, keepdim=True)
        gradient = torch.where(visits > 0, (gains + losses) * slope / visits, 0.0)
        moved = (table + gradient / temperature).log_softmax(1)
        moved = moved.masked_fill(moved < -200, -torch.inf)  # before it underflows
        return torch.where(seen[:, None], moved, table)

    low, high = ((1 - method.epsilon) * p_old).clamp(min=0), ((1 + method.epsilon) * p_old).clamp(max=1)
    high = torch.where(p_old > 0, high, 0.0)  # not infinity times 0
    low, high = low.nan_to_num(nan=0.0), high.nan_to_num(nan=0.0)
    end = torch.where(p_old > 0, 1.0, 0.0)
    middle = p_now.clamp(min=low, max=high)
    # pieces of the axis of each probability: width and slope, those on the way to the policy's own value first
    pieces = [
        (torch.minimum(low, p_now), gains * slope),
        ((torch.minimum(middle, p_now) - low).clamp(min=0), (gains + losses) * slope),
        ((torch.minimum(p_now, end) - high).clamp(min=0), losses * slope),
        ((low - p_now).clamp(min=0), gains * slope),
        ((high - torch.maximum(low, p_now)).clamp(min=0), (gains + losses) * slope),
        ((end - torch.maximum(high, p_now)).clamp(min=0), losses * slope),
    ]
    widths = torch.cat([width for width, _ in pieces], dim=1)  # (R, 6 A)
    slopes = torch.cat([value for _, value in pieces], dim=1)
    scale = slopes.abs().amax(1, keepdim=True).clamp(min=1e-300)
    order = ((slopes / scale / TIE).round()).sort(dim=1, descending=True, stable=True).indices
    filled = widths.gather(1, order).cumsum(1).clamp(max=1.0)
    taken = filled.diff(dim=1, prepend=filled.new_zeros(len(filled), 1))
    taken = torch.zeros_like(taken).scatter(1, order, taken).view(len(old), len(pieces), num_actions).sum(1)
    taken = taken / taken.sum(1, keepdim=True)
    return torch.where(seen[:, None], taken.log(), table)


@dataclass
class Course:
    """`J` of each instance after each iteration, `(K + 1, I)`."""

    values: torch.Tensor

    @property
    def falls(self) -> torch.Tensor:
        """Largest fall of each instance from one iteration to the next, `(I,)`; 0 where there is none."""
        return (self.values[:-1] - self.values[1:]).amax(0).clamp(min=0)

    @property
    def num_monotone(self) -> int:
        """Instances that never fall."""
        return int((self.falls <= ROUNDING).sum())


def play(problems: Problems, method: Method, samples: int | None = None, seed: int = 0) -> Course:
    """`J` along a run."""
    learner = Learner(problems, method, samples, seed)
    values = [learner.objective()]
    for _ in range(method.iterations):
        learner.iterate()
        values.append(learner.objective())
    return Course(torch.stack(values))


# ---- The table ----

MAXIMISED = {"maximised, no clip": {"epsilon": math.inf, "iterations": 20}, "maximised, clip 0.2": {"iterations": 40}}
ONE_STEP = {"update": "sgd", "lr": 0.01, "iterations": 100}
PAST_CLIP = {"update": "sgd", "lr": 5.0, "steps": 20, "iterations": 40}


def conditions() -> list[tuple[str, str, Method]]:
    """The rows of the table: how a turn is updated, what is special, and the method."""
    rows = []
    for update, options in MAXIMISED.items():
        rows += [(update, "", Method(order=order, **options)) for order in ("reverse", "forward", "random")]
        rows += [
            (update, "", Method(order="simultaneous", update="ascend", **options)),
            (update, "denominators at the turn's start", Method(old_policy="turn", **options)),
            (update, "M within 0.2 of 1", Method(weight="bounded", **options)),
            (update, "M = A", Method(weight="advantage", **options)),
            (update, "M = A", Method(order="grpo", weight="advantage", **options)),
        ]
    geometric = Method(ratio="geometric", update="ascend", iterations=20)
    rows.append(("maximised, clip 0.2", "geometric ratios, 1 to 64 tokens", geometric))
    for order in ("reverse", "forward", "random"):
        rows.append(("strong KL step", "", Method(order=order, update="kl", epsilon=math.inf)))
    for order in ("reverse", "forward", "random", "simultaneous"):
        rows.append(("one SGD step, lr 0.01", "", Method(order=order, **ONE_STEP)))
    for order in ("reverse", "simultaneous"):
        rows.append(("one SGD step, lr 0.1", "", Method(order=order, **{**ONE_STEP, "lr": 0.1})))
    rows += [
        ("one SGD step, lr 0.01", "M within 0.2 of 1", Method(weight="bounded", **ONE_STEP)),
        ("one SGD step, lr 0.01", "geometric ratios, 1 to 64 tokens", Method(ratio="geometric", **ONE_STEP)),
        ("one SGD step, lr 0.01", "PPO with group advantages", Method(order="grpo", weight="advantage", **ONE_STEP)),
        ("one SGD step, lr 0.01", "REINFORCE", Method(order="reinforce", weight="advantage", **ONE_STEP)),
        ("20 SGD steps, lr 5", "", Method(**PAST_CLIP)),
        ("20 SGD steps, lr 5", "", Method(order="simultaneous", **PAST_CLIP)),
        ("20 SGD steps, lr 5", "PPO with group advantages", Method(order="grpo", weight="advantage", **PAST_CLIP)),
    ]
    for lr in (0.03, 0.3):
        adam = {"update": "adam", "lr": lr, "iterations": 100}
        rows += [
            (f"one Adam step, lr {lr}", "", Method(**adam)),
            (f"one Adam step, lr {lr}", "a state for each turn", Method(**{**adam, "update": "adam-own"})),
            (f"one Adam step, lr {lr}", "", Method(order="simultaneous", **adam)),
            (f"one Adam step, lr {lr}", "M = A", Method(order="grpo", weight="advantage", **adam)),
            (
                f"one Adam step, lr {lr}",
                "the package's defaults, 1 to 64 tokens",
                Method(weight="bounded", ratio="geometric", **adam),
            ),
        ]
    return rows


@cache
def _drawn(kind: str, count: int, seed: int, turns: int, actions: int, longest: int) -> tuple[Problems, torch.Tensor]:
    problems = random_problems(kind, count, seed, turns, actions, longest)
    return problems, problems.optimum()


def measure(kind: str, update: str, note: str, method: Method, instances: int, seed: int) -> dict:
    """One row of the table, for one kind of policy."""
    longest = 64 if method.ratio == "geometric" else 1
    shapes = [(*shape, instances // len(SHAPES)) for shape in SHAPES]
    courses, gaps = [], []
    for turns, actions, count in shapes:
        problems, optimum = _drawn(kind, count, seed, turns, actions, longest)
        courses.append(play(problems, method))
        gaps.append((optimum - courses[-1].values[-1]).clamp(min=0))
    course, gaps = Course(torch.cat([course.values for course in courses], dim=1)), torch.cat(gaps)
    return {
        "policy": kind,
        "update": update,
        "note": note,
        "order": method.order,
        "monotone": course.num_monotone,
        "instances": course.values.shape[1],
        "largest_fall": course.falls.max().item(),
        "mean_gap": gaps.mean().item(),
        "method": {name: str(v) if v == math.inf else v for name, v in asdict(method).items()},
    }


# ---- Smallest instances that fall ----

DIFFER = {actions: float(actions[0] != actions[1]) for actions in product((0, 1), repeat=2)}
SAME_ROW = {(): 0, (0,): 0, (1,): 0}
ROW_A_TURN = {(): 0, (0,): 1, (1,): 1}
COIN = [0.49, 0.51]


@dataclass(frozen=True)
class Fall:
    """
    A small problem in which a method makes the policy worse.

    Args:
        what (`str`), problem ([`Problems`]), method ([`Method`]):
            In words, and as they are.
        expected (`tuple[float, ...]`):
            `J` at the start and after each iteration.
    """

    what: str
    problem: Problems
    method: Method
    expected: tuple[float, ...]


FALLS = {
    "shared parameters": Fall(
        "Two turns, two actions, one probability for both turns, reward 1 if the actions differ, P(first) = 0.49: "
        "reverse order with exact M, product ratios, clip 0.2, surrogate maximised.",
        problem(DIFFER, SAME_ROW, [COIN]),
        Method(iterations=4),
        (0.4998, 0.476672, 0.498248, 0.469407, 0.495312),
    ),
    "M = A": Fall(
        "The same game with a probability for each turn, of which the second does not see the first's action: all "
        "turns at once with M = A (GRPO; PPO with group advantages), clip 0.2, maximised. With M both orders rise.",
        problem(DIFFER, ROW_A_TURN, [COIN, COIN]),
        Method(order="grpo", weight="advantage", iterations=1),
        (0.4998, 0.484512),
    ),
    "group standard deviation": Fall(
        "One turn, two actions, one probability of 0.5 for three tasks with rewards (1, 0), (0, 0.1), (0, 0.1): the "
        "surrogate maximised, advantages divided by the deviation of their group.",
        problem([{(0,): 1.0, (1,): 0.0}, *[{(0,): 0.0, (1,): 0.1}] * 2], {(): 0}, [[0.5, 0.5]]),
        Method(epsilon=math.inf, iterations=1, group_std=True),
        (0.2, 0.066667),
    ),
    "geometric ratio": Fall(
        "One turn, three actions of 1, 50 and 50 tokens with probabilities 0.1, 0.8, 0.1 and rewards 1, 0.9, 0: one "
        "step of SGD, however small, on the surrogate with geometric ratios.",
        problem({(0,): 1.0, (1,): 0.9, (2,): 0.0}, {(): 0}, [[0.1, 0.8, 0.1]], (1, 50, 50)),
        Method(ratio="geometric", update="sgd", iterations=1),
        (0.82, 0.81991),
    ),
    "steps past the clip, one turn": Fall(
        "One turn, two actions, probabilities 0.3 and 0.7 for two tasks with rewards (0.5, 1) and (1, 0): 20 SGD "
        "steps of 20, which end outside the clip.",
        problem([{(0,): 0.5, (1,): 1.0}, {(0,): 1.0, (1,): 0.0}], {(): 0}, [[0.3, 0.7]]),
        Method(update="sgd", lr=20.0, steps=20, iterations=1),
        (0.575, 0.500617),
    ),
    "steps past the clip, reverse": Fall(
        "Two turns, two actions, a fair coin for each turn, the second blind: rewards 0.5 for (0, 0), 1 for (1, 1), "
        "reverse order, 20 SGD steps of 5 a turn.",
        problem({(0, 0): 0.5, (0, 1): 0.0, (1, 0): 0.0, (1, 1): 1.0}, ROW_A_TURN, [[0.5, 0.5]] * 2),
        Method(update="sgd", lr=5.0, steps=20, iterations=1),
        (0.375, 0.309202),
    ),
    "steps past the clip, simultaneous": Fall(
        "The game of different actions, P(first) = 0.7 in both turns, a probability for each: all turns at once with "
        "product ratios, 20 SGD steps of 5.",
        problem(DIFFER, ROW_A_TURN, [[0.7, 0.3]] * 2),
        Method(order="simultaneous", update="sgd", lr=5.0, steps=20, iterations=1),
        (0.42, 0.314239),
    ),
    "Adam": Fall(
        "Two turns, two actions, P(first) = 0.9 in both, the second blind; rewards 0.5 for (0, 1) and 1 for (1, 0): "
        "reverse order, one Adam step of 0.3 a turn.",
        problem({(0, 0): 0.0, (0, 1): 0.5, (1, 0): 1.0, (1, 1): 0.0}, ROW_A_TURN, [[0.9, 0.1]] * 2),
        Method(update="adam", lr=0.3, iterations=5),
        (0.135, 0.212558, 0.30041, 0.334346, 0.315703, 0.302658),
    ),
    "Adam with a state for each turn": Fall(
        "The same, P(first) = 0.1 and 0.9, rewards 1, 0.5, 0 and 1: the momentum of earlier iterations is enough.",
        problem({(0, 0): 1.0, (0, 1): 0.5, (1, 0): 0.0, (1, 1): 1.0}, ROW_A_TURN, [[0.1, 0.9], [0.9, 0.1]]),
        Method(update="adam-own", lr=0.3, iterations=6),
        (0.185, 0.294217, 0.430187, 0.561676, 0.64515, 0.667037, 0.65906),
    ),
    "bounded M": Fall(
        "Three turns, two actions, rows of a turn shared by histories: reverse order with M within 0.2 of 1, no clip, "
        "maximised. (With the clip none was found.)",
        problem(
            dict(zip(product((0, 1), repeat=3), (0.0, 0.0, 0.5, 1.0, 1.0, 0.5, 0.5, 1.0), strict=True)),
            {(): 0, (0,): 1, (1,): 1, (0, 0): 3, (0, 1): 4, (1, 0): 4, (1, 1): 4},
            [[0.3, 0.7], [0.7, 0.3], [0.7, 0.3], [0.1, 0.9], [0.1, 0.9]],
        ),
        Method(weight="bounded", epsilon=math.inf, iterations=1),
        (0.5545, 0.5),
    ),
}


# ---- Single findings ----


def identity_error(problems: Problems, order: str, iterations: int = 5) -> float:
    """
    Largest error of `E_k[A prod r] + J_k = J` after an iteration of large steps, with product ratios and an unbounded
    `M`: an identity where every turn has parameters of its own, in any order.
    """
    learner = Learner(problems, Method(order=order, update="sgd", lr=3.0, steps=3))
    largest = 0.0
    for _ in range(iterations):
        before = learner.objective()
        iteration = learner.iterate()
        products = iteration.products()
        advantages = problems.rewards - before[problems.instance]
        after = before + problems.by_instance(iteration.probabilities * advantages * products)
        largest = max(largest, (after - learner.objective()).abs().max().item())
    return largest


def wrong_directions(instances: int, seed: int, longest: int = 64) -> int:
    """Instances (one turn, three actions) whose geometric surrogate points down: its gradient lowers `J`."""
    problems = random_problems("table", instances, seed, turns=1, actions=3, longest=longest)
    learner = Learner(problems, Method(ratio="geometric"))
    iteration = learner.begin()
    logits = problems.start.clone().requires_grad_()
    weights = learner._weights(iteration)
    block = [Block(1, 1)]
    total = iteration.surrogates(logits.log_softmax(1), problems.start, block, learner.method, weights).sum()
    (surrogate,) = torch.autograd.grad(total, logits)
    (objective,) = torch.autograd.grad(problems.objective(logits.log_softmax(1)).sum(), logits)
    return int((_sums((surrogate * objective).sum(1), problems.row_instance, instances) < -1e-12).sum())


def compare_on_samples(kind: str, steps: int, instances: int, seed: int, samples: int = 8) -> dict:
    """
    Sequential updates against as many steps on all turns at once, from `samples` episodes an iteration (SGD, each at
    the best of five rates): `J` at the end, and the paired difference of reverse order from each.
    """
    problems = random_problems(kind, instances, seed)
    turns = problems.rows.shape[1]
    arms = {
        "reverse": {"steps": steps},
        "forward": {"order": "forward", "steps": steps},
        "GRPO, as many steps": {"order": "grpo", "weight": "advantage", "steps": steps * turns},
        "simultaneous, as many steps": {"order": "simultaneous", "steps": steps * turns},
        "GRPO, steps of one turn": {"order": "grpo", "weight": "advantage", "steps": steps},
    }
    ends = {}
    for name, options in arms.items():
        runs = [
            play(problems, Method(update="sgd", lr=lr, iterations=40, **options), samples, seed).values[-1]
            for lr in (0.1, 0.3, 1.0, 3.0, 10.0)
        ]
        ends[name] = max(runs, key=lambda values: values.mean().item())
    result = {"policy": kind, "steps_a_turn": steps, "samples": samples, "instances": instances}
    for name, values in ends.items():
        difference = ends["reverse"] - values
        result[name] = {
            "J": values.mean().item(),
            "reverse_minus_this": difference.mean().item(),
            "standard_error": (difference.std() / math.sqrt(instances)).item(),
        }
    return result


def bias_of_weights(instances: int, seed: int, lr: float, samples: int = 8) -> dict:
    """
    What using the same samples twice does: the group mean of `M` after all turns were updated on the samples that it
    is measured on (0 to first order on other samples), and how far its ratios are from 1.
    """
    problems = random_problems("table", instances, seed)
    learner = Learner(problems, Method(update="sgd", lr=lr), samples, seed)
    iteration = learner.iterate()
    played = iteration.probabilities > 0
    relative = iteration.products()
    weights = relative * torch.tensor(iteration.weights.advantages, dtype=torch.float64)
    distances = (relative[played] - 1).abs()
    return {
        "lr": lr,
        "samples": samples,
        "group_mean_of_M": problems.by_instance(iteration.probabilities * weights).mean().item(),
        "mean_distance_of_product_from_1": distances.mean().item(),
    }


def rare_falls(instances: int, seed: int) -> list[dict]:
    """Where falls were looked for and may not be found: many instances, few iterations."""
    bounded = Method(weight="bounded", iterations=20)
    cases = [("M within 0.2 of 1, clip 0.2", kind, bounded, shape) for kind in KINDS[:2] for shape in SHAPES]
    past = Method(**{**PAST_CLIP, "iterations": 3})
    cases.append(("20 SGD steps, lr 5, one turn, one task", "table", past, (1, 3)))
    return [
        {
            "looked_for": what,
            "policy": kind,
            "turns_and_actions": shape,
            "instances": instances,
            "falling": instances - play(random_problems(kind, instances, seed, *shape), method).num_monotone,
        }
        for what, kind, method, shape in cases
    ]


def findings(instances: int, seed: int) -> list[dict]:
    """Numbers behind the statements of the documentation that are not in the table."""
    own = [
        {"policy": kind, "order": order, "error": identity_error(random_problems(kind, instances, seed), order)}
        for kind in KINDS
        for order in ("reverse", "forward", "random", "simultaneous")
    ]
    return [
        *[{"finding": "E_k[A prod r] + J_k - J", **values} for values in own],
        {
            "finding": "geometric surrogate points down (one turn, three actions)",
            "instances": 100 * instances,
            "wrong": wrong_directions(100 * instances, seed),
        },
        *[
            {"finding": "samples", **compare_on_samples(kind, steps, instances, seed)}
            for kind in ("table", "shared")
            for steps in (1, 4)
        ],
        *[{"finding": "bias of M", **bias_of_weights(20 * instances, seed, lr)} for lr in (0.1, 0.3, 1.0)],
        *[{"finding": "rare falls", **found} for found in rare_falls(30 * instances, seed)],
    ]


# ---- The program ----


def markdown(rows: list[dict]) -> str:
    """Rows of the table, the three kinds of policy side by side: monotone, mean gap, largest fall."""
    lines = [
        "| update of a turn | order | what is special | table | features | shared |",
        "|---|---|---|---|---|---|",
    ]
    by_condition: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in rows:
        by_condition.setdefault((row["update"], row["order"], row["note"]), {})[row["policy"]] = row
    for (update, order, note), cells in by_condition.items():
        shown = [
            f"{c['monotone']} of {c['instances']}; {c['mean_gap']:.3f}"
            + (f"; {c['largest_fall']:.1g}" if c["monotone"] < c["instances"] else "")
            for c in (cells[kind] for kind in KINDS)
        ]
        lines.append(f"| {update} | {order} | {note} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--instances", type=int, default=100, help="random instances a row and kind of policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = perf_counter()

    lines = []
    for fall in FALLS.values():
        values = play(fall.problem, fall.method).values.flatten().tolist()
        print(fall.what, "\n   J:", " -> ".join(f"{value:.4f}" for value in values))
        lines.append({"fall": fall.what, "J": values})
    rows = []
    for condition in conditions():
        rows += [measure(kind, *condition, args.instances, args.seed) for kind in KINDS]
        print(f"{perf_counter() - start:.0f} s", *condition[:2], flush=True)
    print(f"\nmonotone in so many instances; mean gap to the optimum; largest fall of J\n\n{markdown(rows)}\n")
    for found in findings(args.instances, args.seed):
        print(json.dumps(found))
        lines.append(found)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shared = {"torch": torch.__version__, "seed": args.seed}
    args.output.write_text("".join(json.dumps({**line, **shared}) + "\n" for line in [*rows, *lines]))
    print(f"{perf_counter() - start:.0f} s; {args.output}")


if __name__ == "__main__":
    main()
