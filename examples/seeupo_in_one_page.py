"""
SeeUPO in one page: the method of arXiv 2602.06554 in plain PyTorch and transformers, without the trainer.

    python examples/seeupo_in_one_page.py

A language model of two layers, random at the start, learns a search game of at most three turns: the environment hides
a number from 0 to 6, the model guesses, the environment answers "lower" or "higher". A hit ends the episode with a
reward of 1. An action is the whole response of a turn; it ends with a full stop or is cut off after two tokens, and
its first token is the guess. Three uniform guesses hit in 37% of the episodes. Binary search that starts at 3 always
hits; from 2 or 4 it reaches six of the seven numbers (86%), from 1 or 5 five of them (71%).

Read `update` beside Algorithm 1 of the paper. What it computes is what `SeeUPOTrainer` computes with its defaults (a
test holds one against the other). What is simpler here than there:

- One process holds the whole iteration, and one micro-batch is all of it. No DDP, DeepSpeed or FSDP2.
- Every pass reads all episodes from end to end. The trainer computes only what a turn's update needs, once where
  trajectories share it, and gets the ratio of Eq. 8 out of the next turn's pass, not out of one of its own.
- An episode is one growing sequence of tokens: no chat template, no tools, no context rewritten between turns.
- The environment never fails, so every trajectory has a reward.
- One optimizer step a turn: no mini-batches, no epochs, no blocks of turns.
- The denominator of a ratio is always theta_k, and M always has its bound: no settings of the paper or of its authors.
- No KL term, no entropy bonus, no clamp on advantages, no correction for a sampler such as vLLM; temperature 1.
- Sampling caches no keys and values: it computes the history again for every token.
- No checkpoints, no resuming, no held-out tasks: the curve is that of the rollouts it trains on.
"""

import argparse
import json
import random
from dataclasses import dataclass, field

import torch
from torch.optim import AdamW, Optimizer
from transformers import Qwen3Config, Qwen3ForCausalLM


VOCABULARY = ["<pad>", "<start>", "0", "1", "2", "3", "4", "5", "6", "lower", "higher", "what?", "."]
PAD, START, END_OF_TURN = VOCABULARY.index("<pad>"), VOCABULARY.index("<start>"), VOCABULARY.index(".")
NUMBERS = range(7)
MAX_TURNS = 3
MAX_ACTION_TOKENS = 2
CHANCE = 1 - (1 - 1 / len(NUMBERS)) ** MAX_TURNS  # success of uniform guesses

GROUP_SIZE = 32  # G, rollouts of each number; B, the number of groups, is 7
LEARNING_RATE = 3e-3  # at the start; it falls to 0 in a straight line
MAX_GRAD_NORM = 1.0
EPSILON = 0.2  # the surrogate's clip
TURN_WEIGHT_CLIP = 0.2  # bound of the ratios in M, and of their running product
ORDERS = ("reverse", "forward", "random", "simultaneous")


# --- Rollouts --------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One trajectory: all tokens, where in them the actions are (turn t's is `tokens[turns[t]]`), and the reward."""

    tokens: list[int]
    turns: list[slice] = field(default_factory=list)
    reward: float = 0.0


def build_model() -> Qwen3ForCausalLM:
    """A Qwen3 of two layers of width 64 with random weights."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=0.1,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def play(model: Qwen3ForCausalLM, hidden_numbers: list[int]) -> list[Episode]:
    """Play one episode a hidden number, all of them side by side."""
    episodes = [Episode([START]) for _ in hidden_numbers]
    playing = list(zip(episodes, hidden_numbers, strict=True))
    for _ in range(MAX_TURNS):
        act(model, [episode for episode, _ in playing])
        for episode, hidden in playing:
            answer(episode, hidden)
        playing = [(episode, hidden) for episode, hidden in playing if not episode.reward]
    return episodes


def act(model: Qwen3ForCausalLM, episodes: list[Episode]) -> None:
    """Sample one action for every episode, a token at a time until the end of the turn."""
    starts = [len(episode.tokens) for episode in episodes]
    for _ in range(MAX_ACTION_TOKENS):
        acting = [episode for episode in episodes if episode.tokens[-1] != END_OF_TURN]
        if not acting:
            break
        last = torch.tensor([len(episode.tokens) - 1 for episode in acting])  # (n,)
        logits = model(pad(acting)).logits[torch.arange(len(acting)), last]  # (n, V)
        for episode, token in zip(acting, logits.softmax(-1).multinomial(1).flatten().tolist(), strict=True):
            episode.tokens.append(token)
    for episode, start in zip(episodes, starts, strict=True):
        episode.turns.append(slice(start, len(episode.tokens)))


def answer(episode: Episode, hidden: int) -> None:
    """The environment's side of a turn: a reward for a hit, else one word."""
    guess = VOCABULARY[episode.tokens[episode.turns[-1].start]]
    if guess == str(hidden):
        episode.reward = 1.0
    elif guess.isdigit():
        episode.tokens.append(VOCABULARY.index("lower" if hidden < int(guess) else "higher"))
    else:
        episode.tokens.append(VOCABULARY.index("what?"))


def pad(episodes: list[Episode]) -> torch.Tensor:
    """Tokens of all episodes, shape `(n, L)`. Attention is causal, so nothing sees the padding on its right."""
    length = max(len(episode.tokens) for episode in episodes)
    return torch.tensor([episode.tokens + [PAD] * (length - len(episode.tokens)) for episode in episodes])


