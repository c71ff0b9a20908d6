"""What goes wrong, once for all dialects: a status, a kind, and a sentence that clients read.

Some clients act on the words: Claude Code looks for "prompt is too long: N tokens > M maximum", Codex for the code
"context_length_exceeded", and the SDKs repeat what has a status of 408, 409, 429 or from 500 on.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from agent_memory_core import (
    AgentMemoryError,
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    ModelError,
    OutOfGpuMemory,
    PromptTooLong,
    QueueFull,
    SessionNotFound,
)
from agent_memory_core.agents import AgentExists, AgentsBusy
from agent_memory_core.manager import LoadTimeout, ManagerClosed, UnknownModel


class Kind(NamedTuple):
    """One kind of error, as the dialects name it."""

    status: int
    openai_type: str
    openai_code: str | None
    anthropic_type: str


INVALID = Kind(400, "invalid_request_error", None, "invalid_request_error")
INVALID_JSON = Kind(400, "invalid_request_error", "invalid_json", "invalid_request_error")
UNSUPPORTED = Kind(400, "invalid_request_error", "unsupported_value", "invalid_request_error")
TOO_LONG = Kind(400, "invalid_request_error", "context_length_exceeded", "invalid_request_error")
PREVIOUS_NOT_FOUND = Kind(
    400, "invalid_request_error", "previous_response_not_found", "invalid_request_error"
)
THREAD_NOT_FOUND = Kind(404, "invalid_request_error", "thread_not_found", "not_found_error")
UNAUTHORIZED = Kind(401, "invalid_request_error", "invalid_api_key", "authentication_error")
FORBIDDEN = Kind(403, "invalid_request_error", "forbidden", "permission_error")
NOT_FOUND = Kind(404, "invalid_request_error", "not_found", "not_found_error")
MODEL_NOT_FOUND = Kind(404, "invalid_request_error", "model_not_found", "not_found_error")
NOT_ALLOWED = Kind(405, "invalid_request_error", "method_not_allowed", "invalid_request_error")
TOO_SLOW = Kind(408, "invalid_request_error", "request_timeout", "timeout_error")
TOO_LARGE = Kind(413, "invalid_request_error", "request_too_large", "request_too_large")
RATE_LIMITED = Kind(429, "requests", "rate_limit_exceeded", "rate_limit_error")
QUEUE_FULL = Kind(429, "requests", "queue_full", "rate_limit_error")
BUSY = Kind(409, "invalid_request_error", "conflict", "invalid_request_error")
GONE = Kind(499, "invalid_request_error", "client_closed_request", "invalid_request_error")
"""Nobody reads it; it is counted."""
FAULT = Kind(500, "server_error", "server_error", "api_error")
SWAP_FAILED = Kind(500, "server_error", "swap_failed", "api_error")
LOADING = Kind(503, "server_error", "model_loading", "overloaded_error")
OVERLOADED = Kind(503, "server_error", "overloaded", "overloaded_error")
TIMEOUT = Kind(504, "server_error", "timeout", "timeout_error")


class ApiError(Exception):
    """What a request is answered with in place of a result.

    Args:
        kind: one of this module's.
        message: a sentence that names the value and the fix.
        param: the field of the request that is meant.
        retry_after: seconds after which another try may succeed; None where nothing is known.
        tokens: of a prompt that is too long, how many tokens it has and how many there may be.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.param = kind, message, param
        self.retry_after, self.tokens = retry_after, tokens

    def openai(self) -> dict[str, Any]:
        """The body of the answer in OpenAI's dialect, which is also the data of an error in a stream."""
        message = self.message
        if self.tokens is not None:
            message = (
                f"This model's maximum context length is {self.tokens[1]} tokens. However, your messages resulted in "
                f"{self.tokens[0]} tokens. Please reduce the length of the messages."
            )
        kind = self.kind
        error = {
            "message": message,
            "type": kind.openai_type,
            "param": self.param,
            "code": kind.openai_code,
        }
        return {"error": error}

    def anthropic(self, request_id: str = "") -> dict[str, Any]:
        """The same in Anthropic's dialect."""
        message = self.message
        if self.kind is TOO_LONG:
            count = f"{self.tokens[0]} tokens > {self.tokens[1]} maximum" if self.tokens else message
            message = f"prompt is too long: {count}"
        error: dict[str, Any] = {"type": self.kind.anthropic_type, "message": message}
        if self.kind is THREAD_NOT_FOUND:
            # Anthropic's client sends the whole conversation again when it reads this.
            error["details"] = {"error_code": self.kind.openai_code}
        return {"type": "error", "error": error, "request_id": request_id}

    def headers(self) -> dict[str, str]:
        """Headers that tell a client whether and when another try makes sense."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.kind in (FAULT, SWAP_FAILED):
            headers["x-should-retry"] = "false"
        return headers


_KINDS: tuple[tuple[type[AgentMemoryError], Kind], ...] = (
    (AgentExists, BUSY),
    (AgentsBusy, QUEUE_FULL),
    # Its name was known a moment ago: the model was swapped meanwhile.
    (UnknownModel, LOADING),
    (LoadTimeout, LOADING),
    (ManagerClosed, OVERLOADED),
    (PromptTooLong, TOO_LONG),
    (InvalidRequest, INVALID),
    (SessionNotFound, NOT_FOUND),
    (DeadlineExceeded, TIMEOUT),
    (OutOfGpuMemory, OVERLOADED),
    (Cancelled, OVERLOADED),
    (QueueFull, OVERLOADED),
    (EngineStopped, FAULT),
    (ModelError, FAULT),
    (AgentMemoryError, FAULT),
)


_PASSING = (OVERLOADED, QUEUE_FULL, LOADING)
"""What another try a little later may not meet."""


def from_core(error: AgentMemoryError) -> ApiError:
    """What an error of the core is to a client."""
    kind = next(kind for cls, kind in _KINDS if isinstance(error, cls))
    tokens = None
    if isinstance(error, PromptTooLong) and error.prompt_tokens is not None and error.limit is not None:
        tokens = (error.prompt_tokens, error.limit)
    # Where a value is wrong, the sentence begins with its name.
    named = re.match(r"(\w+)=", str(error)) if kind is INVALID else None
    return ApiError(
        kind,
        str(error),
        param=named[1] if named else None,
        retry_after=5 if kind in _PASSING else None,
        tokens=tokens,
    )
