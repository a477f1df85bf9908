"""
What a rollout costs beside the policy's new tokens: encoding contexts again, waiting, and the rollout's
own bookkeeping.

    python benchmarks/rollout_cost.py                       # three tables, five minutes on one CPU core
    python benchmarks/rollout_cost.py --parts generation --device cuda --dtype bfloat16 --run-model 0.6B --scale 1

*generation* plays episodes whose lengths are given, on the transformers backend: "anew" is TRL's call, which encodes
every context from its first token in every turn; "kept" is `CachedGeneration`. Tokens are those that forward passes
were given, padding included, counted at full lengths on a model of one layer; FLOPs follow from these passes and the
size of `--count-model`. Seconds and peak memory are those of `--run-model` with all lengths multiplied by `--scale`,
each in a process of its own; memory is what the rollout adds to the process.

*decode* generates responses of lognormal length for groups of equal contexts with SmolLM2-135M's shapes. "lock step"
is `CachedGeneration`, one call for all; "one by one" is `TransformersSampler`. Tokens are those of the responses.

*barrier* plays both schedules of a rollout in simulated time (`rollout_barrier.py`): "lock step", and "free", where no
episode waits for another. "undelayed" is what that would take if a schedule took no time, "bound" what no order of
requests can undercut.

*own* plays `--episodes` BFCL episodes at once with a policy that answers in no time, in both schedules. What the
rollout takes for itself is the CPU time of the process without the time in the environments' methods and the policy.
"""

import argparse
import cProfile
import functools
import json
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from rollout_barrier import barrier_table
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
)
from trl import GRPOConfig, GRPOTrainer
from update_cost import MODELS, peak_memory
from update_schedules import SHAPES, Shape

from seeupo_trl.rollout import MultiTurnRollout, environment_reward, transformers_sampler
from seeupo_trl.rollout.cached_generation import CachedGeneration
from seeupo_trl.rollout.sampler import Request, Response
from seeupo_trl.rollout.transformers_sampler import TransformersSampler
from seeupo_trl.rollout.turn_ends import TurnEnds


GROUP_SIZE = 8
WAYS = ("anew", "kept")
EOS = 1


# --- Generation ------------------------------------------------------------------------------------------------------


@dataclass
class Passes:
    """The forward passes of a model, as (rows, new tokens, tokens in the cache) of each."""

    shapes: list[tuple[int, int, int]] = field(default_factory=list)

    def watch(self, model: Qwen3ForCausalLM) -> None:
        def note(module, args, kwargs):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            self.shapes.append((*kwargs["input_ids"].shape, 0 if cache is None else cache.get_seq_length()))

        model.register_forward_pre_hook(note, with_kwargs=True)

    def tokens(self, decoding: bool) -> int:
        return sum(rows * new for rows, new, _ in self.shapes if (new == 1) == decoding)

    def flops(self, model_name: str) -> float:
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = MODELS[model_name]
        attention_weights = 2 * hidden * head_dim * (heads + kv_heads)
        weights = layers * (attention_weights + 3 * hidden * intermediate)
        total = 0
        for rows, new, past in self.shapes:
            pairs = new * (past + (new + 1) / 2)  # what a token sees of the pass itself is half of it
            attention = 4 * layers * heads * head_dim * pairs
            total += rows * (2 * weights * new + attention + 2 * hidden * vocabulary)
        return total


def small_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(2048)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t1", unk_token="t0")


def random_model(name: str, device: str, dtype: torch.dtype) -> Qwen3ForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = MODELS[name] if name in MODELS else name
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=40960,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype)


def make_trainer(model, tokenizer, directory: str, trainer_class=GRPOTrainer, **config) -> GRPOTrainer:
    on_cpu = model.device.type == "cpu"
    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "report_to": []}
    return trainer_class(
        model=model,
        args=GRPOConfig(output_dir=directory, use_cpu=on_cpu, bf16=False, **settings, **config),
        train_dataset=Dataset.from_dict({"prompt": ["t2"] * 2}),
        processing_class=tokenizer,
        reward_funcs=environment_reward,
        rollout_func=lambda prompts, trainer: {},
    )


