"""The paths of OpenAI's responses, and of the responses and conversations that the server holds for a later request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from pydantic import Field

from agent_memory_core.server import responses_writer
from agent_memory_core.server.errors import NOT_FOUND, ApiError
from agent_memory_core.server.openai_responses import (
    ResponsesBody,
    as_listed,
    referenced,
    response_of,
    with_ids,
)
from agent_memory_core.server.records import Record
from agent_memory_core.server.requests import Body
from agent_memory_core.server.responses_writer import ResponseWriter
from agent_memory_core.server.serving import Server
from agent_memory_core.server.threads import Item

Limit = Annotated[int, Query(ge=1, le=100)]


class ConversationBody(Body):
    """What a conversation begins with."""

    items: list[dict[str, Any]] | None = Field(default=None, max_length=20_000)
    metadata: dict[str, Any] | None = None


class ItemsBody(Body):
    """Items that are added to a conversation."""

    items: list[dict[str, Any]] = Field(max_length=20_000)


class ResponsePaths:
    """The paths under /v1/responses and /v1/conversations."""

    def __init__(self, server: Server) -> None:
        self._server, self._threads, self._records = server, server.threads, server.records

    def add_to(self, app: FastAPI) -> None:
        """Add the paths, with ``/v1`` before them and without."""
        response, conversation = "/responses/{response_id}", "/conversations/{conversation_id}"
        for method, path, endpoint in (
            ("POST", "/responses", self.respond),
            ("POST", "/responses/input_tokens", self.count),
            ("GET", response, self.response),
            ("DELETE", response, self.delete_response),
            ("GET", f"{response}/input_items", self.input_items),
            ("POST", "/conversations", self.begin),
            ("GET", conversation, self.conversation),
            ("POST", conversation, self.update),
            ("DELETE", conversation, self.delete_conversation),
            ("GET", f"{conversation}/items", self.items),
            ("POST", f"{conversation}/items", self.add_items),
        ):
            app.add_api_route(f"/v1{path}", endpoint, methods=[method])
            app.add_api_route(path, endpoint, methods=[method], include_in_schema=False)

    async def respond(self, request: Request, body: ResponsesBody) -> Response:
        """A response, whole or as a stream."""
        body = await self._complete(_namespace(request), body)
        place = await self._threads.place(_namespace(request), body.wanted)
        asked = partial(body.asked, place.earlier)
        call = self._server.asked(request, body, asked, place.thread, stream=bool(body.stream))
        whole = partial(responses_writer.whole, body=body, place=place)
        return await self._server.run(request, call, whole, partial(ResponseWriter, body=body, place=place))

    async def count(self, request: Request, body: ResponsesBody) -> dict[str, Any]:
        """How many tokens the prompt of a response has."""
        body = await self._complete(_namespace(request), body)
        place = await self._threads.place(_namespace(request), body.wanted)
        call = self._server.asked(request, body, partial(body.asked, place.earlier), stream=False)
        return {"object": "response.input_tokens", "input_tokens": await self._server.count(call)}

    async def response(self, request: Request, response_id: str) -> dict[str, Any]:
        """A response that was kept."""
        return (await self._answer(request, response_id)).answer

    async def delete_response(self, request: Request, response_id: str) -> dict[str, Any]:
        """Delete a response; those that went on from it stay."""
        await self._answer(request, response_id)
        await self._records.delete(_namespace(request), response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def input_items(
        self, request: Request, response_id: str, limit: Limit = 20, after: str = "", order: str = "desc"
    ) -> dict[str, Any]:
        """What a response answered, earlier answers included."""
        found = await self._answer(request, response_id)
        return _listed(found.history[: found.asked], limit, after, order)

    async def begin(self, request: Request, body: ConversationBody | None = None) -> dict[str, Any]:
        """Begin a conversation."""
        said = body or ConversationBody()
        items = with_ids(said.items or [])
        return self._threads.begin(_namespace(request), items, said.metadata or {}).answer

    async def conversation(self, request: Request, conversation_id: str) -> dict[str, Any]:
        """A conversation without its items."""
        return (await self._threads.conversation(_namespace(request), conversation_id)).answer

    async def update(self, request: Request, conversation_id: str, body: ConversationBody) -> dict[str, Any]:
        """Replace what a client noted beside a conversation."""
        found = await self._threads.conversation(_namespace(request), conversation_id)
        found = replace(found, answer=found.answer | {"metadata": body.metadata or {}})
        self._records.put(_namespace(request), found)
        return found.answer

    async def delete_conversation(self, request: Request, conversation_id: str) -> dict[str, Any]:
        """Delete a conversation; the responses in it stay."""
        await self._threads.conversation(_namespace(request), conversation_id)
        await self._records.delete(_namespace(request), conversation_id)
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    async def items(
        self, request: Request, conversation_id: str, limit: Limit = 20, after: str = "", order: str = "desc"
    ) -> dict[str, Any]:
        """What was said in a conversation."""
        found = await self._threads.conversation(_namespace(request), conversation_id)
        return _listed(found.history, limit, after, order)

    async def add_items(self, request: Request, conversation_id: str, body: ItemsBody) -> dict[str, Any]:
        """Add to a conversation what was said elsewhere."""
        found = await self._threads.conversation(_namespace(request), conversation_id)
        added = with_ids(body.items)
        self._records.put(_namespace(request), replace(found, history=[*found.history, *added]))
        return _listed(added, len(added), "", "asc")

    async def _complete(self, namespace: str, body: ResponsesBody) -> ResponsesBody:
        """A request in which the items stand that it only refers to.

        Raises:
            ApiError: one of them is not held.
        """
        if isinstance(body.input, str):
            return body
        items = []
        for index, item in enumerate(body.input):
            item_id = referenced(item)
            items.append(item if item_id is None else await self._item(namespace, item_id, f"input.{index}"))
        return body.model_copy(update={"input": items})

    async def _item(self, namespace: str, item_id: str, place: str) -> Item:
        found = await self._threads.answer(namespace, response_of(item_id))
        for item in found.history if found is not None else ():
            if item.get("id") == item_id:
                return item
        raise ApiError(
            NOT_FOUND,
            f"{place}: an item with the id {item_id!r} is not held: send it as it was.",
            param=place,
        )

    async def _answer(self, request: Request, response_id: str) -> Record:
        found = await self._threads.answer(_namespace(request), response_id)
        if found is None:
            raise ApiError(NOT_FOUND, f"Response with id {response_id!r} not found.", param="response_id")
        return found


def _namespace(request: Request) -> str:
    namespace: str = request.state.tenant.namespace
    return namespace


def _listed(items: Sequence[Item], limit: int, after: str, order: str) -> dict[str, Any]:
    """One page of a list of items."""
    inorder = list(items) if order == "asc" else list(reversed(items))
    begin = next((index + 1 for index, item in enumerate(inorder) if item["id"] == after), 0)
    page = [as_listed(item) for item in inorder[begin : begin + limit]]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": begin + limit < len(inorder),
    }
