"""Synthetic conversations: facts told and asked for, tools called, results answered, small talk between.

``conversation(seed, held_out=True, tokens=1000)`` is the door for evaluation and benchmarks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from training.tiny_chat.facts import Fact, acknowledge, draw_fact, draw_foreign_fact
from training.tiny_chat.json_answers import json_question
from training.tiny_chat.talk import brief, copying, passage, small_talk, system_prompt
from training.tiny_chat.tools import (
    RETRY_ERRORS,
    Call,
    Result,
    Tool,
    bare_result,
    make_result,
    make_tools,
    request,
)
from training.tiny_chat.words import Source

LETTERS_PER_TOKEN = 2.6


@dataclass(frozen=True)
class Turn:
    """One message. ``kind`` says what an assistant's turn shows: recall, unknown, call, result, talk, json, copy."""

    role: str
    content: str
    kind: str = ""
    calls: tuple[Call, ...] = ()

    def message(self) -> dict[str, Any]:
        """The OpenAI form of the message."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message


@dataclass
class Conversation:
    """Turns and the tools that were offered for them."""

    turns: list[Turn] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        """The OpenAI form of the turns."""
        return [turn.message() for turn in self.turns]

    def schemas(self) -> list[dict[str, Any]]:
        """The OpenAI form of the tools."""
        return [tool.schema() for tool in self.tools]

    def letters(self) -> int:
        """About how long it is as text."""
        called = sum(60 * len(turn.calls) for turn in self.turns)
        return called + sum(len(turn.content) + 14 for turn in self.turns) + 90 * len(self.tools)

    def user(self, text: str) -> None:
        """Let the user say something."""
        self.turns.append(Turn("user", text))

    def assistant(self, text: str, kind: str, *calls: Call) -> None:
        """Let the assistant say something, or call tools."""
        self.turns.append(Turn("assistant", text, kind, calls))

    def exchange(self, asked: str, answered: str, kind: str) -> None:
        """A user's turn and its answer."""
        self.user(asked)
        self.assistant(answered, kind)

    def returned(self, result: Result) -> None:
        """A tool's message."""
        self.turns.append(Turn("tool", result.content))


@dataclass(frozen=True)
class Mix:
    """How often each kind of exchange comes."""

    ask: int = 32
    tell: int = 24
    talk: int = 10
    tool: int = 70
    passage: int = 3
    json: int = 6
    copy: int = 2


MIXES = (
    Mix(),
    Mix(),
    Mix(ask=40, tell=12, talk=24, passage=6),
    Mix(ask=40, tell=6, talk=30, passage=10, tool=50),
)
COPYING = Mix(ask=0, tell=0, talk=0, tool=0, passage=0, json=0, copy=1)

# How many tools are offered, outside training and in it: more of them leave more to tell apart.
_COUNTS = {False: (1, 1, 2, 3, 4), True: (1, 2, 2, 3, 4)}


