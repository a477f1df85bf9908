"""
Sampling with vLLM by several processes, for real: its HTTP server and its engines run here, on a CPU.

TRL's client speaks to the server that TRL would start; of the weight sync, everything but the transport (NCCL) is
theirs, see vllm_on_cpu.py.
"""

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request

import pytest
import torch
from launching import run_on_two_processes
from transformers import Qwen3ForCausalLM, TrainerCallback

from seeupo_trl import SeeUPOTrainer


pytest.importorskip("vllm", reason="no vLLM here; .ci/run tests it in a virtual environment of its own")
if torch.cuda.is_available():
    pytest.skip("these tests drive vLLM's CPU build", allow_module_level=True)

from vllm_on_cpu import WEIGHTS_DIR, save_talker, send_weights_through_files, server_command
from vllm_runs import FRAME, TOLERANCE, Chat, Lecture, Watch, chats, config, lectures


pytestmark = pytest.mark.slow

SERVER_LENGTH = 80


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("talker") / "model")


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


@pytest.mark.parametrize("schedule", ["lock step", "free"])
def test_a_server_gets_the_weights_once_an_iteration(server, talker, tmp_path, monkeypatch, schedule):
    requests = send_weights_through_files(monkeypatch)
    options = {"vllm_mode": "server", "vllm_server_base_url": server, "vllm_max_model_length": None}
    options["lock_step_rollouts"] = schedule == "lock step"
    args = config(tmp_path, beta=0.01, **options)  # steps in every iteration, whatever the server draws
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=chats(1, 3, 2, 3), environment_factory=Chat)
    watch = Watch(trainer).train()
    assert re.fullmatch("(sg+u+){3}", watch.events), watch.events
    assert max(map(len, re.findall("g+", watch.events))) == (3 if schedule == "lock step" else 1)
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


def test_the_next_batch_is_sampled_while_this_one_is_updated(server, talker, tmp_path, monkeypatch):
    """It comes from the policy before; the weights are pushed between batches."""
    requests = send_weights_through_files(monkeypatch)
    options = {"vllm_mode": "server", "vllm_server_base_url": server, "vllm_max_model_length": None}
    args = config(tmp_path, beta=0.01, rollouts_ahead=1, **options)
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=chats(1, 3, 2, 3, 2, 1), environment_factory=Chat)
    policies = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            policies.append(Qwen3ForCausalLM.from_pretrained(talker))
            policies[-1].load_state_dict(model.state_dict())

    trainer.add_callback(Keep())
    watch = Watch(trainer).train()
    assert re.fullmatch("sggu+sgu+su+", watch.events), watch.events
    push = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]
    assert [r for r in requests[1:] if r != "completions"] == push * 3
    assert [entry["rollout/staleness"] for entry in trainer.state.log_history[:3]] == [0, 1, 1]
    for rollout, sampled_by in zip(watch.rollouts, (0, 0, 1), strict=True):
        for turn, _ in rollout:
            expected = watch.policy(turn, policies[sampled_by])
            torch.testing.assert_close(torch.tensor(turn.sampling_logps), expected, rtol=0, atol=TOLERANCE)
    moved = [(torch.tensor(turn.sampling_logps) - policy).abs().max() for turn, policy in watch.rollouts[2]]
    assert max(moved) > 100 * TOLERANCE


def test_no_context_is_sent_that_the_server_would_refuse(server, talker, tmp_path, monkeypatch):
    """It refuses a context from which a response of `max_completion_length` would exceed its length."""
    send_weights_through_files(monkeypatch)
    response = 30
    longest = SERVER_LENGTH - response
    args = config(
        tmp_path,
        max_steps=1,
        vllm_mode="server",
        vllm_server_base_url=server,
        max_turns=None,
        vllm_max_model_length=None,
        max_completion_length=response,
        per_device_train_batch_size=16,
    )
    data = lectures(1, longest - FRAME, longest - FRAME + 1, SERVER_LENGTH)
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=data, environment_factory=Lecture)
    trainer.train()
    trajectories = trainer._batch.trajectories
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


def in_two_processes(directory, talker, schedule, base_url="", tensor_parallel_size=1):
    arguments = (talker, base_url, str(tensor_parallel_size), schedule)
    return run_on_two_processes("vllm_two_processes.py", directory, *arguments)


SCHEDULES = ["lock step", "free"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_processes_with_colocated_engines_stay_in_step(talker, tmp_path, schedule, tensor_parallel_size):
    first, second = in_two_processes(tmp_path, talker, schedule, tensor_parallel_size=tensor_parallel_size)
    check_two_processes(first, second, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_processes_share_a_server(server, talker, tmp_path, schedule):
    first, second = in_two_processes(tmp_path, talker, schedule, server)
    check_two_processes(first, second, schedule)


def check_two_processes(first, second, schedule):
    for found in (first, second):
        assert re.fullmatch("(sg+u+){2}", found["events"]), found["events"]
        assert found["difference"] < TOLERANCE
        assert found["names"]
    assert first["events"] == second["events"]
    assert first["turn_count"] < second["turn_count"]
    assert first["parameters"] == second["parameters"]
    assert list(map(len, first["calls"])) == list(map(len, second["calls"]))
    if schedule == "free":
        assert len(first["calls"]) == 2
        return
    assert len(first["calls"]) > 2
    # the first process is done after one turn; it goes on with throw-away rows, copies of the other's contexts
    assert all(prompt in second["calls"][1] for prompt in first["calls"][1])
