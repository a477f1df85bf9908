"""An environment that does in `step` what it is told, for tests of environments in processes of their own."""

import os
import signal
import time

from seeupo_trl.envs import MultiTurnEnvironment, Observation, StepResult


class Deeds(MultiTurnEnvironment):
    def __init__(self):
        self.episodes = 0

    def reset(self, deed=None, **task):
        self.deed, self.steps = deed, 0
        self.episodes += 1
        return Observation([{"role": "user", "content": "Begin."}])

    def step(self, message):
        self.steps += 1
        match self.deed:
            case "hang":
                time.sleep(1000)
            case "hold the lock":
                3 ** (10**9)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                raise SystemExit(3)
            case "raise":
                raise OSError("connection lost")
            case "unpicklable":
                return lambda: None
        info = {"process": os.getpid(), "episodes": self.episodes}
        return StepResult([{"role": "user", "content": "Go on."}], reward=0.5, terminated=self.steps == 2, info=info)
