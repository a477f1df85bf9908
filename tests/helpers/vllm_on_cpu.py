"""
vLLM on a CPU, for `test_vllm.py`: what its CPU build lacks, and a tiny model that talks.

The engine, its sampler, its scheduler and its HTTP server are vLLM's own. Two things are replaced:

- Linear layers of the CPU build repack their weights and free the originals, so that nothing can be loaded into them
  again. Here they keep them, as on a GPU.
- The server receives weights over NCCL. Here the trainer writes them to a file, which the server reads; everything
  around the transport (announcing, starting and finishing an update) is TRL's and vLLM's.

TRL leaves the dtype to vLLM, which takes bfloat16 for float32 models on a CPU. Tests that compare log-probabilities
ask for float32.
"""

import json
import os
import time
from pathlib import Path

from tool_calls import CALL, calling_tokenizer


# vLLM reads them when it is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch
import torch._dynamo
import vllm.model_executor.layers.utils as linear_layers
from safetensors.torch import load_file, save_file
from tiny import DIGITS, VOCABULARY, WORDS, tiny_config
from transformers import Qwen3ForCausalLM
from trl.generation import vllm_client
from trl.generation.vllm_client import VLLMClient
from trl.scripts.vllm_serve import ScriptArguments, build_command
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


torch._dynamo.config.disable = True  # compiling takes most of a minute

WEIGHTS_DIR = "SEEUPO_TEST_WEIGHTS_DIR"


def _keep_the_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


linear_layers.dispatch_cpu_unquantized_gemm = _keep_the_weights


# --- Weights for the server, through files ---------------------------------------------------------------------------


class FileWeightTransferEngine(NCCLWeightTransferEngine):
    """The NCCL engine with files as its transport: the update's lifecycle is inherited."""

    def init_transfer_engine(self, init_info):
        self.updates = 0

    def receive_weights(self, update_info):
        path = Path(os.environ[WEIGHTS_DIR], f"{self.updates}.safetensors")
        deadline = time.monotonic() + 120
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {path}")
            time.sleep(0.01)
        weights = load_file(path)
        announced = list(zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True))
        found = [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in weights.items()]
        assert sorted(announced) == sorted(found)
        self.model.load_weights(list(weights.items()))
        path.unlink()
        self.updates += 1

    def shutdown(self):
        pass


class WorkerExtension:
    """Imported by the server's workers (`--worker-extension-cls`), which is what registers the engine there."""


WeightTransferEngineFactory.register_engine("file", FileWeightTransferEngine)


def send_weights_through_files(patch: pytest.MonkeyPatch) -> list[str]:
    """Replace the trainer's end of the NCCL group; returns the requests that TRL's client will have sent."""
    requests, post = [], VLLMClient._post

    def init_communicator(client, device):
        world_size = client.get_world_size() + 1
        info = {"master_address": "", "master_port": 0, "rank_offset": 1, "world_size": world_size, "packed": True}
        client.updates = 0
        client._post(f"{client.base_url}/init_weight_transfer_engine", json={"init_info": info})

    def send(iterator, **transport):
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in iterator}
        directory, number = Path(os.environ[WEIGHTS_DIR]), requests.count("update_weights") - 1
        save_file(weights, directory / "partial")
        (directory / "partial").rename(directory / f"{number}.safetensors")

    def watched_post(client, url, **kwargs):
        requests.append(url.rsplit("/", 1)[-1])
        return post(client, url, **kwargs)

    patch.setattr(VLLMClient, "init_communicator", init_communicator)
    patch.setattr(VLLMClient, "_post", watched_post)
    patch.setattr(vllm_client, "packed_nccl_broadcast_producer", send)
    return requests


def server_command(model: str, port: int, max_model_len: int) -> list[str]:
    """
    The command of `trl vllm-serve` with the weights' transport replaced.

    vLLM's command line refuses to start without the distribution `vllm`; its server is a module of its own.
    """
    arguments = ScriptArguments(
        model, host="127.0.0.1", port=port, dtype="float32", enforce_eager=True, max_model_len=max_model_len
    )
    command = build_command(arguments)
    start = command.index("serve")
    command[start - 1 : start + 2] = ["vllm.entrypoints.openai.api_server", "--model", model]
    command[command.index("--weight-transfer-config") + 1] = json.dumps({"backend": "file"})
    return [*command, "--worker-extension-cls", "vllm_on_cpu.WorkerExtension"]


# --- A model that talks ----------------------------------------------------------------------------------------------

TALK = ["<|im_end|>", CALL, *WORDS[:20], *DIGITS]


def save_talker(directory: str | Path, eos_bias: float = 3.0, call_bias: float = -8.0, **config) -> str:
    """
    A random model whose responses are a few words, digits and tool calls (one token each) and then end.

    Its logits have a bias, written into the weights because Qwen3 has no place for one: the first hidden dimension is
    the same for every token, no layer writes to it, and the head reads it.
    """
    tokenizer = calling_tokenizer([CALL])
    # vLLM's attention for CPUs has heads of 32 and more
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(tiny_config(vocab_size=len(tokenizer), **{**shape, **config}))
    bias = torch.full((len(tokenizer),), -8.0)
    for token in TALK:
        bias[tokenizer.convert_tokens_to_ids(token)] = 0.0
    bias[tokenizer.eos_token_id] = eos_bias
    bias[tokenizer.convert_tokens_to_ids(CALL)] = call_bias
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        hidden = model.model(torch.arange(len(VOCABULARY))[None]).last_hidden_state[0, :, 0].mean()
        model.lm_head.weight[:, 0] = bias / hidden
        model.lm_head.weight[:, 1:] *= 0.5
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
