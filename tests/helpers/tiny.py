"""
A tiny Qwen3 model and its word-level tokenizer, built on the spot: no downloads, no files in the repository.

The model is saved to a directory because TRL loads the reference model of the KL penalty again from the path the
policy came from: load the policy with [`load_tiny_model`] in any dtype and both agree.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


SPECIAL_TOKENS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
ROLES = ["system", "user", "assistant", "tool", "tools", "name", "arguments"]
PUNCTUATION = list('{}[]":,.?!=()')
WORDS = [f"w{i}" for i in range(60)]
DIGITS = [str(i) for i in range(10)]
VOCABULARY = SPECIAL_TOKENS + ROLES + PUNCTUATION + WORDS + DIGITS

# ChatML with tools; no role is rewritten when messages are appended, so a longer conversation extends a shorter one.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|> tools {{ tools | tojson }} <|im_end|>{% endif %}
{%- for message in messages %}<|im_start|> {{ message.role }} {{ message.content or '' }}
{%- for call in message.tool_calls or [] %} <tool_call> {{ call.function | tojson }} </tool_call>{% endfor %}
{{- ' <|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|> assistant {% endif %}"""

# Arguments of a short run: on the CPU, without autocast, logging every iteration and saving nothing.
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of about a hundred tokens (`w0` to `w59`, digits, roles, punctuation) with tools."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(**overrides) -> Qwen3Config:
    """Two layers of width 32; weights large enough that the next-token distributions are far from uniform."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "use_cache": False,
        "pad_token_id": VOCABULARY.index("<pad>"),
        "eos_token_id": VOCABULARY.index("<|im_end|>"),
        "bos_token_id": None,
    }
    return Qwen3Config(**{**settings, **overrides})


_float32_norm = Qwen3RMSNorm.forward


def _norm_in_its_own_dtype(self: Qwen3RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """Qwen3's norms compute in float32 whatever the dtype, which would round away what float64 tests compare."""
    if hidden_states.dtype != torch.float64:
        return _float32_norm(self, hidden_states)
    return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


Qwen3RMSNorm.forward = _norm_in_its_own_dtype


def save_tiny_model(directory: str | Path, seed: int = 0, **config_overrides) -> str:
    """Write a randomly initialised float32 model and its tokenizer to `directory`, and return its path."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(tiny_config(**config_overrides))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def load_tiny_model(directory: str | Path, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """Load the saved model; its `_name_or_path` is `directory`, where TRL looks for the reference model."""
    return Qwen3ForCausalLM.from_pretrained(str(directory), dtype=dtype)
