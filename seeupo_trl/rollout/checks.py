"""What a rollout function returned is made safe for TRL, or refused with a clear error."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from trl import GRPOTrainer

from ..trajectory import Trajectory
from .episode import shorten


_LISTS = ("prompt_ids", "completion_ids", "logprobs", "env_mask")


def checked_rollout(rollout_func: Callable, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
    """
    Call a rollout function and check what it returned.

    Args:
        rollout_func (`Callable`):
            Rollout function in the sense of TRL.
        prompts (`list`):
            Prompts of this process.
        trainer ([`SeeUPOTrainer`]):
            The trainer.

    Returns:
        `dict[str, Any]`:
            The rollout's output, in lists. An empty completion, which TRL cannot hold, is one padding token that no
            model generated. Log-probabilities that do not fit and that nothing reads are left out.

    Raises:
        `ValueError`:
            When the parts of the output do not fit together.
    """
    output = rollout_func(prompts, trainer)
    if not {"prompt_ids", "completion_ids", "logprobs"} <= output.keys():
        return output  # TRL names the missing keys
    output = dict(output)
    for name in (*_LISTS, "trajectories"):
        values = output.get(name)
        if values is not None and len(values) != len(prompts):
            raise ValueError(
                f"`rollout_func` returned {len(values)} `{name}` for {len(prompts)} prompts; need one each."
            )
        if values is not None and name in _LISTS:
            output[name] = [_as_list(row) for row in values]
    _check_tokens(output["prompt_ids"], output["completion_ids"], output.get("env_mask"))
    are_read = trainer.reads_sampled_logps
    if output["logprobs"] is not None:
        rows = zip(output["logprobs"], output["completion_ids"], strict=True)
        named = [(f"`logprobs` of sample {index}", *row) for index, row in enumerate(rows)]
        output["logprobs"] = _checked_logps(named, are_read)
    _check_turns(output.get("trajectories") or [], are_read)
    if not all(output["completion_ids"]):
        output = _fill_empty_completions(output, trainer._tokenizer.pad_token_id)
    return output


def _as_list(row: Any) -> list:
    """A row of tokens or log-probabilities, which may be an array, a tensor or a tuple."""
    if isinstance(row, np.ndarray | torch.Tensor):
        return row.tolist()
    return row if row is None or isinstance(row, list) else list(row)


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
        others = [] if env_mask is None else [value for value in env_mask[index] if value not in (0, 1)]
        if others:
            raise ValueError(
                f"`rollout_func` returned an `env_mask` with the value {shorten(others[0])} for sample {index}; a "
                "token is the model's (1) or the environment's (0)."
            )


def _checked_logps(named: list[tuple[str, list | None, list[int]]], are_read: bool) -> list[list[float | None]] | None:
    """
    Log-probabilities of the tokens of some samples, of each its name, what was returned, and the tokens; `None` where
    they do not fit and nothing reads them: `logprobs` is a key that TRL asks for, so anything may stand there.
    """
    try:
        return [_logps_of_tokens(*one) for one in named]
    except ValueError:
        if are_read:
            raise
        return None


def _logps_of_tokens(name: str, logps: list | None, token_ids: list[int]) -> list[float | None]:
    # vLLM's have another axis, of the most likely tokens, which may hold only the one that was sampled
    logps = [logp[0] if isinstance(logp, list | tuple) and len(logp) == 1 else logp for logp in logps or []]
    if len(logps) != len(token_ids):
        raise ValueError(
            f"`rollout_func` returned {name} with {len(logps)} values for {len(token_ids)} tokens; need one for each "
            "(anything for tokens of the environment), or None in place of all."
        )
    others = [logp for logp in logps if not _is_number(logp)]
    if others:
        raise ValueError(
            f"`rollout_func` returned {name} with the value {shorten(others[0])}; need a number for each token, that "
            "of the token which was sampled."
        )
    return logps


def _is_number(logp: Any) -> bool:
    # vLLM gives None for NaN
    return logp is None or isinstance(logp, Real) or (isinstance(logp, torch.Tensor) and logp.ndim == 0)


def _check_turns(trajectories: list[Trajectory], logps_are_read: bool) -> None:
    for index, trajectory in enumerate(trajectories):
        if not isinstance(trajectory, Trajectory):
            raise ValueError(
                f"`rollout_func` returned a {type(trajectory).__name__} in `trajectories`; that key is for a "
                "`seeupo_trl.Trajectory` of each prompt, which says what its turns are. Give fields of your own "
                "another name."
            )
        for number, turn in enumerate(trajectory.turns, start=1):
            turn.context_ids, turn.action_ids = _as_list(turn.context_ids), _as_list(turn.action_ids)
            if turn.sampling_logps is not None:
                name = f"`sampling_logps` of turn {number} of trajectory {index}"
                named = [(name, _as_list(turn.sampling_logps), turn.action_ids)]
                (turn.sampling_logps,) = _checked_logps(named, logps_are_read) or [None]
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
