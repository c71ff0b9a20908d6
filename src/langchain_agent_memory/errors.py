"""The core's errors in classes that LangChain knows, so that its retries, fallbacks and middleware act on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import langchain_core.exceptions

from agent_memory_core import PromptTooLong

# Older releases of langchain-core have no such error.
_Overflow: type[Exception] = getattr(langchain_core.exceptions, "ContextOverflowError", Exception)


class ContextOverflow(PromptTooLong, _Overflow):  # type: ignore[misc, valid-type]
    """A prompt that can never fit: the core's ``PromptTooLong`` and LangChain's ``ContextOverflowError`` in one."""


@contextmanager
def understood() -> Iterator[None]:
    """Raise the core's errors as errors that LangChain knows too."""
    try:
        yield
    except PromptTooLong as error:
        raise ContextOverflow(*error.args) from error
