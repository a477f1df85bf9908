"""What is planned: the shape of a model, a run, and the strategies that distribute its training state."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..scoring.causal_lm import causal_lm_of
from .activations import build_model


GIB = 2**30

# bytes of optimizer state per trained parameter, in units of the parameter's size
OPTIMIZER_STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "sgd": 0.0,
}
# 8-bit moments are one byte each, whatever the parameter's size
EIGHT_BIT_OPTIMIZERS = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")

# DeepSpeed's default
PERSISTENCE_THRESHOLD = 100_000


@dataclass(frozen=True)
class ModelShape:
    """
    Sizes of a model, in parameters.

    Args:
        total (`int`):
            All parameters, tied ones once.
        trained (`int`):
            Parameters that are trained: all, or those of the adapters.
        head (`int`):
            Of the language-model head.
        embedding (`int`):
            Of the input embeddings; the same parameters as the head's where they are tied.
        tied (`bool`):
            Whether head and embeddings are the same parameters.
        largest_layer (`int`):
            Parameters of the largest single module, as DeepSpeed's estimator asks for them.
        block (`int`):
            Parameters of the largest of the blocks that FSDP2 gathers one after the other: the layers.
        persistent (`int`):
            Parameters in tensors too small for ZeRO-3 to partition.
        kv_elements (`int`):
            Elements of the key-value cache per token.
    """

    total: int
    trained: int
    head: int
    embedding: int
    tied: bool
    largest_layer: int
    block: int
    persistent: int
    kv_elements: int


# takes seconds for a large model, and a table asks for the same ones again and again
_shapes: dict[tuple[str, int | None], ModelShape] = {}


def model_shape(config: PreTrainedConfig, lora_rank: int | None = None) -> ModelShape:
    """Sizes of the model of a config, with LoRA adapters of a rank where one is given. No weight is loaded."""
    key = config.to_json_string(), lora_rank
    if key not in _shapes:
        _shapes[key] = _model_shape(config, lora_rank)
    return _shapes[key]


def _model_shape(config: PreTrainedConfig, lora_rank: int | None) -> ModelShape:
    model = build_model(config, torch.bfloat16, lora_rank)
    causal_lm = causal_lm_of(model)
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head, embedding = causal_lm.get_output_embeddings().weight, causal_lm.get_input_embeddings().weight
    parameters = list(model.parameters())
    blocks = [m for m in causal_lm.modules() if type(m).__name__ in (causal_lm._no_split_modules or ())]
    return ModelShape(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        head=head.numel(),
        embedding=embedding.numel(),
        tied=head is embedding,
        largest_layer=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        block=max((sum(p.numel() for p in m.parameters()) for m in blocks), default=0),
        persistent=sum(p.numel() for p in parameters if p.numel() < PERSISTENCE_THRESHOLD),
        kv_elements=2 * text.num_hidden_layers * kv_heads * head_dim,
    )


@dataclass(frozen=True)
class Strategy:
    """
    How the training state is distributed.

    Args:
        zero_stage (`int`, *optional*, defaults to `0`):
            DeepSpeed's ZeRO stage; 0 is without DeepSpeed: DDP, or FSDP2.
        fsdp (`bool`, *optional*, defaults to `False`):
            Whether it is FSDP2, which gathers a layer's parameters for as long as it computes.
        offload_optimizer (`bool`, *optional*, defaults to `False`):
            Whether gradients' partitions and optimizer state are in the host's memory.
        offload_param (`bool`, *optional*, defaults to `False`):
            Whether parameters' partitions are in the host's memory (stage 3; under FSDP2 with everything that is
            partitioned).
        lora_rank (`int`, *optional*):
            Rank of LoRA adapters. `None` trains all parameters.
        reduce_bucket_size (`int`, *optional*, defaults to 500,000,000):
            As in DeepSpeed's json; `None` is `"auto"`, which transformers replaces by the square of the hidden size.
        max_live_parameters (`int`, *optional*, defaults to 1,000,000,000):
            As in DeepSpeed's json.
    """

    zero_stage: int = 0
    fsdp: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    lora_rank: int | None = None
    reduce_bucket_size: int | None = 500_000_000
    max_live_parameters: int = 1_000_000_000

    def __post_init__(self):
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"`zero_stage` must be 0 (DDP), 1, 2 or 3; got {self.zero_stage}.")
        if self.fsdp and self.zero_stage:
            raise ValueError(f"A run is under FSDP2 or ZeRO, not both; `zero_stage` is {self.zero_stage}.")
        if self.offload_param and not self.is_sharded:
            raise ValueError(
                f"Parameters can be offloaded under ZeRO-3 and FSDP2 only, not under stage {self.zero_stage}."
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("The optimizer can be offloaded by itself under ZeRO only; `zero_stage` is 0.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1; got {self.lora_rank}. Without it all is trained.")

    @property
    def is_ddp(self) -> bool:
        """Whether it is neither DeepSpeed nor FSDP2."""
        return self.zero_stage == 0 and not self.fsdp

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of the parameters only."""
        return self.fsdp or self.zero_stage == 3

    @property
    def name(self) -> str:
        name = f"ZeRO-{self.zero_stage}" if self.zero_stage else "FSDP2" if self.fsdp else "DDP"
        name += " + optimizer offload" * self.offload_optimizer + " + parameter offload" * self.offload_param
        return name + (f", LoRA r={self.lora_rank}" if self.lora_rank else "")


