"""
The next batch, played while this one is updated (`rollouts_ahead=1`): an iteration then takes the longer of rollout
and update, not their sum.

What is lost: the policy that sampled a batch is one iteration older than the one that is updated, and the monotonic
improvement of the paper is shown for batches of the policy itself. The objective is corrected for the difference, with
the sampler's own log-probabilities. It stops at one iteration.

The batch plays in a thread of its own. Everything that is collective happens in the main thread: the sampler is opened
before, with the weights that this iteration starts from, and what the batch becomes is computed after. Weights reach
the sampler between batches only, so whoever would push them waits first. No batch outlives a checkpoint: one that
is in flight is dropped and played anew by the updated policy, in a run that goes on as in one that is resumed, so
that both are the same run.
"""

from collections.abc import Iterator
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_utils import SaveStrategy

from ..envs.call_thread import own_context
from .batch import RolloutBatch
from .schedule import play


if TYPE_CHECKING:
    from trl import GRPOTrainer

    from .multi_turn import MultiTurnRollout
    from .trl_environments import ToolRollout

Rows = list[dict[str, Any]]


class Ahead:
    """
    The next batch, played while this one is updated; at most one.

    `next_rows` are the dataset rows of the batch after the one that [`Ahead.watched`] yielded last, `None` at the end
    of an epoch.
    """

    def __init__(self):
        self.next_rows: Rows | None = None
        self._batches: Iterator[Rows] | None = None
        self._in_flight: _InFlight | None = None

    def watched(self, batches: Iterator[Rows]) -> Iterator[Rows]:
        """
        The same batches of rows in the same order, fetched one earlier.

        Args:
            batches (`Iterator[list[dict]]`):
                The batches of an epoch. Asked again for the same ones, it goes on.
        """
        if batches is not self._batches:
            self._batches, self.next_rows = batches, next(batches, None)
        while self.next_rows is not None:
            rows, self.next_rows = self.next_rows, next(batches, None)
            yield rows

    def start(self, rollout: "MultiTurnRollout | ToolRollout", rows: Rows, trainer: "GRPOTrainer") -> None:
        """
        Begin to play the next iteration's batch with the policy as it is. A collective operation.

        Args:
            rollout ([`~seeupo_trl.rollout.MultiTurnRollout`] or [`~seeupo_trl.rollout.trl_environments.ToolRollout`]):
                Plays it.
            rows (`list[dict]`):
                Its dataset rows of this process.
            trainer ([`~trl.GRPOTrainer`]):
                The trainer whose policy plays.
        """
        self.cancel()
        self._in_flight = _InFlight(rollout.prepare(rows, trainer, steps_ahead=1), trainer.state.global_step + 1)

    def take(self, step: int) -> RolloutBatch | None:
        """
        The batch that was played for an iteration, once it is whole; `None` if there is none.

        Args:
            step (`int`):
                The iteration.

        Raises:
            `ValueError`:
                Where the sampler reported no log-probabilities, without which nothing could be corrected.
        """
        self.wait()
        in_flight = self._in_flight
        if in_flight is None or in_flight.step != step:
            self.cancel()
            return None
        if any(turn.sampling_logps is None for episode in in_flight.batch.episodes for turn in episode.turns):
            raise ValueError(
                "`rollouts_ahead=1` corrects for a sampler that is one iteration old with the sampler's own "
                "log-probabilities, and this one reported none. Give `logps` in each `Response`."
            )
        self._in_flight = None
        return in_flight.batch

    def wait(self) -> None:
        """Wait until the batch in flight is whole, if there is one. Raises what went wrong with it."""
        if self._in_flight is not None:
            self._in_flight.thread.join()
            if self._in_flight.error is not None:
                in_flight, self._in_flight = self._in_flight, None
                raise in_flight.error

    def cancel(self) -> None:
        """Give up the batch in flight, if there is one, and wait until nothing of it is left."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.cancelled.set()
            in_flight.thread.join()
            in_flight.batch.give_up()


class _InFlight:
    """A batch that plays in a thread, and what went wrong there."""

    def __init__(self, batch: RolloutBatch, step: int):
        self.batch = batch
        self.step = step
        self.error: BaseException | None = None
        self.cancelled = Event()
        self.thread = Thread(target=own_context().run, args=(self._play,), daemon=True, name="seeupo-rollout-ahead")
        self.thread.start()

    def _play(self) -> None:
        try:
            play(self.batch, self.cancelled)
        except BaseException as error:
            self.error = error


class PlaysAhead:
    """
    What a [`~trl.GRPOTrainer`] with an [`Ahead`] in `_ahead` does so that no weights change under a batch in flight,
    and nothing goes on when training has ended; a base class that stands before it.
    """

    _ahead: Ahead

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._ahead.cancel()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple:
        if self.args.rollouts_ahead:
            epoch_iterator = self._ahead.watched(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def evaluation_loop(self, *args, **kwargs) -> Any:
        self._ahead.wait()
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._ahead.cancel()
        super()._save_checkpoint(model, trial)

    def _is_followed_at_once(self) -> bool:
        """Whether another iteration of the epoch follows, and no checkpoint is due before it."""
        step, every = self.state.global_step + 1, self.state.save_steps
        saves = self.args.save_strategy == SaveStrategy.STEPS and every > 0 and step % every == 0
        return self._ahead.next_rows is not None and step < self.state.max_steps and not saves
