"""A trainer of TRL's whose policy says what a script says, and episodes played with it."""

from byte_tokenizer import byte_tokenizer, tiny_model
from datasets import Dataset
from talk import Talk, row
from tiny import ON_CPU
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl.rollout import MultiTurnRollout, environment_reward


class ScriptedTrainer(GRPOTrainer):
    """A GRPOTrainer whose policy is a list of responses for each row (the rest of TRL is real)."""

    script: list[list[str]] = []

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        assert num_generations == 1
        self.contexts = [*getattr(self, "contexts", []), prompt_ids]
        responses = []
        for context in prompt_ids:
            responses.append(self.respond(context))
        ids = [self.processing_class(text)["input_ids"] for text in responses]
        return ids, [[-0.5 - i for i in range(len(row))] for row in ids] if self.use_vllm else None

    def respond(self, context):
        """The scripted response that follows the number of assistant turns the context holds."""
        text = self.processing_class.decode(context)
        script = next((script for opening, script in self.script if opening in text), self.script[0][1])
        return script[text.count("<|im_start|>assistant") - 1]


def make_scripted_trainer(
    output_dir, rows=None, template="qwen2_5", script=None, rollout=None, tokenizer=None, **config
) -> GRPOTrainer:
    """A trainer of TRL's that plays [`Talk`]; with `script`, one whose policy says that."""
    rows = rows or [row()]
    tokenizer = tokenizer or byte_tokenizer(template)
    model = tiny_model(tokenizer, positions=config.pop("positions", 8192))
    settings = {"max_completion_length": 6, "num_generations": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    trainer = (ScriptedTrainer if script is not None else GRPOTrainer)(
        model=model,
        args=GRPOConfig(
            output_dir=str(output_dir),
            **{**ON_CPU, **settings, **config},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_funcs=environment_reward,
        rollout_func=rollout or MultiTurnRollout(Talk, tasks=rows),
    )
    trainer.script = [("", script)] if script and isinstance(script[0], str) else script
    return trainer


def play(trainer, rows, **options):
    """Roll the rows out and return TRL's dict."""
    rollout = MultiTurnRollout(Talk, tasks=rows, **options)
    return rollout([r["prompt"] for r in rows], trainer)
