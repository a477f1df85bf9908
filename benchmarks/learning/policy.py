"""The policy of the study: a Qwen3-shaped transformer of two layers of 64 from a random start, and how it plays."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tasks import Task
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A token for each word of a task, between spaces; the first is for padding."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>", padding_side="left"
    )


def save_policy(directory: str | Path, words: list[str], seed: int) -> str:
    """Write the policy that a seed starts from, and its tokenizer, to a folder; returns its path."""
    tokenizer = word_tokenizer(words)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def flops_per_token(model: Qwen3ForCausalLM) -> int:
    """FLOPs of one token's forward pass: two for each weight of a matrix. Attention to earlier tokens is left out."""
    return 2 * sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name)


class Rollout:
    """
    Plays a batch of episodes with the policy at temperature 1, and keeps what each batch earned. A `rollout_func` for
    either trainer: each run of ones in `env_mask` is a turn.
    """

    def __init__(self, task: Task):
        self.task = task
        self.ids = {word: i for i, word in enumerate(["<pad>", *task.words])}
        self.words = {i: word for word, i in self.ids.items()}
        self.ends = {self.ids[word] for word in task.ends}
        self.games = []
        self.is_playing = False
        self.seconds = 0.0
        self.last_rewards: list[float] = []  # of each episode of the last batch
        self.rewards: list[float] = []  # one mean a batch, like the following
        self.successes: list[float] = []
        self.turns: list[float] = []
        self.action_tokens: list[float] = []

    @torch.no_grad()
    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any] | None]:
        start, self.is_playing = time.perf_counter(), True
        while len(self.games) < len(prompts):
            self.games.append(self.task.game())
        openings = [game.reset(self.task.row(p)) for game, p in zip(self.games, prompts, strict=False)]
        prompt_ids = [[self.ids[word] for word in words] for words in openings]
        tokens = [list(ids) for ids in prompt_ids]
        masks: list[list[int]] = [[] for _ in prompts]
        rewards, successes, turns = [0.0] * len(prompts), [False] * len(prompts), [0] * len(prompts)
        playing = list(range(len(prompts)))
        for turn in range(1, self.task.max_turns + 1):
            actions = self._act(trainer.model, tokens, playing)
            for i in list(playing):
                reply = self.games[i].step([self.words[token] for token in actions[i]])
                tokens[i] += actions[i]
                masks[i] += [1] * len(actions[i])
                rewards[i] += reply.reward
                turns[i] += 1
                if reply.is_over or turn == self.task.max_turns:
                    successes[i] = reply.success
                    playing.remove(i)
                    continue
                answer = [self.ids[word] for word in reply.words]
                tokens[i] += answer
                masks[i] += [0] * len(answer)
            if not playing:
                break
        self.last_rewards = rewards
        self.rewards.append(sum(rewards) / len(prompts))
        self.successes.append(sum(successes) / len(prompts))
        self.turns.append(sum(turns) / len(prompts))
        self.action_tokens.append(sum(map(sum, masks)) / sum(turns))
        self.seconds, self.is_playing = self.seconds + time.perf_counter() - start, False
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [ids[len(opening) :] for ids, opening in zip(tokens, prompt_ids, strict=True)],
            "env_mask": masks,
            "logprobs": None,
            "environment_reward": rewards,
        }

    def _act(self, model: torch.nn.Module, tokens: list[list[int]], playing: list[int]) -> dict[int, list[int]]:
        """The words of a turn, sampled token by token until one ends it."""
        actions: dict[int, list[int]] = {i: [] for i in playing}
        acting = playing
        for _ in range(self.task.max_action):
            for i, token in zip(acting, self._sample(model, [tokens[i] + actions[i] for i in acting]), strict=True):
                actions[i].append(token)
            acting = [i for i in acting if actions[i][-1] not in self.ends]
            if not acting:
                break
        return actions

    def _sample(self, model: torch.nn.Module, contexts: list[list[int]]) -> Iterator[int]:
        """One token for each context."""
        length = max(map(len, contexts))
        ids = torch.tensor([[0] * (length - len(one)) + one for one in contexts])  # (n, length)
        lengths = torch.tensor([len(one) for one in contexts])
        positions = torch.arange(length) - (length - lengths)[:, None]
        mask = None if bool((lengths == length).all()) else (positions >= 0).long()
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0), logits_to_keep=1, use_cache=False
        ).logits[:, -1]
        return iter(torch.multinomial(logits.float().softmax(-1), 1)[:, 0].tolist())
