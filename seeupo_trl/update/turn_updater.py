"""
The backward-ordered update of one iteration (Algorithm 1 of arXiv 2602.06554).

Read [`TurnUpdater.run`] beside the paper's box. What makes it cheap: when a turn takes one optimizer step, the forward
pass of its update runs at the very parameters that the previously updated turn was left at. It therefore yields that
turn's new log-probabilities, which fold its ratio into `M`, and the graph of its own loss. A turn then costs one
forward and backward pass and nothing else; only `old_policy="iteration"` adds one no-grad pass per iteration.

Departures from the paper, all of them options with the paper's form available: the bound on `M` (`turn_weight_clip`),
blocks of turns (`max_turn_updates`), mini-batches and epochs within a turn. A turn whose pool has no advantage other
than 0 takes no optimizer step, because its gradient is 0 (unless a KL or entropy term is on).
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn

from ..distributed.lock_step import UpdateEngine
from ..scoring.rows import DUMMY_KEY, Key, Scorer, TurnScores, score_without_gradient
from ..seeupo_config import SeeUPOConfig
from ..trajectory import TurnBuffer
from .entropy_bonus import EntropyBonus
from .metrics import IterationStatistics
from .objective import clipped_surrogate, k3_divergence, keep_on_policy, sampler_correction, sequence_log_ratio
from .schedule import Block, update_schedule


@dataclass(frozen=True)
class Reference:
    """The reference policy of the KL term: a scorer, its model, and a context in which it is in force."""

    scorer: Scorer
    model: nn.Module
    active: Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: a mini-batch of a block's pool."""

    block: Block
    minibatch: int
    is_first_of_block: bool
    is_last_of_block: bool


@dataclass(frozen=True)
class TurnUpdate:
    """
    How one trajectory entered the last optimizer step on one of its turns: the ratio in the loss, whether it was
    clipped there, the turn weight `M`, and `M / A`. The turns of a block share these numbers.
    """

    ratio: float
    is_clipped: bool
    weight: float
    relative_weight: float


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


