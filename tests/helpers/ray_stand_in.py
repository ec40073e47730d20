"""A stand-in for Ray that runs each task in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import loratool


class RayError(Exception):
    """What Ray raises."""


class TaskError(RayError):
    """What Ray raises for an error of a task."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class StandIn:
    """What is used of Ray. Whatever a task gets and gives travels as bytes; results come in another order."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=TaskError)

    def __init__(self, *nodes: Mapping[str, float]) -> None:
        self.resources = nodes
        self.address = ""
        self.limits: list[Mapping[str, Any]] = []
        self.tasks: list[tuple[str, Sequence[str], str]] = []
        self.open, self.cancelled = False, 0
        self.lost: type[Exception] | None = None
        self.refusals: list[str] = []  # of the next attempts to connect

    def is_initialized(self) -> bool:
        return self.open

    def init(self, address: str, **_: Any) -> None:
        if not self.resources:
            raise ConnectionError("Could not find any running Ray instance")
        if self.refusals:
            raise ConnectionAbortedError(self.refusals.pop())
        self.address, self.open = address, True

    def shutdown(self) -> None:
        self.open = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self.resources]

    def put(self, value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))

    def remote(self, **limits: Any) -> Callable[[Callable[..., Any]], Any]:
        self.limits.append(limits)
        return lambda function: SimpleNamespace(remote=lambda *words: self.submit(function, *words))

    def submit(self, function: Callable[..., Any], job: str, words: Any, names: Sequence[str], share: str) -> int:
        self.tasks.append((function.__name__, names, share))
        self.waiting = getattr(self, "waiting", {})
        self.waiting[len(self.tasks)] = lambda: function(job, words, names, share)
        return len(self.tasks)

    def wait(self, pending: Sequence[int], timeout: float) -> tuple[list[int], list[int]]:
        return [pending[-1]], [*pending[:-1]]

    def get(self, task: int) -> Any:
        if self.lost is not None:
            raise self.lost("the worker died")
        try:
            return pickle.loads(pickle.dumps(self.waiting.pop(task)()))
        except loratool.LoratoolError as error:
            raise TaskError(pickle.loads(pickle.dumps(error))) from None

    def cancel(self, _task: int, force: bool) -> None:
        assert force
        self.cancelled += 1
