"""Every exception this distribution raises on purpose.

    AgentMemoryError
    ├── InvalidSetting        a constructor argument, environment variable or profile key (also a ValueError)
    ├── InvalidRequest        a message list, session id or sampling value (also a ValueError)
    │   └── PromptTooLong     the prompt and the answer's first token do not fit the context or the memory budget
    ├── ModelError            the model cannot be used
    │   ├── ModelNotFound     no such embedded model, folder or hub id
    │   └── BackendMissing    MLX itself cannot be imported
    ├── StoreError            the cache directory cannot be used
    │   ├── StoreUnreadable   wrong owner, permissions or file system, or another version
    │   ├── StoreFull         there is no room on disk for what was asked; a turn is answered all the same
    │   │   └── OverBudget    the disk has room, the budget of the store or of a namespace does not
    │   └── SessionNotFound   no session of that id in that namespace (also a KeyError)
    ├── OutOfGpuMemory        the GPU had no memory left for the turn; others go on
    ├── DeadlineExceeded      the answer took longer than its timeout (also a TimeoutError)
    ├── QueueFull             as many turns wait as may; no work was done for this one
    ├── Cancelled             the turn was withdrawn while somebody read it
    └── EngineStopped         the engine was closed, met a fault that it names, or the process was forked

Each message says what was wrong, with which value, and what to do about it. A miss, a damaged block or an
evicted session is never an exception: it costs time.
"""

from __future__ import annotations


class AgentMemoryError(Exception):
    """Root of the tree: ``except AgentMemoryError`` catches all that follows."""


class InvalidSetting(AgentMemoryError, ValueError):
    """A setting is unknown or outside its range."""


class InvalidRequest(AgentMemoryError, ValueError):
    """A request cannot be understood; no work was done for it."""


class PromptTooLong(InvalidRequest):
    """The prompt can never fit, whatever else is freed.

    ``prompt_tokens`` and ``limit`` tell how many tokens it has (of one that is far too long only its beginning is
    counted, and the rest estimated), and how many the context holds; both are None where the context is not what it
    does not fit.
    """

    def __init__(self, *args: object, prompt_tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(*args)
        self.prompt_tokens, self.limit = prompt_tokens, limit


class ModelError(AgentMemoryError):
    """The model cannot be used."""


class ModelNotFound(ModelError):
    """No embedded model, folder or hub id of that name."""


class BackendMissing(ModelError, ImportError):
    """MLX cannot be imported on this machine."""


class StoreError(AgentMemoryError):
    """The cache directory cannot be used."""


class StoreUnreadable(StoreError):
    """The cache directory cannot be opened safely."""


class StoreFull(StoreError):
    """There is no room on the volume or in the disk budget. A turn never raises it: it is answered and not saved."""


class OverBudget(StoreFull):
    """The store may not grow by what was asked; the disk could hold it."""


class SessionNotFound(StoreError, KeyError):
    """No session of that id in that namespace."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument.
        return str(self.args[0]) if self.args else ""


class OutOfGpuMemory(AgentMemoryError):
    """The GPU had no memory left for the turn, which was given up; its session is as it was."""


class DeadlineExceeded(AgentMemoryError, TimeoutError):
    """The answer took longer than its timeout. The turn was withdrawn; what it computed is kept for a retry."""


class QueueFull(AgentMemoryError):
    """As many turns wait for their place as ``max_waiting`` allows. Ask again later."""


class Cancelled(AgentMemoryError):
    """The turn was withdrawn before it ended; its session is as it was."""


class EngineStopped(AgentMemoryError):
    """The engine no longer takes requests."""
