"""Twins of blocking calls for coroutines. Each has a thread of its own, so that one that waits holds up no other."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def asynchronous(
    call: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """The twin of a method. A task that is cancelled no longer waits for it, and it goes on to its end."""

    @functools.wraps(call)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await _in_thread(lambda: call(self, *args, **kwargs))

    return twin


def streamed(
    call: Callable[Concatenate[S, P], Generator[R, None, None]],
) -> Callable[Concatenate[S, P], AsyncGenerator[R, None]]:
    """The twin of a method that gives steps. Closed, or with its task cancelled, it closes the steps after the next."""

    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[R, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[R] | BaseException | None] = asyncio.Queue()
        stopped = threading.Event()

        def put(item: tuple[R] | BaseException | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        steps = call(self, *args, **kwargs)
        reading = asyncio.create_task(_in_thread(lambda: _read(steps, put, stopped)))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item[0]
        finally:
            stopped.set()
            await asyncio.shield(reading)

    twin.__doc__ = call.__doc__
    return twin


def _read(
    steps: Generator[R, None, None],
    put: Callable[[tuple[R] | BaseException | None], None],
    stopped: threading.Event,
) -> None:
    end: BaseException | None = None
    try:
        for step in steps:
            if stopped.is_set():
                break
            put((step,))
    except BaseException as error:  # noqa: BLE001 - it is raised where the steps are read
        end = error
    finally:
        steps.close()
    put(end)


async def _in_thread(call: Callable[[], R]) -> R:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[R] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: object) -> None:
        if not done.done():
            set_it(value)

    def run() -> None:
        try:
            set_it, value = done.set_result, call()
        except BaseException as error:  # noqa: BLE001 - it is raised where the call is awaited
            set_it, value = done.set_exception, error  # type: ignore[assignment]
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, set_it, value)

    threading.Thread(target=run, daemon=True, name="agent-memory-coordination").start()
    return await done
