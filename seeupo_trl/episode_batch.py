"""One generation batch on its way through the trainer: played, scored by reward functions, ready for the update."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from trl.trainer.utils import pad

from .envs.base import StopReason
from .evaluation.outcome import Outcome
from .rollout.output import as_sequence
from .trajectory import Trajectory, turns_from_mask


Row = tuple[list[int], list[int], list[int]]  # prompt, completion, and which tokens of the completion are the model's

_TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
# what GRPO's loss takes from its batch, and the update computes for itself
_NEVER_READ = ("old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio")
# what an episode ends with after a response that was whole
_AFTER_A_WHOLE_RESPONSE = (StopReason.completed, StopReason.truncated, StopReason.max_turns)


class TurnBatch(dict):
    """The batch of `_generate_and_score_completions`, which says what it does not have and why."""

    def __missing__(self, key: str) -> Any:
        if key in _NEVER_READ:
            raise KeyError(
                f"A batch of SeeUPOTrainer has no `{key}`: the update computes log-probabilities turn by turn. In "
                "`turn_surrogate`, `actions.old` and `actions.reference` hold them by token."
            )
        raise KeyError(key)


@dataclass
class EpisodeBatch:
    """
    The `n` episodes of this process in one generation batch.

    Args:
        rows (`list[dict]`):
            Dataset rows, one an episode.
        trajectories (`list[Trajectory]`):
            The episodes as they were played.
        rewards_per_func (`torch.Tensor` of shape `(n, F)`):
            Reward by reward function; NaN where a function gave none.
        num_trajectories (`int`):
            `N`, the number of trajectories over all processes.
        is_cut (`list[bool]`):
            Whether an episode's last response was cut before its end.
        is_left_out (`list[bool]`):
            Whether the trainer leaves an episode out of training (`mask_truncated_completions`): all of its turns,
            while its reward counts in the advantages of the group.
        outcomes (`list[Outcome]`):
            What became of the episodes.
        turn_advantages (`list[list[float]]`, *optional*):
            Advantages of the turns of each episode, where turns have their own (`turn_credit="to_go"`).
        advantages (`torch.Tensor` of shape `(n,)`, *optional*):
            Those of the episodes that they belong to.
        tokens (`dict[str, torch.Tensor]`):
            Tokens and masks of the rows of TRL's batch as it was made, see [`follow`].
        generated (`list[tuple]`):
            Tokens and masks of the rows as they were generated, see [`follow_generated`].
    """

    rows: list[dict[str, Any]]
    trajectories: list[Trajectory] = field(default_factory=list)
    rewards_per_func: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    num_trajectories: int = 0
    is_cut: list[bool] = field(default_factory=list)
    is_left_out: list[bool] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    turn_advantages: list[list[float]] | None = None
    advantages: torch.Tensor | None = None
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    generated: list[Row] = field(default_factory=list)

    def __getitem__(self, index: Any) -> None:
        raise TypeError(
            "The rows of a batch of `_generate_and_score_completions` were split, repeated or permuted together with "
            "its `episodes`, which belong together: an iteration trains on the whole batch, turn by turn. Call "
            "`super()._prepare_inputs(inputs)` and change what it returns, or override `select_episodes`."
        )

    @property
    def trained(self) -> list[Trajectory]:
        """The trajectories with the turns that are trained on: none of an episode that is left out or quarantined."""
        return [
            Trajectory(turns=[]) if left_out or trajectory.is_quarantined else trajectory
            for trajectory, left_out in zip(self.trajectories, self.is_left_out, strict=True)
        ]

    @property
    def num_left_out(self) -> int:
        """Episodes that have turns and are left out of training nevertheless."""
        pairs = zip(self.trajectories, self.is_left_out, strict=True)
        return sum(left_out and bool(trajectory.turns) for trajectory, left_out in pairs)

    def mask_cut(self, batch: dict[str, Any]) -> None:
        """Empty the masks of the episodes that were cut, as TRL does for `mask_truncated_completions`."""
        is_cut = torch.tensor(self.is_cut, device=batch["completion_mask"].device)
        for name in ("completion_mask", "tool_mask"):
            if name in batch:
                batch[name] = batch[name].masked_fill(is_cut.unsqueeze(1), 0)

    def remember(self, batch: dict[str, Any]) -> None:
        """Keep what TRL's batch says of the episodes, and who is left out of it."""
        self.tokens = {name: batch[name].clone() for name in _TOKENS if name in batch}
        self.is_left_out = (~batch["completion_mask"].bool().any(dim=1)).tolist()

    def show_replaced(self, batch: dict[str, Any], played: list[Trajectory], pad_token_id: int) -> None:
        """
        Write the tokens of episodes that were put in the place of others into TRL's batch, where a subclass may read
        or change them.

        Args:
            batch (`dict`):
                TRL's batch of the episodes that were played at first.
            played (`list[Trajectory]`):
                Those.
            pad_token_id (`int`):
                Token of the padding.
        """
        replaced = {
            i: _row_of(trajectory, self.is_left_out[i], pad_token_id)
            for i, (trajectory, before) in enumerate(zip(self.trajectories, played, strict=False))
            if trajectory is not before
        }
        if not replaced:
            return
        batch.setdefault("tool_mask", torch.ones_like(batch["completion_mask"]))
        padding = {"prompt_ids": pad_token_id, "completion_ids": pad_token_id, "tool_mask": 1}
        for name in batch.keys() & {*_TOKENS, "sampling_per_token_logps"}:
            rows = list(batch[name])
            for i, row in replaced.items():
                rows[i] = torch.tensor(row[name], dtype=batch[name].dtype, device=batch[name].device)
            side = "left" if name.startswith("prompt") else "right"
            batch[name] = pad(rows, padding.get(name, 0), side)
        self.tokens = {name: batch[name].clone() for name in _TOKENS}

    def follow(self, batch: dict[str, Any]) -> None:
        """
        Take in what a subclass changed in the batch of `_generate_and_score_completions`: rows with other tokens
        (replay) have the turns that those say, as [`~seeupo_trl.trajectory.turns_from_mask`] cuts them.

        Raises:
            `ValueError`:
                Where the batch has another number of rows, or advantages that are not one number a row; where turns
                have advantages of their own and the batch was changed; or where something was added that the update
                would not read.
        """
        unread = [name for name in _NEVER_READ if name in batch]
        if unread:
            raise ValueError(
                f"`{unread[0]}` was put into the batch, but the update computes log-probabilities turn by turn and "
                "does not read it. Override `turn_surrogate`, where `actions.old` and `actions.reference` hold them."
            )
        advantages, rows = batch["advantages"], batch["completion_ids"]
        if advantages.dim() != 1:
            raise ValueError(
                f"`advantages` have shape {tuple(advantages.shape)}, but an action is one sequence with one weight: "
                "give one number for each episode, shape (n,). To weigh tokens, override `turn_surrogate`."
            )
        if not len(rows) == len(advantages) == len(self.trajectories):
            raise ValueError(
                f"The batch has {len(rows)} rows and {len(advantages)} advantages for {len(self.trajectories)} "
                "episodes; groups must stay whole. To leave an episode out, override `select_episodes`."
            )
        same_tokens = self.tokens.keys() == {name for name in _TOKENS if name in batch} and all(
            torch.equal(batch[name], tokens) for name, tokens in self.tokens.items()
        )
        if self.turn_advantages is not None and not (same_tokens and torch.equal(advantages, self.advantages)):
            raise ValueError(
                "The tokens or the `advantages` of the batch were changed, but with `turn_credit='to_go'` each turn "
                "has an advantage of its own, made of the rewards of steps. Override `select_episodes` to replace or "
                "leave out episodes before that, or use `turn_credit='episode'`."
            )
        if same_tokens:
            return
        logps = batch.get("sampling_per_token_logps")
        for i, (before, now) in enumerate(zip(_rows(self.tokens), _rows(batch), strict=True)):
            if now != before:
                _, completion, _ = now
                sampled = None if logps is None else logps[i, : len(completion)].tolist()
                self.trajectories[i] = Trajectory(turns=turns_from_mask(*now, sampled))
                self.is_left_out[i] = not completion

    def follow_generated(self, output: tuple) -> None:
        """
        Take in what a subclass made of the output of `_generate`, or put in its place: rows with other tokens have the
        turns that those say.
        """
        rows = generated_rows(output)
        if rows == self.generated:
            return
        trajectories = trajectories_from_masks(*output[:3], output[4], output[3])
        if len(self.generated) == len(rows):
            for i, (row, before) in enumerate(zip(rows, self.generated, strict=True)):
                if row == before:
                    trajectories[i] = self.trajectories[i]
        self.trajectories = trajectories


