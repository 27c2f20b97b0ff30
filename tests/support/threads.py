"""Helpers for tests of calls from other threads: records of events, leftover threads, Ctrl-C at any step."""

from __future__ import annotations

import gc
import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType


class Story:
    """The events that the handlers of a server record. Another thread can wait for each of them."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.tell = self._told.put

    def next(self) -> object:
        return self._told.get(timeout=10)

    def forget(self) -> None:
        while not self._told.empty():
            self._told.get()


def no_thread_but(known: set[threading.Thread]) -> None:
    """Check that all threads but the known ones end soon."""
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - known:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.001)


def stop_tracing() -> None:
    """Stop measuring coverage, in a forked child that ends by `os._exit` and so saves nothing.

    An interrupt in the tracer may leave its lock taken, and then the child hangs.
    """
    sys.settrace(None)
    threading.settrace(None)


def in_child(act: Callable[[], object], patience: float = 60) -> str:
    """Call a function in the main thread of a forked child, and return its result as a text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = "nothing"
        try:
            stop_tracing()
            signal.alarm(int(patience))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            told = str(act())
        except BaseException:
            told = traceback.format_exc()
        finally:
            os.write(write, told.encode()[-60_000:])
            os._exit(0)
    os.close(write)
    with open(read) as told_by_child:
        told = told_by_child.read()
    os.waitpid(child, 0)
    return told


class Interrupter:
    """Raises SIGINT once in the main thread, before the `at`-th step of the interpreter."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Interrupter:
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                signal.raise_signal(signal.SIGINT)
        return self


def sweep(use: Callable[[], object], count: int) -> str:
    """Interrupt a function at `count` of its steps, chosen at random. Return what went wrong, or "fine"."""
    use()
    tracer = Interrupter(0)
    sys.settrace(tracer)
    use()
    sys.settrace(None)
    known = set(threading.enumerate())
    for at in sorted(random.sample(range(1, tracer.count + 1), min(count, tracer.count))):
        tracer = Interrupter(at)
        try:
            sys.settrace(tracer)
            use()
        except KeyboardInterrupt:
            pass
        except BaseException:
            sys.settrace(None)
            return f"at {at}: {traceback.format_exc()}"
        finally:
            sys.settrace(None)
        gc.collect()  # an interrupt inside a finalizer or a callback may leave its frames in a cycle
        try:
            no_thread_but(known)
        except AssertionError:
            return f"a thread remains after an interrupt at step {at}"
    return "fine"
