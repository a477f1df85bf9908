"""
AppWorld through its real server, on synthetic tasks that its own classes build (`appworld_tasks.py`).

Runs where `$SEEUPO_APPWORLD_PYTHON` is the Python of a virtual environment with AppWorld; its data is not needed.
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from tiny import ON_CPU, VOCABULARY, load_tiny_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser
from waiting import is_running, wait_until

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.envs.appworld import AppWorldEnvironment, load_appworld, opening_messages
from seeupo_trl.envs.appworld.environment import CODE_BLOCK
from seeupo_trl.envs.appworld.install import INSTALL, find_python, find_root
from seeupo_trl.envs.appworld.launcher import AppWorldServerError, AppWorldTimeoutError
from seeupo_trl.envs.appworld.server import AppWorldServers
from seeupo_trl.rollout.tasks import Tasks


HELPERS = Path(__file__).parents[1] / "helpers"
EXAMPLES = HELPERS.parents[1] / "examples"
PYTHON = os.environ.get("SEEUPO_APPWORLD_PYTHON")

needs_appworld = pytest.mark.skipif(
    not PYTHON, reason="SEEUPO_APPWORLD_PYTHON does not name the Python of an environment with AppWorld" + INSTALL
)

LOGIN = "token = apis.simple_note.login(username='ada@example.com', password='correct-horse')['access_token']\n"
WRITE_NOTE = LOGIN + "apis.simple_note.create_note(access_token=token, title='Groceries', content='milk')\n"
COMPLETE = "apis.supervisor.complete_task()\n"
END_AT_LAST_TOKEN = {"forced_eos_token_id": VOCABULARY.index("<|im_end|>")}
HANG = "sum(range(10**13))"  # in C, where nothing interrupts it


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """AppWorld's root directory with the synthetic tasks."""
    if not PYTHON:
        pytest.skip("needs AppWorld")
    root = tmp_path_factory.mktemp("appworld")
    subprocess.run([PYTHON, "-I", HELPERS / "appworld_tasks.py", root], check=True, timeout=300)
    return root


@pytest.fixture(scope="module")
def servers(root):
    os.environ["SECRET_FOR_TESTS"] = "hidden"
    servers = AppWorldServers(2, root=root, execution_timeout=1, request_timeout=10.0)
    yield servers
    servers.close()
    del os.environ["SECRET_FOR_TESTS"]


@pytest.fixture
def environment(servers):
    environment = AppWorldEnvironment(servers)
    yield environment
    environment.close()


def act(environment, code: str):
    return environment.step({"role": "assistant", "content": f"I try this.\n```python\n{code}\n```\nDone."})


def output(result) -> str:
    return result.messages[0]["content"]


# ---------------------------------------------------------------------------------------------------- the environment


@needs_appworld
def test_a_task_is_opened_with_its_instruction_and_the_supervisor(environment):
    system, user = environment.reset(task_id="notes_1", prompt="not used").messages
    assert system["role"] == "system" and "apis.supervisor.complete_task()" in system["content"]
    assert user["role"] == "user"
    assert "Create a note titled 'Groceries' with the content 'milk'." in user["content"]
    assert "Ada Lee (email ada@example.com, phone 5550100000)" in user["content"]
    assert "2023-05-18 12:00:00" in user["content"]


@needs_appworld
def test_a_right_solution_is_paid_in_full_and_in_total(environment):
    environment.reset(task_id="notes_1")
    results = [
        act(environment, "print(apis.api_docs.show_api_doc(app_name='simple_note', api_name='create_note'))"),
        act(environment, WRITE_NOTE),
        act(environment, COMPLETE),
    ]
    assert "Create a new note." in output(results[0])
    assert [result.terminated for result in results] == [False, False, True]
    assert sum(result.reward for result in results) == 1.5  # without a rounding error
    assert results[-1].info == {
        "success": True,
        "score": 1.0,
        "passes": 3,
        "failures": 0,
        "completed": True,
        "task_id": "notes_1",
        "difficulty": 1,
        "failure": None,
    }


