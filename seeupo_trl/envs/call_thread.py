"""A thread that runs calls for others, one after another."""

import decimal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from queue import SimpleQueue
from typing import Any


class CallThread(threading.Thread):
    """
    Runs functions in the order in which they are given. It does not keep the interpreter from exiting.

    Context variables have the values that they had where the thread was made, until one of the functions sets them.

    Args:
        name (`str`):
            Name of the thread.
    """

    def __init__(self, name: str):
        super().__init__(daemon=True, name=name)
        self._calls: SimpleQueue = SimpleQueue()
        self._context = own_context()
        self.start()

    def submit(self, function: Callable[[], Any]) -> Future:
        """Have a function without arguments run. The future also carries exceptions such as `SystemExit`."""
        future: Future = Future()
        self._calls.put((function, future))
        return future

    def end(self) -> None:
        """End the thread once its present call has returned."""
        self._calls.put(None)

    def run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                result = self._call(function)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            del call, function, future  # they hold the environment

    def _call(self, function: Callable[[], Any]) -> Any:
        return self._context.run(function)


def own_context() -> Context:
    """The context variables as they are here, for another thread to set."""
    context = copy_context()
    # settings of decimal are changed in place (`getcontext().prec = 9`), which a copy of the variable would share
    context.run(lambda: decimal.setcontext(decimal.getcontext().copy()))
    return context
