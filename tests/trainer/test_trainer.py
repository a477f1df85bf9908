"""The trainer around the update: message-level environments, evaluation, logs that mean what docs/metrics.md says."""

import math
import re
import threading
from pathlib import Path

import pytest
import torch
from count_down import CountDown
from datasets import Dataset
from tiny import ON_CPU, load_tiny_model, tiny_tokenizer

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer, StepResult, environment_reward
from seeupo_trl.envs import StopReason
from seeupo_trl.evaluation.info_metrics import InfoMetrics, numbers_in


METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
# what stock GRPO and the Trainer log; the page refers to their documentation
GRPO_METRICS = (
    r"(eval_)?(reward|reward_std|frac_reward_zero_std|num_tokens|step_time|rewards/.*|completions/.*|tools/.*)"
)
TRAINER_METRICS = r"loss|grad_norm|learning_rate|epoch|step|train_.*|total_flos|eval_(loss|runtime|.*_per_second)"


class Fragile(CountDown):
    """Breaks in its second step for tasks of three turns."""

    def step(self, message) -> StepResult:
        if self.left == 2:
            raise RuntimeError("the database is gone")
        return super().step(message)


@pytest.fixture
def make_trainer(tiny_dir, tmp_path):
    def make(turns=(1, 2, 3, 2), **kwargs):
        options = {
            **ON_CPU,
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
        }
        model = load_tiny_model(tiny_dir)
        # any word may end a response: an untrained model hardly ever writes the one token that should
        model.generation_config.eos_token_id = list(range(40, 96))
        rows = {"prompt": [[{"role": "user", "content": "w0"}]] * len(turns), "turns": list(turns)}
        options |= kwargs.pop("options", {})
        arguments = {"train_dataset": Dataset.from_dict(rows), "environment_factory": CountDown, **kwargs}
        return SeeUPOTrainer(model=model, args=SeeUPOConfig(**options), processing_class=tiny_tokenizer(), **arguments)

    return make


