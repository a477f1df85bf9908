"""What a checkpoint of somebody else may not do."""

import os
import pickle

import pytest


class Deed:
    """Pickled, it makes a directory when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_nothing_in_a_checkpoint_is_executed(name, make, tmp_path):
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(args).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickle.dumps(Deed(tmp_path / "deed")))
    resumed = make({**args, "output_dir": str(tmp_path / "resumed")})
    if name == "training_args.bin":  # which nothing reads
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == 2
    else:
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
            resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "deed").exists()
