"""How far a batch of episodes is, and what its episodes waited for: the progress bar and the metrics of a rollout."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from tqdm.auto import tqdm

from .episode import Episode


if TYPE_CHECKING:
    from trl import GRPOTrainer


# What an episode that has begun waits for, at any time.
Awaited = Literal["sampler", "environment", "others"]

BAR_DELAY = 3.0  # seconds; a rollout that is over before shows no bar


class Progress:
    """
    Watches the episodes of one batch.

    An episode waits for the sampler while its response is generated, for its environment while that resets or steps,
    and for others in between: until the process has time for it, and in lock step until the last response of a turn
    and the last environment are there.
    """

    def __init__(self):
        self._tokens = 0
        self._begun: set[int] = set()
        self._waits: Counter = Counter()  # seconds of all episodes together
        self._busy: Counter = Counter()  # seconds in which any episode waited
        self._state: dict[int, tuple[Awaited, float]] = {}
        self._number: Counter = Counter()  # episodes by what they wait for
        self._since: dict[Awaited, float] = {}
        self._seconds = 0.0
        self._bar: tqdm | None = None

    @contextmanager
    def shown(self, trainer: "GRPOTrainer", num_episodes: int, in_background: bool = False) -> Iterator[None]:
        """
        Show a bar while the batch is played, on the main process, unless `disable_tqdm` and not in the background.

        Args:
            trainer ([`~trl.GRPOTrainer`]):
                The trainer.
            num_episodes (`int`):
                Number of episodes of this process.
            in_background (`bool`, *optional*, defaults to `False`):
                Whether the process does something else meanwhile.
        """
        hidden = in_background or trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
        start = time.perf_counter()
        bar = tqdm(total=num_episodes, desc="Episodes", unit="", leave=False, delay=BAR_DELAY, disable=hidden)
        with bar as self._bar:
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start

    def show(self, episodes: list[Episode]) -> None:
        """Show how many of all episodes have ended."""
        self._to(sum(not episode.active for episode in episodes))

    def ended(self) -> None:
        """One more episode has ended."""
        self._to(self._bar.n + 1)

    def count_tokens(self, number: int) -> None:
        """So many tokens of a response have come."""
        self._tokens += number

    def waits_for(self, key: int, awaited: Awaited | None) -> None:
        """
        An episode waits for something else from now on.

        Args:
            key (`int`):
                The episode.
            awaited (`str`, *optional*):
                What for; `None` when it has ended.
        """
        now = time.perf_counter()
        self._begun.add(key)
        before, since = self._state.pop(key, (None, now))
        if before is not None:
            self._waits[before] += now - since
            self._number[before] -= 1
            if self._number[before] == 0:
                self._busy[before] += now - self._since[before]
        if awaited is not None:
            self._state[key] = awaited, now
            if self._number[awaited] == 0:
                self._since[awaited] = now
            self._number[awaited] += 1

    def generated(self, lengths: Sequence[int], seconds: float) -> None:
        """
        One call has generated a response for each waiting episode. A response was there when its share of the longest
        one's tokens was.

        Args:
            lengths (`Sequence[int]`):
                Tokens of the responses.
            seconds (`float`):
                How long the call took.
        """
        longest = max(lengths, default=0)
        self._together("sampler", [seconds * length / longest if longest else 0.0 for length in lengths], seconds)

    def stepped(self, each: Sequence[float], seconds: float) -> None:
        """
        Environments were called together.

        Args:
            each (`Sequence[float]`):
                Seconds until each had answered.
            seconds (`float`):
                Seconds until the last one had.
        """
        self._together("environment", each, seconds)

    def metrics(self) -> dict[str, float]:
        """
        What is logged: `rollout/wait_*` (mean seconds an episode waited), `rollout/tokens_per_second` (of the
        responses), `rollout/requests_in_flight` (mean number of episodes that waited for the sampler),
        `time/generation` and `time/environments` (seconds in which any episode waited for it; both may be true at
        once).
        """
        number = max(len(self._begun), 1)
        seconds = max(self._seconds, 1e-9)
        waits = {f"rollout/wait_{name}": self._waits[name] / number for name in ("sampler", "environment", "others")}
        return waits | {
            "rollout/tokens_per_second": self._tokens / seconds,
            "rollout/requests_in_flight": self._waits["sampler"] / seconds,
            "time/generation": self._busy["sampler"],
            "time/environments": self._busy["environment"],
        }

    def begun(self, episodes: Sequence[Episode]) -> None:
        """Episodes have begun, which are counted in the means."""
        self._begun.update(episode.key for episode in episodes)

    def _together(self, awaited: Awaited, each: Sequence[float], seconds: float) -> None:
        self._busy[awaited] += seconds
        self._waits[awaited] += sum(each)
        self._waits["others"] += sum(seconds - own for own in each)

    def _to(self, number: int) -> None:
        if self._bar is not None and number != self._bar.n:
            self._bar.set_postfix_str(f"{self._tokens:,} tokens", refresh=False)
            self._bar.update(number - self._bar.n)
