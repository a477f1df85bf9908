"""A thread that runs calls for others, one after another."""

import asyncio
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

    Context variables have the values that they had where the thread was made, until one of the functions sets them. As
    in the main thread, `asyncio.get_event_loop()` has a loop.

    Args:
        name (`str`):
            Name of the thread.
    """

    def __init__(self, name: str):
        super().__init__(daemon=True, name=name)
        self._calls: SimpleQueue = SimpleQueue()
        self._context = own_context()
        self.start()

    def submit(self, function: Callable[[], Any], future: Future | None = None) -> Future:
        """
        Have a function without arguments run. The future, a new one unless it is given, also carries exceptions such
        as `SystemExit`.
        """
        future = Future() if future is None else future
        self._calls.put((function, future))
        return future

    def end(self) -> None:
        """End the thread once its present call has returned."""
        self._calls.put(None)

    def run(self) -> None:
        event_loop = _LoopOnDemand()
        asyncio.set_event_loop(event_loop)
        try:
            self._run_calls()
        finally:
            if not isinstance(event_loop, _LoopOnDemand) and not event_loop.is_running():
                event_loop.close()

    def _run_calls(self) -> None:
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


class _LoopOnDemand(asyncio.SelectorEventLoop):
    """An event loop that is made when somebody first asks something of it: each takes three of the process's files."""

    def __init__(self):
        pass

    def __getattribute__(self, name: str) -> Any:
        self.__class__ = asyncio.SelectorEventLoop
        self.__init__()
        return getattr(self, name)

    def __del__(self):
        pass


def own_context() -> Context:
    """The context variables as they are here, for another thread to set."""
    context = copy_context()
    # settings of decimal are changed in place (`getcontext().prec = 9`), which a copy of the variable would share
    context.run(lambda: decimal.setcontext(decimal.getcontext().copy()))
    return context
