"""Rows of the dataset: how a rollout finds the task of a prompt, and what an environment is given of it."""

import pytest
from byte_tokenizer import forced_end
from datasets import Dataset
from talk import Talk, row, user

from seeupo_trl.rollout import MultiTurnRollout
from seeupo_trl.rollout.tasks import Tasks


def test_reset_receives_every_column(make_trainer):
    rows = [row(number=7, label="x")]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    environments = []

    class Keep(Talk):
        def __init__(self):
            super().__init__()
            environments.append(self)

    MultiTurnRollout(Keep, tasks=Dataset.from_list(rows))([rows[0]["prompt"]], trainer)
    assert environments[0].task == {"prompt": rows[0]["prompt"], "number": 7, "label": "x"}


def test_rows_of_the_trainer_come_before_a_look_up(make_trainer):
    trainer = make_trainer([row()], generation_kwargs=forced_end())
    trainer.rollout_inputs = [row([user("Go on.")])]
    output = MultiTurnRollout(Talk)(["any prompt"], trainer)
    assert len(output["trajectories"][0].turns) == 2


def test_tasks_add_the_columns_that_rows_of_the_trainer_do_not_have(make_trainer):
    seen = []

    class Keep(Talk):
        def reset(self, **task):
            observation = super().reset(**task)
            seen.append(self.task)
            return observation

    tasks = [row(number=number, label="of the tasks") for number in range(2)]
    trainer = make_trainer(tasks, generation_kwargs=forced_end())
    prompts = [[user("unheard")], tasks[1]["prompt"]]
    trainer.rollout_inputs = [{"prompt": prompt, "replies": [], "label": "of the trainer"} for prompt in prompts]
    MultiTurnRollout(Keep, tasks=tasks)(prompts, trainer)
    unheard, found = sorted(seen, key=len)
    assert unheard == {"prompt": prompts[0], "label": "of the trainer"}
    assert found == {"prompt": prompts[1], "number": 1, "label": "of the trainer"}


def test_what_arrow_fills_in_does_not_hide_a_row():
    def prompt(number):
        call = {"type": "function", "function": {"name": "f", "arguments": {f"argument {number}": 1}}}
        return [user(str(number)), {"role": "assistant", "content": "", "tool_calls": [call]}, user("Now?")]

    rows = [{"prompt": prompt(number), "number": number} for number in range(2)]
    filled = list(Dataset.from_list(rows))
    assert filled[0]["prompt"] != rows[0]["prompt"]
    for tasks, asked in ((rows, filled), (filled, rows), (rows + filled, filled)):
        prompts = [row["prompt"] for row in asked]
        assert [row["number"] for row in Tasks(tasks).of(prompts)] == [0, 1]
        assert [row["number"] for row in Tasks(tasks).added_to([{"prompt": p} for p in prompts])] == [0, 1]


def test_a_row_of_the_trainer_that_stays_without_the_columns_of_tasks_is_worth_a_warning(caplog):
    tasks = Tasks([row(number=1)])
    unheard = {"prompt": [user("unheard")], "replies": []}
    assert tasks.added_to([{**unheard, "number": 3}]) == [{**unheard, "number": 3}] and not caplog.records
    for _ in range(2):
        assert tasks.added_to([unheard]) == [unheard]
    (record,) = caplog.records
    assert "unheard" in record.getMessage() and "without the columns number." in record.getMessage()


def test_an_environment_cannot_change_the_dataset(make_trainer):
    class Greedy(Talk):
        def reset(self, replies, **task):
            observation = super().reset(replies, **task)
            replies.clear()
            return observation

    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    MultiTurnRollout(Greedy, tasks=rows)([rows[0]["prompt"]], trainer)
    assert len(rows[0]["replies"]) == 1


def test_a_stock_trainer_needs_tasks(make_trainer):
    trainer = make_trainer([row()], generation_kwargs=forced_end())
    with pytest.raises(ValueError, match="tasks=dataset"):
        MultiTurnRollout(Talk)([row()["prompt"]], trainer)


def test_a_prompt_without_row_is_an_error(make_trainer):
    trainer = make_trainer([row()], generation_kwargs=forced_end())
    with pytest.raises(ValueError, match="No row of `tasks` has this prompt.*unheard"):
        MultiTurnRollout(Talk, tasks=[row()])([[user("unheard")]], trainer)


def test_one_prompt_for_different_rows_is_an_error():
    rows = [{"prompt": [user("Same.")], "answer": answer} for answer in (1, 2)]
    with pytest.raises(ValueError, match="Different rows of `tasks` have the same prompt"):
        MultiTurnRollout(Talk, tasks=rows)
    MultiTurnRollout(Talk, tasks=[rows[0], dict(rows[0])])


def test_tasks_without_prompts_are_refused():
    with pytest.raises(ValueError, match="A row of `tasks` has no `prompt`.*answer"):
        MultiTurnRollout(Talk, tasks=Dataset.from_list([{"answer": 1}]))


@pytest.mark.parametrize("option", ["max_turns", "max_context_length"])
def test_limits_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        MultiTurnRollout(Talk, **{option: 0})
