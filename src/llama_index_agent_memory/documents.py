"""Questions over documents whose keys and values are computed once.

A prompt with instructions, documents and a question, in this order, begins like the last one about the same documents.
Retrievers sort by score, which changes with every question: `InOrderOfId` puts the documents into an order that lasts,
and `DOCUMENTS_PROMPT` puts them before the question.
"""

from __future__ import annotations

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.schema import NodeWithScore, QueryBundle

DOCUMENTS_PROMPT = ChatPromptTemplate(
    [
        ChatMessage(
            "Answer from these documents alone.\n\n{context_str}",
            role=MessageRole.SYSTEM,
        ),
        ChatMessage("{query_str}", role=MessageRole.USER),
    ]
)
"""A ``text_qa_template`` with the documents before the question."""


class InOrderOfId(BaseNodePostprocessor):
    """A postprocessor that sorts the nodes by their ids, so that equal sets of nodes make equal prompts."""

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows this class."""
        return "InOrderOfId"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return sorted(nodes, key=lambda found: found.node.node_id)