@needs_appworld
@pytest.mark.parametrize("answer, reward", [("4711", 1.5), (4711, 1.5), ("1234", 0.5 * 2 / 3)])
def test_an_answer_is_compared_with_the_right_one(environment, answer, reward):
    environment.reset(task_id="notes_2")
    result = act(environment, f"apis.supervisor.complete_task(answer={answer!r})")
    assert result.terminated
    assert result.reward == pytest.approx(reward, abs=1e-6)
    assert result.info["success"] == (reward == 1.5)


@needs_appworld
def test_a_side_effect_costs_the_tests_it_breaks(environment):
    environment.reset(task_id="notes_2")
    before = act(environment, "print('nothing yet')")
    assert (before.info["passes"], before.info["failures"], before.info["completed"]) == (2, 1, False)
    after = act(environment, WRITE_NOTE)
    assert (after.info["passes"], after.info["failures"]) == (0, 3)
    assert before.reward > 0 and before.reward + after.reward == 0  # what was paid is taken back


@needs_appworld
def test_an_unfinished_episode_has_been_paid_for_its_state(environment):
    """So it does not matter whether the environment hears of the episode's end."""
    environment.reset(task_id="notes_1")
    rewards = [act(environment, code).reward for code in ("x = 1", WRITE_NOTE, "print(x)")]
    assert sum(rewards) == pytest.approx(0.5 * 2 / 3, abs=1e-6)


@needs_appworld
def test_the_first_block_of_code_is_the_action_and_variables_stay(environment):
    environment.reset(task_id="notes_1")
    first = environment.step({"content": "```python\nx = 6\nprint('one')\n```\nthen\n```python\nprint('two')\n```"})
    assert "one" in output(first) and "two" not in output(first)
    second = environment.step({"content": "```\nprint('no')\n```\n2.\n   ```py\n   y = 7\n   print(y * x)\n   ```"})
    assert "42" in output(second) and "no" not in output(second)


@needs_appworld
@pytest.mark.parametrize("content", ["", "I am done.", "```\nprint(1)\n```", "```python\nprint(1)"])
def test_a_message_without_code_is_answered_and_the_episode_goes_on(environment, content):
    environment.reset(task_id="notes_1")
    result = environment.step({"role": "assistant", "content": content})
    assert "no block of code" in output(result)
    assert not (result.terminated or result.truncated)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("```python\nprint(1)```", "print(1)"),
        ("I try: ```python\nx = 1\nprint(x)``` \nDone. ```python\nprint(2)\n```", "x = 1\nprint(x)"),
        ("```python\nprint('a ``` b')\n  ```", "print('a ``` b')\n"),
        ("```py\nx = 1\n```\nthen\n```python\nprint(2)```", "x = 1\n"),
        ("```\nprint(1)```", None),
        ("```python\nprint(1)", None),
    ],
)
def test_a_block_may_begin_and_end_within_a_line(content, code):
    block = CODE_BLOCK.search(content)
    assert (block and block[1]) == code


@needs_appworld
def test_the_policy_reads_its_errors_and_long_output_is_cut(environment):
    environment.reset(task_id="notes_1")
    assert "ZeroDivisionError" in output(act(environment, "1 / 0"))
    assert "Syntax error" in output(act(environment, "print('"))
    assert "No API named" in output(act(environment, "apis.simple_note.write_a_note()"))
    assert "MemoryError" in output(act(environment, "x = 'x' * 10**11"))
    assert "is not allowed" in output(act(environment, "open('file', 'w')"))
    environment.max_observation_chars = 1000
    assert "x" * 1000 + "\n[4000 characters cut off]" in output(act(environment, "print(5000 * 'x')"))


@needs_appworld
def test_code_that_takes_too_long_is_interrupted_and_the_episode_goes_on(environment):
    environment.reset(task_id="notes_1")
    assert "timed out after 1 seconds" in output(act(environment, "while True:\n    pass"))
    assert "still here" in output(act(environment, "print('still here')"))


