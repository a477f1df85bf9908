"""The same script of tool calls for TRL's trainer and ours, and all that their user sees of the episodes."""

import copy
import json

from byte_tokenizer import byte_tokenizer, tiny_model
from datasets import Dataset
from tiny import ON_CPU
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


END = "<|im_end|>"


class Scripted:
    """The policy is a list of responses for each row; all that the trainer makes of it is recorded."""

    script: dict[str, list[str]]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        ids = [self.processing_class(self.respond(context))["input_ids"] for context in prompt_ids]
        return [row[: self.max_completion_length] for row in ids], None

    def respond(self, context):
        """The response that follows those the context holds."""
        text = self.processing_class.decode(context)
        script = next((script for opening, script in self.script.items() if opening in text), [f"?{END}"])
        place = 0
        for response in script:
            found = text.find(response, place)
            if found < 0:
                return response
            place = found + len(response)
        return f"?{END}"

    def _generate(self, prompts):
        output = super()._generate(prompts)
        names = ("prompt_ids", "completion_ids", "tool_mask", "completions")
        self.generated.append(
            {"prompts": copy.deepcopy(prompts), **dict(zip(names, copy.deepcopy(output), strict=False))}
        )
        return output


class ScriptedGRPO(Scripted, GRPOTrainer):
    pass


class ScriptedSeeUPO(Scripted, SeeUPOTrainer):
    pass


def make_tool_trainer(output_dir, trainer_class, factory, script, template="qwen2_5", tools=None, **config):
    """A scripted trainer whose reward function keeps what it is given."""

    def watching(prompts, completions, completion_ids, environments=None, start=None, shelf=None, **columns):
        state = [vars(environment) for environment in environments]
        state = [{name: repr(value) for name, value in s.items() if name != "connection"} for s in state]
        trainer.seen.append(copy.deepcopy([prompts, completions, completion_ids, state, start, shelf]))
        return [float(len(str(completion))) for completion in completions]

    tokenizer = byte_tokenizer(template)
    settings = {"max_completion_length": 2000, "num_generations": 2, "per_device_train_batch_size": 2}
    settings |= {"max_tool_calling_iterations": 20, "shuffle_dataset": False, "max_steps": 2, "logging_steps": 1}
    config_class = GRPOConfig if issubclass(trainer_class, ScriptedGRPO) else SeeUPOConfig
    trainer = trainer_class(
        model=tiny_model(tokenizer),
        args=config_class(
            output_dir=str(output_dir),
            **{**ON_CPU, **settings, **config},
        ),
        train_dataset=Dataset.from_dict({"environment": ["counter", "library"]}),
        processing_class=tokenizer,
        reward_funcs=watching,
        tools=tools,
        environment_factory=factory,
    )
    trainer.script, trainer.generated, trainer.seen = script, [], []
    trainer.model.train()
    return trainer


def play(trainer, rows):
    """Play the rows twice each, and return all that the trainer's user can see of the episodes."""
    for kept in (trainer.generated, trainer.seen, trainer._metrics["train"], *trainer._logs.values()):
        kept.clear()
    trainer.state.num_input_tokens_seen = 0
    trainer._generate_and_score_completions([copy.deepcopy(row) for row in rows for _ in range(2)])
    metrics = {
        name: values
        for name, values in trainer._metrics["train"].items()
        if name.startswith(("tools/", "rewards/", "completions/")) or name in ("reward", "num_tokens")
    }
    logs = {name: list(trainer._logs[name]) for name in ("prompt", "completion")}
    return {"generated": trainer.generated, "rewards": trainer.seen, "metrics": metrics, "logs": logs}


def row(name, **columns):
    return {"prompt": [{"role": "user", "content": f"Task {name}."}], **columns}


SCRIPTS = {
    "Task one.": [f"{call('increment', step=2)}{END}", f"Hm. {call('read')}{END}", f"It is 2.{END}"],
    "Task several.": [f"{call('read')}\n{call('increment', step=1)}\n{call('read')}{END}", f"Done.{END}"],
    "Task none.": [f"No.{END}"],
    "Task mistakes.": [
        f"{call('fail', reason='x')}{END}",
        f"{call('increment', stride=2)}{END}",
        f"{call('decrement', step=2)}{END}",
        f"{call('increment', step='many')}\n{call('increment', step=3)}{END}",
        f"{call('reset')}\n{call('get_reward')}{END}",
        f"Sorry.{END}",
    ],
    "Task malformed.": [f"{call('increment', step=1)}{END}", "<tool_call>\n{increment\n</tool_call>" + END],
    "Task library.": [
        f"{call('borrow', title='a')}\n{call('count')}\n{call('search', words='b')}\n{call('lend')}{END}",
        f"{call('borrow', title='b 1')}\n{call('search', words='c', limit=1)}{END}",
        f"{call('count')}{END}",
        f"Thanks.{END}",
    ],
}
COUNTING = [row(name, start=start) for start, name in enumerate(("one", "several", "none", "mistakes", "malformed"))]