def play(way: str, trainer: GRPOTrainer, shape: Shape, groups: int) -> None:
    """The episodes of a shape; every response has exactly the shape's length."""
    torch.manual_seed(0)

    def tokens(count):
        return torch.randint(2, 2048, (count,)).tolist()

    contexts = [prompt for _ in range(groups) for prompt in [tokens(shape.prompt)] * GROUP_SIZE]
    cached = CachedGeneration(trainer)
    keys = range(len(contexts))
    for _ in range(shape.turns):
        if way == "kept":
            responses = cached.generate(keys, contexts)
        else:
            responses, _ = trainer._generate_single_turn(contexts, None, {}, 1)
        contexts = [
            context + response[shape.stripped :] + tokens(shape.observation)
            for context, response in zip(contexts, responses, strict=True)
        ]


def measure(way: str, shape: Shape, model, groups: int, device: str) -> dict:
    """Forward passes, seconds and MiB of a rollout, in this process."""
    torch.set_num_threads(1)
    passes, result = Passes(), {}
    with tempfile.TemporaryDirectory() as directory:
        length = {"min_new_tokens": shape.action, "max_new_tokens": shape.action}
        trainer = make_trainer(model, small_tokenizer(), directory, generation_kwargs=length)
        passes.watch(model)
        with peak_memory(device, result):
            start = time.perf_counter()
            play(way, trainer, shape, groups)
            if device == "cuda":
                torch.cuda.synchronize()
            result["seconds"] = time.perf_counter() - start
    return {**result, "shapes": passes.shapes}