def was_cut(trajectory: Trajectory, completion_ids: list[int], is_whole: Callable[[list[int]], bool]) -> bool:
    """
    Whether the last response of an episode was cut before its end.

    Args:
        trajectory ([`~seeupo_trl.Trajectory`]):
            The episode. A rollout that says why it ended has seen to the ends of its turns.
        completion_ids (`list[int]`):
            Its tokens. One that ends with a tool's result lacks a response.
        is_whole (`Callable[[list[int]], bool]`):
            Whether the tokens of a response end it.
    """
    if trajectory.stop_reason in _AFTER_A_WHOLE_RESPONSE:
        return False
    response = trajectory.turns[-1].action_ids if trajectory.turns else []
    return list(completion_ids[len(completion_ids) - len(response) :]) != response or not is_whole(response)


def checked_batch(batch: dict[str, Any]) -> EpisodeBatch:
    """
    The episodes of a batch that `_generate_and_score_completions` returned, as it is now.

    Raises:
        `ValueError`:
            Where the batch does not come from [`SeeUPOTrainer`], or does not fit its episodes.
    """
    if "episodes" not in batch:
        raise ValueError(
            "`_generate_and_score_completions` returned a batch without `episodes`: the update needs the turns of "
            "each episode. Call `super()._generate_and_score_completions(inputs)` and change what it returns, or "
            "override `select_episodes`."
        )
    episodes: EpisodeBatch = batch["episodes"]
    episodes.follow(batch)
    return episodes


