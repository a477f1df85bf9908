"""
The backward-ordered update of one iteration (Algorithm 1 of arXiv 2602.06554).

Read [`TurnUpdater.run`] beside the paper's box. What makes it cheap: when a turn takes one optimizer step, the forward
pass of its update runs at the very parameters `theta^{t+1}` that the turn after it was left at. It therefore yields
that turn's ratio, which makes `M_{t+1}`, and the graph of its own loss. A turn then costs one forward and backward
pass and nothing else; only `old_policy="iteration"` adds one pass without gradient an iteration.

Departures from the paper, all of them options with the paper's form available: the bound on `M` (`turn_weight_clip`),
blocks of turns (`max_turn_updates`), mini-batches and epochs within a turn. A turn whose pool has no advantage other
than 0 takes no optimizer step, because its gradient is 0 (unless a KL or entropy term is on). It counts as not
updated: its ratio does not enter `M`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import nn

from ..distributed.lock_step import LockStep
from ..scoring.interface import DUMMY_KEY, Scorer, Scores, TurnScores
from ..scoring.turn_buffer import Block, Key, TurnBuffer
from ..seeupo_config import SeeUPOConfig
from .entropy_bonus import EntropyBonus
from .improvement import Improvement
from .log_probs import LogProbs, Reference
from .loss import Actions, LossSettings, Surrogate, turn_loss, turn_surrogate
from .metrics import GATES, TurnUpdate, UpdateMetrics
from .objective import sequence_log_ratios
from .steps import OptimizerStep, UpdatePlan
from .turn_weights import TurnWeights


@dataclass
class UpdateRecord:
    """
    What an update did on this process.

    Args:
        metrics ([`~seeupo_trl.update.metrics.UpdateMetrics`]):
            By block, to be reduced over processes.
        turns (`dict[tuple[int, int], TurnUpdate]`):
            How each turn was trained on; without those that no optimizer step was taken on.
        grad_norms (`list[tuple[Block, float]]`):
            Of each optimizer step but the last one.
        tokens (`dict[str, int]`), seconds (`dict[str, float]`):
            Tokens computed, padding included, and time spent.
    """

    metrics: UpdateMetrics
    turns: dict[Key, TurnUpdate] = field(default_factory=dict)
    grad_norms: list[tuple[Block, float]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: {"no_grad": 0, "train": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"old_pass": 0.0, "update": 0.0})


class TurnUpdater:
    """
    The update phase of one iteration.

    Args:
        buffer ([`~seeupo_trl.scoring.turn_buffer.TurnBuffer`]):
            This process's trajectories.
        advantages (`list[float]`):
            Normalised advantage `A_i` of each of them (Eq. 9).
        num_trajectories (`int`):
            `N`, the number of trajectories over all processes.
        config ([`~seeupo_trl.SeeUPOConfig`]):
            The user's configuration.
        lock_step ([`~seeupo_trl.distributed.lock_step.LockStep`]):
            Backward passes and optimizer steps.
        scorer ([`~seeupo_trl.scoring.interface.Scorer`]):
            Log-probabilities of turns under the policy.
        model (`torch.nn.Module`):
            The policy without distributed wrapper, for passes without gradient.
        iteration (`int`):
            Iterations done before this one; with the run's seed it fixes everything random here.
        entropy_bonus ([`~seeupo_trl.update.entropy_bonus.EntropyBonus`]):
            Weight of the entropy in the objective.
        reference ([`~seeupo_trl.update.log_probs.Reference`], *optional*):
            Reference policy of the KL term; without one there is none.
        aux_loss_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the load-balancing loss of a mixture-of-experts model.
        settings ([`~seeupo_trl.update.loss.LossSettings`], *optional*):
            The numbers in the loss; by default those of the configuration.
        surrogate (`Callable`, *optional*, defaults to [`~seeupo_trl.update.loss.turn_surrogate`]):
            What is maximised of each action.
        turn_advantages (`list[Sequence[float]]`, *optional*):
            Normalised advantage `A_{i,t}` of each turn of each trajectory, where turns have their own; `advantages` is
            then that of the episode.
    """

    def __init__(
        self,
        buffer: TurnBuffer,
        advantages: list[float],
        num_trajectories: int,
        config: SeeUPOConfig,
        lock_step: LockStep,
        scorer: Scorer,
        model: nn.Module,
        iteration: int,
        entropy_bonus: EntropyBonus,
        reference: Reference | None = None,
        aux_loss_coef: float = 0.0,
        settings: LossSettings | None = None,
        surrogate: Surrogate = turn_surrogate,
        turn_advantages: list[Sequence[float]] | None = None,
    ):
        if len(buffer) != len(advantages):
            raise ValueError(f"Got {len(buffer)} trajectories but {len(advantages)} advantages; need one each.")
        self.buffer = buffer
        self.config = config
        self.lock_step = lock_step
        self.scorer = scorer
        self.reference = reference
        self.entropy_bonus = entropy_bonus
        self.aux_loss_coef = aux_loss_coef

        self.settings = LossSettings.of(config) if settings is None else settings
        self.surrogate = surrogate
        regularized = reference is not None or entropy_bonus.is_enabled
        num_minibatches = config.steps_per_generation // config.gradient_accumulation_steps
        self.weights = TurnWeights(advantages, config.turn_weight_clip, turn_advantages)
        self.plan = UpdatePlan(
            buffer,
            lambda index, turn: regularized or self.weights.advantage(index, turn) != 0.0,
            lock_step,
            num_minibatches=num_minibatches,
            num_passes=config.num_iterations,
            update_order=config.update_order,
            max_turn_updates=config.max_turn_updates,
            seed=config.seed,
            iteration=iteration,
        )
        self.improvement = None
        if config.update_order == "reverse" and config.old_policy == "iteration" and len(self.plan.blocks) > 1:
            trained = sorted({i for block in self.plan.blocks for i in self.plan.active(block)})
            self.improvement = Improvement({i: advantages[i] for i in trained if advantages[i] != 0}, num_trajectories)
        self.log_probs = LogProbs(
            buffer, scorer, model, lock_step, config.per_device_train_batch_size, config.old_policy
        )
        self._scale = num_minibatches / num_trajectories
        self._corrects_sampler = self.settings.sampler_correction is not None
        self._needs_start = config.old_policy == "iteration" or self._corrects_sampler
        self._ratio_due: dict[int, Block] = {}  # trajectory -> updated block whose ratio is not in M yet
        optional = {
            "kl": reference is not None,
            "sampler": self._corrects_sampler,
            "entropy_bonus": entropy_bonus.is_enabled,
            "aux_loss": aux_loss_coef != 0.0,
            **{name: config.loss_type == loss_type for loss_type, name in GATES.items()},
        }
        metrics = UpdateMetrics(
            {block: len(steps) for block, steps in self.plan.steps.items()},
            {name for name, present in optional.items() if present},
        )
        self.record = UpdateRecord(metrics)

    def run(self) -> torch.Tensor:
        """
        Update the turns one block at a time. The last optimizer step is left to the Trainer, with its gradients
        ready; when the plan has no step there is none.

        Returns:
            `torch.Tensor` of shape `()`:
                Mean over optimizer steps of this process's share of the loss, so that the mean over processes is the
                loss of the iteration.
        """
        start = perf_counter()
        # the check may end in another layout, and that one has to keep within the budget
        self.scorer.check(self.buffer, self.plan.keys(), self.log_probs.model, self.lock_step)
        self.plan.check_budget(self.scorer, self.config.max_tokens_per_microbatch)
        self._score_before_updates()
        self.record.seconds["old_pass"] = perf_counter() - start

        start = perf_counter()
        loss = torch.zeros((), device=self.lock_step.device)
        for block in self.plan.blocks:  # for t = T, ..., 1
            self.record.metrics.add_pool(block, len(self.buffer.pool(block)))
            # M_{t+1} = r_{t+1}(theta^{t+1}) M_{t+2} (Eq. 8), where the pass of the first step does not make it itself
            self._weigh_outside_the_pass(block)
            for step in self.plan.steps[block]:
                # the gradient of J_t, each trajectory weighted by its M_{t+1}
                loss += self._accumulate_gradients(step)
                if step is not self.plan.last_step:
                    # theta^t, when it is the block's last step
                    self.record.grad_norms.append((block, self.lock_step.step()))
            self._ratio_due.update((i, block) for i in self.plan.active(block) if self.weights.matters(i))
        if not self.plan.blocks:
            self._measure_without_update()
        self.record.seconds["update"] = perf_counter() - start
        self.record.tokens["no_grad"] = self.log_probs.num_tokens
        return loss * self.lock_step.num_processes / max(self.plan.num_steps, 1)

    def logs(self) -> list[tuple[str, float]]:
        """Names and values of what the update logs, over all processes. Must be called on every process."""
        record = self.record
        values = record.metrics.reduce(self.lock_step)
        if self.scorer.noise_floor is not None:
            values["ratio/noise_floor"] = self.scorer.noise_floor
        values["turn_updates"] = len(self.plan.blocks)
        values["optimizer_steps"] = self.plan.num_steps
        if self.improvement is not None:
            values |= self.improvement.reduce(self.lock_step)
        if self.entropy_bonus.is_enabled:
            values["entropy_coef"] = self.entropy_bonus.coef
        values |= {f"time/{name}": seconds for name, seconds in record.seconds.items()}
        tokens = self.lock_step.gather(torch.tensor(list(record.tokens.values()), dtype=torch.float32)).sum(0)
        values |= {f"tokens/{name}": count for name, count in zip(record.tokens, tokens.tolist(), strict=True)}
        return [*values.items(), *((f"turn_{block.label}/grad_norm", norm) for block, norm in record.grad_norms)]

    # ---- The weight of a turn: M ----

    @torch.no_grad()
    def _multiply_by_ratios(self, indices: Iterable[int], scores: Scores) -> None:
        """
        `M_{i,t} = r_{i,t}(theta^t) M_{i,t+1}` (Eq. 8), where block t was just updated and `scores` are of `theta^t`.
        """
        updated = [(i, self._ratio_due.pop(i)) for i in indices if i in self._ratio_due]
        if not updated:
            return
        turns = [self.buffer.turns_in(*one) for one in updated]
        new, old = scores.in_a_row(turns).logps, _in_a_row(turns, self.log_probs.old)
        lengths = self._lengths(turns)
        kinds = [self.config.turn_ratio] if self.improvement is None else [self.config.turn_ratio, "product"]
        # one transfer from the device for both
        log_ratios = torch.stack([sequence_log_ratios(new, old, lengths, kind) for kind in kinds]).tolist()
        for (index, _), log_ratio in zip(updated, log_ratios[0], strict=True):
            self.weights.multiply(index, log_ratio)
        if self.improvement is not None:
            for (index, _), log_ratio in zip(updated, log_ratios[1], strict=True):
                self.improvement.take_in(index, log_ratio)

    def _weigh_outside_the_pass(self, block: Block) -> None:
        """
        Before a block's first optimizer step: a pass without gradient over what that step's own forward pass does not
        cover. It is empty when every turn takes one optimizer step in reverse order.
        """
        in_pass = set(self.plan.members(self.plan.steps[block][0]))
        still_playing = self.plan.played_from(block)
        self._ratio_due = {i: updated for i, updated in self._ratio_due.items() if i in still_playing}
        due = [i for i in self._ratio_due if i not in in_pass]
        keys = {key for i in due for key in self.buffer.turns_in(i, self._ratio_due[i])}
        denominators: set[Key] = set()
        if self.config.old_policy == "turn":
            others = [i for i in self.plan.active(block) if i not in in_pass]
            denominators = {key for i in others for key in self.buffer.turns_in(i, block)}
        scores = self.log_probs.now(keys | denominators)
        self.log_probs.old.update({key: scores[key].logps for key in denominators})
        self._multiply_by_ratios(due, scores)

    # ---- Log-probabilities ----

    def _score_before_updates(self) -> None:
        """Log-probabilities under `theta_k` and under the reference that no later pass yields anyway."""
        keys = self.plan.keys()
        if self.reference is not None:
            self.log_probs.score_reference(keys, self.reference)
        first = self.plan.first_step
        if first is not None and self._needs_start:
            own = {key for i in self.plan.members(first) for key in self.buffer.turns_in(i, first.block)}
            self.log_probs.start.update(self.log_probs.now(keys - own - self._covered(first)).logps_by_turn())

    def _covered(self, first: OptimizerStep) -> set[Key]:
        """
        Turns that the first optimizer step computes as the history of its own: its forward pass runs under `theta_k`
        and yields their log-probabilities too.
        """
        covered = set()
        for i in self.plan.members(first):
            *_, last = self.buffer.turns_in(i, first.block)
            earlier = [(i, number) for number in range(1, last[1])]
            covered.update(key for key in earlier if self.buffer.turn(last).extends(self.buffer.turn(key)))
        return covered

    def _take_denominators(self, step: OptimizerStep, scores: Scores) -> None:
        """Keep what a first pass yields at parameters that have not moved yet since those of the denominator."""
        if step is self.plan.first_step:
            self.log_probs.start.update(scores.logps_by_turn())
        if step.is_first_of_block and self.config.old_policy == "turn":
            own = [key for key in scores if step.block.first <= key[1] <= step.block.last]
            self.log_probs.old.update((key, scores[key].logps.detach()) for key in own)

    def _sampled(self, turns: list[list[Key]]) -> torch.Tensor:
        """
        The sampler's log-probabilities of the actions that some trajectories' turns make up, one after another, shape
        `(S,)`; NaN for tokens without one, and for actions with a turn of which the sampler reported none.
        """
        values: list[float] = []
        for keys in turns:
            action = [self.buffer.turn(key) for key in keys]
            if any(turn.sampling_logps is None for turn in action):
                values += [torch.nan] * sum(len(turn.action_ids) for turn in action)
            else:
                values += [torch.nan if logp is None else logp for turn in action for logp in turn.sampling_logps]
        return torch.tensor(values).to(self.lock_step.device, non_blocking=True)

    # ---- One optimizer step ----

    def _accumulate_gradients(self, step: OptimizerStep) -> torch.Tensor:
        """Forward and backward passes of one optimizer step; returns this process's share of its loss."""
        members = self.plan.members(step)
        keys = [key for i in members for key in self.buffer.turns_in(i, step.block)]
        keys += [key for i in members if i in self._ratio_due for key in self.buffer.turns_in(i, self._ratio_due[i])]
        if step is self.plan.first_step and self._needs_start:
            keys = list({*keys, *self._covered(step)})
        batches = self.scorer.micro_batches(self.buffer, keys, self.config.per_device_train_batch_size)
        num_batches = self.lock_step.max_over_processes(len(batches))

        total = torch.zeros((), device=self.lock_step.device)
        entropy, tokens = 0.0, 0
        for number in range(num_batches):
            # a process that is out of work runs a dummy forward and backward, so that collectives match
            batch = batches[number] if number < len(batches) else self.scorer.dummy_batch()
            with self.lock_step.micro_batch(number == num_batches - 1), self.scorer.attention(batch):
                with self.lock_step.loss_context():
                    with self.lock_step.autocast():
                        scores, aux_loss = self.scorer.score(self.lock_step.model, batch)
                    if DUMMY_KEY in scores:
                        loss = self._no_loss(scores[DUMMY_KEY])
                    else:
                        loss, batch_entropy, batch_tokens = self._loss(step, scores)
                        entropy, tokens = entropy + batch_entropy, tokens + batch_tokens
                    if aux_loss is not None:
                        scale = self.aux_loss_coef / (num_batches * self.lock_step.num_processes)
                        self.record.metrics.add_aux_loss(step.block, aux_loss.item(), scale)
                        loss = loss + scale * aux_loss
                    total += loss.detach()
                self.lock_step.backward(loss)
            self.record.tokens["train"] += batch.num_tokens
        self.entropy_bonus.observe(entropy, tokens, self.lock_step)
        return total

    @torch.no_grad()
    def _measure_without_update(self) -> None:
        """
        Metrics of an iteration without any optimizer step, whose ratios are 1: the entropy is always there, as in
        GRPO. Must be called on every process.
        """
        block = Block(1, self.buffer.num_turns)
        indices = self.buffer.pool(block)
        keys = [key for i in indices for key in self.buffer.turns_in(i, block)]
        self.scorer.check(self.buffer, keys, self.log_probs.model, self.lock_step)
        scores = self.log_probs.now(keys)
        if not indices:
            return
        logps = scores.logps_by_turn()
        self.log_probs.start.update(logps)
        self.log_probs.old.update(logps)
        actions = self._actions(indices, block, scores)
        loss = turn_loss(actions, actions.new.new_zeros(len(indices)), self.settings)
        self.record.metrics.add_micro_batch(None, indices, actions, loss, 0.0, self.weights)

    def _no_loss(self, scores: TurnScores) -> torch.Tensor:
        """
        0, of the outputs that a loss would depend on: ZeRO-3 gets out of step where processes do not backpropagate
        through the same outputs of the model.
        """
        outputs = scores if self.entropy_bonus.is_enabled else scores[:1]
        return torch.cat(outputs).sum() * 0.0

    def _loss(self, step: OptimizerStep, scores: Scores) -> tuple[torch.Tensor, float, int]:
        """`-J_t` and its regularisers, summed over a micro-batch and divided by N; entropies of how many tokens."""
        block = step.block
        indices = sorted({index for index, _ in scores})
        self._multiply_by_ratios(indices, scores)
        self._take_denominators(step, scores)

        actions = self._actions(indices, block, scores)
        entropy_weight = self.entropy_bonus.weight if self.entropy_bonus.is_enabled else None
        settings = replace(self.settings, entropy_weight=entropy_weight)
        weights = torch.tensor(
            [self.weights.of_turn(i, block.first) for i in indices], dtype=actions.new.dtype
        )  # (n,)
        weights = weights.to(actions.new.device, non_blocking=True)
        loss = turn_loss(actions, weights, settings, self.surrogate)
        updates, entropy, tokens = self.record.metrics.add_micro_batch(
            block, indices, actions, loss, self._scale, self.weights
        )
        for index, update in zip(indices, updates, strict=True):
            for key in self.buffer.turns_in(index, block):
                self.record.turns[key] = update
        return loss.losses.sum() * self._scale, entropy, tokens

    def _actions(self, indices: list[int], block: Block, scores: Scores) -> Actions:
        """What some trajectories do in a block, with the scores of a pass and what it is compared with."""
        turns = [self.buffer.turns_in(i, block) for i in indices]
        new = scores.in_a_row(turns)
        return Actions(
            lengths=self._lengths(turns),
            new=new.logps,
            old=_in_a_row(turns, self.log_probs.old),
            entropies=new.entropies,
            start=_in_a_row(turns, self.log_probs.start) if self._corrects_sampler else None,
            sampled=self._sampled(turns) if self.settings.reads_sampled else None,
            reference=None if self.reference is None else _in_a_row(turns, self.log_probs.reference),
        )

    def _lengths(self, turns: list[list[Key]]) -> torch.Tensor:
        """Numbers of tokens of the actions that some trajectories' turns make up, shape `(n,)`."""
        lengths = [sum(len(self.buffer.turn(key).action_ids) for key in keys) for keys in turns]
        return torch.tensor(lengths).to(self.lock_step.device, non_blocking=True)


def _in_a_row(turns: list[list[Key]], values: dict[Key, torch.Tensor]) -> torch.Tensor:
    """Per-token values of the actions that some trajectories' turns make up, one after another, shape `(S,)`."""
    return torch.cat([values[key] for keys in turns for key in keys])
