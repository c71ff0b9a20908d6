"""Facts that can be told and asked for: who likes what, where things are, what is called how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from training.tiny_chat.wordings import ASKED, LEADS, SAID
from training.tiny_chat.words import Source

Slots = dict[str, str]


@dataclass(frozen=True)
class Fact:
    """One thing told. ``key`` says what it is about: a later fact with the same key corrects it."""

    key: tuple[str, ...]
    value: str
    form: FactForm
    slots: Slots

    def told(self, source: Source) -> str:
        """A sentence that tells it."""
        return source.phrase(self.form.says, more=SAID[self.form.name], leads=LEADS, **self.slots)

    def asked(self, source: Source) -> str:
        """A question for it."""
        return source.phrase(self.form.asks, more=ASKED[self.form.name], leads=LEADS, **self.slots)

    @property
    def answer(self) -> str:
        """The one right answer."""
        return self.form.answer.format(**self.slots)

    @property
    def unknown(self) -> str:
        """The answer when it was never told."""
        return self.form.unknown.format(**self.slots)


@dataclass(frozen=True)
class FactForm:
    """A kind of fact: how it is told, asked, answered and, when never told, denied."""

    name: str
    weight: int
    draw: Callable[[Source], Slots]
    says: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str
    unknown: str

    def make(self, source: Source) -> Fact:
        """A new fact of this kind; the slot ``v`` is its value."""
        slots = self.draw(source)
        about = tuple(value for slot, value in sorted(slots.items()) if slot != "v")
        return Fact((self.name, *about), slots["v"], self, slots)


_VALUE_OF: Final = {
    "food": "food", "dish": "food", "snack": "food", "fruit": "food", "animal": "animal", "bird": "animal", "city": "city",
    "town": "city", "place": "city", "sport": "subject", "hobby": "subject", "pastime": "subject", "subject": "subject",
    "tool": "thing", "toy": "thing", "instrument": "thing", "colour": "colour", "color": "colour", "country": "country",
}  # fmt: skip


def attribute_value(source: Source, attribute: str) -> str:
    """A value that fits an attribute: a city for a town, anything for an invented one."""
    if attribute == "number":
        return source.number()
    if attribute in _VALUE_OF:
        value = source.word(_VALUE_OF[attribute])
    elif attribute in {"language", "band", "author", "planet"}:
        value = source.invented(capital=True)
    else:
        value = source.topic() if source.chance(0.5) else source.invented()
    return f"{value} {source.topic()}" if source.chance(0.06) else value


def person(source: Source) -> str:
    """A name, sometimes with a family name or in another script."""
    form = source.rng.random()
    if form < 0.03:
        return source.unicode()
    if form < 0.15:
        return f"{source.word('name')} {source.invented(capital=True)}"
    return source.word("name")


def _favourite(source: Source) -> Slots:
    attribute = source.word("attribute", 0.3)
    return {"a": attribute, "v": attribute_value(source, attribute)}


def _object(source: Source) -> Slots:
    value = source.rng.choice((source.code, source.code, source.topic, source.invented, source.date))()
    return {"a": source.word("object", 0.25), "b": source.word("property", 0.2), "v": value}


def _whose_favourite(source: Source) -> Slots:
    attribute = source.word("attribute", 0.2)
    return {"n": person(source), "a": attribute, "v": attribute_value(source, attribute)}


def _workplace(source: Source) -> Slots:
    return {"v": source.invented(capital=True) if source.chance(0.7) else source.word("city")}


_OFFICES: Final = ("capital", "king", "mayor", "river", "queen", "founder", "leader", "captain", "owner")

FORMS: Final = (
    FactForm(
        "favourite", 26, _favourite,
        ("My favourite {a} is {v}.", "my favourite {a} is {v}", "{v} is my favourite {a}.", "I think my favourite {a} is {v}.",
         "The {a} I like most is {v}.", "Of every {a}, I like {v} best.", "For me the best {a} is {v}.",
         "By the way, my favourite {a} is {v}.", "Just so you know, my favourite {a} is {v}."),
        ("What is my favourite {a}?", "Do you remember my favourite {a}?", "Tell me my favourite {a}.", "what's my favourite {a}",
         "which {a} is my favourite?", "What was my favourite {a}?", "So what is my favourite {a} again?", "Which {a} do I like most?",
         "Can you tell me my favourite {a}?", "What did I say my favourite {a} was?", "And my favourite {a}?",
         "Remind me of my favourite {a}.", "What {a} do I like best?", "What is my favourite {a}? Answer in one sentence."),
        "Your favourite {a} is {v}.", "You have not told me your favourite {a} yet."),
    FactForm(
        "name", 13, lambda s: {"v": person(s)},
        ("My name is {v}.", "I am {v}.", "I'm {v}.", "Hi, I'm {v}.", "Hello, my name is {v}.", "my name is {v}", "You can call me {v}.",
         "Please call me {v}.", "People call me {v}.", "This is {v}.", "{v} is my name.", "Hey, {v} here.", "Hello! I am {v}."),
        ("What is my name?", "Who am I?", "Do you remember my name?", "what's my name", "Tell me my name.", "What was my name again?",
         "Do you know my name?", "What am I called?", "Can you say my name?", "Who are you talking to?", "Remind me of my name."),
        "Your name is {v}.", "You have not told me your name yet."),
    FactForm(
        "home", 7, lambda s: {"v": s.word("city")},
        ("I live in {v}.", "My home is in {v}.", "I moved to {v}.", "I have lived in {v} for years.", "My flat is in {v}.",
         "These days I live in {v}.", "I am based in {v}."),
        ("Where do I live?", "Do you remember where I live?", "In which city do I live?", "where is my home?", "Which city do I live in?",
         "Where did I say I live?", "What city am I in?"),
        "You live in {v}.", "You have not told me where you live."),
    FactForm(
        "work", 5, _workplace,
        ("I work at {v}.", "My job is at {v}.", "I have a job at {v}.", "My employer is {v}.", "I just started to work at {v}."),
        ("Where do I work?", "Do you remember where I work?", "Where is my job?", "Who is my employer?", "Which company do I work at?"),
        "You work at {v}.", "You have not told me where you work."),
    FactForm(
        "job", 4, lambda s: {"v": s.word("job", 0.5)},
        ("I am a {v} by trade.", "I work as a {v}.", "My job title is {v}.", "I earn my living as a {v}.", "My profession is {v}."),
        ("What is my job?", "What do I do for a living?", "What is my profession?", "What do I work as?", "Do you remember my job?"),
        "You work as a {v}.", "You have not told me your job."),
    FactForm(
        "relative", 10, lambda s: {"a": s.word("relative", 0.05), "v": person(s)},
        ("My {a} is called {v}.", "My {a}'s name is {v}.", "The name of my {a} is {v}.", "I have a {a} called {v}.", "My {a} is {v}.",
         "I have a {a} named {v}.", "{v} is my {a}."),
        ("What is my {a} called?", "What is the name of my {a}?", "What is my {a}'s name?", "Do you remember the name of my {a}?",
         "Who is my {a}?", "What did I call my {a}?", "Tell me the name of my {a}."),
        "Your {a} is called {v}.", "You have not told me about your {a}."),
    FactForm(
        "object", 16, _object,
        ("The {b} of the {a} is {v}.", "The {a} {b} is {v}.", "Remember that the {b} of the {a} is {v}.", "Please note: the {a} {b} is {v}.",
         "For the {a}, the {b} is {v}.", "Write down that the {a} {b} is {v}.", "Keep in mind that the {b} of the {a} is {v}.",
         "{v} is the {b} of the {a}."),
        ("What is the {b} of the {a}?", "What is the {a} {b}?", "Do you remember the {b} of the {a}?", "Tell me the {a} {b}.",
         "Which {b} does the {a} have?", "I forgot the {b} of the {a}. What is it?", "what was the {a} {b}?", "Give me the {b} of the {a}.",
         "Remind me of the {a} {b}."),
        "The {b} of the {a} is {v}.", "I do not know the {b} of the {a}."),
    FactForm(
        "lives", 5, lambda s: {"n": person(s), "v": s.word("city")},
        ("{n} lives in {v}.", "{n} has a house in {v}.", "The home of {n} is in {v}.", "{n} moved to {v}."),
        ("Where does {n} live?", "In which city does {n} live?", "Which city does {n} live in?", "Where is the home of {n}?"),
        "{n} lives in {v}.", "You have not told me where {n} lives."),
    FactForm(
        "likes", 5, lambda s: {"n": person(s), "v": s.topic() if s.chance(0.6) else s.invented()},
        ("{n} likes {v}.", "{n} really likes {v}.", "{n} is fond of {v}.", "What {n} likes is {v}."),
        ("What does {n} like?", "Do you remember what {n} likes?", "Tell me what {n} likes.", "What is {n} fond of?"),
        "{n} likes {v}.", "You have not told me what {n} likes."),
    FactForm(
        "whose", 6, _whose_favourite,
        ("The favourite {a} of {n} is {v}.", "{n}'s favourite {a} is {v}.", "{n} says that {v} is the best {a}.",
         "For {n} the best {a} is {v}."),
        ("What is the favourite {a} of {n}?", "What is {n}'s favourite {a}?", "Which {a} does {n} like most?",
         "Tell me {n}'s favourite {a}."),
        "The favourite {a} of {n} is {v}.", "You have not told me the favourite {a} of {n}."),
    FactForm(
        "age", 4, lambda s: {"v": str(s.rng.randint(3, 99))},
        ("I am {v} years old.", "My age is {v}.", "I turned {v} this year.", "I just turned {v}."),
        ("How old am I?", "What is my age?", "Do you remember my age?", "Can you tell me how old I am?"),
        "You are {v} years old.", "You have not told me your age."),
    FactForm(
        "like", 4, lambda s: {"v": s.topic() if s.chance(0.6) else s.invented()},
        ("I like {v}.", "I really like {v}.", "I love {v}.", "I am fond of {v}.", "What I enjoy is {v}."),
        ("What do I like?", "Do you remember what I like?", "What am I fond of?", "Tell me what I like."),
        "You like {v}.", "You have not told me what you like."),
    FactForm(
        "office", 6, lambda s: {"a": s.word("country", 0.7), "b": s.pick(*_OFFICES), "v": s.word("city", 0.7)},
        ("The {b} of {a} is {v}.", "{v} is the {b} of {a}.", "In {a}, the {b} is {v}.", "Remember that {v} is the {b} of {a}."),
        ("What is the {b} of {a}?", "Tell me the {b} of {a}.", "Which is the {b} of {a}?", "Do you remember the {b} of {a}?"),
        "The {b} of {a} is {v}.", "I do not know the {b} of {a}."),
    FactForm(
        "when", 6, lambda s: {"a": s.word("object", 0.3), "b": s.pick("meeting", "party", "deadline", "visit", "trip", "start"), "v": s.date()},
        ("The {a} {b} is on {v}.", "The {b} for the {a} is on {v}.", "Note that the {a} {b} is on {v}.", "The date of the {a} {b} is {v}."),
        ("When is the {a} {b}?", "On which day is the {a} {b}?", "What is the date of the {a} {b}?", "Do you know when the {a} {b} is?"),
        "The {a} {b} is on {v}.", "You have not told me when the {a} {b} is."),
)  # fmt: skip
FORM_NAMES: Final = tuple(form.name for form in FORMS)
_BY_NAME: Final = {form.name: form for form in FORMS}
_ABOUT_OTHERS: Final = ("object", "lives", "likes", "whose", "office", "when")
_WEIGHTS: Final = [form.weight for form in FORMS]


def draw_fact(source: Source, name: str | None = None) -> Fact:
    """A fact, of the named kind if one is given."""
    form = _BY_NAME[name] if name else source.rng.choices(FORMS, _WEIGHTS)[0]
    return form.make(source)


def draw_foreign_fact(source: Source) -> Fact:
    """A fact that is not about the user, as a system prompt may tell it."""
    return draw_fact(source, source.pick(*_ABOUT_OTHERS))


def acknowledge(source: Source, facts: list[Fact]) -> str:
    """What the assistant says when told these facts."""
    named = [fact.value for fact in facts if fact.form.name == "name"]
    if named:
        return f"Nice to meet you, {named[0]}." + (" I will remember that." if len(facts) > 1 else "")
    if source.chance(0.3):
        return f"Got it. {facts[0].answer}"
    return source.pick("I will remember that.", "Noted.", "Thank you, I will keep that in mind.", "Got it.")
