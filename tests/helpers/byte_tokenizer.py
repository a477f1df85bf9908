"""A tokenizer of bytes with the chat templates that TRL ships, and a tiny model for it."""

from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


TEMPLATES = ["qwen2_5", "qwen3", "qwen3_instruct_2507"]


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Every byte is a token, so any text and any token sequence can occur; TRL's own chat template."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def tiny_model(tokenizer, positions=8192):
    """A random Qwen3 of one layer for the vocabulary of `tokenizer`."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=positions,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def forced_end(tokenizer=None):
    """Generation settings under which a random model ends each response at `max_completion_length`."""
    return {"forced_eos_token_id": (tokenizer or byte_tokenizer("qwen2_5")).eos_token_id}
