"""What LlamaIndex's dispatcher is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import PrivateAttr


class Watch(BaseEventHandler):
    """Keeps every event."""

    _seen: list[BaseEvent] = PrivateAttr(default_factory=list)

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self._seen.append(event)

    def of(self, *kinds: type[BaseEvent]) -> list[BaseEvent]:
        return [event for event in self._seen if isinstance(event, kinds)]


@contextmanager
def watching() -> Iterator[Watch]:
    root, watch = get_dispatcher(), Watch()
    root.add_event_handler(watch)
    yield watch
    root.event_handlers.remove(watch)
