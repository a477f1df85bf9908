"""
One of two processes of `test_vllm_server.py`: trains under watch, and notes what happened.

`accelerate launch --config_file CONFIG vllm_two_processes.py OUTPUT MODEL SERVER_URL TENSOR_PARALLEL_SIZE SCHEDULE`,
where an empty URL stands for engines in the processes themselves.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM
from trl.generation import vllm_generation
from vllm_on_cpu import send_weights_through_files
from vllm_runs import Chat, Watch, chats, config, engine

from seeupo_trl import SeeUPOTrainer


def main() -> None:
    output, model, base_url, tensor_parallel_size, schedule = sys.argv[1:]
    if base_url:
        send_weights_through_files(pytest.MonkeyPatch())
        options = {"vllm_mode": "server", "vllm_server_base_url": base_url}
    else:
        vllm_generation.LLM = engine()
        options = {"vllm_tensor_parallel_size": int(tensor_parallel_size)}
    options["lock_step_rollouts"] = schedule == "lock step"
    # The first process's episodes have one turn, the second's have three. With a KL term every iteration takes steps,
    # also one whose rewards happen to be all alike: a server draws tokens as it likes.
    trainer = SeeUPOTrainer(
        model,
        args=config(output, per_device_train_batch_size=4, shuffle_dataset=False, max_steps=2, beta=0.01, **options),
        train_dataset=chats(1, 3, 1, 3),
        environment_factory=Chat,
    )
    assert trainer.accelerator.num_processes == 2
    calls, sampler = [], trainer.vllm_generation
    generate = sampler.generate

    def watched_generate(prompts, **kwargs):
        calls.append(prompts)
        return generate(prompts=prompts, **kwargs)

    sampler.generate = watched_generate
    watch = Watch(trainer).train()
    differences = [
        (torch.tensor(turn.sampling_logps) - policy).abs().max().item()
        for rollout in watch.rollouts
        for turn, policy in rollout
    ]
    names = sorted(name for name, _ in Qwen3ForCausalLM.from_pretrained(model).named_parameters())
    found = {
        "events": watch.events,
        "calls": calls,
        "turn_count": len(differences),
        "difference": max(differences),
        "parameters": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
        "names": sorted(watch.pushed[-1]) == names,
    }
    Path(output, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
