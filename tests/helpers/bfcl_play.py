"""Playing BFCL's tasks: calls as messages, and whole episodes of the ground truth."""

from seeupo_trl.envs.bfcl import load_bfcl


ANSWER = {"role": "assistant", "content": "Done."}


def ids(category="multi_turn_base"):
    return list(load_bfcl(category, split="all")["id"])


def calling(*calls):
    """An assistant message with calls, each `(name, arguments)`."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }


def call(environment, name, arguments):
    (message,) = environment.step(calling((name, arguments))).messages
    assert message["role"] == "tool"
    return message["content"]


def play(environment, task_id, change=lambda turn, calls: calls):
    """Play the ground truth, after `change(turn, calls)`; returns all step results."""
    environment.reset(id=task_id)
    results = []
    while not (results and results[-1].terminated):
        calls = change(len(results and results[-1].info["turns_passed"]), environment.ground_truth_calls())
        if calls:
            results.append(environment.step({"role": "assistant", "content": "", "tool_calls": calls}))
        results.append(environment.step(ANSWER))
    return results
