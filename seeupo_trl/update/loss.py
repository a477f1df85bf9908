"""The loss of a micro-batch: `-J_t` and what regularises it, as pure functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..seeupo_config import SeeUPOConfig
from .objective import (
    MAX_LOG_RATIO,
    action_of_tokens,
    cispo_surrogate,
    clipped_surrogate,
    is_reported,
    k3_divergence,
    keep_on_policy,
    sampler_correction,
    sampler_ratios,
    sapo_surrogate,
    segment_sums,
    sequence_log_ratios,
    vespo_phi,
    vespo_surrogate,
)


@dataclass(frozen=True)
class LossSettings:
    """
    The numbers in the loss.

    Args:
        epsilon_low (`float`), epsilon_high (`float`), delta (`float`, *optional*):
            Clipping range, see [`~seeupo_trl.update.objective.clipped_surrogate`].
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL term.
        use_bias_correction_kl (`bool`, *optional*, defaults to `False`):
            Whether the KL term is multiplied by the ratio.
        entropy_weight (`float`, *optional*):
            Weight of the entropy bonus; `None` where there is none in this run.
        off_policy_mask_threshold (`float`, *optional*):
            See [`~seeupo_trl.update.objective.keep_on_policy`].
        sampler_correction (`tuple[str, float | None, float | None]`, *optional*):
            Mode and bounds of the correction for the sampler, see
            [`~seeupo_trl.update.objective.sampler_correction`].
        loss_type (`str`, *optional*, defaults to `"seeupo"`):
            Which surrogate, see [`turn_surrogate`].
        surrogate_ratio (`str`, *optional*, defaults to `"geometric"`):
            Ratio in the surrogate, see [`~seeupo_trl.update.objective.sequence_log_ratios`].
        sapo_temperatures (`tuple[float, float]`, *optional*, defaults to `(1.0, 1.05)`):
            Where the turn weight is positive, and where it is not.
        vespo_k (`tuple[float, float]`, *optional*, defaults to `(2.0, 3.0)`):
            The same of the exponent `k`.
        vespo_lambda (`tuple[float, float]`, *optional*, defaults to `(3.0, 2.0)`):
            The same of the decay `lambda`.
    """

    epsilon_low: float
    epsilon_high: float
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = False
    entropy_weight: float | None = None
    off_policy_mask_threshold: float | None = None
    sampler_correction: tuple[str, float | None, float | None] | None = None
    loss_type: str = "seeupo"
    surrogate_ratio: str = "geometric"
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_k: tuple[float, float] = (2.0, 3.0)
    vespo_lambda: tuple[float, float] = (3.0, 2.0)

    @classmethod
    def of(cls, config: SeeUPOConfig) -> "LossSettings":
        """The settings that a configuration asks for."""
        bounds = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
        corrects = (config.use_vllm or config.rollouts_ahead) and config.vllm_importance_sampling_correction
        return cls(
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            delta=config.delta,
            beta=config.beta,
            use_bias_correction_kl=config.use_bias_correction_kl,
            off_policy_mask_threshold=config.off_policy_mask_threshold,
            sampler_correction=(config.vllm_importance_sampling_mode, *bounds) if corrects else None,
            loss_type=config.loss_type,
            surrogate_ratio=config.surrogate_ratio,
            sapo_temperatures=(config.sapo_temperature_pos, config.sapo_temperature_neg),
            vespo_k=(config.vespo_k_pos, config.vespo_k_neg),
            vespo_lambda=(config.vespo_lambda_pos, config.vespo_lambda_neg),
        )

    @property
    def reads_sampled(self) -> bool:
        """Whether the loss depends on the log-probabilities that the sampler reported."""
        return self.sampler_correction is not None or self.off_policy_mask_threshold is not None


@dataclass(frozen=True)
class Actions:
    """
    The actions that `n` trajectories take in the turn (or block of turns) that is updated, one after another: `S`
    tokens in all.

    Args:
        lengths (`torch.Tensor` of shape `(n,)`):
            Number of tokens of each action.
        new (`torch.Tensor` of shape `(S,)`), entropies (`torch.Tensor` of shape `(S,)`):
            Log-probabilities and entropies under the parameters that are trained, with gradient.
        old (`torch.Tensor` of shape `(S,)`):
            Log-probabilities in the denominator of the ratio.
        start (`torch.Tensor` of shape `(S,)`, *optional*):
            Log-probabilities under `theta_k`, for the sampler's correction.
        sampled (`torch.Tensor` of shape `(S,)`, *optional*):
            Log-probabilities that the sampler reported; NaN where it reported none.
        reference (`torch.Tensor` of shape `(S,)`, *optional*):
            Log-probabilities under the reference policy, for the KL term.
    """

    lengths: torch.Tensor
    new: torch.Tensor
    old: torch.Tensor
    entropies: torch.Tensor
    start: torch.Tensor | None = None
    sampled: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of one value a token over each action: `(S,)` to `(n,)`."""
        return segment_sums(values, self.lengths)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of one value a token over each action: `(S,)` to `(n,)`."""
        return self.sums(values) / self.lengths

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """One value an action as one a token: `(n,)` to `(S,)`."""
        return values[action_of_tokens(self.lengths, len(self.new))]


@dataclass(frozen=True)
class TurnLoss:
    """
    The loss of `n` trajectories and what it is made of.

    Args:
        losses (`torch.Tensor` of shape `(n,)`):
            `-J_t` and its regularisers, before the division by N.
        policy_losses (`torch.Tensor` of shape `(n,)`):
            The same without the entropy bonus.
        ratios (`torch.Tensor` of shape `(n,)`):
            Sequence ratios.
        clipped_low (`torch.Tensor` of shape `(n,)`), clipped_high (`torch.Tensor` of shape `(n,)`):
            Whether the ratio is below or above the clipping range on the side where the surrogate is flat.
        kl (`torch.Tensor` of shape `(n,)`, *optional*):
            Sum of the KL estimates of each action's tokens.
        sampler_weights (`torch.Tensor` of shape `(n,)`, *optional*):
            Correction for the sampler.
        gates (`torch.Tensor` of shape `(n,)`, *optional*):
            What TRL logs of two loss types: with `"cispo"` whether a ratio of positive weight is above its bound, with
            `"vespo"` `phi`.
    """

    losses: torch.Tensor
    policy_losses: torch.Tensor
    ratios: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    kl: torch.Tensor | None = None
    sampler_weights: torch.Tensor | None = None
    gates: torch.Tensor | None = None


def turn_surrogate(
    ratios: torch.Tensor, weights: torch.Tensor, actions: Actions, settings: LossSettings
) -> torch.Tensor:
    """
    What is maximised of each action, before it is corrected for the sampler and regularised.

    Args:
        ratios (`torch.Tensor` of shape `(n,)`):
            Sequence ratios of Eq. 6 (`surrogate_ratio="geometric"`) or their products over tokens, with gradient.
        weights (`torch.Tensor` of shape `(n,)`):
            Turn weights `M` of the continuation, constants.
        actions ([`Actions`]):
            The actions behind them, token by token.
        settings ([`LossSettings`]):
            The numbers in the loss.

    Returns:
        `torch.Tensor` of shape `(n,)`:
            With `loss_type="seeupo"` the clipped surrogate of `J_t`; with `"luspo"` the same times the number of
            tokens; with `"cispo"`, `"sapo"` and `"vespo"` their turn-level forms in
            [`~seeupo_trl.update.objective`].
    """
    if settings.loss_type == "cispo":
        return cispo_surrogate(ratios, weights, actions.means(actions.new), settings.epsilon_high)
    if settings.loss_type == "sapo":
        return sapo_surrogate(ratios, weights, *settings.sapo_temperatures)
    if settings.loss_type == "vespo":
        log_ratios, mean_logps = _product_log_ratios(actions, settings), actions.means(actions.new)
        return vespo_surrogate(log_ratios, weights, mean_logps, settings.vespo_k, settings.vespo_lambda)
    surrogates = clipped_surrogate(ratios, weights, settings.epsilon_low, settings.epsilon_high, settings.delta)
    if settings.loss_type == "luspo":
        surrogates = surrogates * actions.lengths
    return surrogates


Surrogate = Callable[[torch.Tensor, torch.Tensor, Actions, LossSettings], torch.Tensor]


def turn_loss(
    actions: Actions, weights: torch.Tensor, settings: LossSettings, surrogate: Surrogate = turn_surrogate
) -> TurnLoss:
    """
    `-J_t` of each trajectory of a micro-batch, plus what regularises it.

    Args:
        actions ([`Actions`]):
            The actions of the turn that is updated.
        weights (`torch.Tensor` of shape `(n,)`):
            Turn weights `M` of the continuation, constants.
        settings ([`LossSettings`]):
            The numbers in the loss.
        surrogate (`Callable`, *optional*, defaults to [`turn_surrogate`]):
            What is maximised.

    Returns:
        [`TurnLoss`]
    """
    log_ratios = sequence_log_ratios(actions.new, actions.old, actions.lengths, settings.surrogate_ratio)
    if settings.surrogate_ratio == "product":
        # over many tokens it can leave the range of float32, and a gradient through infinity is not a number
        log_ratios = log_ratios.clamp(max=MAX_LOG_RATIO)
    ratios = log_ratios.exp()  # (n,)
    surrogates = surrogate(ratios, weights, actions, settings)
    if surrogates.shape != ratios.shape:
        raise ValueError(
            f"The surrogate has shape {tuple(surrogates.shape)}; it must return one value for each of the "
            f"{len(ratios)} actions, shape {tuple(ratios.shape)}."
        )
    sampler_weights = None
    if settings.sampler_correction is not None:
        sampler_weights = sampler_correction(
            actions.start, actions.sampled, actions.lengths, *settings.sampler_correction
        )
        if settings.loss_type != "vespo":  # which has it in its ratio
            surrogates = surrogates * sampler_weights
    if settings.off_policy_mask_threshold is not None:
        surrogates = surrogates * _on_policy_mask(actions, weights, settings.off_policy_mask_threshold)
    losses = -surrogates
    kl = None
    if actions.reference is not None:
        kl = actions.sums(k3_divergence(actions.new, actions.reference))  # (n,)
        mean_kl = kl / actions.lengths
        losses = losses + settings.beta * (mean_kl * ratios if settings.use_bias_correction_kl else mean_kl)
    policy_losses = losses
    if settings.entropy_weight is not None:
        losses = losses - settings.entropy_weight * actions.means(actions.entropies)
    return TurnLoss(
        losses,
        policy_losses,
        ratios,
        clipped_low=(ratios < 1 - settings.epsilon_low) & (weights < 0),
        clipped_high=(ratios > 1 + settings.epsilon_high) & (weights > 0),
        kl=kl,
        sampler_weights=sampler_weights,
        gates=_gates(ratios, weights, actions, settings),
    )


def _gates(
    ratios: torch.Tensor, weights: torch.Tensor, actions: Actions, settings: LossSettings
) -> torch.Tensor | None:
    """See [`TurnLoss`]."""
    if settings.loss_type == "cispo":
        return (ratios > settings.epsilon_high) & (weights > 0)
    if settings.loss_type == "vespo":
        return vespo_phi(_product_log_ratios(actions, settings), weights, settings.vespo_k, settings.vespo_lambda)
    return None


def _product_log_ratios(actions: Actions, settings: LossSettings) -> torch.Tensor:
    """Log of the product ratios, of the sampler's correction too where there is one, shape `(n,)`."""
    log_ratios = sequence_log_ratios(actions.new, actions.old, actions.lengths, ratio="product")
    if settings.sampler_correction is None:
        return log_ratios
    mode = settings.sampler_correction[0]
    ratios = sampler_ratios(actions.start, actions.sampled, actions.lengths, *settings.sampler_correction)
    corrections = ratios.log().clamp(min=math.log(1e-8), max=MAX_LOG_RATIO)
    corrections = actions.sums(corrections) if mode.startswith("token") else corrections
    return log_ratios + torch.where(is_reported(actions.sampled, actions.lengths), corrections, 0.0)


def _on_policy_mask(actions: Actions, weights: torch.Tensor, threshold: float) -> torch.Tensor:
    """1 for the actions that off-policy masking keeps, 0 for those it drops, shape `(n,)`."""
    reported = actions.by_token(is_reported(actions.sampled, actions.lengths))
    behaviour = torch.where(reported, actions.sampled, actions.old)
    return keep_on_policy(weights, actions.new, behaviour, actions.lengths, threshold)
