"""
The official harness (`QwenFCHandler` of `bfcl-eval`) and the environment in the same conversation.

A script, because the harness needs packages that are not installed (stand-ins take their place: none of them does
anything here) and runs calls as Python code. Reads `[task id, responses]` a line, where responses are the assistant's
messages in order, each a list of calls; says what differs, a line each.
"""

import contextlib
import io
import json
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock


for missing in ("openai", "tenacity", "tree_sitter", "tree_sitter_java", "tree_sitter_javascript"):
    sys.modules[missing] = MagicMock()
sys.modules["overrides"] = SimpleNamespace(final=lambda f: f, override=lambda f: f, EnforceOverrides=object)

from bfcl_eval.model_handler.local_inference.qwen_fc import QwenFCHandler  # noqa: E402
from bfcl_eval.utils import load_dataset_entry  # noqa: E402

from seeupo_trl.envs.bfcl import BfclEnvironment  # noqa: E402


class Scripted(QwenFCHandler):
    """The handler, with a script in place of the server."""

    def _query_prompting(self, inference_data):
        self.seen = inference_data
        calls = next(self.script)
        text = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls) or "Done."
        usage = SimpleNamespace(prompt_tokens=0, completion_tokens=0)
        return SimpleNamespace(choices=[SimpleNamespace(text=text)], usage=usage), 0.0


def official(entry, responses):
    """Tools, messages and number of user turns of the official harness."""
    handler = Scripted("Qwen/Qwen3-14B", 0.0, "Qwen/Qwen3-14B-FC", False)
    handler.script = iter(responses)
    with contextlib.redirect_stdout(io.StringIO()):
        turns, _ = handler.inference_multi_turn_prompting(entry, False, True)
    messages = [(m["role"], m["content"]) for m in handler.seen["message"] if m["role"] != "assistant"]
    return handler.seen["function"], messages, len(turns), len(list(handler.script))


def ours(task_id, responses):
    """The same of the environment."""
    environment = BfclEnvironment(tools="raw")
    opening = environment.reset(id=task_id)
    messages, script = list(opening.messages), iter(responses)
    result = None
    while result is None or not (result.terminated or result.truncated):
        calls = next(script)
        message = {"role": "assistant", "content": "" if calls else "Done."}
        if calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        result = environment.step(message)
        messages += result.messages
    shown = [(message["role"], message["content"]) for message in messages]
    cut = result.truncated and len(calls)
    return opening.tools, shown, result, len(list(script)), cut


def differences(entry, responses):
    tools, messages, turns, left = official(entry, responses)
    our_tools, our_messages, result, our_left, cut = ours(entry["id"], responses)
    if tools != our_tools:
        yield "tools"
    # the results of the message that reaches the limit are of no use to the policy; the environment leaves them out
    if messages[: len(messages) - cut] != our_messages:
        yield "messages", messages, our_messages
    if left != our_left:
        yield "responses asked for", left, our_left
    if (turns == len(entry["question"])) != (len(result.info["turns_passed"]) == len(entry["question"])):
        yield "user turns", turns, result.info


def main():
    entries = {}
    for line in sys.stdin:
        task_id, responses = json.loads(line)
        category = task_id.rpartition("_")[0]
        if category not in entries:
            entries[category] = {entry["id"]: entry for entry in load_dataset_entry(category)}
        sys.stdout.flush()
        child = os.fork()  # the harness keeps instances, and changes its modules and the entry
        if child == 0:
            for difference in differences(entries[category][task_id], responses):
                print(task_id, *(difference if isinstance(difference, tuple) else (difference,)))
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(task_id, "crashed")
    print("compared")


if __name__ == "__main__":
    main()
