"""
AppWorld as an environment: tasks of everyday apps, solved by writing Python code.

The policy's action is the first fenced ```` ```python ```` block of its message. It runs in the world of the task,
where variables stay from one block to the next, and the policy reads what it prints. The episode ends when the code
marks the task as complete. AppWorld's own tests on the state of the apps are the score.

Every action is followed by an evaluation, and its reward is what the evaluation is worth now, less the rewards
before. So the return of an episode is that of its last state, however it ends: also at `max_turns` or with a full
context, where no environment is asked.

AppWorld lives in an environment of its own, see [`~seeupo_trl.envs.appworld.server.AppWorldServers`].

**Code written by a model is executed**, in AppWorld's server process. AppWorld's guard keeps honest code from writing
files or starting programs; it is no sandbox against code that wants out, which runs with your rights and can also read
the tests and answers of the tasks. Use a container where that matters.
"""

import json
import os
import re
import textwrap
from typing import TYPE_CHECKING, Any, Literal

from ..base import MultiTurnEnvironment, Observation, StepResult
from .install import find_root
from .server import AppWorldServer, AppWorldServers, BrokenByCodeError


if TYPE_CHECKING:
    from datasets import Dataset


SPLITS = ("train", "dev", "test_normal", "test_challenge")

# AppWorld makes a path of it
TASK_ID = re.compile(r"[A-Za-z0-9_-]+")

# A block may begin and end within a line: models write "Code: ```python" and "print(1)```".
CODE_BLOCK = re.compile(
    r"```(?:python|py)[ \t]*\n(.*?)(?:^[ \t]*```|```[ \t]*$)", re.DOTALL | re.MULTILINE | re.IGNORECASE
)

# Rewards are multiples of this power of two, so that sums and differences of them are exact: rounding errors would
# look like differences between the episodes of a group.
REWARD_UNIT = 2.0**-20

SYSTEM_PROMPT = """\
You do everyday tasks for your supervisor by writing Python code that uses their apps. Work step by step: in each \
message, think briefly and write exactly one block of code

```python
...
```

It is run, and you get to see what it prints. Variables stay defined from one block to the next. Print what you need \
to know: the value of the last line is not shown. If the code fails, you see the traceback.

How to use the apps:
- Every API is a function `apis.<app>.<api>(...)` with keyword arguments. It returns plain Python data, or raises an \
exception that says what is wrong.
- Do not guess names or arguments; look them up:
  `print(apis.api_docs.show_app_descriptions())` lists the apps,
  `print(apis.api_docs.show_api_descriptions(app_name='spotify'))` lists the APIs of an app,
  `print(apis.api_docs.show_api_doc(app_name='spotify', api_name='login'))` shows how to call one \
and what it returns.
- `apis.supervisor` knows the supervisor: `show_profile()`, `show_addresses()`, `show_payment_cards()` and \
`show_account_passwords()`. Most apps need an `access_token`, which their `login` gives for the account's user name \
and password; the user name is the supervisor's email address, or phone number in the phone app.
- APIs that return lists return them in pages: ask for one `page_index` after another until you have everything.
- Friends, family and other people are in the contacts of the phone app. The present time is that of `DateTime.now()`.

Change nothing that the task does not ask for: side effects count as failures. You cannot ask questions; decide for \
yourself. When everything is done, call `apis.supervisor.complete_task()`. If the task asks a question, give the \
answer with it and nothing else: `apis.supervisor.complete_task(answer=...)`, a number or a few words. If the task \
cannot be done, call `apis.supervisor.complete_task(status='fail')`.\
"""

NO_CODE = (
    "Your message has no block of code, so nothing was run. Write one that begins with a line ```python and ends with "
    "a line ```. When the task is done, call apis.supervisor.complete_task() in it."
)


