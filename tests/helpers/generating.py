"""Trainers of TRL's that generate, for the tests of what takes the place of TRL's own generation."""

from datasets import Dataset
from tiny import ON_CPU, VOCABULARY, load_tiny_model, tiny_tokenizer
from transformers import AutoConfig, PreTrainedConfig
from trl import GRPOConfig, GRPOTrainer


EOS = VOCABULARY.index("<|im_end|>")
ENDS = [EOS, *range(VOCABULARY.index("w0"), VOCABULARY.index("w10"))]  # so many that responses differ in length
GREEDY = {"do_sample": False}


def make_generating_trainer(
    tiny_dir, output_dir, dtype, model=None, peft_config=None, generation=GREEDY, **config
) -> GRPOTrainer:
    """A trainer of a tiny model, or of the one that is given, whose responses end at any of [`ENDS`]."""
    model = model or load_tiny_model(tiny_dir, dtype)
    model.generation_config.eos_token_id = ENDS
    settings = {"max_completion_length": 9, "num_generations": 2, "per_device_train_batch_size": 2}
    return GRPOTrainer(
        model=model,
        args=GRPOConfig(output_dir=str(output_dir), generation_kwargs=generation, **{**ON_CPU, **settings, **config}),
        train_dataset=Dataset.from_dict({"prompt": ["w1"] * 2}),
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        peft_config=peft_config,
    )


def small_config(model_type, **options) -> PreTrainedConfig:
    """A configuration of two layers of width 32."""
    shape = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.2}
    shape |= {"eos_token_id": EOS, "pad_token_id": VOCABULARY.index("<pad>"), "bos_token_id": None}
    return AutoConfig.for_model(model_type, **(shape | options))


def words(rng, count) -> list[int]:
    """So many tokens of the tiny vocabulary."""
    return [rng.randrange(len(VOCABULARY) - 72, len(VOCABULARY)) for _ in range(count)]
