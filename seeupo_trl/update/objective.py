"""
The equations of SeeUPO as pure tensor functions, one equation each (arXiv 2602.06554).

Conventions the paper leaves open: a standard deviation has the divisor N - 1 (as in TRL and in the authors' code), no
epsilon is added to it, and a ratio inside `M` is bounded to [e^-20, e^20] so that it stays a number. So is a product
ratio in the surrogate, from above.
"""

import math

import torch


MAX_LOG_RATIO = 20.0
_LOWEST_VESPO_LOG_RATIO = math.log(1e-8)


def center_by_group(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    Group-relative advantages `A_i = r_i - mean_group(r)`, first half of Eq. 9.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards, the trajectories of a group next to each other. NaN marks a trajectory that could not be scored:
            it stays out of its group's mean.
        group_size (`int`):
            `G`, trajectories of one group.

    Returns:
        `torch.Tensor` of shape `(N,)`:
            Advantages in float64, NaN where the reward is NaN. Exactly 0 where all rewards of a group are equal.
    """
    groups = rewards.double().view(-1, group_size)  # (B, G)
    scored = ~groups.isnan()
    mean = groups.nanmean(dim=1, keepdim=True)
    highest = groups.masked_fill(~scored, -torch.inf).amax(dim=1, keepdim=True)
    lowest = groups.masked_fill(~scored, torch.inf).amin(dim=1, keepdim=True)
    # rounding in the mean must not leave a residue that the normalisation would blow up
    advantages = torch.where(highest == lowest, torch.zeros_like(groups), groups - mean)
    return advantages.masked_fill(~scored, torch.nan).view(-1)


def normalize_over_batch(advantages: torch.Tensor) -> torch.Tensor:
    """
    Batch-level normalisation `(A - mean_B(A)) / std_B(A)`, second half of Eq. 9.

    Args:
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages of all trajectories of the iteration over all processes; NaN marks one that is left out.

    Returns:
        `torch.Tensor` of shape `(N,)`:
            Normalised advantages; NaN where the input is NaN, and 0 everywhere else when the advantages do not vary.
    """
    scored = advantages[~advantages.isnan()]
    if scored.numel() < 2 or bool((scored == scored[0]).all()):
        return torch.where(advantages.isnan(), advantages, torch.zeros_like(advantages))
    mean = scored.mean()
    if mean.abs() < 1e-12 * scored.abs().max():
        # advantages relative to their groups add up to 0: what rounding leaves of that must not become the advantage,
        # and so the update, of a group without variance
        mean = torch.zeros_like(mean)
    return (advantages - mean) / scored.std()


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Weighted sum over reward functions, of shapes `(N, F, ...)` and `(F,)`; NaN counts as 0. Exactly 0 where the terms
    cancel.
    """
    terms = values * weights.to(values).view(-1, *[1] * (values.dim() - 2))
    total = terms.nansum(dim=1)
    # rounding must not leave a residue that the normalisation would blow up
    return total.masked_fill(total.abs() < 1e-12 * terms.abs().nansum(dim=1), 0.0)


def batch_advantages(
    rewards_per_func: torch.Tensor,
    weights: torch.Tensor,
    group_size: int,
    *,
    normalize: bool = True,
    per_function: bool = False,
    clip: float | None = None,
) -> torch.Tensor:
    """
    Advantages of an iteration (Eq. 9) from the rewards of several functions.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`):
            Rewards by function, the trajectories of a group next to each other. NaN where a function gave none; a
            trajectory that no function scored has no advantage.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        group_size (`int`):
            `G`, trajectories of one group.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to normalise over the batch.
        per_function (`bool`, *optional*, defaults to `False`):
            Whether the advantages of each function are normalised over the batch before they are weighted and added.
            So is then their sum, whatever `normalize` says, as in TRL.
        clip (`float`, *optional*):
            Bound of the absolute value of the advantages.

    Returns:
        `torch.Tensor` of shape `(N,)`:
            Advantages in float64; 0 for a trajectory that no function scored.
    """

    def normalized(advantages: torch.Tensor) -> torch.Tensor:
        return normalize_over_batch(advantages) if normalize or per_function else advantages

    rewards_per_func = rewards_per_func.double()
    unscored = rewards_per_func.isnan().all(dim=1)
    if per_function:
        objectives = [normalized(center_by_group(rewards, group_size)) for rewards in rewards_per_func.T]
        advantages = weighted_sum(torch.stack(objectives, dim=1), weights).masked_fill(unscored, torch.nan)
    else:
        rewards = weighted_sum(rewards_per_func, weights).masked_fill(unscored, torch.nan)
        advantages = center_by_group(rewards, group_size)
    advantages = normalized(advantages).nan_to_num(nan=0.0)
    return advantages if clip is None else advantages.clamp(-clip, clip)


def to_go_advantages(
    rewards_per_func: torch.Tensor,
    weights: torch.Tensor,
    group_size: int,
    to_come: torch.Tensor,
    environment: int | None,
    *,
    normalize: bool = True,
    per_function: bool = False,
    clip: float | None = None,
) -> torch.Tensor:
    """
    Advantages of single turns (`turn_credit="to_go"`): Eq. 9 with the rewards from turn t on in place of the return,
    and with the trajectories of the group that have turn t in place of the group. The scale of all turns is that of
    the episodes, so a turn whose rewards to come vary little has small advantages.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`), weights (`torch.Tensor` of shape `(F,)`):
            As in [`batch_advantages`].
        group_size (`int`):
            The same.
        to_come (`torch.Tensor` of shape `(N, T)`):
            The environment's rewards from each turn on; NaN for turns that a trajectory does not have.
        environment (`int`, *optional*):
            Column of `rewards_per_func` with their sum. All other rewards, and all where it is `None`, count as
            arriving at the last turn.
        normalize (`bool`, *optional*, defaults to `True`), per_function (`bool`, *optional*, defaults to `False`):
            As in [`batch_advantages`].
        clip (`float`, *optional*):
            Bound of the absolute value of the advantages.

    Returns:
        `torch.Tensor` of shape `(N, T)`:
            Advantages in float64; 0 where a trajectory has no turn t, or no function scored it.
    """
    num_turns = to_come.shape[1]
    rewards = rewards_per_func.double().unsqueeze(2).expand(-1, -1, 1 + num_turns).clone()  # (N, F, 1 + T)
    if environment is not None:
        given = ~rewards_per_func[:, environment].isnan()
        rewards[given, environment, 1:] = to_come[given].double()
    rewards[:, :, 1:].masked_fill_(to_come.isnan().unsqueeze(1), torch.nan)
    missing = rewards.isnan().all(dim=1)  # (N, 1 + T)

    def relative(values: torch.Tensor) -> torch.Tensor:
        """Of rewards, `(N, 1 + T)`: of the episodes, and of what of them is to come at each turn."""
        return torch.stack([center_by_group(column, group_size) for column in values.T], dim=1)

    def scaled(advantages: torch.Tensor) -> torch.Tensor:
        """In units of the standard deviation of the episodes' advantages, the first column of `(N, 1 + T)`."""
        if not (normalize or per_function):
            return advantages
        scored = advantages[~advantages[:, 0].isnan(), 0]
        if scored.numel() < 2 or bool((scored == scored[0]).all()):
            return torch.zeros_like(advantages)
        return advantages / scored.std()

    if per_function:
        objectives = torch.stack([scaled(relative(values)) for values in rewards.unbind(dim=1)], dim=1)
        advantages = weighted_sum(objectives, weights).masked_fill(missing, torch.nan)
    else:
        advantages = relative(weighted_sum(rewards, weights).masked_fill(missing, torch.nan))
    advantages = scaled(advantages)[:, 1:].nan_to_num(nan=0.0)
    return advantages if clip is None else advantages.clamp(-clip, clip)


def groups_without_variance(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, group_size: int, *, per_function: bool = False
) -> torch.Tensor:
    """
    Which groups have no variance of rewards, so that nothing is learned from them, whatever the rest of the batch is.
    Where each function is normalised by itself, functions that trade off within a group do not cancel.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`), weights (`torch.Tensor` of shape `(F,)`):
            Rewards by function, NaN where a function gave none, and weights of the functions.
        group_size (`int`):
            `G`, trajectories of one group.
        per_function (`bool`, *optional*, defaults to `False`):
            As in [`batch_advantages`].

    Returns:
        `torch.Tensor` of shape `(N / G,)`, `bool`
    """
    functions = list(range(len(weights)))
    together = [[f] for f in functions] if per_function else [functions]
    advantages = [
        batch_advantages(rewards_per_func[:, some], weights[some], group_size, normalize=False) for some in together
    ]
    return (torch.stack(advantages) == 0).all(dim=0).view(-1, group_size).all(dim=1)


def segment_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Sums over the actions that lie one after another in a tensor.

    Args:
        values (`torch.Tensor` of shape `(S,)`):
            One value a token.
        lengths (`torch.Tensor` of shape `(n,)`):
            Numbers of tokens of the actions; they add up to `S`.

    Returns:
        `torch.Tensor` of shape `(n,)`
    """
    return values.new_zeros(len(lengths)).index_add(0, action_of_tokens(lengths, len(values)), values)


def action_of_tokens(lengths: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Index of the action that each token belongs to, shape `(S,)`, where actions of `lengths` tokens, shape `(n,)`, lie
    one after another and have `num_tokens` in all, which saves asking the device for it.
    """
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=num_tokens)


