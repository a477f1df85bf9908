"""
Fixed rollouts that are unkind to several processes, for `distributed_run.py` and for the oracle.

Twelve trajectories in groups of three. Two processes hold six each: in the first iteration one plays single turns only
while the other plays up to eight; in the second the groups of the first have no variance; in the third no group has
any, so that without a KL term there is nothing to update; in the fourth the first process has no model token. Three
processes hold four each, so that groups lie on two processes.
"""

import random

from seeupo_trl.trajectory import Trajectory, Turn


GROUP_SIZE = 3
NUM_TRAJECTORIES = 12
TURNS = [
    [1, 1, 1, 1, 1, 1, 8, 3, 8, 5, 2, 8],
    [2, 3, 1, 2, 1, 4, 2, 1, 3, 1, 2, 2],
    [1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2],
    [0, 0, 0, 0, 0, 0, 3, 1, 2, 2, 1, 3],
]
REWARDS = [
    [0, 1, 2, 0, 0, 1, 3, 1, 0, 2, 1, 2],
    [1, 1, 1, 2, 2, 2, 0, 3, 1, 0, 1, 1],
    [1, 1, 1, 2, 2, 2, 0, 0, 0, 3, 3, 3],
    [0, 1, 0, 0, 2, 1, 3, 0, 1, 1, 0, 2],
]
FIRST_WORD, LAST_WORD = 30, 89  # ids of ordinary words in the tiny tokenizer


def episode(iteration: int, index: int, strip: bool = False) -> tuple[list[int], list[int], list[int], list]:
    """
    Prompt, completion and mask (1 for the policy's tokens) of a trajectory, and its turns as `(context, action)`.

    With `strip`, the first token of each action is missing from later contexts, as when reasoning is stripped from the
    history; the sequence and its mask are then those of the unstripped episode.
    """
    group = index // GROUP_SIZE
    prompt = [FIRST_WORD + (7 * group + 13 * iteration + k) % 60 for k in range(4)]
    rng = random.Random(f"{iteration} {index}")

    def tokens(most: int) -> list[int]:
        return [rng.randint(FIRST_WORD, LAST_WORD) for _ in range(rng.randint(1, most))]

    opening = tokens(1)
    completion, mask = list(opening), [0]
    history, turns = prompt + opening, []
    for _ in range(TURNS[iteration][index]):
        action, observation = tokens(5), tokens(2)
        turns.append((list(history), action))
        history += (action[1:] if strip else action) + observation
        completion += action + observation
        mask += [1] * len(action) + [0] * len(observation)
    return prompt, completion, mask, turns


def groups(iteration: int, strip: bool = False) -> list[list[tuple[list, float]]]:
    """The trajectories of an iteration as the oracle reads them: groups of `(turns, reward)`."""
    rows = [(episode(iteration, i, strip)[3], float(REWARDS[iteration][i])) for i in range(NUM_TRAJECTORIES)]
    return [rows[first : first + GROUP_SIZE] for first in range(0, NUM_TRAJECTORIES, GROUP_SIZE)]


class FixedRollouts:
    """Rollout function that returns this process's share of the fixed rollouts."""

    def __init__(self, strip: bool):
        self.strip = strip

    def __call__(self, prompts, trainer):
        iteration = trainer.state.global_step
        first = trainer.accelerator.process_index * len(prompts)
        indices = range(first, first + len(prompts))
        episodes = [episode(iteration, index, self.strip) for index in indices]
        output = {
            "prompt_ids": [prompt for prompt, _, _, _ in episodes],
            "completion_ids": [completion for _, completion, _, _ in episodes],
            "logprobs": None,
            "env_mask": [mask for _, _, mask, _ in episodes],
            "outcome": [float(REWARDS[iteration][index]) for index in indices],
        }
        if self.strip:
            output["trajectories"] = [Trajectory([Turn(*turn) for turn in turns]) for _, _, _, turns in episodes]
        return output