class AppWorldEnvironment(MultiTurnEnvironment):
    """
    One AppWorld task, on a server leased from a pool.

    The trajectory's `info` has, as of its last action, `success` (`bool`, all tests pass), `score` (`float`, fraction
    of the tests that pass), `passes` and `failures` (`int`, numbers of tests), `completed` (`bool`, the task was
    marked as complete), `task_id`, `difficulty` (1 to 3) and `failure` (`str` or `None`, how the code ended the
    episode).

    A message without code changes nothing and the policy is told so. Code that runs too long is interrupted by
    AppWorld, which the policy reads. Code that hangs or kills its server, or after which AppWorld cannot answer, ends
    the episode (`truncated`) with a return of 0. Everything else that goes wrong with a server is an exception.

    Args:
        servers ([`~seeupo_trl.envs.appworld.server.AppWorldServers`]):
            Pool of servers, shared by all environments of the process. An environment keeps a server from `reset` to
            the end of the task, the next `reset` or `close`.
        success_reward (`float`, *optional*, defaults to `1.5`):
            Return of an episode that passes all tests.
        partial_reward (`float`, *optional*, defaults to `0.5`):
            Factor of the score in the return of any other episode.
        max_observation_chars (`int`, *optional*, defaults to `20_000`):
            Most characters of output that are shown; the rest is cut off, with a note. A limit in tokens (the paper's
            is 3,000) is `max_observation_tokens` of the trainer.

    Example:

    ```python
    servers = AppWorldServers(num_servers=16)
    trainer = SeeUPOTrainer(
        model="Qwen/Qwen3-14B",
        args=SeeUPOConfig(max_turns=10, max_concurrent_envs=16),
        train_dataset=load_appworld("train"),
        environment_factory=partial(AppWorldEnvironment, servers),
    )
    ```
    """

    def __init__(
        self,
        servers: AppWorldServers,
        *,
        success_reward: float = 1.5,
        partial_reward: float = 0.5,
        max_observation_chars: int = 20_000,
    ):
        if not isinstance(servers, AppWorldServers):
            raise TypeError(
                f"servers is a {type(servers).__name__}; give an AppWorldServers, for instance by "
                "`functools.partial(AppWorldEnvironment, AppWorldServers(num_servers=8))`."
            )
        if max_observation_chars < 1:
            raise ValueError(f"max_observation_chars is {max_observation_chars}; give at least 1.")
        self.servers = servers
        self.success_reward = success_reward
        self.partial_reward = partial_reward
        self.max_observation_chars = max_observation_chars
        self._server: AppWorldServer | None = None

    def reset(self, task_id: str, **task: Any) -> Observation:
        """
        Begin a task on a new server.

        Args:
            task_id (`str`):
                Id of the task, such as `"82e2fac_1"`.
            task (`Any`):
                Other columns of the dataset; not used.

        Raises:
            [`~seeupo_trl.envs.appworld.launcher.AppWorldServerError`]:
                When there is no server, or it does not know the task.
        """
        self._release()
        if not TASK_ID.fullmatch(task_id):
            raise ValueError(
                f"task_id is {task_id[:100]!r}; an id such as '82e2fac_1' is letters, digits, '_' and '-'."
            )
        self._task_id = task_id
        self._return = 0.0
        self._server = self.servers.lease()
        task = self._server.initialize(task_id)
        return Observation(messages=opening_messages(task["instruction"], task["supervisor"], task["datetime"]))

    def step(self, message: dict[str, Any]) -> StepResult:
        """
        Run the code of an assistant message and evaluate the state it leaves.

        Args:
            message (`dict`):
                The assistant message.
        """
        block = CODE_BLOCK.search(message["content"])
        if block is None:
            answer = NO_CODE
        else:
            try:
                answer = f"Output:\n```\n{self._shorten(self._server.execute(textwrap.dedent(block[1])))}\n```"
            except BrokenByCodeError as error:
                return self._broken(error)
        completed = self._server.task_completed()
        evaluation = self._server.evaluate()
        passes, failures = len(evaluation["passes"]), len(evaluation["failures"])
        info = {
            "success": evaluation["success"] and failures == 0,
            "score": passes / max(passes + failures, 1),
            "passes": passes,
            "failures": failures,
            "completed": completed,
            "task_id": self._task_id,
            "difficulty": evaluation["difficulty"],
            "failure": None,
        }
        episode_return = self.success_reward if info["success"] else self.partial_reward * info["score"]
        reward = self._reward_towards(episode_return)
        if completed:
            self._release()
        return StepResult([{"role": "user", "content": answer}], reward=reward, terminated=completed, info=info)

    def close(self) -> None:
        """Give the server back."""
        self._release()

    def _broken(self, error: BrokenByCodeError) -> StepResult:
        self._release()
        failure = f"The code ended the episode: {error}."
        info = {"success": False, "score": 0.0, "completed": False, "task_id": self._task_id, "failure": failure}
        message = {"role": "user", "content": failure}
        return StepResult([message], reward=self._reward_towards(0.0), truncated=True, info=info)

    def _reward_towards(self, episode_return: float) -> float:
        """The reward with which those of the episode add up to `episode_return`."""
        episode_return = round(episode_return / REWARD_UNIT) * REWARD_UNIT
        reward, self._return = episode_return - self._return, episode_return
        return reward

    def _release(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            self.servers.give_back(server)

    def _shorten(self, output: str) -> str:
        output = output.rstrip()
        too_many = len(output) - self.max_observation_chars
        return output if too_many <= 0 else f"{output[:-too_many]}\n[{too_many} characters cut off]"


def opening_messages(instruction: str, supervisor: dict[str, Any], datetime: str) -> list[dict[str, str]]:
    """
    The conversation that a task begins with.

    Args:
        instruction (`str`):
            What to do.
        supervisor (`dict`):
            `first_name`, `last_name`, `email` and `phone_number` of the person the task is from.
        datetime (`str`):
            The present time in the world, in ISO format.

    Returns:
        `list[dict]`: a system and a user message.
    """
    person = (
        f"{supervisor['first_name']} {supervisor['last_name']} (email {supervisor['email']}, phone "
        f"{supervisor['phone_number']})"
    )
    now = datetime.replace("T", " ")
    task = f"Your supervisor is {person}. The time is {now}.\n\nTask: {instruction}"
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": task}]


def load_appworld(
    split: Literal["train", "dev", "test_normal", "test_challenge"] = "train",
    *,
    root: str | os.PathLike | None = None,
) -> "Dataset":
    """
    The tasks of one of AppWorld's splits, one row each. Reads AppWorld's data; neither the package nor a server.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` (90 tasks) or `"dev"` (57), the paper's training and evaluation tasks, `"test_normal"` (168) or
            `"test_challenge"` (417).
        root (`str` or `PathLike`, *optional*):
            Directory that AppWorld's data was downloaded to. Defaults to `$APPWORLD_ROOT`.

    Returns:
        `Dataset` with the columns `prompt` (the opening messages), `task_id` and `difficulty` (1 to 3, `None` where
        the data does not say). Each message of `prompt` also carries the `task_id`: a stock `GRPOTrainer` hands a
        rollout function nothing but prompts to tell tasks apart.

    Raises:
        `FileNotFoundError`:
            When the data is missing; the message has the commands that download it.
    """
    from datasets import Dataset

    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}.")
    data = find_root(root) / "data"
    task_list = data / "datasets" / f"{split}.txt"
    if not task_list.is_file():
        raise FileNotFoundError(f"AppWorld's data has no split {split}: there is no file {task_list}.")
    # an id may be followed by a tag
    ids = [line.split(":")[0].strip() for line in task_list.read_text().splitlines() if line.strip()]
    rows = []
    for id in ids:
        if not TASK_ID.fullmatch(id):
            raise ValueError(
                f"{task_list} names the task {id[:100]!r}, which is no id of letters, digits, '_' and '-'."
            )
        folder = data / "tasks" / id
        specs = json.loads((folder / "specs.json").read_text())
        supervisor = specs["supervisor"] if "supervisor" in specs else specs["main_user"]  # older data
        messages = opening_messages(specs["instruction"], supervisor, specs["datetime"])
        metadata = folder / "ground_truth" / "metadata.json"
        difficulty = json.loads(metadata.read_text())["difficulty"] if metadata.is_file() else None
        prompt = [{**message, "task_id": id} for message in messages]
        rows.append({"prompt": prompt, "task_id": id, "difficulty": difficulty})
    return Dataset.from_list(rows)
