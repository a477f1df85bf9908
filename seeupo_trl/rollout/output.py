"""What a batch of episodes becomes: the dict that TRL takes from a rollout function."""

from typing import TYPE_CHECKING, Any

from ..trajectory import Turn
from .chat_format import shared_length
from .episode import Episode


if TYPE_CHECKING:
    from trl import GRPOTrainer


# what reward functions get of it besides TRL's own
REPORTED = ("environment_reward", "stop_reason")


def rollout_output(episodes: list[Episode], trainer: "GRPOTrainer", filler_id: int) -> dict[str, list[Any] | None]:
    """
    The dict that [`~seeupo_trl.rollout.MultiTurnRollout`] describes.

    Args:
        episodes (`list[Episode]`):
            Episodes that have ended.
        trainer ([`~trl.GRPOTrainer`]):
            The trainer that takes it.
        filler_id (`int`):
            Token that stands where a prompt or a completion has none.
    """
    sequences = [as_sequence(episode.turns, episode.context_ids, filler_id) for episode in episodes]
    output: dict[str, list[Any] | None] = {
        name: [sequence[name] for sequence in sequences]
        for name in ("prompt_ids", "completion_ids", "env_mask", "logprobs")
    }
    if not trainer.use_vllm:
        output["logprobs"] = None
    output["trajectories"] = [episode.trajectory() for episode in episodes]
    output["environment_reward"] = [trajectory.reward for trajectory in output["trajectories"]]
    output["stop_reason"] = [episode.stop_reason.value for episode in episodes]
    return output


def as_sequence(turns: list[Turn], opening_ids: list[int], filler_id: int) -> dict[str, list]:
    """
    Prompt, completion, mask (1 = policy) and sampling log-probabilities of an episode as one sequence.

    Args:
        turns (`list[Turn]`):
            Its turns.
        opening_ids (`list[int]`):
            What the policy would have read, where it has none.
        filler_id (`int`):
            Token that stands where a prompt or a completion has none.
    """
    if not turns:
        prompt_ids = opening_ids or [filler_id]
        return {"prompt_ids": prompt_ids, "completion_ids": [filler_id], "env_mask": [0], "logprobs": [0.0]}
    prompt_ids = turns[0].context_ids
    completion_ids: list[int] = []
    mask: list[int] = []
    logps: list[float] = []
    before = prompt_ids
    for turn in turns:
        gap = turn.context_ids[shared_length(before, turn.context_ids) :]
        completion_ids += gap + turn.action_ids
        mask += [0] * len(gap) + [1] * len(turn.action_ids)
        logps += [0.0] * len(gap) + (turn.sampling_logps or [0.0] * len(turn.action_ids))
        before = turn.context_ids + turn.action_ids
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "env_mask": mask, "logprobs": logps}
