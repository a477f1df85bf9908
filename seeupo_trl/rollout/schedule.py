"""When the episodes of a batch go on: each by itself, or all together."""

from contextlib import nullcontext
from threading import Event

from .batch import RolloutBatch
from .free import play_freely
from .lock_step import play_in_lock_step


def play(batch: RolloutBatch, cancelled: Event | None = None) -> None:
    """
    Play the episodes of a batch to their ends. A collective operation in lock step, and where the sampler is not
    independent. When something goes wrong, or is interrupted, the batch is given up.

    Args:
        batch ([`~seeupo_trl.rollout.batch.RolloutBatch`]):
            A batch that is prepared.
        cancelled (`Event`, *optional*):
            Ends a batch that does not play in lock step as soon as it is set.
    """
    in_background = cancelled is not None
    shown = batch.progress.shown(batch.trainer, len(batch.episodes), in_background)
    # meanwhile the main thread may replace something, a callback its output: nobody can tell that from environments
    try:
        with shown, nullcontext() if in_background else batch.shared_state:
            if batch.sampler is None:
                play_in_lock_step(batch)
            else:
                play_freely(batch, batch.sampler, cancelled)
    except BaseException:
        batch.give_up()
        raise
