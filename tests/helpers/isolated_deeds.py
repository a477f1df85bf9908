"""An environment that does in `step` what it is told, for tests of environments in processes of their own."""

import asyncio
import contextvars
import datetime
import os
import pickle
import signal
import socket
import subprocess
import time
from dataclasses import replace
from fractions import Fraction

from seeupo_trl.envs import MultiTurnEnvironment, Observation, StepResult


class Deeds(MultiTurnEnvironment):
    def __init__(self):
        self.episodes = 0

    def reset(self, deed=None, **task):
        self.deed, self.steps = deed, 0
        self.episodes += 1
        self.task = task
        return Observation([{"role": "user", "content": "Begin."}], info={"process": os.getpid()})

    def step(self, message):
        self.steps += 1
        match self.deed:
            case "hang":
                time.sleep(1000)
            case "start another and hang":
                print(subprocess.Popen(["sleep", "1000"]).pid, file=open(self.task["file"], "w"), flush=True)
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
            case "time out":
                raise TimeoutError("the server is slow")
            case "a date":
                return StepResult([], terminated=True, info={"when": [datetime.date(2020, 1, 1)]})
            case "keys":
                return StepResult([], terminated=True, info={"counts": {1: 2}})
            case "numbers":
                import numpy as np  # every process would wait for these
                import torch

                info = {"array": np.arange(2), "tensor": torch.tensor(0.5), "pair": (1, None), "flag": np.bool_(True)}
                return StepResult([], reward=np.float32(0.5), terminated=np.bool_(True), info=info)
            case "fraction":
                return StepResult([], reward=Fraction(1, 2), terminated=True, info={"half": Fraction(1, 2)})
            case "one element":
                import numpy as np
                import torch

                terminated, truncated = np.array([False]), torch.tensor([False])
                say = [{"role": "user", "content": "Go on."}]
                return StepResult(say, reward=torch.tensor([0.5]), terminated=terminated, truncated=truncated)
            case "half a number":
                return StepResult([], reward=Fraction(1, 2), terminated=True)
            case "task":
                types = sorted(type(value).__name__ for value in self.task.values())
                return StepResult([], terminated=True, info={"types": types})
            case "pickle":
                Wire.send(pickle.dumps(Bomb(self.task["trace"])))
            case "half a line":
                Wire.send(b'{"error": null, ')
                time.sleep(1000)
        info = {"process": os.getpid(), "episodes": self.episodes}
        return StepResult([{"role": "user", "content": "Go on."}], reward=0.5, terminated=self.steps == 2, info=info)


class Bomb:
    """Leaves a trace in the process that unpickles it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (self.trace, "w")


class Wire:
    """What code in the process can do to the socket behind the package's back."""

    @staticmethod
    def send(data):
        for number in range(3, 64):
            try:
                end = socket.socket(fileno=os.dup(number))
                if end.family == socket.AF_UNIX and end.getpeername() == "":
                    end.sendall(data + b"\n" * data.endswith(b"."))
            except OSError:
                pass


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


class Coroutines(Deeds):
    async def reset(self, **task):
        await asyncio.sleep(0)
        VARIABLE.set("set in reset")
        return super().reset(**task)

    async def step(self, message):
        await asyncio.sleep(0)
        result = super().step(message)
        return replace(result, info={**result.info, "variable": VARIABLE.get()})