# --- One iteration of Algorithm 1 ------------------------------------------------------------------------------------


def normalised_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards relative to their group's mean, standardised over the batch (Eq. 9); in and out `(N,)`."""
    groups = rewards.view(-1, group_size)  # (B, G)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).flatten()  # (N,)
    if not advantages.any():  # no group tells good from bad
        return advantages
    return (advantages - advantages.mean()) / advantages.std()


def token_logps(model: Qwen3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token given those before it; in and out `(N, L)`, 0 for the first."""
    logps = model(tokens).logits.log_softmax(-1)  # (N, L, V), each position predicts the token that follows
    logps = logps[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)  # (N, L - 1)
    return torch.nn.functional.pad(logps, (1, 0))


def sequence_ratio(logps: torch.Tensor, old_logps: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """
    Length-normalised importance ratio of an action (Eq. 6), shape `(N,)`; 1 for a trajectory without it.

    `action` is a mask of shape `(N, L)`, true where the action's tokens are.
    """
    log_ratio = ((logps - old_logps) * action).sum(1)  # (N,)
    return (log_ratio / action.sum(1).clamp(min=1)).exp()


def action_mask(episodes: list[Episode], turns: list[int], length: int) -> torch.Tensor:
    """Which tokens are actions of these turns (counted from 0), shape `(N, length)`; no-op rows are all false."""
    mask = torch.zeros(len(episodes), length, dtype=torch.bool)
    for row, episode in zip(mask, episodes, strict=True):
        for t in turns:
            if t < len(episode.turns):
                row[episode.turns[t]] = True
    return mask


def update_schedule(num_turns: int, order: str) -> list[list[int]]:
    """Turns (counted from 0) of every update, first update first. The algorithm is "reverse"."""
    turns = list(range(num_turns))
    if order == "simultaneous":
        return [turns]  # one action, the concatenation of all: GSPO with batch normalisation
    if order == "random":
        random.shuffle(turns)
    if order == "reverse":
        turns.reverse()
    return [[t] for t in turns]


def update(
    model: Qwen3ForCausalLM, optimizer: Optimizer, episodes: list[Episode], group_size: int, order: str
) -> None:
    """Move theta_k to theta_{k+1} with the trajectories sampled from theta_k, the members of a group side by side."""
    tokens = pad(episodes)  # (N, L)
    with torch.no_grad():
        old_logps = token_logps(model, tokens)  # (N, L), under theta_k
    rewards = torch.tensor([episode.reward for episode in episodes], dtype=old_logps.dtype)
    advantages = normalised_advantages(rewards, group_size)  # (N,)
    weights = torch.ones_like(advantages)  # (N,), M / A; so M_{T+1} = A (Eq. 7)
    low, high = 1 - TURN_WEIGHT_CLIP, 1 + TURN_WEIGHT_CLIP

    num_turns = max(len(episode.turns) for episode in episodes)  # T
    for turns in update_schedule(num_turns, order):  # [[T - 1], ..., [1], [0]]
        action = action_mask(episodes, turns, tokens.shape[1])  # (N, L)
        if not advantages[action.any(1)].any():
            continue  # nobody who plays this turn has anything to learn

        # maximise J_t; a trajectory without this turn has a ratio of 1: no gradient, but it counts in N
        M = weights * advantages  # (N,), M_{t+1}
        ratio = sequence_ratio(token_logps(model, tokens), old_logps, action)  # (N,), Eq. 6
        surrogate = torch.minimum(ratio * M, ratio.clamp(1 - EPSILON, 1 + EPSILON) * M)  # (N,)
        optimizer.zero_grad()
        (-surrogate.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()

        # M_t = r_t(theta^t) M_{t+1} (Eq. 8), at the parameters after the step: a constant for the turn before
        with torch.no_grad():
            ratio = sequence_ratio(token_logps(model, tokens), old_logps, action)  # (N,)
        weights = (weights * ratio.clamp(low, high)).clamp(low, high)


def train(seed: int, num_iterations: int, order: str) -> list[float]:
    """Train a new model and return the success rate of every iteration's rollouts, before their update."""
    torch.manual_seed(seed)
    random.seed(seed)
    model = build_model()
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    every = max(1, num_iterations // 20)
    success = []
    for iteration in range(num_iterations):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / num_iterations)
        episodes = play(model, [number for number in NUMBERS for _ in range(GROUP_SIZE)])
        success.append(sum(episode.reward for episode in episodes) / len(episodes))
        update(model, optimizer, episodes, GROUP_SIZE, order)
        if (iteration + 1) % every == 0:
            recent = sum(success[-every:]) / every
            print(f"{iteration + 1:9d}     {recent:.2f}  {'█' * round(60 * recent)}", flush=True)
    return success


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny model with SeeUPO on a search game.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--order", choices=ORDERS, default="reverse", help="order in which turns are updated")
    parser.add_argument("--json", metavar="FILE", help="append the run's curve to this file, as a line of JSON")
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error(f"--iterations is {args.iterations}, it has to be at least 1")
    torch.set_num_threads(1)  # matrices this small are slower on several

    print(f"{len(NUMBERS)} groups of {GROUP_SIZE} an iteration; success of uniform guesses {CHANCE:.2f}\n")
    print("iteration  success")
    success = train(args.seed, args.iterations, args.order)
    if args.json:
        run = {"seed": args.seed, "order": args.order, "chance": CHANCE, "success": success}
        with open(args.json, "a") as file:
            file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
