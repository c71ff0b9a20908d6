"""What a caller says, made into the request that a turn runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from agent_memory_core.config import SamplingParams, known_settings, with_tuples
from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, checked_request, to_message
from agent_memory_core.models.profile import find_profile, sampling_for

Conversation = ChatRequest | str | Sequence[Message | Mapping[str, Any]]
"""A request, one user message, or a list of messages as `Message` or as role and content mappings."""


def to_request(model: str, conversation: Conversation, sampling: Mapping[str, Any]) -> ChatRequest:
    """The request for a model; ``sampling`` are fields of `SamplingParams` and go before those of a request.

    Raises:
        InvalidRequest: the messages or a sampling value cannot be used.
    """
    given = known_settings(with_tuples(sampling), of=SamplingParams, error=InvalidRequest)
    if isinstance(conversation, ChatRequest):
        request = conversation
        if given:
            request = dataclasses.replace(request, sampling=request.sampling.replace(**given))
        return checked_request(_with_profile(model, request))
    params = sampling_for(model, given)
    items = (
        [Message("user", conversation)]
        if isinstance(conversation, str)
        else [to_message(m) for m in conversation]
    )
    return checked_request(_with_profile(model, ChatRequest(tuple(items), sampling=params)))


def _with_profile(model: str, request: ChatRequest) -> ChatRequest:
    """The request with what the model's profile tells the chat template, unless it says so itself."""
    profile = find_profile(model)
    if profile is None or not profile.template_kwargs:
        return request
    said = {**profile.template_kwargs, **request.template_kwargs}
    return dataclasses.replace(request, template_kwargs=said)
