"""Tokens for clients that count or cut by themselves: the paths of vLLM and of llama.cpp, in one form for both."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from agent_memory_core import AgentMemory
from agent_memory_core.server.errors import INVALID, ApiError
from agent_memory_core.server.openai_chat import ChatBody
from agent_memory_core.server.requests import Body
from agent_memory_core.server.serving import Server, apart

MOST_TOKENS = 1_000_000

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TextBody(Body):
    """A text, or a conversation of which the model's template makes one."""

    prompt: str | None = None
    """The text, as vLLM names it."""
    content: str | None = None
    """The text, as llama.cpp names it."""
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    with_pieces: bool = False
    """Whether llama.cpp's clients want the text of each token."""
    return_token_strs: bool | None = None
    """Whether vLLM's clients want it."""


class TokensBody(Body):
    """Token ids."""

    tokens: list[TokenId] = Field(max_length=MOST_TOKENS)


class TokenPaths:
    """The paths of texts and tokens. A text gets no token that it does not spell, such as one at its beginning."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def add_to(self, app: FastAPI) -> None:
        """Add the paths, with ``/v1`` before them and without."""
        for path, endpoint in (
            ("/tokenize", self.tokenize),
            ("/detokenize", self.detokenize),
            ("/apply-template", self.apply_template),
        ):
            app.add_api_route(path, endpoint, methods=["POST"])
            app.add_api_route(f"/v1{path}", endpoint, methods=["POST"], include_in_schema=False)

    async def tokenize(self, request: Request, body: TextBody) -> dict[str, Any]:
        """The tokens of a text or of a conversation."""
        memory = self._memory(body)
        text = await self._text(request, body)
        ids = await apart(lambda: memory.encode(text))
        said: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": memory.context_length}
        if not (body.with_pieces or body.return_token_strs):
            return said
        words = await apart(lambda: [memory.decode([token_id]) for token_id in ids])
        pieces = [{"id": token_id, "piece": word} for token_id, word in zip(ids, words, strict=True)]
        return said | ({"tokens": pieces} if body.with_pieces else {"token_strs": words})

    async def detokenize(self, body: TokensBody) -> dict[str, str]:
        """The text of tokens, under both names that are in use."""
        memory = self._memory(body)
        text = await apart(lambda: memory.decode(body.tokens))
        return {"prompt": text, "content": text}

    async def apply_template(self, request: Request, body: ChatBody) -> dict[str, str]:
        """The prompt that the chat template makes of a conversation."""
        return {"prompt": await self._rendered(request, body)}

    def _memory(self, body: Body) -> AgentMemory:
        """The model that a request asks for.

        Raises:
            ApiError: there is none of that name, or it does not run yet.
        """
        served = self._server.catalog.find(body.model)
        self._server.turns.check_loaded()
        return self._server.host.engine(served)

    async def _text(self, request: Request, body: TextBody) -> str:
        if body.messages is not None:
            return await self._rendered(request, _as_chat(body))
        text = body.prompt if body.prompt is not None else body.content
        if text is None:
            raise ApiError(
                INVALID, "There is no text: send it as prompt, content or messages.", param="prompt"
            )
        return text

    async def _rendered(self, request: Request, body: ChatBody) -> str:
        memory = self._memory(body)
        call = self._server.asked(request, body, body.asked, stream=False)
        return await apart(lambda: memory.render(call.request))


def _as_chat(body: TextBody) -> ChatBody:
    """The conversation of a request as that of a chat completion.

    Raises:
        RequestValidationError: it is none.
    """
    try:
        return ChatBody.model_validate(body.model_dump(exclude_none=True))
    except ValidationError as wrong:
        raise RequestValidationError(wrong.errors()) from None
