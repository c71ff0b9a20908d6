"""Counts of cached tokens beside those that LlamaIndex counts."""

from __future__ import annotations

from typing import Any

from llama_index.core.callbacks import CBEventType, EventPayload, TokenCountingHandler


class CachedTokenCounter(TokenCountingHandler):
    """A `TokenCountingHandler` that also counts the prompt tokens whose keys and values were there already.

    Arguments are those of `TokenCountingHandler`. The counts are those that the model reports.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cached_llm_token_counts: list[int] = []
        """Cached tokens of each call, in the order of ``llm_token_counts``."""

    @property
    def cached_llm_token_count(self) -> int:
        """Prompt tokens of all calls that did not have to be computed."""
        return sum(self.cached_llm_token_counts)

    @property
    def new_llm_token_count(self) -> int:
        """Prompt tokens of all calls that were computed."""
        return self.prompt_llm_token_count - self.cached_llm_token_count

    def on_event_end(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        **kwargs: Any,
    ) -> None:
        """Count the tokens of a call."""
        if (
            event_type == CBEventType.LLM
            and event_type not in self.event_ends_to_ignore
            and payload is not None
        ):
            answer = payload.get(EventPayload.RESPONSE) or payload.get(EventPayload.COMPLETION)
            self.cached_llm_token_counts.append(_cached(getattr(answer, "raw", None)))
        super().on_event_end(event_type, payload, event_id, **kwargs)

    def reset_counts(self) -> None:
        """Begin at zero again."""
        super().reset_counts()
        self.cached_llm_token_counts = []


def _cached(raw: object) -> int:
    """The cached tokens in what a model reports; 0 where it reports none."""
    usage = raw.get("usage") if isinstance(raw, dict) else getattr(raw, "usage", None)
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    count = details.get("cached_tokens") if isinstance(details, dict) else 0
    return count if isinstance(count, int) else 0