class TurnUpdater:
    """
    The update phase of one iteration.

    Args:
        buffer ([`~seeupo_trl.trajectory.TurnBuffer`]):
            This process's trajectories with their advantages.
        config ([`~seeupo_trl.SeeUPOConfig`]):
            The user's configuration.
        engine ([`~seeupo_trl.distributed.lock_step.UpdateEngine`]):
            Backward passes and optimizer steps.
        scorer ([`Scorer`]):
            Log-probabilities of turns under the policy.
        model (`torch.nn.Module`):
            The policy without distributed wrapper, for passes without gradient.
        iteration (`int`):
            Iterations done before this one; with the run's seed it fixes everything random here.
        entropy_bonus ([`~seeupo_trl.update.entropy_bonus.EntropyBonus`]):
            Weight of the entropy in the objective.
        reference ([`Reference`], *optional*):
            Reference policy, needed when `config.beta` is not 0.
        aux_loss_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the load-balancing loss of a mixture-of-experts model.
    """

    def __init__(
        self,
        buffer: TurnBuffer,
        config: SeeUPOConfig,
        engine: UpdateEngine,
        scorer: Scorer,
        model: nn.Module,
        iteration: int,
        entropy_bonus: EntropyBonus,
        reference: Reference | None = None,
        aux_loss_coef: float = 0.0,
    ):
        self.buffer = buffer
        self.config = config
        self.engine = engine
        self.scorer = scorer
        self.model = model
        self.reference = reference
        self.entropy_bonus = entropy_bonus
        self.aux_loss_coef = aux_loss_coef

        self.num_turns = engine.max_over_processes(buffer.num_turns)  # T
        self.num_minibatches = config.steps_per_generation // config.gradient_accumulation_steps
        self._minibatch_of = assign_minibatches(len(buffer), self.num_minibatches, config.seed, iteration)
        seed = random.Random(f"{config.seed} {iteration}").getrandbits(32)
        schedule = update_schedule(self.num_turns, config.update_order, config.max_turn_updates, seed)
        self.steps = self._plan(schedule)
        self.blocks = list(dict.fromkeys(step.block for step in self.steps))

        self._epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self._corrects_sampler = config.use_vllm and config.vllm_importance_sampling_correction
        self._needs_logps_start = config.old_policy == "iteration" or self._corrects_sampler
        self._logps_start: dict[Key, torch.Tensor] = {}  # under theta_k
        # denominators of the ratios
        self._logps_old = self._logps_start if config.old_policy == "iteration" else {}
        self._logps_ref: dict[Key, torch.Tensor] = {}
        self._pending: dict[int, Block] = {}  # trajectory -> updated block whose ratio is not in M yet
        optional = {
            "kl": reference is not None,
            "sampler": self._corrects_sampler,
            "entropy_bonus": entropy_bonus.is_enabled,
            "aux_loss": aux_loss_coef != 0.0,
        }
        self.statistics = IterationStatistics(
            Counter(step.block for step in self.steps), {name for name, present in optional.items() if present}
        )
        self._step_entropy, self._step_tokens = 0.0, 0  # of this process, in the optimizer step under way
        self.grad_norms: list[tuple[Block, float]] = []
        self.turn_updates: dict[Key, TurnUpdate] = {}  # without the turns that no optimizer step was taken on
        self.tokens = {"no_grad": 0, "train": 0}
        self.seconds = {"old_pass": 0.0, "update": 0.0}

    def run(self) -> torch.Tensor:
        """
        Update the turns one block at a time. The last optimizer step is left to the Trainer, with its gradients
        ready; when [`steps`] is empty there is none.

        Returns:
            `torch.Tensor` of shape `()`:
                Mean over optimizer steps of this process's share of the loss, so that the mean over processes is the
                loss of the iteration.
        """
        start = perf_counter()
        self._check_budget()
        self.scorer.check(self.buffer, self._all_keys(), self.model, self.engine)
        self._score_before_updates()
        self.seconds["old_pass"] = perf_counter() - start

        start = perf_counter()
        loss = torch.zeros((), device=self.engine.device)
        for position, step in enumerate(self.steps):
            if step.is_first_of_block:
                self._catch_up(position)
            loss += self._accumulate_gradients(step)
            if position < len(self.steps) - 1:
                self.grad_norms.append((step.block, self.engine.step()))
            if step.is_last_of_block:
                self._pending.update((i, step.block) for i in self._active(step.block) if self.buffer.weight(i) != 0)
        self.seconds["update"] = perf_counter() - start
        return loss * self.engine.num_processes / max(len(self.steps), 1)

    def _plan(self, schedule: list[Block]) -> list[OptimizerStep]:
        """Optimizer steps of the iteration. Steps without a gradient on any process are left out, on all of them."""
        counts = torch.zeros(len(schedule), self.num_minibatches)
        for row, block in enumerate(schedule):
            for index in self._active(block):
                counts[row, self._minibatch_of[index]] += 1
        counts = self.engine.gather(counts).sum(0)
        steps = []
        for row, block in enumerate(schedule):
            minibatches = counts[row].nonzero().flatten().tolist() * self.config.num_iterations
            for position, minibatch in enumerate(minibatches):
                steps.append(OptimizerStep(block, minibatch, position == 0, position == len(minibatches) - 1))
        return steps

    def _active(self, block: Block) -> list[int]:
        """Trajectories of the block's pool that contribute a gradient."""
        regularized = self.config.beta != 0.0 or self.entropy_bonus.is_enabled
        return [i for i in self.buffer.pool(block) if regularized or self.buffer.advantages[i] != 0.0]

    def _members(self, step: OptimizerStep) -> list[int]:
        return [i for i in self._active(step.block) if self._minibatch_of[i] == step.minibatch]

    def _all_keys(self) -> set[Key]:
        """Turns of the trajectories that contribute a gradient."""
        return {key for block in self.blocks for i in self._active(block) for key in self.buffer.turns_in(i, block)}

    def _check_budget(self) -> None:
        """
        Refuse a trajectory that no micro-batch may hold, before the parameters move and on every process. A turn is
        trained in one micro-batch with the turn that was updated before it.
        """
        budget = self.config.max_tokens_per_microbatch
        if budget is None:
            return
        longest, index, label = 0, -1, ""
        previous: dict[int, list[Key]] = {}
        for block in self.blocks:
            for i in self._active(block):
                keys = self.buffer.turns_in(i, block)
                tokens = self.scorer.num_tokens(self.buffer, previous.get(i, []) + keys)
                longest, index, label = max((longest, index, label), (tokens, i, block.label))
                previous[i] = keys
        over = self.engine.max_over_processes(longest)
        if over <= budget:
            return
        where = f"Trajectory {index} of this process has" if longest == over else "A trajectory of another process has"
        where += f" {over} tokens that are trained together" + (f" in turn {label}" if longest == over else "")
        raise ValueError(
            f"{where}, but `max_tokens_per_microbatch={budget}`. Raise it to at least {over}, or shorten the episodes "
            "(`max_turns`, `max_completion_length`, `max_context_length`)."
        )

    def _score_before_updates(self) -> None:
        """Log-probabilities under theta_k and under the reference policy that no later pass yields anyway."""
        keys = self._all_keys()
        if self.reference is not None:
            with self.reference.active():
                self._logps_ref = self._logps(keys, self.reference.scorer, self.reference.model)
        if self.steps and self._needs_logps_start:
            first = self.steps[0]
            inline = {key for i in self._members(first) for key in self.buffer.turns_in(i, first.block)}
            inline |= self._covered(first)
            self._logps_start.update(self._logps(keys - inline, self.scorer, self.model))

    def _covered(self, first: OptimizerStep) -> set[Key]:
        """
        Turns that the first optimizer step computes as the history of its own: its forward pass runs under theta_k and
        yields their log-probabilities too.
        """
        covered = set()
        for i in self._members(first):
            *_, last = self.buffer.turns_in(i, first.block)
            earlier = [(i, number) for number in range(1, last[1])]
            covered.update(key for key in earlier if self.buffer.turn(last).extends(self.buffer.turn(key)))
        return covered

    def _catch_up(self, position: int) -> None:
        """
        Before a block's first optimizer step: a pass without gradient for what that step's own forward pass does not
        cover. It is empty when every turn takes one optimizer step in reverse order.
        """
        step = self.steps[position]
        upcoming = {later.block for later in self.steps[position:]}
        needed = {i for block in upcoming for i in self.buffer.pool(block)}
        self._pending = {i: block for i, block in self._pending.items() if i in needed}

        inline = set(self._members(step))
        folded = {i: block for i, block in self._pending.items() if i not in inline}
        keys = {key for i, block in folded.items() for key in self.buffer.turns_in(i, block)}
        old_keys = {key for i in self._active(step.block) for key in self.buffer.turns_in(i, step.block)}
        old_keys = {key for key in old_keys if key[0] not in inline and key not in self._logps_old}
        logps = self._logps(keys | old_keys, self.scorer, self.model)
        self._logps_old.update({key: logps[key] for key in old_keys})
        self._fold_in(folded, logps)

    def _logps(self, keys: set[Key], scorer: Scorer, model: nn.Module) -> dict[Key, torch.Tensor]:
        """Log-probabilities of turns, without gradient."""
        max_rows = self.config.per_device_train_batch_size
        scores, tokens = score_without_gradient(self.buffer, keys, scorer, model, self.engine, max_rows)
        self.tokens["no_grad"] += tokens
        return {key: score.logps for key, score in scores.items()}

    def _fold_in(self, blocks: dict[int, Block], logps: dict[Key, torch.Tensor]) -> None:
        """`M_t = r_t(theta^t) * M_{t+1}` for the trajectories in `blocks`, each with its updated block (Eq. 8)."""
        if not blocks:
            return
        new = [self._action(i, block, logps) for i, block in blocks.items()]
        old = [self._action(i, block, self._logps_old) for i, block in blocks.items()]
        log_ratios = [sequence_log_ratio(*pair, self.config.turn_ratio) for pair in zip(new, old, strict=True)]
        for index, log_ratio in zip(blocks, torch.stack(log_ratios).tolist(), strict=True):
            self.buffer.fold_in(index, log_ratio)
            del self._pending[index]

    def _action(self, index: int, block: Block, values: dict[Key, torch.Tensor]) -> torch.Tensor:
        """Concatenate per-token values of the turns that a trajectory plays in a block, shape `(|a|,)`."""
        return torch.cat([values[key] for key in self.buffer.turns_in(index, block)])

    def _accumulate_gradients(self, step: OptimizerStep) -> torch.Tensor:
        """Forward and backward passes of one optimizer step; returns this process's share of its loss."""
        members = self._members(step)
        keys = [key for i in members for key in self.buffer.turns_in(i, step.block)]
        keys += [key for i in members if i in self._pending for key in self.buffer.turns_in(i, self._pending[i])]
        if step is self.steps[0] and self._needs_logps_start:
            keys = list({*keys, *self._covered(step)})
        batches = self.scorer.micro_batches(self.buffer, keys, self.config.per_device_train_batch_size)
        num_batches = self.engine.max_over_processes(len(batches))
        if step.is_first_of_block:
            self.statistics.add(step.block, pool=len(self.buffer.pool(step.block)))

        total = torch.zeros((), device=self.engine.device)
        self._step_entropy, self._step_tokens = 0.0, 0
        for number in range(num_batches):
            # a process that is out of work runs a dummy forward and backward, so that collectives match
            batch = batches[number] if number < len(batches) else self.scorer.dummy_batch()
            is_last = number == num_batches - 1
            with self.engine.micro_batch(is_last), self.scorer.attention(batch):
                with self.engine.autocast():
                    scores, aux_loss = self.scorer.score(self.engine.model, batch)
                loss = self._loss(step, scores)
                total += loss.detach()
                if aux_loss is not None:
                    self.statistics.add(step.block, aux_loss=aux_loss.item(), micro_batches=1)
                    loss = loss + self.aux_loss_coef * aux_loss / (num_batches * self.engine.num_processes)
                self.engine.backward(loss)
            self.tokens["train"] += batch.num_tokens
        self.entropy_bonus.observe(self._step_entropy, self._step_tokens, self.engine)
        return total

    def _loss(self, step: OptimizerStep, scores: dict[Key, TurnScores]) -> torch.Tensor:
        """`-J_t` of the trajectories in a micro-batch, plus what regularises it, summed and divided by N."""
        if DUMMY_KEY in scores:
            # ZeRO-3 gets out of step where processes do not backpropagate through the same outputs of the model
            outputs = scores[DUMMY_KEY] if self.entropy_bonus.is_enabled else scores[DUMMY_KEY][:1]
            return torch.cat(outputs).sum() * 0.0
        config, block = self.config, step.block
        logps = {key: score.logps for key, score in scores.items()}
        constants = {key: values.detach() for key, values in logps.items()}
        indices = sorted({index for index, _ in scores})
        self._fold_in({i: self._pending[i] for i in indices if i in self._pending}, constants)
        # not scored before: the parameters have not moved since the denominator's policy
        for key, values in constants.items():
            self._logps_start.setdefault(key, values)
        for key in (key for i in indices for key in self.buffer.turns_in(i, block)):
            self._logps_old.setdefault(key, constants[key])

        new = [self._action(i, block, logps) for i in indices]
        old = [self._action(i, block, self._logps_old) for i in indices]
        weights = new[0].new_tensor([self.buffer.weight(i) for i in indices])  # (n,)
        ratios = torch.stack(list(map(sequence_log_ratio, new, old))).exp()  # (n,)
        surrogates = clipped_surrogate(ratios, weights, config.epsilon, self._epsilon_high, config.delta)
        if self._corrects_sampler:
            surrogates = surrogates * self._sampler_weights(indices, block)
        if config.off_policy_mask_threshold is not None:
            surrogates = surrogates * self._on_policy_mask(indices, block, weights, new, old)
        losses = -surrogates
        kl = None
        if self.reference is not None:
            ref = [self._action(i, block, self._logps_ref) for i in indices]
            kl = list(map(k3_divergence, new, ref))
            mean_kl = torch.stack([values.mean() for values in kl])  # (n,)
            losses = losses + config.beta * (mean_kl * ratios if config.use_bias_correction_kl else mean_kl)
        entropies = [self._action(i, block, {key: score.entropies for key, score in scores.items()}) for i in indices]
        policy_losses = losses
        if self.entropy_bonus.is_enabled:
            losses = losses - self.entropy_bonus.weight * torch.stack([values.mean() for values in entropies])
        scale = self.num_minibatches / self.buffer.num_trajectories
        self._record(indices, block, losses * scale, policy_losses * scale, ratios, weights, entropies, kl)
        return losses.sum() * scale

    def _sampler_weights(self, indices: list[int], block: Block) -> torch.Tensor:
        """Correction of each action for a sampler that is not exactly theta_k, shape `(n,)`; 1 where unknown."""
        mode = self.config.vllm_importance_sampling_mode
        clip_min = self.config.vllm_importance_sampling_clip_min
        clip_max = self.config.vllm_importance_sampling_clip_max
        weights = []
        for index in indices:
            policy, sampler = self._action(index, block, self._logps_start), self._sampling_logps(index, block)
            if sampler is None:
                weights.append(policy.new_ones(()))
                continue
            weights.append(sampler_correction(policy, sampler, mode, clip_min, clip_max))
            difference = (policy - sampler).abs()
            difference = difference[~difference.isnan()]
            if len(difference):
                self.statistics.add(block, sampler_tokens=len(difference), sampler_difference=difference.sum().item())
                self.statistics.observe(block, sampler_difference=difference.max().item())
        for weight in weights:
            self.statistics.add(block, sampler_weight=weight.item())
            self.statistics.observe(block, sampler_weight=weight.item())
        return torch.stack(weights)

    def _on_policy_mask(
        self,
        indices: list[int],
        block: Block,
        weights: torch.Tensor,
        new: list[torch.Tensor],
        old: list[torch.Tensor],
    ) -> torch.Tensor:
        """1 for the actions that off-policy masking keeps, 0 for those it drops, shape `(n,)`."""
        sampled = [self._sampling_logps(index, block) for index in indices]
        behaviour = [fallback if logps is None else logps for logps, fallback in zip(sampled, old, strict=True)]
        threshold = self.config.off_policy_mask_threshold
        return torch.stack([keep_on_policy(*args, threshold) for args in zip(weights, new, behaviour, strict=True)])

    def _sampling_logps(self, index: int, block: Block) -> torch.Tensor | None:
        """The sampler's log-probabilities of one action, shape `(|a|,)`, where the sampler reported them."""
        turns = [self.buffer.turn(key) for key in self.buffer.turns_in(index, block)]
        if any(turn.sampling_logps is None for turn in turns):
            return None
        values = [torch.nan if logp is None else logp for turn in turns for logp in turn.sampling_logps]
        return torch.tensor(values, device=self.engine.device)

    def _record(
        self,
        indices: list[int],
        block: Block,
        losses: torch.Tensor,
        policy_losses: torch.Tensor,
        ratios: torch.Tensor,
        weights: torch.Tensor,
        entropies: list[torch.Tensor],
        kl: list[torch.Tensor] | None,
    ) -> None:
        columns = [
            losses,
            policy_losses,
            ratios,
            (ratios < 1 - self.config.epsilon) & (weights < 0),
            (ratios > 1 + self._epsilon_high) & (weights > 0),
            torch.stack([values.sum() for values in entropies]),
            torch.zeros_like(losses) if kl is None else torch.stack([values.sum() for values in kl]),
        ]
        # one transfer from the device for the whole micro-batch
        table = torch.stack([column.detach().double() for column in columns], dim=1).tolist()
        for index, tokens, row in zip(indices, map(len, entropies), table, strict=True):
            loss, policy_loss, ratio, clip_low, clip_high, entropy, kl_sum = row
            weight = self.buffer.relative_weight(index)
            unclipped = self.buffer.unclipped_relative_weight(index)
            extremes = {"ratio": ratio, "weight": weight, "clip_low": clip_low, "clip_high": clip_high}
            self.statistics.add(block, scored=1, loss=loss, policy_loss=policy_loss, kl=kl_sum)
            self.statistics.add(block, tokens=tokens, entropy=entropy, **extremes)
            self.statistics.observe(block, weight_unclipped=unclipped, **extremes)
            update = TurnUpdate(ratio, bool(clip_low or clip_high), self.buffer.weight(index), weight)
            self.turn_updates.update(dict.fromkeys(self.buffer.turns_in(index, block), update))
            self._step_entropy += entropy
            self._step_tokens += tokens
