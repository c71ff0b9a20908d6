"""An ASGI application that says which node it runs on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

NODE_HEADER = b"x-agent-memory-node"
"""The header of every answer that names the node which gave it."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Named:
    """An ASGI application whose answers name the node."""

    def __init__(self, app: Any, node: str) -> None:
        self._app = app
        self._node = node.encode()

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Answer a request."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (NODE_HEADER, self._node)]
            await send(message)

        await self._app(scope, receive, named)
