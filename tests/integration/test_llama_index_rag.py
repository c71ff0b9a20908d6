"""Questions over local documents: a LlamaIndex query engine whose documents are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import ChatPromptTemplate, Document
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from pydantic import Field
from support.cases import some_of

from llama_index_agent_memory import MLXPersistentLLM

bm25 = pytest.importorskip(
    "llama_index.retrievers.bm25", reason="its PyStemmer has no wheel for Python 3.14 on a Mac"
)

# LlamaIndex walks over the deprecated names of its own classes, which are pydantic models.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect")

RULES = "You are a helpful assistant. Answer from these notes."
FILLER = "Everybody is polite and thinks before they speak. " * 6
NOTES = {
    "ada.txt": f"Ada lives in Rome. {FILLER}",
    "bread.txt": "Bread needs flour, water, salt and time.",
    "mia.txt": f"Mia lives in Madrid. {FILLER}",
    "rain.txt": "Rain falls from clouds.",
    "tom.txt": f"Tom lives in Oslo. {FILLER}",
}
PEOPLE = ["ada.txt-0", "mia.txt-0", "tom.txt-0"]
PROMPT = ChatPromptTemplate(
    [ChatMessage(RULES + "\n\n{context_str}", role="system"), ChatMessage("{query_str}")]
)


class InOrderOfId(BaseNodePostprocessor):
    """Retrieved nodes in the order of their ids, which no question changes."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return sorted(nodes, key=lambda node: node.node.node_id)


class Reports(BaseEventHandler):
    """What the model reported of its calls."""

    found: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            self.found.append(event.response.raw)


class Library:
    """A query engine over the notes in a folder, and what its model reported last."""

    def __init__(self, folder: Path, cache_dir: Path, processors: Sequence[BaseNodePostprocessor]) -> None:
        self.reports = Reports()
        get_dispatcher().add_event_handler(self.reports)
        self.llm = MLXPersistentLLM(cache_dir=cache_dir, session_id="notes", temperature=0, max_tokens=24)
        self.retriever = bm25.BM25Retriever.from_defaults(nodes=self._nodes(folder), similarity_top_k=3)
        self.processors = list(processors)
        self.engine = RetrieverQueryEngine.from_args(
            self.retriever,
            llm=self.llm,
            text_qa_template=PROMPT,
            node_postprocessors=self.processors,
        )

    def close(self) -> None:
        self.llm.memory.close()
        get_dispatcher().event_handlers.remove(self.reports)

    def _nodes(self, folder: Path) -> list[Any]:
        documents = [Document(text=path.read_text(), doc_id=path.name) for path in folder.iterdir()]
        splitter = SentenceSplitter(
            tokenizer=self.llm.tokenizer, id_func=lambda number, document: f"{document.node_id}-{number}"
        )
        return list(splitter.get_nodes_from_documents(documents))

    def ask(self, question: str) -> tuple[str, list[str], dict[str, Any]]:
        """The answer, the ids of the nodes it was given, and the report of the model."""
        response = self.engine.query(question)
        (report,) = self.reports.found
        self.reports.found.clear()
        return str(response), [node.node.node_id for node in response.source_nodes], report


@pytest.fixture
def open_library(tmp_path: Path) -> Iterator[Callable[..., Library]]:
    """Opens libraries on the same notes and the same store, closed at the end of the test."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, text in NOTES.items():
        (folder / name).write_text(text)
    opened: list[Library] = []

    def open_one(*processors: BaseNodePostprocessor) -> Library:
        opened.append(Library(folder, tmp_path / "caches", processors))
        return opened[-1]

    yield open_one
    for library in opened:
        library.close()


def share_of_notes(report: dict[str, Any], llm: MLXPersistentLLM, question: str) -> float:
    """How much of what stands before the question was read from memory."""
    usage = report["usage"]
    in_front: int = usage["prompt_tokens"] - llm.count_tokens([ChatMessage(question)])
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return cached / in_front


def test_the_second_question_computes_itself_alone(open_library: Callable[..., Library]) -> None:
    library = open_library(InOrderOfId())
    text, nodes, report = library.ask("Where does Tom live?")
    assert (text, nodes, report["hit_tier"]) == ("Tom lives in Oslo.", PEOPLE, "none")
    for question, answer in (("Where does Ada live?", "Rome"), ("Where does Mia live?", "Madrid")):
        text, nodes, report = library.ask(question)
        assert answer in text
        assert nodes == PEOPLE
        assert (report["hit_tier"], report["session_id"]) == ("hot", "notes")
        assert share_of_notes(report, library.llm, question) >= 0.9


def test_notes_are_warm_after_a_restart(open_library: Callable[..., Library]) -> None:
    first = open_library(InOrderOfId())
    first.ask("Where does Tom live?")
    first.llm.memory.close()
    again = open_library(InOrderOfId())
    text, _, report = again.ask("Where does Ada live?")
    assert text == "Ada lives in Rome."
    assert report["hit_tier"] == "warm"
    assert share_of_notes(report, again.llm, "Where does Ada live?") >= 0.9


def test_in_the_order_of_their_scores_notes_are_computed_again(open_library: Callable[..., Library]) -> None:
    library = open_library()
    library.ask("Where does Tom live?")
    _, nodes, report = library.ask("Where does Mia live?")
    assert sorted(nodes) == PEOPLE != nodes
    assert share_of_notes(report, library.llm, "Where does Mia live?") < 0.5


@pytest.mark.parametrize(
    "kind", some_of([ContextChatEngine, CondensePlusContextChatEngine], [CondensePlusContextChatEngine])
)
@pytest.mark.parametrize(("processors", "reason"), [([InOrderOfId()], ""), ([], "diverged")])
def test_a_conversation_over_notes(
    open_library: Callable[..., Library], kind: Any, processors: list[InOrderOfId], reason: str
) -> None:
    library = open_library(*processors)
    talk = kind.from_defaults(
        library.retriever,
        llm=library.llm,
        memory=ChatMemoryBuffer.from_defaults(llm=library.llm),
        system_prompt=RULES,
        node_postprocessors=library.processors,
        **({"skip_condense": True} if kind is CondensePlusContextChatEngine else {}),
    )
    assert "Oslo" in talk.chat("Where does Tom live?").response
    talk.chat("Where does Mia live?")
    first, second = library.reports.found[0], library.reports.found[-1]
    # The notes stand in the system message: where they change their order, all behind them is computed again.
    assert second["miss_reason"] == reason
    if not reason:
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 2
