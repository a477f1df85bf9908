"""Scripted environments, what they say, and rows of a dataset for them."""

import json

from seeupo_trl.envs import MultiTurnEnvironment, Observation, StepResult


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a thing.",
            "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]},
        },
    }
]


class Talk(MultiTurnEnvironment):
    """Replies with the scripted batches of messages, one batch a step, and ends the episode after the last one."""

    def __init__(self):
        self.resets = 0
        self.closed = 0
        self.read = []

    def reset(self, replies, tools=None, opening="Begin.", **task):
        self.resets += 1
        self.task = task
        self.read = []
        self.replies = [json.loads(reply) for reply in replies]
        return Observation([{"role": "user", "content": opening}], tools=json.loads(tools) if tools else None)

    def step(self, message):
        self.read.append(message)
        if not self.replies:
            return StepResult([], reward=1.0, terminated=True, info={"read": self.read})
        return StepResult(self.replies.pop(0), reward=0.25, info={"read": self.read})

    def close(self):
        self.closed += 1


def user(content):
    return {"role": "user", "content": content}


def result(content):
    return {"role": "tool", "name": "look", "content": content}


def row(*replies, **columns):
    """A dataset row for [`Talk`]; `prompt` is made unique by its content."""
    return {
        "prompt": [user(json.dumps([replies, columns], default=str))],
        "replies": [json.dumps(reply) for reply in replies],
        **columns,
    }


class Fragile(Talk):
    """Raises where the task says."""

    def reset(self, fails_in=None, **task):
        self.fails_in = fails_in
        if fails_in == "reset":
            raise OSError("no server")
        if fails_in == "reset type":
            return "hello"
        return super().reset(**task)

    def step(self, message):
        if self.fails_in == "step":
            raise KeyError("lost")
        if self.fails_in == "silence":
            return StepResult([])
        return super().step(message)