class Writer:
    """Writes one conversation, remembering what has been told in it."""

    def __init__(self, source: Source, mix: Mix) -> None:
        self.source = source
        self.mix = mix
        self.facts: dict[tuple[str, ...], Fact] = {}
        self.talk = Conversation()
        self.unused: list[Tool] = []

    def write(self, tokens: int, *, tool_share: float, system_tokens: int) -> Conversation:
        """The conversation, at least so many tokens long by estimate."""
        if self.source.chance(tool_share):
            self.talk.tools = make_tools(self.source, self.source.rng.choice(_COUNTS[self.source.trains]))
            self.unused = list(self.talk.tools) if self.source.trains else []
        self._system(system_tokens)
        if system_tokens:
            self._tell()
        while self.talk.letters() < tokens * LETTERS_PER_TOKEN:
            self._exchange()
        return self.talk

    def _exchange(self) -> None:
        mix = self.mix
        choices = (
            (self._ask, mix.ask if self.facts else mix.ask // 10), (self._tell, mix.tell), (self._small_talk, mix.talk),
            (self._use_tool, mix.tool if self.talk.tools else 0), (self._passage, mix.passage), (self._json, mix.json),
            (self._copy, mix.copy),
        )  # fmt: skip
        self.source.rng.choices([c[0] for c in choices], [c[1] for c in choices])[0]()

    def _system(self, tokens: int) -> None:
        source = self.source
        if tokens:
            sentences = brief(source, int(tokens * LETTERS_PER_TOKEN))
        elif source.chance(0.5):
            sentences = [system_prompt(source)]
        else:
            return
        if tokens or source.chance(0.3):
            for _ in range(source.rng.randint(1, 5)):
                fact = draw_foreign_fact(source)
                if fact.key not in self.facts:
                    self.facts[fact.key] = fact
                    sentences.insert(source.rng.randint(1, len(sentences)), fact.told(source))
        self.talk.turns.append(Turn("system", source.pick(" ", " ", "\n").join(sentences)))

    def _tell(self) -> None:
        source = self.source
        if self.facts and source.chance(0.12):
            self._correct()
            return
        told: dict[tuple[str, ...], Fact] = {}
        for _ in range(source.rng.choices((1, 2, 3), (55, 33, 12))[0]):
            fact = draw_fact(source)
            if fact.key not in self.facts and not self._contradicts(fact, told):
                told[fact.key] = fact
        if not told:
            return
        self.facts |= told
        sentences = [fact.told(source) for fact in told.values()]
        text = source.pick(" ", " ", "\n").join(sentences)
        if len(sentences) == 2 and source.chance(0.25):
            text = f"{sentences[0].removesuffix('.')} and {sentences[1][0].lower() if sentences[1].startswith('My') else sentences[1][0]}{sentences[1][1:]}"
        if source.chance(0.12):
            fact = source.rng.choice(list(told.values()))
            self.talk.exchange(f"{text} {fact.asked(source)}", fact.answer, "recall")
        else:
            self.talk.exchange(text, acknowledge(source, list(told.values())), "talk")

    @staticmethod
    def _contradicts(fact: Fact, told: dict[tuple[str, ...], Fact]) -> bool:
        return fact.key in told

    def _correct(self) -> None:
        source = self.source
        old = source.rng.choice(list(self.facts.values()))
        new = draw_fact(source, old.form.name)
        slots = {**old.slots, "v": new.value}
        fact = Fact(old.key, new.value, old.form, slots)
        self.facts[fact.key] = fact
        said = fact.told(source)
        start = source.pick(
            "Actually, ",
            "Sorry, that was wrong. ",
            "I made a mistake. ",
            "Correction: ",
            "That has changed. ",
        )
        self.talk.exchange(
            start + said, source.pick(f"Got it. {fact.answer}", "Noted.", f"Got it. {fact.answer}"), "talk"
        )

    def _ask(self) -> None:
        source = self.source
        if self.facts and source.chance(0.91):
            fact = source.rng.choice(list(self.facts.values()))
            self.talk.exchange(fact.asked(source), fact.answer, "recall")
            return
        fact = draw_fact(source)
        if fact.key not in self.facts:
            self.talk.exchange(fact.asked(source), fact.unknown, "unknown")

    def _small_talk(self) -> None:
        if not self.talk.tools and self.source.chance(0.05):
            tool = make_tools(self.source, 1)[0]
            self.talk.exchange(
                self.source.pick(f"Call {tool.name}.", f"Use the {tool.noun} tool."),
                "I do not have that tool.",
                "talk",
            )
        else:
            self.talk.exchange(*small_talk(self.source), "talk")

    def _passage(self) -> None:
        self.talk.exchange(*passage(self.source), "talk")

    def _json(self) -> None:
        self.talk.exchange(*json_question(self.source), "json")

    def _copy(self) -> None:
        self.talk.exchange(*copying(self.source), "copy")

    def _use_tool(self) -> None:
        source = self.source
        tool = self._next_tool()
        form = source.rng.random()
        if form < 0.12:
            self._in_parallel(tool)
        elif form < 0.20 and len(self.talk.tools) > 1:
            self._in_turn(tool)
        else:
            text, call = request(source, tool)
            self.talk.user(text)
            self.talk.assistant("", "call", call)
            if source.chance(0.1):
                self.talk.returned(bare_result(source.pick(*RETRY_ERRORS)))
                self.talk.assistant("", "call", call)
            self._answer(make_result(source, tool))

    def _next_tool(self) -> Tool:
        """In training mostly one not yet called: after its first call, its name could be copied from there."""
        source = self.source
        tool = source.rng.choice(self.unused if self.unused and source.chance(0.75) else self.talk.tools)
        if tool in self.unused:
            self.unused.remove(tool)
        return tool

    def _answer(self, result: Result) -> None:
        self.talk.returned(result)
        self.talk.assistant(result.answer, "result")

    def _in_parallel(self, first: Tool) -> None:
        """Two calls in one turn, of one tool or of two."""
        source = self.source
        second = source.rng.choice(self.talk.tools)
        (asked, call), (also, other) = request(source, first), request(source, second)
        if call == other:
            return
        joined = source.pick("{} And {}", "{} Then also: {}", "{}\n{}", "Two things. {} {}")
        self.talk.user(joined.replace("{}", asked, 1).replace("{}", also, 1))
        self.talk.assistant("", "call", call, other)
        results = [bare_result(make_result(source, tool).value) for tool in (first, second)]
        for result in results:
            self.talk.returned(result)
        self.talk.assistant(f"The results are {results[0].value} and {results[1].value}.", "result")

    def _in_turn(self, first: Tool) -> None:
        """A call whose result is the argument of a second one."""
        source = self.source
        usable = [tool for tool in self.talk.tools if tool is not first and _takes_one_text(tool)]
        if not usable:
            return
        second = source.rng.choice(usable)
        asked, call = request(source, first)
        then = source.pick(
            "Then use {} on the result.", "Then call {} with the result.", "Give the result to {}."
        )
        self.talk.user(f"{asked} {then.format(second.name)}")
        self.talk.assistant("", "call", call)
        value = source.topic() if source.chance(0.5) else source.invented()
        self.talk.returned(bare_result(value))
        self.talk.assistant("", "call", Call(second.name, {second.parameters[0].name: value}))
        self._answer(make_result(source, second))


def _takes_one_text(tool: Tool) -> bool:
    return tool.style == "plain" and len(tool.parameters) == 1 and tool.parameters[0].kind == "string"


def write(
    source: Source, tokens: int, *, mix: Mix | None = None, tool_share: float = 0.6, system_tokens: int = 0
) -> Conversation:
    """A conversation of about so many tokens; a system prompt of ``system_tokens`` begins it."""
    return Writer(source, mix or source.rng.choice(MIXES)).write(
        tokens, tool_share=tool_share, system_tokens=system_tokens
    )


def conversation(
    seed: int, *, held_out: bool = False, tokens: int = 400, system_tokens: int = 0, tool_share: float = 0.6
) -> Conversation:
    """A conversation by its seed; ``held_out`` takes words and wordings that training never saw."""
    source = Source(seed, held_values=held_out, held_wordings=held_out)
    return write(source, tokens, tool_share=tool_share, system_tokens=system_tokens)


# --- Rendering ------------------------------------------------------------------------------------


def render(talk: Conversation) -> str:
    """The text that ``chat_template.jinja`` gives for the conversation, without the cost of jinja."""
    turns = talk.turns
    system = turns[0].content if turns and turns[0].role == "system" else None
    parts: list[str] = []
    if talk.tools or system is not None:
        tools = (
            "\n# Tools" + "".join("\n" + _tool_line(schema["function"]) for schema in talk.schemas())
            if talk.tools
            else ""
        )
        parts.append("<|im_start|>system" + (f"\n{system}" if system else "") + tools + "<|im_end|>\n")
    for turn in turns[1:] if system is not None else turns:
        calls = "".join(
            f'\n<tool_call>\n{{"name": "{call.name}", "arguments": {json.dumps(call.arguments, ensure_ascii=False)}}}\n</tool_call>'
            for call in turn.calls
        )
        parts.append(
            f"<|im_start|>{turn.role}"
            + (f"\n{turn.content}" if turn.content else "")
            + calls
            + "<|im_end|>\n"
        )
    return "".join(parts)


def _tool_line(function: dict[str, Any]) -> str:
    skeleton = _properties(function["parameters"])
    return f'{{"name": "{function["name"]}", "arguments": {skeleton}}} {function["description"]}'


def _properties(schema: dict[str, Any]) -> str:
    required = schema.get("required", list(schema["properties"]))
    fields = (
        f'"{name}": {_type(inner)}{"" if name in required else "?"}'
        for name, inner in schema["properties"].items()
    )
    return "{" + ", ".join(fields) + "}"


def _type(schema: dict[str, Any]) -> str:
    if schema["type"] == "array":
        return f"[{_type(schema['items'])}]"
    return _properties(schema) if schema["type"] == "object" else str(schema["type"])
