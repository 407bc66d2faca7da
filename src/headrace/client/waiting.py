"""The two ways in which a client waits: on asyncio's event loop, or by blocking the thread that called.

All else is written once, as coroutines. A blocking client runs them with `run`: whatever they await there blocks
instead of suspending, so they end in one step.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from headrace.clock import NS_PER_S, now_ns, seconds

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")


class Waits(Protocol):
    """How to wait; also the event loop that a `frontend.link.BackendLink` lives on. Limits are in seconds."""

    lock: AbstractContextManager[object]  # held by whoever calls a link, and while a reader's callback runs

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None: ...

    def remove_reader(self, fd: int, /) -> object: ...

    def create_future(self) -> asyncio.Future[Any]: ...

    async def wait(self, coroutine: Coroutine[Any, Any, T], limit_s: float | None) -> T:
        """Return what the coroutine does; the lock is free. Raises TimeoutError, and its future is cancelled."""
        ...

    async def sleep(self, pause_s: float) -> None: ...

    async def in_thread(self, call: Callable[[], T], undo: Callable[[T], None]) -> T:
        """Return what a blocking call does. If nobody waits for it any more, its result is undone."""
        ...

    def mutex(self) -> AbstractAsyncContextManager[object]:
        """Return a lock that may be held while waiting."""
        ...

    def close(self) -> None: ...


class LoopWaits:
    """On the event loop that runs when it is first used. One thread, so there is nothing to lock."""

    def __init__(self) -> None:
        self.lock: AbstractContextManager[object] = nullcontext()

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        asyncio.get_running_loop().add_reader(fd, callback)

    def remove_reader(self, fd: int, /) -> object:
        return asyncio.get_running_loop().remove_reader(fd)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def wait(self, coroutine: Coroutine[Any, Any, T], limit_s: float | None) -> T:
        async with asyncio.timeout(limit_s):
            return await coroutine

    async def sleep(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)

    async def in_thread(self, call: Callable[[], T], undo: Callable[[T], None]) -> T:
        future = asyncio.get_running_loop().run_in_executor(None, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: None if done.cancelled() or done.exception() else undo(done.result()))
            raise

    def mutex(self) -> AbstractAsyncContextManager[object]:
        return asyncio.Lock()

    def close(self) -> None:
        """There is nothing to end."""


class ThreadWaits:
    """Blocks the calling thread. One more thread, started when it is needed, calls readers' callbacks."""

    def __init__(self) -> None:
        self.lock: AbstractContextManager[object] = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, lambda: None)
        self._thread: threading.Thread | None = None
        self._closed = False

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="headrace client", daemon=True)
            self._thread.start()

    def remove_reader(self, fd: int, /) -> object:
        return self._selector.unregister(fd)

    def create_future(self) -> asyncio.Future[Any]:
        return cast("asyncio.Future[Any]", _Pending())  # as much of one as a link and `wait` use

    async def wait(self, coroutine: Coroutine[Any, Any, T], limit_s: float | None) -> T:
        deadline_ns = None if limit_s is None else now_ns() + int(limit_s * NS_PER_S)
        try:
            with self.lock:
                pending = coroutine.send(None)
            while True:
                pending = self._step(coroutine, pending, deadline_ns)
        except StopIteration as stop:
            return cast("T", stop.value)

    async def sleep(self, pause_s: float) -> None:
        time.sleep(pause_s)

    async def in_thread(self, call: Callable[[], T], _undo: Callable[[T], None]) -> T:
        return call()

    def mutex(self) -> AbstractAsyncContextManager[object]:
        return _Mutex()

    def close(self) -> None:
        """End the thread. All links must be closed. Safe to call again."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake_fd, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._selector.close()
        os.close(self._wake_fd)

    def _step(self, coroutine: Coroutine[Any, Any, object], pending: _Pending, deadline_ns: int | None) -> _Pending:
        """Wait for what the coroutine awaits, and run it on to the next. Raises what it does."""
        try:
            pending.exception(None if deadline_ns is None else max(0.0, seconds(deadline_ns - now_ns())))
        except BaseException as error:  # noqa: BLE001  a limit, or Ctrl-C: the coroutine has to hear of it
            with self.lock:
                if pending.cancel() or not isinstance(error, TimeoutError):
                    return cast("_Pending", coroutine.throw(error))
                # it was answered in this moment
        with self.lock:
            return cast("_Pending", coroutine.send(None))

    def _read(self) -> None:
        while True:
            events = self._selector.select()
            with self.lock:
                if self._closed:
                    return
                registered = self._selector.get_map()
                for key, _ in events:
                    if registered.get(key.fd) is key:  # else closed by now, or another descriptor of the same number
                        key.data()


class _Pending(Future[Any]):
    """A future that a coroutine can await: `ThreadWaits.wait` blocks on what it yields."""

    def __await__(self) -> Generator[_Pending, None, Any]:
        if not self.done():
            yield self
        return self.result()


class _Mutex:
    """A thread's lock with asyncio's interface."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine does that never suspends, because all it awaits blocks."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    coroutine.close()
    raise AssertionError("a blocking client's coroutine suspended")