def all_strategies(lora_rank: int) -> list[Strategy]:
    """The strategies that a plan compares where none is given."""
    return [
        Strategy(0),
        Strategy(1),
        Strategy(2),
        Strategy(2, offload_optimizer=True),
        Strategy(3),
        Strategy(3, offload_optimizer=True),
        Strategy(3, offload_optimizer=True, offload_param=True),
        Strategy(fsdp=True),
        Strategy(0, lora_rank=lora_rank),
        Strategy(3, lora_rank=lora_rank),
    ]


@dataclass(frozen=True)
class PlannedRun:
    """
    What is trained, on what.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Shape of the model.
        gpus (`int`):
            Number of GPUs, over all nodes.
        gpu_memory (`int`):
            Bytes of memory of a GPU.
        nodes (`int`, *optional*, defaults to `1`):
            Number of hosts.
        host_memory (`int`, *optional*):
            Bytes of memory of a host, if it shall be checked.
        reserve (`int`, *optional*, defaults to 2 GiB):
            Bytes of a GPU that are not for tensors: CUDA context, NCCL, workspaces of kernels, fragmentation.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            In which the model is loaded.
        bf16 (`bool`, *optional*, defaults to `True`):
            Mixed precision of the run.
        optimizer (`str`, *optional*, defaults to `"adamw_torch_fused"`):
            As `optim` of the training arguments.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            As in the training arguments.
        tokens (`int`, *optional*, defaults to `24000`):
            Tokens of the largest micro-batch.
        rows (`int`, *optional*):
            Rows that these tokens are in; `None` is a token tree.
        prompt (`int`, *optional*, defaults to `5400`):
            Tokens of a prompt. They are not scored.
        action, observation (`int`, *optional*, default to `60` and `40`):
            Tokens of an action and of what comes between two actions: how many of a micro-batch's other tokens are
            scored.
        reference (`bool`, *optional*, defaults to `False`):
            Whether there is a reference model (`beta` other than 0). With LoRA it takes no memory.
        generation (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, `"vllm-colocate"` or `"vllm-server"` (on other GPUs).
        completions (`int`, *optional*, defaults to `32`):
            Episodes of a GPU that transformers generates at the same time.
        max_context (`int`, *optional*, defaults to `24000`):
            Tokens of the longest context with its response.
        vllm_utilization (`float`, *optional*, defaults to `0.3`):
            Share of a GPU's memory that vLLM takes.
        vllm_tensor_parallel (`int`, *optional*, defaults to `1`):
            GPUs that share a copy of vLLM's weights.
        vllm_sleep (`bool`, *optional*, defaults to `False`):
            Whether vLLM gives its memory back during the update.
        gather_for_generation (`bool`, *optional*, defaults to `True`):
            TRL's `ds3_gather_for_generation`.
    """

    config: PreTrainedConfig
    gpus: int
    gpu_memory: int
    nodes: int = 1
    host_memory: int | None = None
    reserve: int = 2 * GIB
    dtype: torch.dtype = torch.bfloat16
    bf16: bool = True
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = True
    tokens: int = 24000
    rows: int | None = None
    prompt: int = 5400
    action: int = 60
    observation: int = 40
    reference: bool = False
    generation: str = "transformers"
    completions: int = 32
    max_context: int = 24000
    vllm_utilization: float = 0.3
    vllm_tensor_parallel: int = 1
    vllm_sleep: bool = False
    gather_for_generation: bool = True

    def __post_init__(self):
        allowed = (*OPTIMIZER_STATES, *EIGHT_BIT_OPTIMIZERS)
        if self.optimizer not in allowed:
            raise ValueError(
                f"The state of optimizer {self.optimizer!r} is not known; known are {', '.join(allowed)}."
            )
        if self.generation not in ("transformers", "vllm-colocate", "vllm-server"):
            raise ValueError(
                f"`generation={self.generation!r}` is not one of 'transformers', 'vllm-colocate', 'vllm-server'."
            )
        least = dict.fromkeys(("gpus", "gpu_memory", "nodes", "host_memory", "tokens", "rows"), 1)
        least |= dict.fromkeys(("action", "completions", "max_context", "vllm_tensor_parallel"), 1)
        least |= dict.fromkeys(("reserve", "prompt", "observation"), 0)
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}; got {value}.")
        if not 0 < self.vllm_utilization <= 1:
            raise ValueError(
                f"`vllm_utilization` is a share of a GPU, more than 0 and at most 1; got {self.vllm_utilization}."
            )
        if self.generation == "vllm-colocate" and self.gpus % self.vllm_tensor_parallel:
            raise ValueError(
                f"{self.gpus} GPUs cannot be grouped by `vllm_tensor_parallel={self.vllm_tensor_parallel}`; give a "
                "divisor of their number."
            )
        if self.gpus % self.nodes:
            raise ValueError(f"{self.gpus} GPUs cannot be spread evenly over {self.nodes} nodes.")

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a host, which is as many processes."""
        return self.gpus // self.nodes

    def compute_dtype(self, strategy: Strategy) -> torch.dtype:
        """Dtype of the parameters in a pass; DDP has autocast convert what needs it."""
        return torch.bfloat16 if self.bf16 and not strategy.is_ddp else self.dtype

    def scored(self, tokens: int) -> int:
        """Positions of a micro-batch that are scored at most: the actions among what follows the prompt."""
        after_prompt = max(tokens - self.prompt, tokens // 10)
        return max(-(-after_prompt * self.action // (self.action + self.observation)), 1)
