"""Tools with invented schemas, requests that need them, their results, and the answers to those."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

from training.tiny_chat.wordings import CALL_MANY, CALL_NONE, CALL_ONE, CALL_ORDERED
from training.tiny_chat.words import Source

Value = Any  # A JSON value: what an argument or a result may be.


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool; ``inner`` holds an object's properties or a list's element."""

    name: str
    kind: str
    required: bool = True
    inner: tuple[Parameter, ...] = ()

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        if self.kind == "array":
            return {"type": "array", "items": self.inner[0].schema()}
        if self.kind == "object":
            return {"type": "object", "properties": {p.name: p.schema() for p in self.inner}}
        return {"type": self.kind}


@dataclass(frozen=True)
class Tool:
    """A function that the assistant may call. ``style`` says which requests fit it."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    verb: str
    noun: str
    style: str = "plain"

    def schema(self) -> dict[str, Any]:
        """The OpenAI form of the tool."""
        parameters = {
            "type": "object",
            "properties": {p.name: p.schema() for p in self.parameters},
            "required": [p.name for p in self.parameters if p.required],
        }
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


@dataclass(frozen=True)
class Call:
    """A tool's name and the arguments for it."""

    name: str
    arguments: dict[str, Value] = field(default_factory=dict)


# --- Making tools ---------------------------------------------------------------------------------

_DESCRIPTIONS: Final = (
    "{V} a {n} by its {p}.", "The {n} tool.", "Tells you the {n} of something.", "{N} service.", "{V} the {n}.", "{V} {n}.",
    "{V} the {n} for a given {p}.", "Use this to {v} the {n}.", "Applies the {n} to the {p}.", "Returns the {n} of the {p}.",
    "{V} the {n} at a {p}.", "Tool for the {n}. It needs the {p}.", "{V} a {n} with a {p}.", "Apply the {n} function to the {p}.", "",
)  # fmt: skip
_OPERATIONS: Final = {
    "add": ("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.", "what is {a} + {b}", "{a} + {b}", "Add {b} to {a}."),
    "multiply": ("What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.", "what is {a} times {b}", "{a} * {b}"),
    "subtract": ("What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.", "what is {a} minus {b}", "{a} - {b}"),
    "divide": ("What is {a} / {b}?", "What is {a} divided by {b}?", "Divide {a} by {b}.", "what is {a} divided by {b}", "{a} / {b}"),
}  # fmt: skip
_NAMED: Final = (
    "Create a {n} named '{v}' ({g}) - {d}", "Create a {n} named '{v}' - {d}", "Make a {n} called '{v}' - {d}", "New {n} '{v}' ({g}) - {d}",
    'Add a {n} with the name "{v}": {d}', "Register the {n} '{v}', {d}", "Please create a {n} named {v} - {d}",
)  # fmt: skip
_COMPOSED: Final = (
    "Tell me a {n} about {t}.", "Give me a {n} about {t}.", "Write a {n} about {t}.", "Make a {n} about {t}.",
    "I want a {n} about {t}.", "Using the tool, write a {n} about {t}.",
)  # fmt: skip
_WORKS: Final = ("story", "poem", "riddle", "tale", "speech", "letter", "song", "slogan", "fable", "toast")
# How often a tool has none to four parameters.
_COUNTS: Final = (8, 50, 26, 10, 6)
_COUNTS_IN_TRAINING: Final = (14, 32, 24, 16, 14)


def _parameter(source: Source, name: str, depth: int = 0) -> Parameter:
    kinds = ("string", "integer", "number", "boolean", "array", "object")
    kind = source.rng.choices(kinds, (56, 22, 7, 5, 6, 0 if depth else 4))[0]
    if kind == "array":
        element = source.rng.choices(("string", "integer"), (3, 1))[0]
        return Parameter(name, kind, inner=(Parameter("item", element),))
    if kind == "object":
        inner = tuple(_parameter(source, key, 1) for key in _names(source, source.rng.choice((1, 2, 2))))
        if all(p.kind != "array" for p in inner):
            return Parameter(name, kind, inner=inner)
        kind = "string"
    return Parameter(name, kind)