def in_own_process(way: str, shape: str, purpose: str, args: argparse.Namespace) -> dict:
    options = [
        f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("device", "dtype", "run_model", "scale")
    ]
    command = [
        sys.executable,
        __file__,
        "--measure",
        way,
        purpose,
        "--shapes",
        shape,
        f"--groups={args.groups}",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def generation_table(args: argparse.Namespace) -> None:
    print(
        f"\nGeneration, {args.groups} group(s) of {GROUP_SIZE}; FLOPs of Qwen3-{args.count_model}; seconds and MiB of"
    )
    print(f"the {args.run_model} model at {args.scale:g} of the lengths on {args.device}\n")
    print("| shape | | encoded | decoded | PFLOP | of anew | s | of anew | MiB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for shape in args.shapes:
        first = None
        for way in WAYS:
            passes = Passes(in_own_process(way, shape, "count", args)["shapes"])
            run = in_own_process(way, shape, "run", args)
            flops = passes.flops(args.count_model)
            first = first or (flops, run["seconds"])
            print(
                f"| `{shape}` | {way} | {passes.tokens(False):,} | {passes.tokens(True):,} | {flops / 1e15:.2f} "
                f"| {flops / first[0]:.3f} | {run['seconds']:.1f} | {run['seconds'] / first[1]:.2f} "
                f"| {run['memory']:.0f} |",
                flush=True,
            )


# --- Decoding --------------------------------------------------------------------------------------------------------


def smollm2_135m(dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's size with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


class EndsAt(StoppingCriteria):
    """Ends each row of a batch at a length of its own."""

    def __init__(self, lengths: torch.Tensor):
        self.lengths, self.count = lengths, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.count += 1
        return self.count >= self.lengths


def decode_in_lock_step(trainer: GRPOTrainer, contexts: list[list[list[int]]], lengths: torch.Tensor) -> None:
    cached, generate = CachedGeneration(trainer), trainer.model.generate
    for turn, rows in enumerate(contexts):
        criteria = [EndsAt(lengths[turn].to(trainer.model.device))]
        trainer.model.generate = lambda criteria=criteria, **inputs: generate(stopping_criteria=criteria, **inputs)
        cached.generate(range(len(rows)), rows)
    del trainer.model.generate


def decode_one_by_one(trainer: GRPOTrainer, contexts: list[list[list[int]]], lengths: torch.Tensor) -> None:
    """Every episode's next context is there as soon as its response is."""
    plan = transformers_sampler.plan_response
    seeds = iter(range(10**6))
    turns = dict.fromkeys(range(len(contexts[0])), 0)

    def plan_with_length(*args):
        found = plan(*args)
        found.max_tokens = length_of[args[-1]]
        return found

    transformers_sampler.plan_response = plan_with_length
    sampler = TransformersSampler(trainer, TurnEnds(trainer.processing_class, trainer.eos_token_ids))
    length_of = {}
    waiting = list(turns)
    while turns:
        for key in waiting:
            seed = next(seeds)
            length_of[seed] = int(lengths[turns[key], key])
            sampler.submit(Request(key, contexts[turns[key]][key], seed))
        waiting = []
        for response in sampler.poll(None):
            turns[response.key] += 1
            if turns[response.key] < len(contexts):
                waiting.append(response.key)
            else:
                sampler.forget(response.key)
                del turns[response.key]
    sampler.close()
    transformers_sampler.plan_response = plan


def decode_table(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    model = smollm2_135m(getattr(torch, args.dtype), args.device)
    rng = torch.Generator().manual_seed(0)
    rows, turns = args.rows, args.decode_turns
    lengths = torch.distributions.LogNormal(0.0, 1.0).icdf(torch.rand(turns, rows, generator=rng))
    lengths = (lengths * args.median).round().clamp(1, 8 * args.median).int()

    def tokens(count):
        return torch.randint(2, 49152, (count,), generator=rng).tolist()

    first = [prompt for _ in range(rows // GROUP_SIZE) for prompt in [tokens(args.context)] * GROUP_SIZE]
    contexts = [first]
    for turn in range(1, turns):  # histories that were sampled long before, of the responses' lengths
        contexts.append([row + tokens(int(lengths[turn - 1, i]) + 40) for i, row in enumerate(contexts[-1])])
    print(f"\nDecoding, {rows} rows in groups of {GROUP_SIZE}, contexts of {args.context} tokens, {turns} turn(s),")
    print(f"{int(lengths.sum()):,} response tokens, the longest {int(lengths.max())}; {args.dtype} on {args.device}\n")
    print("| | s | ms a token | times faster |")
    print("|---|---:|---:|---:|")
    slower = None
    with tempfile.TemporaryDirectory() as directory:
        for name, decode in (("lock step", decode_in_lock_step), ("one by one", decode_one_by_one)):
            trainer = make_trainer(
                model, small_tokenizer(), directory, max_completion_length=8 * args.median, temperature=1.0
            )
            decode(trainer, [[row[:40] for row in first]], torch.full((1, rows), 3))  # compiles nothing, but warms up
            start = time.perf_counter()
            decode(trainer, contexts, lengths)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            slower = slower or seconds
            each = 1000 * seconds / int(lengths.sum())
            print(f"| {name} | {seconds:.1f} | {each:.2f} | {slower / seconds:.2f} |", flush=True)


# --- The rollout's own time ------------------------------------------------------------------------------------------

CALLS = [
    ("ls", {"a": True}),
    ("cd", {"folder": "document"}),
    ("find", {"path": ".", "name": "report"}),
    (
        "get_flight_cost",
        {"travel_from": "RMS", "travel_to": "LAX", "travel_date": "2024-11-15", "travel_class": "first"},
    ),
    ("get_stock_info", {"symbol": "NVDA"}),
    ("message_login", {"user_id": "USR001"}),
    ("fillFuelTank", {"fuelAmount": 20.0}),
    ("post_tweet", {"content": "Just filled the tank.", "tags": ["#travel"], "mentions": []}),
]


class InstantPolicy(GRPOTrainer):
    """A policy that answers with one tool call or another, at once."""

    cpu_seconds = 0.0

    @functools.cached_property
    def responses(self) -> list[list[int]]:
        texts = [
            f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call><|im_end|>'
            for name, arguments in CALLS
        ]
        return [self.processing_class(text)["input_ids"] for text in texts]

    def respond(self, number: int, context: list[int]) -> list[int]:
        start = time.process_time()
        response = list(self.responses[(number + len(context)) % len(self.responses)])
        self.cpu_seconds += time.process_time() - start
        return response

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [self.respond(number, context) for number, context in enumerate(prompt_ids)], None

    def rollout_sampler(self, ends, settings) -> "InstantSampler":
        return InstantSampler(self)


class InstantSampler:
    """Has the policy answer all requests whenever it is asked."""

    def __init__(self, trainer: InstantPolicy):
        self.trainer = trainer
        self.requests: list[Request] = []

    def submit(self, request: Request) -> None:
        self.requests.append(request)

    def poll(self, timeout: float | None) -> list[Response]:
        requests, self.requests = self.requests, []
        return [Response(r.key, self.trainer.respond(r.key, r.context_ids)) for r in requests]

    def forget(self, key: int) -> None:
        pass

    def close(self) -> None:
        pass


def timed(environment_class, seconds: list[float]):
    """The environment class, with the CPU time of its calls added to `seconds[0]`."""
    lock = threading.Lock()

    def timed_method(name):
        method = getattr(environment_class, name)

        def call(self, *args, **kwargs):
            start = time.thread_time()
            try:
                return method(self, *args, **kwargs)
            finally:
                with lock:
                    seconds[0] += time.thread_time() - start

        return call

    return type("Timed", (environment_class,), {name: timed_method(name) for name in ("reset", "step")})


def load_tokenizer(path: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer in Qwen's chat format."""
    import trl

    if path is None:
        from seeupo_trl.recipes.cache import default_cache_dir
        from seeupo_trl.recipes.smollm2 import smollm2

        path = smollm2(default_cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return tokenizer


def own_table(args: argparse.Namespace) -> None:
    from seeupo_trl.envs.bfcl import BfclEnvironment, load_bfcl

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.tokenizer)
    tasks = load_bfcl(split="all")
    others = [tasks[len(tasks) - 1 - i] for i in range(GROUP_SIZE)]
    in_environments = [0.0]
    model = random_model((16, 16, 1, 2, 1, 8, len(tokenizer)), "cpu", torch.float32)
    print("\nOwn time with BFCL episodes, all at once\n")
    print("| episodes | | turns | tokens at the end | environments, CPU s | own, CPU s | ms a turn |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(model, tokenizer, directory, InstantPolicy, max_completion_length=256)
        for number in args.episodes:
            rows = [tasks[i % len(tasks)] for i in range(number // GROUP_SIZE) for _ in range(GROUP_SIZE)]
            for schedule in ("lock step", "free"):
                rollout = MultiTurnRollout(
                    timed(BfclEnvironment, in_environments),
                    max_turns=args.turns,
                    lock_step_rollouts=schedule == "lock step",
                )
                trainer.rollout_inputs = others  # where SeeUPOTrainer puts the dataset's rows
                rollout([row["prompt"] for row in others], trainer)  # reads data files, compiles templates
                trainer.rollout_inputs = rows
                in_environments[0] = trainer.cpu_seconds = 0.0
                profile = cProfile.Profile(time.thread_time) if args.profile else nullcontext()
                start = time.process_time()
                with profile:
                    output = rollout([row["prompt"] for row in rows], trainer)
                total = time.process_time() - start
                rollout.close()
                if args.profile:
                    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
                turns = sum(len(trajectory.turns) for trajectory in output["trajectories"])
                tokens = sum(len(t.turns[-1].context_ids) for t in output["trajectories"]) / number
                del output  # else the next rollout's collections of garbage walk over it
                own = total - in_environments[0] - trainer.cpu_seconds
                print(
                    f"| {number} | {schedule} | {turns:,} | {tokens:,.0f} | {in_environments[0]:.2f} | {own:.2f} "
                    f"| {1000 * own / turns:.2f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("generation", "barrier", "decode", "own"),
        default=["generation", "barrier", "own"],
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["bfcl", "think"])
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--count-model", choices=MODELS, default="0.6B", help="model whose FLOPs are counted")
    parser.add_argument("--run-model", choices=MODELS, default="tiny", help="model that is run")
    parser.add_argument("--scale", type=float, default=0.1, help="factor of all lengths in the runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seeds", type=int, default=8, help="of the part `barrier`")
    parser.add_argument("--episodes", type=int, nargs="+", default=[64, 256, 1024], help="of the part `own`")
    parser.add_argument("--turns", type=int, default=10, help="of the part `own`")
    parser.add_argument("--rows", type=int, default=32, help="of the part `decode`")
    parser.add_argument("--context", type=int, default=500, help="tokens of a context of the part `decode`")
    parser.add_argument("--median", type=int, default=40, help="median length of a response of the part `decode`")
    parser.add_argument("--decode-turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of the part `decode`")
    parser.add_argument("--tokenizer", help="directory of a tokenizer; SmolLM2's by default")
    parser.add_argument("--profile", action="store_true", help="print where the rollout's time goes")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, purpose = args.measure
        shape, dtype = SHAPES[args.shapes[0]], getattr(torch, args.dtype)
        if purpose == "count":
            result = measure(way, shape, random_model((16, 16, 1, 2, 1, 8, 2048), "cpu", dtype), args.groups, "cpu")
        else:
            model = random_model(args.run_model, args.device, dtype)
            result = measure(way, shape.scaled(args.scale), model, args.groups, args.device)
        print(json.dumps(result))
        return
    if "generation" in args.parts:
        generation_table(args)
    if "barrier" in args.parts:
        barrier_table(args.seeds)
    if "decode" in args.parts:
        decode_table(args)
    if "own" in args.parts:
        own_table(args)


if __name__ == "__main__":
    main()
