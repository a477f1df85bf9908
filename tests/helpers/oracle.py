"""
A naive SeeUPO iteration, to compare the package with (Algorithm 1 of arXiv 2602.06554).

Everything is done the slow, obvious way: plain loops, one trajectory and one turn at a time, no padding, no sharing
of prefixes, no fused head, no skipping of trajectories that cannot contribute, an old pass and a new pass for every
block, and a gradient step written out by hand. It imports nothing from the package under test.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch


@dataclass(frozen=True)
class OracleSettings:
    """
    What one iteration depends on besides the model and the rollouts.

    Args:
        lr (`float`):
            Step size of plain SGD.
        update_order (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"`, `"forward"`, `"simultaneous"`, or `"random"`, which visits the blocks as `permutation` says.
        permutation (`tuple[int, ...]`, *optional*):
            Blocks (counted from the first turns) in the order they are updated, for `update_order="random"`.
        minibatches (`tuple[int, ...]`, *optional*):
            Minibatch of every trajectory; `None` puts all of them into one. An epoch is one optimizer step on each.

    The other fields are named and defined as in `SeeUPOConfig`.
    """

    lr: float
    update_order: str = "reverse"
    permutation: tuple[int, ...] | None = None
    max_turn_updates: int | None = None
    old_policy: str = "iteration"
    turn_credit: str = "episode"
    surrogate_ratio: str = "geometric"
    turn_ratio: str = "geometric"
    turn_weight_clip: float | None = 0.2
    scale_rewards: str = "batch"
    multi_objective_aggregation: str = "sum_then_normalize"
    reward_weights: tuple[float, ...] | None = None
    advantage_clip: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    loss_type: str = "seeupo"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_k_neg: float = 3.0
    vespo_lambda_pos: float = 3.0
    vespo_lambda_neg: float = 2.0
    num_iterations: int = 1
    minibatches: tuple[int, ...] | None = None
    max_grad_norm: float = 0.0
    temperature: float = 1.0
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0


@dataclass
class BlockRecord:
    """What happened in the update of one block of turns; trajectories are numbered through all groups, in order."""

    turns: list[int]
    pool: list[int]
    weights_before: dict[int, float]
    first_ratios: dict[int, float] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    weights_after: dict[int, float] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)


@dataclass
class OracleResult:
    """Advantages of all trajectories, a record of every block in the order of the updates, the final parameters."""

    advantages: list[float]
    blocks: list[BlockRecord]
    parameters: dict[str, torch.Tensor]


def seeupo_iteration(
    model, groups, settings: OracleSettings, ref_model=None, sampling_logps=None, step_rewards=None
) -> OracleResult:
    """
    Run one iteration on `model`, in place.

    Args:
        model (`PreTrainedModel`):
            Policy; parameters that require no gradient stay as they are.
        groups (`list[list[tuple[list[tuple[list[int], list[int]]], float]]]`):
            Groups of `(turns, reward)`, one a rollout of the same task; a turn is `(context_ids, action_ids)`. In
            place of the reward there may be a list with one of each reward function, `None` where it gave none.
        settings ([`OracleSettings`]):
            Settings of the iteration.
        ref_model (`PreTrainedModel`, *optional*):
            Model of the KL penalty, needed when `settings.beta` is not 0.
        sampling_logps (`list[list[list[float]]]`, *optional*):
            Log-probabilities that a sampler reported, by trajectory, turn and token. The objective of an action is
            then corrected for the difference from the policy's.
        step_rewards (`list[list[float]]`, *optional*):
            What of its reward (of the last function) a trajectory got after each turn, for
            `settings.turn_credit="to_go"`; the rest comes after the last turn.
    """
    trajectories = [turns for group in groups for turns, _ in group]
    rewards = [[reward if isinstance(reward, list) else [reward] for _, reward in group] for group in groups]
    advantages = [advantage for (advantage,) in advantages_of(rewards, settings)]
    credit = {(i, t): advantage for i, advantage in enumerate(advantages) for t in range(len(trajectories[i]))}
    if settings.turn_credit == "to_go":
        of_turns = advantages_of(rewards, settings, step_rewards)
        credit = {(i, t): advantage for i, row in enumerate(of_turns) for t, advantage in enumerate(row)}
    blocks = ordered_blocks(max(len(turns) for turns in trajectories), settings)

    old_logps, ref_logps, start_logps = {}, {}, {}
    for i, turns in enumerate(trajectories):
        for t, (context, action) in enumerate(turns):
            if settings.old_policy == "iteration":
                old_logps[i, t] = token_logps(model, context, action, settings.temperature).detach()
            if sampling_logps is not None:
                start_logps[i, t] = token_logps(model, context, action, settings.temperature).detach()
            if settings.beta != 0:
                ref_logps[i, t] = token_logps(ref_model, context, action, settings.temperature).detach()

    weights = [1.0] * len(trajectories)
    records = []
    for block in blocks:
        turns_of = {i: [t for t in block if t < len(turns)] for i, turns in enumerate(trajectories)}
        pool = [i for i in turns_of if turns_of[i]]
        record = BlockRecord(block, pool, {i: weights[i] for i in pool})
        records.append(record)

        if settings.old_policy == "turn":
            for i in pool:
                for t in turns_of[i]:
                    old_logps[i, t] = token_logps(model, *trajectories[i][t], settings.temperature).detach()

        def log_ratios(i, turns_of=turns_of):
            new = [token_logps(model, *trajectories[i][t], settings.temperature) for t in turns_of[i]]
            old = [old_logps[i, t] for t in turns_of[i]]
            return torch.cat(new) - torch.cat(old), torch.cat(new)

        is_updated = any(credit[i, block[0]] != 0 for i in pool)
        if is_updated or settings.beta != 0 or settings.entropy_coef != 0:
            minibatches = settings.minibatches or (0,) * len(trajectories)
            num_minibatches = max(minibatches) + 1
            for _epoch in range(settings.num_iterations):
                for minibatch in range(num_minibatches):
                    model.zero_grad()
                    for i in pool:
                        if minibatches[i] != minibatch:
                            continue
                        log_ratio, new_logps = log_ratios(i)
                        ratio = surrogate_ratio(log_ratio, settings)
                        record.first_ratios.setdefault(i, ratio.item())
                        weighted = credit[i, block[0]] * weights[i]
                        objective = objective_of(log_ratio, new_logps, weighted, settings)
                        if sampling_logps is not None:
                            policy = [logp.item() for t in turns_of[i] for logp in start_logps[i, t]]
                            sampler = [logp for t in turns_of[i] for logp in sampling_logps[i][t]]
                            objective = objective * sampler_weight(policy, sampler, settings)
                        if settings.beta != 0:
                            difference = torch.cat([ref_logps[i, t] for t in turns_of[i]]) - new_logps
                            k3 = difference.exp() - difference - 1
                            if settings.use_bias_correction_kl:
                                k3 = k3 * ratio
                            objective = objective - settings.beta * k3.mean()
                        if settings.entropy_coef != 0:
                            entropies = [
                                token_entropies(model, *trajectories[i][t], settings.temperature) for t in turns_of[i]
                            ]
                            objective = objective + settings.entropy_coef * torch.cat(entropies).mean()
                        loss = -num_minibatches / len(trajectories) * objective
                        if loss.requires_grad:  # not where the ratio is clipped
                            loss.backward()
                    record.grad_norms.append(sgd_step(model, settings.lr, settings.max_grad_norm))
        else:
            continue  # a turn that nobody learns from is not updated, so the weights do not hear of it

        for i in pool:
            with torch.no_grad():
                log_ratio, _ = log_ratios(i)
            if settings.turn_ratio == "geometric":
                factor = math.exp(log_ratio.mean().item())
            else:
                factor = math.exp(log_ratio.sum().item())
            record.factors[i] = factor
            if settings.turn_weight_clip is None:
                weights[i] = weights[i] * factor
            else:
                low, high = 1 - settings.turn_weight_clip, 1 + settings.turn_weight_clip
                factor = min(max(factor, low), high)
                weights[i] = min(max(weights[i] * factor, low), high)
            record.weights_after[i] = weights[i]

    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return OracleResult(advantages, records, parameters)


def advantages_of(
    rewards: list[list[list[float | None]]], settings: OracleSettings, step_rewards: list[list[float]] | None = None
) -> list[list[float]]:
    """
    Advantages in the order of the trajectories (Eq. 9): of each of its turns where `step_rewards` are given, or else
    one of the episode.

    The advantage of a turn is the reward that is still to come, minus its mean over those of the group who played the
    turn (trained on or not), in the same units as the advantages of episodes.
    """
    num_functions = len(rewards[0][0])
    function_scales, scale = [1.0] * num_functions, 1.0
    scales_functions = settings.multi_objective_aggregation == "normalize_then_sum"
    if scales_functions:
        for f in range(num_functions):
            function_scales[f] = deviation([a for group in rewards for a in relative([r[f] for r in group])])
    if scales_functions or settings.scale_rewards == "batch":
        scale = deviation([a for group in rewards for a in combined(group, settings, function_scales, 1.0)])

    result, first = [], 0
    for group in rewards:
        members = range(len(group))
        num_turns = [1 if step_rewards is None else len(step_rewards[first + i]) for i in members]
        of_turns = [[0.0] * num for num in num_turns]
        for t in range(max(num_turns)):
            playing = [i for i in members if num_turns[i] > t]
            to_come = [list(group[i]) for i in playing]
            for i, values in zip(playing, to_come, strict=True):
                if step_rewards is not None and values[-1] is not None:
                    values[-1] -= math.fsum(step_rewards[first + i][:t])
            advantages = combined(to_come, settings, function_scales, scale)
            for i, advantage in zip(playing, advantages, strict=True):
                bound = math.inf if settings.advantage_clip is None else settings.advantage_clip
                of_turns[i][t] = min(max(float(advantage or 0), -bound), bound)
        result += of_turns
        first += len(group)
    return result


def combined(
    group: list[list[float | None]], settings: OracleSettings, function_scales: list[float], scale: float
) -> list[Fraction | None]:
    """Advantages in a group, of rewards by function; `None` for who has none of any function."""
    weights = [Fraction(w) for w in settings.reward_weights or [1.0] * len(function_scales)]
    if settings.multi_objective_aggregation == "normalize_then_sum":
        columns = [relative([rewards[f] for rewards in group]) for f in range(len(weights))]
        columns = [divided(column, s) for column, s in zip(columns, function_scales, strict=True)]
        total = weighted([list(row) for row in zip(*columns, strict=True)], weights)
    else:
        total = relative(weighted(group, weights))
    return divided(total, scale)


def weighted(rows: list[list], weights: list[Fraction]) -> list[Fraction | None]:
    """Weighted sums of the values that there are; exact, as all sums and differences here."""
    sums = []
    for row in rows:
        terms = [w * Fraction(value) for w, value in zip(weights, row, strict=True) if value is not None]
        sums.append(sum(terms) if terms else None)
    return sums


def relative(values: list) -> list[Fraction | None]:
    """Values minus the mean of those that there are."""
    there = [Fraction(value) for value in values if value is not None]
    return [None if value is None else Fraction(value) - sum(there) / len(there) for value in values]


def divided(values: list, scale: float) -> list[Fraction | None]:
    """Values by their scale; 0 where nothing varies."""
    return [None if value is None else value / Fraction(scale) if scale > 0 else Fraction(0) for value in values]


def deviation(advantages: list[Fraction | None]) -> float:
    """Standard deviation of those advantages that there are; they add up to 0."""
    there = [a for a in advantages if a is not None]
    return math.sqrt(sum(a**2 for a in there) / (len(there) - 1)) if len(there) > 1 else 0.0


def ordered_blocks(num_turns: int, settings: OracleSettings) -> list[list[int]]:
    """Blocks of consecutive turns (counted from 0), in the order they are updated."""
    num_blocks = num_turns if settings.max_turn_updates is None else min(settings.max_turn_updates, num_turns)
    if settings.update_order == "simultaneous":
        num_blocks = 1
    blocks, start = [], 0
    for b in range(num_blocks):
        size = num_turns // num_blocks + (1 if b < num_turns % num_blocks else 0)
        blocks.append(list(range(start, start + size)))
        start += size
    if settings.update_order == "reverse":
        return blocks[::-1]
    if settings.update_order == "random":
        return [blocks[b] for b in settings.permutation]
    return blocks


def next_token_logps(model, context: list[int], action: list[int], temperature: float) -> list[torch.Tensor]:
    """Log-probabilities of the whole vocabulary at every position of the action, in one plain forward pass."""
    logits = model(torch.tensor([context + action])).logits[0]
    positions = [len(context) + j - 1 for j in range(len(action))]  # logits predict the token that follows
    return [torch.log_softmax(logits[position] / temperature, dim=-1) for position in positions]


def token_logps(model, context: list[int], action: list[int], temperature: float) -> torch.Tensor:
    """Log-probability of every action token after the context."""
    distributions = next_token_logps(model, context, action, temperature)
    return torch.stack([logps[token] for logps, token in zip(distributions, action, strict=True)])


def token_entropies(model, context: list[int], action: list[int], temperature: float) -> torch.Tensor:
    """Entropy, in nats, of the distribution every action token was drawn from."""
    distributions = next_token_logps(model, context, action, temperature)
    return torch.stack([-(logps.exp() * logps).sum() for logps in distributions])


def surrogate_ratio(log_ratio: torch.Tensor, settings: OracleSettings) -> torch.Tensor:
    """Ratio of one action, given the log-ratio of each of its tokens."""
    return log_ratio.mean().exp() if settings.surrogate_ratio == "geometric" else log_ratio.exp().prod()


def objective_of(
    log_ratio: torch.Tensor, new_logps: torch.Tensor, weighted_advantage: float, settings: OracleSettings
) -> torch.Tensor:
    """What is maximised of one action, given the log-ratio and the log-probability of each of its tokens."""
    ratio = surrogate_ratio(log_ratio, settings)
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    if settings.loss_type == "cispo":
        return min(ratio.item(), high) * weighted_advantage * new_logps.sum() / len(new_logps)
    if settings.loss_type == "sapo":
        tau = settings.sapo_temperature_pos if weighted_advantage > 0 else settings.sapo_temperature_neg
        return weighted_advantage * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
    if settings.loss_type == "vespo":
        w = math.exp(math.fsum(log_ratio.tolist()))
        sign = "pos" if weighted_advantage >= 0 else "neg"
        k, lam = getattr(settings, f"vespo_k_{sign}"), getattr(settings, f"vespo_lambda_{sign}")
        return math.exp(lam) * w**k * math.exp(-lam * w) * weighted_advantage * new_logps.sum() / len(new_logps)
    objective = clipped_objective(ratio, weighted_advantage, settings)
    return len(new_logps) * objective if settings.loss_type == "luspo" else objective


def clipped_objective(ratio: torch.Tensor, weighted_advantage: float, settings: OracleSettings) -> torch.Tensor:
    """The clipped surrogate of one trajectory; a clipped ratio is a constant, so it gives no gradient."""
    low = 1 - settings.epsilon
    high = 1 + (settings.epsilon if settings.epsilon_high is None else settings.epsilon_high)
    value = ratio.item()
    clipped = ratio if low <= value <= high else ratio.new_tensor(min(max(value, low), high))
    unclipped = ratio
    if settings.delta is not None and value > settings.delta:
        unclipped = ratio.new_tensor(settings.delta)
    if (unclipped * weighted_advantage).item() <= (clipped * weighted_advantage).item():
        return unclipped * weighted_advantage
    return clipped * weighted_advantage


def sampler_weight(policy_logps: list[float], sampling_logps: list[float], settings: OracleSettings) -> float:
    """Correction of one action in the chosen mode, averaged over tokens where a mode has one ratio a token."""
    level, constraint = settings.vllm_importance_sampling_mode.split("_")
    differences = [p - s for p, s in zip(policy_logps, sampling_logps, strict=True)]
    ratios = [math.exp(d) for d in ([math.fsum(differences)] if level == "sequence" else differences)]
    low = (
        -math.inf if settings.vllm_importance_sampling_clip_min is None else settings.vllm_importance_sampling_clip_min
    )
    high = (
        math.inf if settings.vllm_importance_sampling_clip_max is None else settings.vllm_importance_sampling_clip_max
    )
    if constraint == "truncate":
        ratios = [min(max(ratio, low), high) for ratio in ratios]
    else:
        ratios = [ratio if low <= ratio <= high else 0.0 for ratio in ratios]
    return math.fsum(ratios) / len(ratios)


def sgd_step(model, lr: float, max_grad_norm: float) -> float:
    """One step of gradient descent on the trainable parameters; returns the norm of the gradient before clipping."""
    trainable = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    norm = math.sqrt(math.fsum((p.grad.double() ** 2).sum().item() for p in trainable))
    # The small constant in the denominator is that of `torch.nn.utils.clip_grad_norm_`.
    scale = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm > 0 else 1.0
    with torch.no_grad():
        for p in trainable:
            p -= lr * scale * p.grad
    return norm