@needs_appworld
@pytest.mark.parametrize(
    "code, failure",
    [
        ("import os\nos.abort()", "it ended its process (signal SIGABRT)"),
        ("raise KeyboardInterrupt", "AppWorld could not return its output"),
        ("print('\\ud83d')", "AppWorld could not return its output"),  # half a character
        pytest.param(HANG, "it did not end within 10 seconds", marks=pytest.mark.slow),
    ],
)
def test_code_that_breaks_its_server_ends_the_episode_with_nothing(environment, code, failure):
    environment.reset(task_id="notes_2")
    paid = act(environment, "print(1)").reward
    result = act(environment, code)
    assert paid > 0 and paid + result.reward == 0
    assert result.truncated and not result.terminated
    assert (result.info["success"], result.info["score"]) == (False, 0.0)
    assert failure in result.info["failure"] and failure in output(result)
    environment.reset(task_id="notes_2")
    assert act(environment, "apis.supervisor.complete_task(answer='4711')").info["success"]


@needs_appworld
def test_nothing_of_an_episode_is_left_in_the_next(environment):
    environment.reset(task_id="notes_2")
    act(environment, "import builtins, json, random\nbuiltins.print = None\nx = 1")
    environment.reset(task_id="notes_2")
    assert "NameError" in output(act(environment, "print(x)"))
    assert act(environment, "apis.supervisor.complete_task(answer='4711')").info["success"]


@needs_appworld
def test_code_does_not_see_our_environment_variables(environment):
    environment.reset(task_id="notes_1")
    text = output(act(environment, "import os\nprint(dict(os.environ))"))
    assert "APPWORLD_ROOT" in text and "SECRET_FOR_TESTS" not in text


@needs_appworld
def test_a_task_that_is_not_there_is_a_fault_of_the_environment(environment):
    with pytest.raises(AppWorldServerError, match="(?s)task none_1 with status 500.*doesn't exist"):
        environment.reset(task_id="none_1")


@needs_appworld
@pytest.mark.parametrize("task_id", ["../notes_1", "/etc/passwd", "notes_1/..", "notes 1", "notes_1\n", ""])
def test_an_id_that_would_be_another_path_is_refused_before_a_server_is_asked(environment, task_id):
    with pytest.raises(ValueError, match="letters, digits, '_' and '-'") as refused:
        environment.reset(task_id=task_id)
    assert repr(task_id) in str(refused.value)
    assert environment.reset(task_id="notes_1").messages


# ------------------------------------------------------------------------------------------------------- the servers


@needs_appworld
def test_more_episodes_than_servers_take_turns(servers):
    processes = []

    def play(number: int) -> bool:
        environment = AppWorldEnvironment(servers)
        environment.reset(task_id="notes_1")
        processes.append(environment._server.pid)
        act(environment, f"number = {number}")
        assert str(number) in output(act(environment, "print(number)"))
        act(environment, WRITE_NOTE)
        return act(environment, COMPLETE).info["success"]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(play, range(4))) == [True] * 4
    assert len(set(processes)) == 4
    assert not any(is_running(pid) for pid in processes)
    assert sorted(path.name for path in servers._launcher.directory.iterdir()) == ["log"]


@needs_appworld
def test_waiting_for_a_server_has_an_end(servers, monkeypatch):
    monkeypatch.setattr(servers, "lease_timeout", 0.2)
    busy = [AppWorldEnvironment(servers) for _ in range(2)]
    for environment in busy:
        environment.reset(task_id="notes_1")
    with pytest.raises(AppWorldTimeoutError, match="All 2 AppWorld servers were in use .*`max_concurrent_envs`"):
        AppWorldEnvironment(servers).reset(task_id="notes_1")
    busy[0].close()
    AppWorldEnvironment(servers).reset(task_id="notes_1")
    busy[1].close()