def _names(source: Source, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = source.word("parameter", 0.25)
        if source.chance(0.1):
            name = f"{name}_{source.word('parameter', 0.25)}"
        if name not in names:
            names.append(name)
    return names


def _parameters(source: Source, count: int) -> tuple[Parameter, ...]:
    made = [_parameter(source, name) for name in _names(source, count)]
    if count > 1 and source.chance(0.2):
        made[-1] = Parameter(made[-1].name, made[-1].kind, required=False, inner=made[-1].inner)
    return tuple(made)


def _tool_name(source: Source, verb: str, noun: str) -> str:
    noun = noun.replace(" ", "_")
    form = source.rng.random()
    if form < 0.55:
        return f"{verb}_{noun}"
    if form < 0.77:
        return f"{noun}_{source.pick('function', 'tool', 'search', 'service', 'finder', 'generator', 'api')}"
    if form < 0.83:
        return verb + "".join(part.capitalize() for part in noun.split("_"))
    if form < 0.88:
        return f"my_{noun}_tool"
    return noun if form < 0.95 else f"{noun}_{verb}"


def make_tool(source: Source, count: int | None = None) -> Tool:
    """A tool with so many parameters, or with none to four."""
    form = source.rng.random()
    if count is None and form < 0.12:
        return _special_tool(source, form)
    verb, noun = source.word("verb", 0.1), source.word("noun", 0.35)
    if source.chance(0.2):
        noun = f"{noun} {source.word('noun', 0.35)}"
    if count is None:
        shares = _COUNTS_IN_TRAINING if source.trains else _COUNTS
        count = source.rng.choices((0, 1, 2, 3, 4), shares)[0]
    parameters = _parameters(source, count)
    first = parameters[0].name if parameters else source.word("parameter", 0)
    slots = {
        "V": verb.capitalize(),
        "v": verb,
        "N": noun.capitalize(),
        "n": noun,
        "p": first.replace("_", " "),
    }
    name = _tool_name(source, verb, noun)
    if not parameters and source.chance(0.2):
        name += "_no_args"
    return Tool(name, source.phrase(_DESCRIPTIONS, **slots), parameters, verb, noun)


def _special_tool(source: Source, form: float) -> Tool:
    """A calculator, a maker of named things, or a writer of something about a topic."""
    if form < 0.05:
        verb = source.pick(*_OPERATIONS)
        first, second = ("a", "b") if source.chance(0.5) else _names(source, 2)
        kind = source.pick("integer", "integer", "number")
        name = source.pick(
            verb, f"{verb}_numbers", f"{verb}_tool", f"my_{verb}_tool", f"{verb}_{source.invented()}"
        )
        return Tool(
            name,
            f"{verb.capitalize()} two numbers.",
            (Parameter(first, kind), Parameter(second, kind)),
            verb,
            verb,
            "operation",
        )
    if form < 0.09:
        noun = source.word("noun", 0.4)
        name_key = source.pick(f"{noun}_name", f"{noun}_name", "name", "title")
        other = source.pick("description", "description", "note", "text")
        name = source.pick(f"create_{noun}", f"{source.invented()}_{noun}", f"add_{noun}", f"new_{noun}")
        description = source.pick(
            f"Tool for creating a {noun}.", f"Create a {noun}.", f"Adds a {noun} with a name."
        )
        return Tool(
            name,
            description,
            (Parameter(name_key, "string"), Parameter(other, "string")),
            "create",
            noun,
            "named",
        )
    noun = source.pick(*_WORKS) if source.chance(0.6) else source.invented()
    keys = _names(source, source.rng.choice((1, 2, 2)))
    name = source.pick(noun.capitalize(), f"{noun}_generator", f"write_{noun}")
    description = source.pick(f"{noun.capitalize()} to tell user.", f"A {noun}.", f"Write a {noun}.")
    return Tool(name, description, tuple(Parameter(key, "string") for key in keys), "write", noun, "composed")


def make_tools(source: Source, count: int) -> list[Tool]:
    """Tools that cannot be mistaken for one another: no two share a word of their nouns."""
    tools: list[Tool] = []
    taken: set[str] = set()
    while len(tools) < count:
        tool = make_tool(source)
        words = {*tool.noun.split(), tool.name}
        if tool.style != "plain":
            words.add(tool.style)
        if not words & taken:
            tools.append(tool)
            taken |= words
    return tools


# --- Asking for them ------------------------------------------------------------------------------

_NONE: Final = (
    "Call {f}.", "What is the value of {f}()? Use the tool.", "{V} the {n}.", "Please {v} the {n}.", "What is the {n}?", "Use {f}.",
    "Use the {n} tool.", "Can you {v} the {n}?", "I need the {n}.", "Run {f}().", "Tell me the {n}.", "what is {f}()?", "{f}()",
    "Could you {v} the {n} for me?", "Show me the {n}, please.", "Give me the {n}.",
)  # fmt: skip
_ONE: Final = (
    "What is the {n} of {x}?", "What is the {n} for {x}?", "What is the {n} in {x}?", "Please {v} the {n} for {x}.",
    "Can you {v} the {n} of {x}?", "{v} the {n} of {x}", "Call {f} with {x}.", "Use {f} on {x}.", "What is {f}({x})?",
    "what is the value of {f}({x})?", "What is the value of {f}({x})? Use the tool.", "Use the {n} tool with {k} {x}.",
    "Call {f} with {k}={x}.", "What is the {n} when the {k} is {x}?", "What does {f} return for {x}?", "I need the {n} for {x}.",
    "Apply {f} to {x}, please.", "What's the {n} in {x}?", "what is the {n} like in {x} today?", "How is the {n} in {x} now?",
    "{v} {n} {x}", "Give me the {n} of {x}.", "Tell me the {n} for {x}.", "I want to know the {n} of {x}.",
    "Could you {v} the {n} with the {k} {x}?", "{n} for {x}", "{V} the {n} at {x}.", "Do you know the {n} for {x}?",
    "Use the tool to {v} the {n} of {x}.", "{f}({x})", "Use the {n} tool: {x}", "What {n} do you get for {x}?",
    "Please call {f} with the {k} set to {x}.", "{V} the {n}. The {k} is {x}.",
)  # fmt: skip
_MANY: Final = (
    "Call {f} with {kv}.", "Use {f} with {kv}.", "{V} the {n} with {kv}.", "Please {v} the {n} with {kv}.", "Use the {n} tool with {kv}.",
    "Can you {v} the {n} for {kv}?", "I need the {n} for {kv}.", "What is the {n} for {kv}?", "Run {f} with {kv}.",
    "{V} the {n}: {kv}", "{f}({kv})", "What is {f}({kv})?", "Give me the {n}: {kv}.", "{v} {n}, {kv}", "Could you {v} the {n}? Use {kv}.",
)  # fmt: skip
_ORDERED: Final = (
    "What is the {n} of {xs}?", "Please {v} the {n} for {xs}.", "What is {f}({cs})?", "Call {f} with {xs}.", "Run {f} on {xs}.",
    "{V} the {n} of {xs}.", "I need the {n} of {xs}.", "{f}({cs})", "Use {f} on {xs}.",
)  # fmt: skip


def argument(source: Source, parameter: Parameter) -> Value:
    """A value of the parameter's type."""
    if parameter.kind == "integer":
        return int(source.number()) * (-1 if source.chance(0.04) else 1)
    if parameter.kind == "number":
        return float(source.decimal()) if source.chance(0.7) else int(source.number())
    if parameter.kind == "boolean":
        return source.chance(0.5)
    if parameter.kind == "array":
        return [argument(source, parameter.inner[0]) for _ in range(source.rng.choice((1, 2, 2, 3)))]
    if parameter.kind == "object":
        return {inner.name: argument(source, inner) for inner in parameter.inner}
    return text_argument(source)


def text_argument(source: Source) -> str:
    """A string value: mostly one word, sometimes several, a place with a comma, or foreign letters."""
    form = source.rng.random()
    if form < 0.42:
        return source.word(source.pick("city", "name", "animal", "thing", "food"), 0.45)
    if form < 0.58:
        return f"{source.word('city')}, {source.pick(source.word('region', 0), source.word('region', 0), source.word('country', 0.2))}"
    if form < 0.68:
        return f"{source.word('city')} {source.word('city')}, {source.word('region', 0)}"
    if form < 0.78:
        return " ".join(source.topic() for _ in range(source.rng.choice((2, 2, 3))))
    if form < 0.83:
        return f"{source.word('name')} {source.invented(capital=True)}"
    if form < 0.90:
        return source.unicode()
    if form < 0.95:
        return source.code()
    return (
        source.date()
        if source.chance(0.5)
        else f"{source.invented()}/{source.invented()}.{source.pick('txt', 'md', 'py', 'csv')}"
    )


def spoken(value: Value, *, quote: str = "") -> str:
    """A value as a user writes it; lists and objects in JSON."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    return json.dumps(value, ensure_ascii=False)


def request(source: Source, tool: Tool) -> tuple[str, Call]:
    """A request that this tool answers, and the call that does."""
    if tool.style == "operation":
        return _operation(source, tool)
    if tool.style == "named":
        return _named(source, tool)
    if tool.style == "composed":
        return _composed(source, tool)
    given = [p for p in tool.parameters if p.required or source.chance(0.5)]
    arguments = {p.name: argument(source, p) for p in given}
    slots = {"f": tool.name, "n": tool.noun, "v": tool.verb, "V": tool.verb.capitalize()}
    if not arguments:
        text = source.phrase(_NONE, more=CALL_NONE, **slots)
    elif len(arguments) == 1 and len(tool.parameters) == 1:
        text = _with_one(source, slots, arguments)
    else:
        text = _with_many(source, slots, arguments, all_given=len(arguments) == len(tool.parameters))
    if source.chance(0.3) and not text.startswith(tool.name):
        text = text[0].upper() + text[1:]
    return text, Call(tool.name, arguments)


def _with_one(source: Source, slots: dict[str, str], arguments: dict[str, Value]) -> str:
    ((key, value),) = arguments.items()
    quote = source.pick("'", '"') if source.chance(0.15) else ""
    key = key.replace("_", " ") if source.chance(0.5) else key
    return source.phrase(_ONE, more=CALL_ONE, x=spoken(value, quote=quote), k=key, **slots)


def _with_many(source: Source, slots: dict[str, str], arguments: dict[str, Value], *, all_given: bool) -> str:
    simple = all(not isinstance(v, list | dict) and "," not in str(v) for v in arguments.values())
    if simple and all_given and source.chance(0.35):
        said = [spoken(value) for value in arguments.values()]
        listed = f"{', '.join(said[:-1])} and {said[-1]}"
        return source.phrase(_ORDERED, more=CALL_ORDERED, xs=listed, cs=", ".join(said), **slots)
    return source.phrase(_MANY, more=CALL_MANY, kv=_pairs(source, arguments), **slots)


def _pairs(source: Source, arguments: dict[str, Value]) -> str:
    items = list(arguments.items())
    if source.chance(0.4):
        source.rng.shuffle(items)
    between, link = (
        source.pick(" and ", ", ", " and the ", ", "),
        source.pick(" ", "=", ": ", " set to ", " "),
    )
    plain_keys = source.chance(0.5)
    pairs = []
    for key, value in items:
        quote = source.pick("'", '"') if "," in str(value) or source.chance(0.2) else ""
        pairs.append(f"{key.replace('_', ' ') if plain_keys else key}{link}{spoken(value, quote=quote)}")
    return between.join(pairs)


def _operation(source: Source, tool: Tool) -> tuple[str, Call]:
    first, second = (argument(source, p) for p in tool.parameters)
    text = source.phrase(_OPERATIONS[tool.verb], a=spoken(first), b=spoken(second))
    if source.chance(0.15):
        text += " Use the tool."
    return text, Call(tool.name, {tool.parameters[0].name: first, tool.parameters[1].name: second})


def _named(source: Source, tool: Tool) -> tuple[str, Call]:
    name = source.unicode() if source.chance(0.6) else source.invented(capital=True)
    described = f"a {source.pick('small', 'large', 'new', source.word('colour'))} {source.topic()} {source.pick('company', 'shop', 'club', 'group', 'service')}"
    gloss = f"{source.word('name')} {source.pick('Group', 'House', 'Works', 'Club')}"
    text = source.phrase(_NAMED, n=tool.noun, v=name, g=gloss, d=described)
    return text, Call(tool.name, {tool.parameters[0].name: name, tool.parameters[1].name: described})


def _composed(source: Source, tool: Tool) -> tuple[str, Call]:
    topic = source.topic() if source.chance(0.7) else source.invented()
    text = source.phrase(_COMPOSED, n=tool.noun, t=topic)
    return text, Call(tool.name, {p.name: composed_text(p.name, topic) for p in tool.parameters})


def composed_text(key: str, topic: str) -> str:
    """What this model, which has nothing to tell, writes about a topic."""
    return f"A {key.replace('_', ' ')} about {topic}."


# --- Their results --------------------------------------------------------------------------------

_SENTENCES: Final = (
    "The {n} is {x}.", "It is {x}.", "It's {x}.", "{N} likes the {t}.", "{N} found the {t} in {C}.", "There are {x} of them.",
    "Created {n}: {x} - {t}", "Done. The {n} was saved as {x}.",
)  # fmt: skip
_ERRORS: Final = (
    "not found", "bad {t}", "no such {n}", "permission denied", "Missing required argument '{p}'.", "{t} is not a valid {p}.",
    "the service is down", "Unknown {p}.",
)  # fmt: skip
RETRY_ERRORS: Final = (
    "Error: timeout, please try again.",
    "Error: busy, try again.",
    "Error: try again later.",
)


@dataclass(frozen=True)
class Result:
    """What a tool returned, its value in words, and the assistant's answer to it."""

    content: str
    value: str
    answer: str


def make_result(source: Source, tool: Tool) -> Result:
    """A result: a bare value, a sentence, JSON or an error."""
    form = source.rng.random()
    if form < 0.38:
        return bare_result(_plain_value(source))
    if form < 0.62:
        slots = {
            "n": tool.noun,
            "x": _plain_value(source),
            "N": source.word("name"),
            "t": source.topic(),
            "C": source.word("city"),
        }
        sentence = source.phrase(_SENTENCES, **slots)
        return Result(sentence, sentence, sentence)
    if form < 0.9:
        return _json_result(source, tool)
    parameter = tool.parameters[0].name if tool.parameters else source.word("parameter")
    error = source.phrase(_ERRORS, t=source.topic(), n=tool.noun, p=parameter)
    return Result(f"Error: {error}", error, f"The tool failed: {error}")


def bare_result(value: str) -> Result:
    """A result that is a value and nothing else."""
    return Result(value, value, f"The result is {value}.")


def _plain_value(source: Source) -> str:
    makers = (
        source.number,
        source.topic,
        source.decimal,
        source.invented,
        source.code,
        source.unicode,
        source.date,
    )
    value = source.rng.choices(makers, (5, 3, 2, 3, 2, 1, 1))[0]()
    return f"{value} {source.topic()}" if source.chance(0.15) else value


def _json_result(source: Source, tool: Tool) -> Result:
    form = source.rng.random()
    if form < 0.2:
        values = [_plain_value(source) for _ in range(source.rng.choice((2, 3)))]
        said = f"{', '.join(values[:-1])} and {values[-1]}"
        return Result(json.dumps(values, ensure_ascii=False), said, f"The results are {said}.")
    first = source.pick(tool.noun.replace(" ", "_"), "result", "value", "status", source.word("parameter"))
    keys = (
        [first]
        if form < 0.6
        else [first, *(k for k in _names(source, 2) if k != first)][: source.rng.choice((2, 2, 3))]
    )
    record: dict[str, Value] = {key: _json_value(source) for key in keys}
    said = " and the ".join(f"{key.replace('_', ' ')} is {spoken(value)}" for key, value in record.items())
    return Result(json.dumps(record, ensure_ascii=False), said, f"The {said}.")


def _json_value(source: Source) -> Value:
    form = source.rng.random()
    if form < 0.4:
        return int(source.number())
    if form < 0.5:
        return float(source.decimal())
    return source.chance(0.5) if form < 0.55 else _plain_value(source)