def sequence_log_ratios(
    new_logps: torch.Tensor, old_logps: torch.Tensor, lengths: torch.Tensor, ratio: str = "geometric"
) -> torch.Tensor:
    """
    Logs of the sequence-level importance ratios of `n` actions (Eq. 6) that lie one after another.

    Args:
        new_logps (`torch.Tensor` of shape `(S,)`):
            Log-probabilities of the actions' tokens under the current parameters.
        old_logps (`torch.Tensor` of shape `(S,)`):
            Log-probabilities of the same tokens under the policy of the denominator.
        lengths (`torch.Tensor` of shape `(n,)`):
            Numbers of tokens of the actions; they add up to `S`.
        ratio (`str`, *optional*, defaults to `"geometric"`):
            `"geometric"` divides the sum over an action's tokens by their number, as GSPO does; `"product"` does not,
            and is the ratio of the probabilities of the whole action.

    Returns:
        `torch.Tensor` of shape `(n,)`
    """
    sums = segment_sums(new_logps - old_logps, lengths)
    return sums / lengths if ratio == "geometric" else sums


def clipped_surrogate(
    ratio: torch.Tensor,
    weight: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> torch.Tensor:
    """
    Clipped surrogate `min(r M, clip(r, 1 - eps_low, 1 + eps_high) M)` of the objective `J_t`.

    Args:
        ratio (`torch.Tensor` of any shape):
            Sequence ratios `r` of the turn that is updated.
        weight (`torch.Tensor` of the same shape):
            Turn weights `M` of the continuation, constants.
        epsilon_low (`float`), epsilon_high (`float`):
            Half widths of the clipping range below and above 1.
        delta (`float`, *optional*):
            Upper bound of the unclipped ratio (two-sided clipping).

    Returns:
        `torch.Tensor`:
            Surrogates, to be maximised.
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * weight, clipped * weight)


def cispo_surrogate(
    ratio: torch.Tensor, weight: torch.Tensor, mean_logps: torch.Tensor, epsilon_high: float
) -> torch.Tensor:
    """
    Turn-level form of CISPO (MiniMax-M1, arXiv 2506.13585): `sg(min(r, eps_max)) M mean_j log pi(a_j)`. Its gradient
    is the one of `r M` with a bounded ratio, so no action loses its gradient.

    Args:
        ratio (`torch.Tensor` of any shape), weight (`torch.Tensor` of the same shape):
            Sequence ratios, and turn weights `M`.
        mean_logps (`torch.Tensor` of the same shape):
            Mean log-probability of the action's tokens, with gradient.
        epsilon_high (`float`):
            Largest ratio: as in TRL a bound of the ratio itself, not of its distance from 1.

    Returns:
        `torch.Tensor`:
            Surrogates, to be maximised.
    """
    return ratio.clamp(max=epsilon_high).detach() * weight * mean_logps


def sapo_surrogate(
    ratio: torch.Tensor, weight: torch.Tensor, temperature_pos: float, temperature_neg: float
) -> torch.Tensor:
    """
    Turn-level form of SAPO (arXiv 2511.20347): `4 / tau sigmoid(tau (r - 1)) M`, a soft gate in place of the clip.

    Args:
        ratio (`torch.Tensor` of any shape), weight (`torch.Tensor` of the same shape):
            Sequence ratios, and turn weights `M`.
        temperature_pos (`float`), temperature_neg (`float`):
            `tau` where `M` is positive, and where it is not.

    Returns:
        `torch.Tensor`:
            Surrogates, to be maximised.
    """
    tau = torch.where(weight > 0, temperature_pos, temperature_neg).to(ratio)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * weight


def vespo_surrogate(
    log_ratio: torch.Tensor,
    weight: torch.Tensor,
    mean_logps: torch.Tensor,
    k: tuple[float, float],
    lam: tuple[float, float],
) -> torch.Tensor:
    """
    Turn-level form of VESPO: `sg(phi(w)) M mean_j log pi(a_j)` with `phi(w) = e^lambda w^k e^(-lambda w)` of the
    product ratio `w`, which fades out actions whose probability has changed much.

    Args:
        log_ratio (`torch.Tensor` of any shape):
            Log of the product ratio `w` (of the sampler's correction, too, where there is one).
        weight (`torch.Tensor` of the same shape):
            Turn weights `M`.
        mean_logps (`torch.Tensor` of the same shape):
            Mean log-probability of the action's tokens, with gradient.
        k (`tuple[float, float]`), lam (`tuple[float, float]`):
            `k` and `lambda` where `M` is not negative, and where it is.

    Returns:
        `torch.Tensor`:
            Surrogates, to be maximised.
    """
    return vespo_phi(log_ratio, weight, k, lam) * weight * mean_logps


def vespo_phi(
    log_ratio: torch.Tensor, weight: torch.Tensor, k: tuple[float, float], lam: tuple[float, float]
) -> torch.Tensor:
    """`phi(w)` of [`vespo_surrogate`], without gradient; takes and returns tensors of any one shape."""
    log_w = log_ratio.detach().clamp(_LOWEST_VESPO_LOG_RATIO, MAX_LOG_RATIO)
    exponent = torch.where(weight >= 0, *k).to(log_w)
    decay = torch.where(weight >= 0, *lam).to(log_w).clamp(min=1e-4)
    return (decay + exponent * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def k3_divergence(new_logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """
    Per-token estimate of KL(policy || reference) that is never negative (the "k3" estimator).

    Args:
        new_logps (`torch.Tensor` of shape `(|a|,)`):
            Log-probabilities under the current parameters.
        ref_logps (`torch.Tensor` of shape `(|a|,)`):
            Log-probabilities under the reference model.

    Returns:
        `torch.Tensor` of shape `(|a|,)`
    """
    difference = ref_logps - new_logps
    return torch.exp(difference) - difference - 1


def fold_in_ratio(weight: float, log_ratio: float, clip: float | None) -> float:
    """
    Turn weight after an update, relative to the advantage: `M_t / A = r_t(theta^t) * M_{t+1} / A` (Eq. 8).

    Args:
        weight (`float`):
            `M_{t+1} / A` of the trajectory.
        log_ratio (`float`):
            Log of the updated turn's ratio at the parameters after its last optimizer step.
        clip (`float`, *optional*):
            `c` bounds both the ratio and the running product to `[1 - c, 1 + c]`; `None` is the paper's plain product.

    Returns:
        `float`
    """
    ratio = math.exp(min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))
    if clip is None:
        return weight * ratio
    low, high = 1 - clip, 1 + clip
    return min(max(weight * min(max(ratio, low), high), low), high)


def sampler_ratios(
    policy_logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    lengths: torch.Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """
    Ratios of the policy's and the sampler's probabilities within their bounds: of each token, shape `(S,)`, or of each
    whole action, shape `(n,)`, as the mode says. Arguments as in [`sampler_correction`].
    """
    log_ratio = (policy_logps - sampling_logps).nan_to_num(nan=0.0)
    level, constraint = mode.split("_")
    ratio = (segment_sums(log_ratio, lengths) if level == "sequence" else log_ratio).exp()
    if constraint == "truncate":
        return ratio.clamp(min=clip_min, max=clip_max)
    low = -torch.inf if clip_min is None else clip_min
    high = torch.inf if clip_max is None else clip_max
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def sampler_correction(
    policy_logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    lengths: torch.Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """
    Weights that correct `n` actions, which lie one after another, for a sampler whose probabilities differ from the
    policy's (vLLM).

    The four modes are TRL's, applied to the action of one block of turns. A token-level weight multiplies a
    sequence-level surrogate, which averages over tokens, so it enters as its mean over the action's tokens.

    Args:
        policy_logps (`torch.Tensor` of shape `(S,)`):
            Log-probabilities under the policy that was to be sampled.
        sampling_logps (`torch.Tensor` of shape `(S,)`):
            Log-probabilities that the sampler reported; NaN where it reported none (no correction there).
        lengths (`torch.Tensor` of shape `(n,)`):
            Numbers of tokens of the actions; they add up to `S`.
        mode (`str`):
            `"token_truncate"`, `"token_mask"`, `"sequence_truncate"` or `"sequence_mask"`.
        clip_min (`float`, *optional*), clip_max (`float`, *optional*):
            Bounds of the ratio.

    Returns:
        `torch.Tensor` of shape `(n,)`:
            Weights; 1 for an action of which the sampler reported nothing.
    """
    weights = sampler_ratios(policy_logps, sampling_logps, lengths, mode, clip_min, clip_max)
    if mode.startswith("token"):
        weights = segment_sums(weights, lengths) / lengths
    return torch.where(is_reported(sampling_logps, lengths), weights, 1.0)


def is_reported(sampling_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Whether the sampler reported the log-probability of any token of each action: `(S,)` to `(n,)`."""
    return segment_sums((~sampling_logps.isnan()).to(sampling_logps), lengths) > 0


def keep_on_policy(
    weights: torch.Tensor,
    new_logps: torch.Tensor,
    behaviour_logps: torch.Tensor,
    lengths: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """
    Off-policy sequence mask of DeepSeek-V3.2 (arXiv 2512.02556, Eq. 9) for `n` actions, which lie one after another.

    Args:
        weights (`torch.Tensor` of shape `(n,)`):
            Turn weights `M`.
        new_logps (`torch.Tensor` of shape `(S,)`), behaviour_logps (`torch.Tensor` of shape `(S,)`):
            Log-probabilities under the current parameters and under the policy that sampled; NaN where it is unknown.
        lengths (`torch.Tensor` of shape `(n,)`):
            Numbers of tokens of the actions; they add up to `S`.
        threshold (`float`):
            Largest mean difference at which an action with a negative weight is kept.

    Returns:
        `torch.Tensor` of shape `(n,)`:
            1 to keep an action's surrogate, 0 to drop it.
    """
    divergence = (behaviour_logps - new_logps.detach()).nan_to_num(nan=0.0)
    mean_divergence = segment_sums(divergence, lengths) / lengths
    return ((weights >= 0) | (mean_divergence <= threshold)).to(new_logps.dtype)