@needs_appworld
def test_a_server_that_is_killed_is_a_fault_of_the_environment_and_is_replaced(environment):
    environment.reset(task_id="notes_1")
    os.kill(environment._server.pid, signal.SIGKILL)
    with pytest.raises(AppWorldServerError, match="has died: signal SIGKILL"):
        act(environment, "print(1)")
    environment.reset(task_id="notes_1")
    os.kill(environment._server.pid, signal.SIGKILL)
    with pytest.raises(AppWorldServerError, match="has died, at /task_completed of task notes_1: signal SIGKILL"):
        environment.step({"content": "no code"})
    environment.reset(task_id="notes_1")
    assert "1" in output(act(environment, "print(1)"))


@needs_appworld
def test_the_launcher_is_replaced_and_takes_its_servers_along(servers, environment):
    environment.reset(task_id="notes_1")
    server = environment._server.pid
    os.kill(servers._launcher._process.pid, signal.SIGKILL)
    assert wait_until(lambda: not is_running(server))
    with pytest.raises(AppWorldServerError, match="process that starts AppWorld's servers has died"):
        act(environment, "print(1)")
    environment.reset(task_id="notes_1")
    assert "1" in output(act(environment, "print(1)"))


@needs_appworld
@pytest.mark.skipif(sys.platform != "linux", reason="code in C is stopped on Linux only")
def test_no_server_outlives_a_killed_process(root):
    script = (
        "import sys\n"
        "from seeupo_trl.envs.appworld.server import AppWorldServers\n"
        "servers = AppWorldServers(2, root=sys.argv[1])\n"
        "idle, busy = servers.lease(), servers.lease()\n"
        "busy.initialize('notes_1')\n"
        "launcher = servers._launcher\n"
        "print(launcher._process.pid, idle.pid, busy.pid, launcher.directory, flush=True)\n"
        f"busy.execute({HANG!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, root], stdout=subprocess.PIPE, text=True)
    *pids, directory = process.stdout.readline().split()
    assert all(is_running(int(pid)) for pid in pids)
    process.kill()
    process.wait()
    wait_until(lambda: not Path(directory).exists())
    assert not Path(directory).exists(), [path.name for path in Path(directory).iterdir()]
    assert wait_until(lambda: not any(is_running(int(pid)) for pid in pids)), [is_running(int(pid)) for pid in pids]


@needs_appworld
def test_a_closed_pool_leaves_nothing_and_gives_nothing(root):
    servers = AppWorldServers(2, root=root)
    servers.start()
    launcher = servers._launcher
    server = servers.lease()
    servers.close()
    assert not is_running(server.pid) and not is_running(launcher._process.pid)
    assert not launcher.directory.exists()
    servers.give_back(server)
    with pytest.raises(AppWorldServerError, match="closed"):
        servers.lease()


@needs_appworld
def test_files_that_are_kept_are_for_their_owner_alone(root, tmp_path):
    kept = tmp_path / "runs" / "kept"
    servers = AppWorldServers(1, root=root, keep_outputs=kept)
    environment = AppWorldEnvironment(servers)
    environment.reset(task_id="notes_1")
    act(environment, WRITE_NOTE)
    environment.close()
    servers.close()
    assert kept.stat().st_mode & 0o777 == 0o700
    assert any(path.is_file() for path in kept.rglob("*"))


# ------------------------------------------------------------------------------------------------------ the data set


@needs_appworld
def test_rows_open_like_the_environment_does(root, environment):
    dataset = load_appworld("train", root=root)
    assert dataset["task_id"] == ["notes_1", "notes_2"] and dataset["difficulty"] == [1, 2]
    assert load_appworld("dev", root=root)["task_id"] == ["notes_2"]
    for row in dataset:
        messages = [{"role": message["role"], "content": message["content"]} for message in row["prompt"]]
        assert messages == environment.reset(**row).messages
        assert {message["task_id"] for message in row["prompt"]} == {row["task_id"]}


@needs_appworld
def test_a_split_that_is_not_there_is_named(root):
    with pytest.raises(ValueError, match="split is 'test'; it must be one of 'train', 'dev', 'test_normal'"):
        load_appworld("test", root=root)
    with pytest.raises(FileNotFoundError, match="no split test_normal"):
        load_appworld("test_normal", root=root)


def test_a_list_of_tasks_that_names_another_path_is_refused(tmp_path):
    for part in ("datasets", "tasks", "api_docs"):
        (tmp_path / "data" / part).mkdir(parents=True)
    task_list = tmp_path / "data" / "datasets" / "train.txt"
    task_list.write_text("../../home:easy\n")
    with pytest.raises(ValueError, match=r"train\.txt names the task '\.\./\.\./home', which is no id"):
        load_appworld("train", root=tmp_path)


# ------------------------------------------------------------------------------------------- what is missing is named


def test_missing_settings_are_answered_with_the_commands(monkeypatch):
    for name in ("SEEUPO_APPWORLD_PYTHON", "APPWORLD_ROOT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ImportError, match="(?s)SEEUPO_APPWORLD_PYTHON is not set.*pip install appworld==0.1.3.post1"):
        find_python()
    with pytest.raises(FileNotFoundError, match="(?s)APPWORLD_ROOT is not set.*appworld download data --root"):
        find_root()
    with pytest.raises(FileNotFoundError, match="appworld download data"):
        load_appworld()


def test_missing_package_is_answered_with_the_commands(tmp_path):
    with pytest.raises(ImportError, match="(?s)nowhere is not a Python interpreter that runs.*-m venv"):
        find_python(tmp_path / "nowhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    with pytest.raises(ImportError, match="(?s)AppWorld is not installed for .*appworld install"):
        find_python(python)

    site_packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site_packages / "appworld").mkdir()
    (site_packages / "appworld" / "__init__.py").touch()
    metadata = site_packages / "appworld.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: appworld\nVersion: 0.2.0\n")
    with pytest.raises(ImportError, match=r"AppWorld 0\.2\.0 is installed for .*; need 0\.1\.3\.post1"):
        find_python(python)
    metadata.write_text("Metadata-Version: 2.1\nName: appworld\nVersion: 0.1.3.post1\n")
    with pytest.raises(ImportError, match="not unpacked. Run\n\n    .*venv/bin/appworld install"):
        find_python(python)


def test_missing_data_is_answered_with_the_command(tmp_path):
    (tmp_path / "data" / "datasets").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="(?s)no directory data/tasks.*appworld download data --root"):
        AppWorldServers(root=tmp_path)


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="num_servers is 0; give at least 1"):
        AppWorldServers(0)
    with pytest.raises(ValueError, match="request_timeout is 30, execution_timeout 60; it must be more"):
        AppWorldServers(request_timeout=30.0)
    with pytest.raises(ValueError, match="request_timeout is nan"):
        AppWorldServers(request_timeout=float("nan"))
    with pytest.raises(TypeError, match="servers is a int; give an AppWorldServers"):
        AppWorldEnvironment(8)


