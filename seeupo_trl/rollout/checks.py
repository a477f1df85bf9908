"""What a rollout function returned is made safe for TRL, or refused with a clear error."""

from collections.abc import Callable
from typing import Any

from trl import GRPOTrainer

from ..trajectory import Trajectory


def checked_rollout(rollout_func: Callable, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
    """
    Call a rollout function and check what it returned.

    Args:
        rollout_func (`Callable`):
            Rollout function in the sense of TRL.
        prompts (`list`):
            Prompts of this process.
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.

    Returns:
        `dict[str, Any]`:
            The rollout's output. An empty completion, which TRL cannot hold, is one padding token that no model
            generated.

    Raises:
        `ValueError`:
            When the parts of the output do not fit together.
    """
    output = rollout_func(prompts, trainer)
    if not {"prompt_ids", "completion_ids", "logprobs"} <= output.keys():
        return output  # TRL names the missing keys
    for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "trajectories"):
        values = output.get(name)
        if values is not None and len(values) != len(prompts):
            raise ValueError(
                f"`rollout_func` returned {len(values)} `{name}` for {len(prompts)} prompts; need one each."
            )
    _check_tokens(output["prompt_ids"], output["completion_ids"], output.get("env_mask"))
    _check_turns(output.get("trajectories") or [])
    if not all(output["completion_ids"]):
        output = _fill_empty_completions(output, trainer._tokenizer.pad_token_id)
    return output


def _check_tokens(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], env_mask: list[list[int]] | None
) -> None:
    for index, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not prompt:
            raise ValueError(
                f"`rollout_func` returned an empty prompt for sample {index}: the first generated token needs a token "
                "before it. Begin the prompt with the tokenizer's `bos_token`."
            )
        if env_mask is not None and len(env_mask[index]) != len(completion):
            raise ValueError(
                f"`rollout_func` returned an `env_mask` of {len(env_mask[index])} values for the {len(completion)} "
                f"completion tokens of sample {index}; need one value (1 model, 0 environment) for each token."
            )


def _check_turns(trajectories: list[Trajectory]) -> None:
    for index, trajectory in enumerate(trajectories):
        for number, turn in enumerate(trajectory.turns, start=1):
            for name, tokens in (("action", turn.action_ids), ("context", turn.context_ids)):
                if not tokens:
                    raise ValueError(
                        f"`rollout_func` returned `trajectories` in which turn {number} of trajectory {index} has no "
                        f"{name} tokens; a turn needs at least one. Leave out turns in which nothing was generated."
                    )


def _fill_empty_completions(output: dict[str, Any], filler: int) -> dict[str, Any]:
    completion_ids, logprobs = output["completion_ids"], output["logprobs"]
    masks = output.get("env_mask") or [[1] * len(ids) for ids in completion_ids]
    output = {
        **output,
        "completion_ids": [ids or [filler] for ids in completion_ids],
        "env_mask": [mask or [0] for mask in masks],
    }
    if logprobs is not None:
        output["logprobs"] = [logps or [0.0] for logps in logprobs]
    return output