def generated_rows(output: tuple) -> list[Row]:
    """Tokens and masks of the rows that `_generate` returns, as they are now."""
    prompts, completions, masks = output[:3]
    masks = [[1] * len(completion) for completion in completions] if masks is None else masks
    return [tuple(map(list, row)) for row in zip(prompts, completions, masks, strict=True)]


def _row_of(trajectory: Trajectory, is_left_out: bool, filler_id: int) -> dict[str, list]:
    """An episode as a row of TRL's batch, without padding."""
    sequence = as_sequence(trajectory.turns, [], filler_id)
    return {
        "prompt_ids": sequence["prompt_ids"],
        "prompt_mask": [1] * len(sequence["prompt_ids"]),
        "completion_ids": sequence["completion_ids"],
        "completion_mask": [int(not is_left_out)] * len(sequence["completion_ids"]),
        "tool_mask": sequence["env_mask"],
        "sampling_per_token_logps": [torch.nan if logp is None else logp for logp in sequence["logprobs"]],
    }


def _rows(batch: dict[str, Any]) -> list[Row]:
    """
    Tokens and masks of the rows of TRL's batch without padding. Zeros between the ones of `completion_mask` are tokens
    that the model read and did not write.
    """
    tool_mask = batch.get("tool_mask", batch["completion_mask"])
    masks = (batch["completion_mask"] * tool_mask).tolist()
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    rows = []
    for *row, mask in zip(*(batch[name].tolist() for name in names), masks, strict=True):
        prompt, prompt_mask, completion, completion_mask = row
        length = len(completion) - completion_mask[::-1].index(1) if 1 in completion_mask else 0
        rows.append((list(compress(prompt, prompt_mask)), completion[:length], mask[:length]))
    return rows


def trajectories_from_masks(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    masks: list[list[int]] | None,
    logps: list[list[float]] | None,
    completions: list[Any],
) -> list[Trajectory]:
    """
    Trajectories of a rollout that says no more than TRL asks for, see [`~seeupo_trl.trajectory.turns_from_mask`].

    Args:
        prompt_ids (`list[list[int]]`), completion_ids (`list[list[int]]`):
            Tokens of each sample.
        masks (`list[list[int]]`, *optional*):
            1 for tokens of the model; `None` where all are.
        logps (`list[list[float]]`, *optional*):
            Log-probabilities of the completions' tokens under the sampler.
        completions (`list`):
            Completions as TRL hands them to reward functions; those that are conversations are kept as messages.
    """
    masks = masks or [None] * len(prompt_ids)
    logps = logps or [None] * len(prompt_ids)
    return [
        Trajectory(turns=turns_from_mask(*sample), messages=messages if isinstance(messages, list) else [])
        for *sample, messages in zip(prompt_ids, completion_ids, masks, logps, completions, strict=True)
    ]


def check_finite(rewards_per_func: torch.Tensor, names: list[str]) -> None:
    """
    Refuse infinite rewards.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`), names (`list[str]`):
            Rewards and the names of the functions.

    Raises:
        `ValueError`:
            With the name of the first function that returned one.
    """
    infinite = rewards_per_func.isinf().any(dim=0)
    if infinite.any():
        raise ValueError(
            f"The reward function '{names[infinite.nonzero()[0].item()]}' returned an infinite reward. Rewards must "
            "be finite numbers, or `None` for a completion that cannot be scored."
        )