# ----------------------------------------------------------------------------------------------------------- training


class SpokenAppWorld(AppWorldEnvironment):
    """For a model that knows some sixty words and no code: each of them stands for a program."""

    PROGRAMS = (WRITE_NOTE, "apis.supervisor.complete_task(answer='4711')", "print(1)", "1 / 0", COMPLETE)

    def step(self, message):
        programs = [self.PROGRAMS[int(word[1:]) % 5] for word in message["content"].split() if word[1:].isdigit()]
        return act(super(), programs[0] if programs else "")


@needs_appworld
def test_a_policy_is_trained_on_the_real_server(root, tmp_path):
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    servers = AppWorldServers(8, root=root)
    trainer = SeeUPOTrainer(
        model=load_tiny_model(model),
        processing_class=tiny_tokenizer(),
        args=SeeUPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_steps=1,
            max_turns=3,
            max_completion_length=6,
            generation_kwargs=END_AT_LAST_TOKEN,
            learning_rate=1e-2,
            seed=1,
            **ON_CPU,
        ),
        train_dataset=load_appworld("train", root=root),
        rollout_func=MultiTurnRollout(partial(SpokenAppWorld, servers)),
        reward_funcs=[],
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    servers.close()
    logs = trainer.state.log_history[0]
    assert logs["stop_reason/env_error"] == 0
    assert logs["reward"] > 0 and logs["reward_std"] > 0
    assert any((old != new).any() for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.fixture
def train_appworld(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_appworld

    return train_appworld


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*_appworld.yaml")), ids=lambda path: path.stem)
def test_configuration_is_understood_and_that_of_the_paper(train_appworld, path, tmp_path):
    parser = TrlParser((train_appworld.AppWorldArguments, train_appworld.Config, ModelConfig))
    arguments = ["--config", str(path), "--output_dir", str(tmp_path)]
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    assert (script_args.split, script_args.success_reward, script_args.partial_reward) == ("train", 1.5, 0.5)
    processes = yaml.safe_load((EXAMPLES / "accelerate_configs" / "zero3.yaml").read_text())["num_processes"]
    config = training_args
    assert config.gradient_accumulation_steps * config.per_device_train_batch_size * processes == 32 * 8
    assert script_args.num_servers >= config.max_concurrent_envs
    assert config.env_timeout > script_args.execution_timeout + 30  # or the rollout gives up before the server does
    assert config.max_observation_tokens == 3000
    assert (config.num_generations, config.max_turns, config.num_train_epochs) == (8, 10, 75)
    assert (config.learning_rate, config.epsilon, config.beta, config.temperature) == (1e-6, 0.2, 0.002, 0.9)
    assert (config.max_completion_length, config.max_context_length) == (3000, 16000)
    assert "14B" in model_args.model_name_or_path


@needs_appworld
def test_training_script_runs_from_end_to_end(train_appworld, root, tmp_path, capsys):
    options = {
        "model_name_or_path": save_tiny_model(tmp_path / "model", max_position_embeddings=4096),
        "output_dir": str(tmp_path / "out"),
        "appworld_root": str(root),
        "keep_outputs": str(tmp_path / "kept"),
        "num_servers": 2,
        "held_out_tasks": 1,
        "num_generations": 2,
        "num_generations_eval": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        "max_completion_length": 4,
        "generation_kwargs": json.dumps(END_AT_LAST_TOKEN),
        "max_turns": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "bf16": "false",
        "save_strategy": "no",
        "report_to": "none",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    parser = TrlParser((train_appworld.AppWorldArguments, train_appworld.Config, ModelConfig))
    train_appworld.main(*parser.parse_args_and_config(arguments))
    printed = capsys.readouterr().out
    assert "2 training tasks; evaluated: {'dev': 1}" in printed
    assert "success on 1 dev tasks: 0.000 before, 0.000 after" in printed
    assert "no block of code" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "kept").glob("seeupo-*/tasks/notes_*/logs/environment_io.md"))) == 4


@pytest.mark.parametrize("missing", ["model", "data"])
def test_training_script_says_what_is_missing(train_appworld, missing, tmp_path, monkeypatch):
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    parser = TrlParser((train_appworld.AppWorldArguments, train_appworld.Config, ModelConfig))
    arguments = ["--output_dir", str(tmp_path), "--bf16", "false"]
    if missing == "data":
        arguments += ["--model_name_or_path", "anything"]
    with pytest.raises((ValueError, FileNotFoundError), match="--model_name_or_path|appworld download data"):
        train_appworld.main(*parser.parse_args_and_config(arguments))


def test_a_stock_trainer_can_tell_tasks_apart():
    person = {"first_name": "A", "last_name": "B", "email": "a@b.c", "phone_number": "1"}
    messages = opening_messages("Do it.", person, "2023-05-18T12:00:00")
    rows = [{"prompt": [{**message, "task_id": id} for message in messages], "task_id": id} for id in ("a_1", "a_2")]
    tasks = Tasks(Dataset.from_list(rows))
    assert tasks.of([row["prompt"] for row in rows]) == rows