class Rows(torch.utils.data.Dataset):
    """Rows of which nothing is known before they are read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]


def parameters(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("factory", [CountDown, lambda: CountDown()], ids=["class", "callable"])
def test_environment_of_messages_trains_with_its_own_reward(make_trainer, factory):
    trainer = make_trainer(environment_factory=factory)
    before = parameters(trainer)
    trainer.train()
    assert not torch.equal(parameters(trainer), before)
    logs = trainer.state.log_history[0]
    assert logs["rewards/environment_reward/mean"] == pytest.approx(logs["reward"])
    assert sum(value for name, value in logs.items() if name.startswith("stop_reason/")) == pytest.approx(1)


def test_a_function_that_makes_environments_of_messages_is_called_once_for_each(make_trainer):
    numbers, threads, closed = iter(range(4)), {}, []

    class Server(CountDown):
        def __init__(self):
            self.number = next(numbers)
            threads[self.number] = {threading.get_ident()}

        def reset(self, **row):
            threads[self.number].add(threading.get_ident())
            return super().reset(**row)

        def close(self):
            threads[self.number].add(threading.get_ident())
            closed.append(self.number)

    trainer = make_trainer(environment_factory=lambda: Server(), options={"max_concurrent_envs": 4})
    assert list(threads) == [0]
    trainer.train()
    trainer.close()
    assert sorted(closed) == [0, 1, 2, 3]
    assert [len(own) for own in threads.values()] == [1] * 4 and len(set.union(*threads.values())) == 4


@pytest.mark.parametrize("column", ["stop_reason", "environment_reward"])
def test_a_column_that_reports_of_episodes_would_replace_is_refused(make_trainer, column):
    with pytest.raises(ValueError, match=f"has a column `{column}`.*Rename the column"):
        make_trainer(train_dataset=Dataset.from_dict({"turns": [1, 2], column: ["a", "b"]}))


@pytest.mark.parametrize("make_rows", [Dataset.from_list, list, Rows], ids=["dataset", "list", "torch"])
def test_such_a_column_is_refused_in_a_dataset_that_comes_later(make_trainer, make_rows):
    rows = make_rows([{"turns": 2, "stop_reason": "mine"}] * 4)
    trainer = make_trainer()
    with pytest.raises(ValueError, match="has a column `stop_reason`"):
        trainer.evaluate(rows)
    with pytest.raises(ValueError, match="has a column `stop_reason`"):
        trainer.predict(rows)
    trainer.train_dataset = rows
    with pytest.raises(ValueError, match="has a column `stop_reason`"):
        trainer.train()


@pytest.mark.parametrize("make_rows", [list, Rows], ids=["list", "torch"])
def test_an_evaluation_takes_rows_that_are_no_dataset(make_trainer, make_rows):
    trainer = make_trainer(eval_dataset=make_rows([{"turns": 2}] * 4))
    for _ in range(2):
        assert trainer.evaluate()["eval_episodes/tasks"] == 4


def test_a_list_that_has_such_a_column_is_refused_when_the_trainer_is_made(make_trainer):
    with pytest.raises(ValueError, match="has a column `stop_reason`"):
        make_trainer(eval_dataset=[{"turns": 2}, {"turns": 2, "stop_reason": "mine"}])


def test_environment_reward_adds_to_reward_functions(make_trainer):
    def flat(completions, **kwargs):
        assert all(message["role"] in ("assistant", "user") for messages in completions for message in messages)
        return [10.0] * len(completions)

    trainer = make_trainer(reward_funcs=flat, options={"reward_weights": [0.5]})
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["reward"] == pytest.approx(5 + logs["rewards/environment_reward/mean"], rel=1e-5)


def test_a_rollout_function_whose_reward_is_added_unasked_is_warned_about(make_trainer, caplog):
    def flat(completions, **kwargs):
        return [10.0] * len(completions)

    rollout = {"environment_factory": None, "rollout_func": MultiTurnRollout(CountDown)}
    for quiet in ({**rollout, "reward_funcs": [flat, environment_reward]}, rollout, {"reward_funcs": flat}):
        make_trainer(**quiet)
    assert "environment_reward" not in caplog.text
    trainer = make_trainer(**rollout, reward_funcs=flat)
    assert "GRPOTrainer would leave it out" in caplog.text
    assert trainer.reward_func_names == ["flat", "environment_reward"]


def test_reward_functions_get_messages_also_where_prompts_are_texts(make_trainer):
    seen = []

    def watching(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    trainer = make_trainer(
        reward_funcs=watching, train_dataset=Dataset.from_dict({"prompt": ["w1"] * 2, "turns": [1, 2]})
    )
    trainer.train()
    assert {prompt for prompt, _ in seen} == {"w1"}
    assert {completion[0]["role"] for _, completion in seen} == {"assistant"}


def test_max_turns_ends_an_episode(make_trainer):
    trainer = make_trainer(turns=(9, 9, 9, 9), options={"max_turns": 2, "max_completion_length": 16})
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["turns/max"] <= 2
    assert logs[f"stop_reason/{StopReason.completed}"] == 0


def test_broken_environment_neither_stops_nor_teaches(make_trainer):
    trainer = make_trainer(turns=(3, 1, 3, 1), environment_factory=Fragile, options={"beta": 0.1, "max_steps": 4})
    trainer.train()
    assert parameters(trainer).isfinite().all()
    errors = [log.get("stop_reason/env_error", 0) for log in trainer.state.log_history[:4]]
    assert max(errors) > 0


def test_failed_episode_has_no_reward_whatever_the_reward_functions_say(make_trainer):
    def generous(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = make_trainer(turns=(3, 1, 3, 1), environment_factory=Fragile, reward_funcs=generous)
    seen = []
    update = trainer.training_step

    def training_step(*args, **kwargs):
        loss = update(*args, **kwargs)
        failed = [t.stop_reason == StopReason.env_error for t in trainer._batch.trajectories]
        seen.extend(zip(failed, trainer._batch.rewards_per_func.isnan().all(dim=1).tolist(), strict=True))
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert any(failed for failed, _ in seen)
    assert all(failed == unrewarded for failed, unrewarded in seen)


def test_environment_may_bring_the_tasks(make_trainer):
    trainer = make_trainer(train_dataset=None)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="`max_steps` must be set"):
        make_trainer(train_dataset=None, options={"max_steps": -1})


def test_a_dataset_needs_no_prompt_where_the_environment_opens_the_conversation(make_trainer):
    rows = Dataset.from_dict({"turns": [1, 2, 3, 2]})
    options = {"per_device_eval_batch_size": 4, "num_generations_eval": 2, "log_completions": True}
    trainer = make_trainer(train_dataset=rows, eval_dataset=rows, options=options)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.evaluate()["eval_episodes/tasks"] == 4


@pytest.mark.parametrize(
    ("functions", "weights", "expected"),
    [(0, [2.0], [2.0]), (1, [2.0], [2.0, 1.0]), (1, [2.0, 0.5], [2.0, 0.5]), (1, None, [1.0, 1.0])],
)
def test_weights_of_rewards_may_include_the_environments_own(make_trainer, functions, weights, expected):
    def length(completions, **kwargs):
        return [0.0] * len(completions)

    trainer = make_trainer(reward_funcs=[length] * functions or None, options={"reward_weights": weights})
    assert trainer.reward_weights.tolist() == expected


def test_a_wrong_number_of_weights_is_refused_with_the_right_numbers(make_trainer):
    with pytest.raises(
        ValueError, match="`reward_weights` has 2 weights for 0 reward functions and the environment's"
    ):
        make_trainer(options={"reward_weights": [2.0, 1.0]})


def test_the_trainer_closes_its_environments(make_trainer):
    closed = []

    class Closing(CountDown):
        def close(self):
            closed.append(self)

    trainer = make_trainer(environment_factory=Closing)
    trainer.train()
    assert not closed
    trainer.close()
    assert len(closed) == 8 == len(set(map(id, closed)))
    trainer.close()
    assert len(closed) == 8


def test_numbers_in_info_are_metrics(make_trainer):
    class Reporting(CountDown):
        def step(self, message):
            result = super().step(message)
            left = torch.tensor(float(self.left))
            result.info |= {"left": left, "success": True, "words": "three", "nan": math.nan}
            return result

    rows = {"prompt": [[{"role": "user", "content": "w0"}]] * 2, "turns": [1, 3]}
    options = {"per_device_eval_batch_size": 2, "num_generations_eval": 2, "logging_steps": 1}
    trainer = make_trainer(environment_factory=Reporting, eval_dataset=Dataset.from_dict(rows), options=options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "turn_updates" in log]
    assert all(log["info/success"] == 1 and log["info/left"] >= 0 for log in logs)
    assert not {"info/words", "info/nan"} & set(logs[0])
    assert trainer.evaluate()["eval_info/success"] == 1


def test_the_name_of_a_number_can_be_encoded():
    assert numbers_in({"a\ud83db": 1, 10**5000: 2}) == {"a?b": 1.0, "int without text": 2.0}


def test_no_more_than_32_numbers_are_logged(caplog):
    metrics = InfoMetrics()
    assert metrics.of([{f"a{i:02}": 1.0 for i in range(30)}, {"a00": 3.0}])["info/a00"] == 2.0
    values = metrics.of([{"b1": 1.0, "b2": 1.0, "b3": 1.0}])
    assert values == {"info/b1": 1.0, "info/b2": 1.0}
    assert "not logged as metrics: b3" in caplog.text and len(metrics.of([{"c": 1.0, "a00": 0.0}])) == 1


def test_environment_of_messages_brings_its_own_tools(make_trainer):
    def tool():
        """A tool."""

    with pytest.raises(ValueError, match="brings its own tools"):
        make_trainer(tools=[tool])


def test_rollout_object_trains_like_the_factory(make_trainer):
    trainers = [make_trainer(), make_trainer(environment_factory=None, rollout_func=MultiTurnRollout(CountDown))]
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
    assert torch.equal(parameters(trainers[0]), parameters(trainers[1]))


def test_evaluation_plays_episodes_and_changes_nothing(make_trainer):
    rows = {"prompt": [[{"role": "user", "content": "w0"}]] * 2, "turns": [1, 3]}
    options = {"beta": 0.1, "per_device_eval_batch_size": 2, "num_generations_eval": 2}
    trainer = make_trainer(eval_dataset=Dataset.from_dict(rows), options=options)
    before = parameters(trainer)
    metrics = trainer.evaluate()
    assert torch.equal(parameters(trainer), before)
    assert metrics["eval_loss"] == pytest.approx(0, abs=1e-6)
    logs = trainer.state.log_history[-1]
    assert logs["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert logs["eval_turns/max"] >= 1
    assert logs["eval_entropy"] > 0


def test_every_metric_is_explained_in_the_documentation(make_trainer):
    rows = {"prompt": [[{"role": "user", "content": "w0"}]] * 4, "turns": [1, 3, 2, 2]}
    options = {
        "beta": 0.1,
        "entropy_coef": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
    }
    trainer = make_trainer(eval_dataset=Dataset.from_dict(rows), options=options)
    trainer.train()
    cells = re.findall(r"^\| (`.*?) \|", METRICS_PAGE.read_text(), re.MULTILINE)
    documented = {name for cell in cells for name in re.findall(r"`(.*?)`", cell)}
    patterns = [re.escape(name).replace("<t>", r"\d+(-\d+)?").replace("<reason>", r"\w+") for name in documented]
    patterns = [pattern.replace(r"\*", ".*") for pattern in patterns]
    patterns += [f"eval_{pattern}" for pattern in patterns] + [GRPO_METRICS, TRAINER_METRICS]
    logged = {name for log in trainer.state.log_history for name in log}
    unexplained = {name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert not unexplained
