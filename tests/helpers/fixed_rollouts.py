"""Rollouts drawn from a seed, for the trainer and for the oracle (see oracle.py)."""

import random
from dataclasses import dataclass
from functools import cache

from tiny import VOCABULARY, WORDS


NUM_GROUPS = 4
GROUP_SIZE = 3
NUM_TRAJECTORIES = NUM_GROUPS * GROUP_SIZE


@dataclass
class Episode:
    """One rollout twice: as the sequence and mask a rollout function returns, and as the turns the oracle reads."""

    prompt_ids: list[int]
    completion_ids: list[int]
    env_mask: list[int]
    turns: list[tuple[list[int], list[int]]]
    reward: float


def make_episode(rng: random.Random, prompt_ids: list[int], num_turns: int, reward: float) -> Episode:
    """Alternate actions and environment tokens; the environment may speak first, and speaks last half of the time."""
    first, last = VOCABULARY.index(WORDS[0]), VOCABULARY.index(WORDS[-1])

    def tokens(shortest, longest):
        return [rng.randint(first, last) for _ in range(rng.randint(shortest, longest))]

    completion_ids, env_mask, turns = [], [], []
    if num_turns == 0 or rng.random() < 0.25:
        completion_ids += tokens(1, 3)
        env_mask += [0] * len(completion_ids)
    for t in range(num_turns):
        action = tokens(1, 6)
        turns.append((prompt_ids + completion_ids, action))
        completion_ids = completion_ids + action
        env_mask += [1] * len(action)
        if t < num_turns - 1 or rng.random() < 0.5:
            observation = tokens(1, 4)
            completion_ids = completion_ids + observation
            env_mask += [0] * len(observation)
    return Episode(prompt_ids, completion_ids, env_mask, turns, reward)


def make_iteration(seed: int, turn_counts: list[int], equal_rewards: bool = False) -> list[Episode]:
    """Rollouts of `NUM_GROUPS` tasks in generation order; all rewards of the second group are equal."""
    rng = random.Random(seed)
    episodes = []
    for group in range(NUM_GROUPS):
        prompt_ids = [rng.randrange(len(VOCABULARY)) for _ in range(rng.randint(3, 9))]
        for member in range(GROUP_SIZE):
            # Multiples of 1/8: a reward passes through float32 on its way to the trainer.
            reward = 0.5 if equal_rewards or group == 1 else rng.randint(0, 16) / 8
            episodes.append(make_episode(rng, prompt_ids, turn_counts[GROUP_SIZE * group + member], reward))
    return episodes


@cache
def ragged_rollouts() -> tuple[list[Episode], ...]:
    """Three iterations of one to five turns; the second has a trajectory without any model token."""
    return (
        make_iteration(1, [5, 2, 1, 3, 4, 1, 2, 2, 3, 1, 4, 2]),
        make_iteration(2, [1, 3, 2, 2, 1, 3, 4, 0, 1, 2, 4, 3]),
        make_iteration(3, [3, 1, 3, 3, 2, 1, 1, 2, 3, 2, 3, 1]),
    )


def draw_step_rewards(episodes: list[Episode], seed: int) -> list[list[float]]:
    """Rewards after each turn, multiples of 1/8, often 0; what they leave of an episode's reward comes at its end."""
    rng = random.Random(seed)
    return [[rng.choice((0, 0, 1, 2, -1)) / 8 for _ in episode.turns] for episode in episodes]


def as_groups(episodes: list[Episode]):
    rows = [(episode.turns, episode.reward) for episode in episodes]
    return [rows[start : start + GROUP_SIZE] for start in range(0, len(rows), GROUP_SIZE)]


def rewrite_contexts(episodes: list[Episode], seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """The episodes' turns with middle tokens removed from later contexts, as when reasoning is stripped."""
    rng = random.Random(seed)
    rewritten = []
    for episode in episodes:
        turns = []
        for t, (context, action) in enumerate(episode.turns):
            if t > 0:
                start = len(episode.prompt_ids) + rng.randint(0, 1)
                context = context[:start] + context[start + rng.randint(1, 3) :]
            turns.append((context, action))
        rewritten.append(turns)
    return rewritten


def outcome_reward(completions, outcome, **kwargs):
    return outcome
