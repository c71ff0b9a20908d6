"""Small talk, filler and the long briefs that system prompts hold: everything between telling and asking."""

from __future__ import annotations

from typing import Final

from training.tiny_chat.words import Source

_TALK: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (("Hello!", "Hi", "Hello there.", "Hey!", "Good morning.", "Good evening!", "hi there", "hello", "Hello", "Hi!"),
     ("Hello! How can I help you today?", "Hi! What would you like to talk about?")),
    (("How are you?", "How are you today?", "how is it going?", "How do you feel?", "how are you", "Are you well?"),
     ("I am doing well, thank you. How are you?",)),
    (("Thanks!", "Thank you.", "Thank you very much!", "thanks a lot", "Great, thanks."), ("You are welcome!",)),
    (("Bye!", "Goodbye.", "See you later.", "I have to go now.", "Talk to you soon."), ("Goodbye! It was nice talking to you.",)),
    (("What can you do?", "How can you help me?", "What are you good at?", "Help"),
     ("I can chat with you, remember what you tell me, and use tools.",)),
    (("Are you a human?", "Are you a robot?", "What are you?", "Are you real?", "Are you a person?"), ("I am a very small language model.",)),
    (("Tell me something funny.", "Make me laugh.", "Do you know something funny?"),
     ("Why did the cat sit on the computer? It wanted to watch the mouse.",)),
    (("Tell me a story.", "Tell me a short story.", "Do you know a story?"),
     ("Once there was a small fox who found a lantern in the snow. It carried the light home, and the whole forest was warm.",)),
    (("I am tired.", "I feel tired today.", "I did not sleep well.", "I need some sleep."),
     ("I am sorry to hear that. I hope you can rest soon.",)),
    (("I am happy.", "I feel great today!", "Today is a good day.", "What a good day!"), ("That is good to hear!",)),
    (("I am sad.", "I feel sad today.", "I had a bad day.", "Nothing works today."), ("I am sorry to hear that. Do you want to talk about it?",)),
    (("I am fine.", "I am well, thank you.", "I am good.", "Well, thanks."), ("I am glad to hear that.",)),
    (("Yes.", "Yes please.", "Sure.", "yes"), ("Great! Please go on.",)),
    (("No.", "No, thank you.", "Not really.", "no"), ("That is all right.",)),
    (("The sun is out today.", "It is sunny outside.", "What a lovely day.", "It is warm today."),
     ("That sounds lovely. A walk outside would be nice.",)),
    (("It is raining again.", "It is cold today.", "It snows outside."), ("Then it is a good day to stay inside with a warm drink.",)),
    (("You are funny.", "You are very kind.", "I like you.", "You are nice."), ("Thank you, that is kind of you to say.",)),
    (("Who made you?", "Who created you?", "Where do you come from?"), ("I was trained from scratch on made up conversations.",)),
    (("Can you remember things?", "Do you have a memory?", "Is your memory good?"), ("Yes, I remember what you tell me in this conversation.",)),
    (("What time is it?", "What day is it today?", "Do you have a clock?"), ("I do not have a clock, so I cannot tell you.",)),
    (("Good night.", "Good night!", "Sleep well."), ("Good night! Sleep well.",)),
    (("Let's talk.", "Can we talk?", "I want to talk."), ("Of course. What is on your mind?",)),
    (("I am bored.", "I have nothing to do.", "What should I do today?"), ("You could read a book or go for a walk.",)),
    (("Are you there?", "Can you hear me?", "Are you still there?"), ("Yes, I am here.",)),
    (("What is your favourite colour?", "How old are you?", "Where do you live?", "Do you have a family?"),
     ("I am only a small language model, so I have none of that.",)),
    (("Can you help me?", "I need some help.", "I have a question.", "Can I ask you something?"), ("Of course. What do you need?",)),
    (("That is great!", "Wonderful!", "Nice.", "Cool.", "Very good."), ("I am glad you think so.",)),
    (("That is wrong.", "No, that is not right.", "You are wrong."), ("I am sorry about that. Please tell me the right answer.",)),
    (("My friend is ill.", "My dog is ill.", "My mother is ill."), ("I am sorry to hear that. I hope things get better soon.",)),
    (("I am hungry.", "I am thirsty.", "I need a break."), ("Then it is time for a little break.",)),
    (("I am working.", "I am at work.", "I am writing some code."), ("I hope it goes well.",)),
    (("OK", "Okay.", "I see.", "All right."), ("Is there anything else I can help you with?",)),
    (("Who are you?", "What is your name?", "Do you have a name?"), ("I am a small language model without a name.",)),
)  # fmt: skip
_QUESTIONS: Final = (
    "Why is the {t} {c}?", "How does a {t} work?", "Who invented the {t}?", "What is a {t}?", "How many {t} are there in {C}?",
    "When was {N} born?", "How far is {C} from here?", "How tall is {N}?", "Is a {t} bigger than a {u}?", "What does {t} mean?",
    "Who wrote {T}?", "What happened in {C} in {n}?", "Why do people like {t}?", "how do I make {t}?", "Which is better, {t} or {u}?",
    "Why is the sky {c}?", "How old is {N}?", "What is {t} made of?", "Where does {t} come from?", "Explain {t} to me.",
)  # fmt: skip
_WISHES: Final = (
    "Write me a poem about {t}.", "Can you write me a poem?", "Write a song about {t}.", "Draw a {t} for me.",
    "Write some code for {t}.", "Can you cook {t}?", "Sing a song.", "Write an essay on {t}.", "Buy me a {t}.", "Paint the {t} {c}.",
)  # fmt: skip
_CHAT: Final = (
    (("What do you think about {t}?", "What is your opinion on {t}?", "Your thoughts on {t}?"), "I think {t} can be very interesting."),
    (("I went to see the {t} yesterday.", "Yesterday I saw a {t}.", "I saw a {t} on my way."), "That sounds like fun. How was the {t}?"),
    (("Can we talk about {t}?", "Let's talk about {t}.", "I want to talk about {t}."), "Of course. What would you like to say about {t}?"),
    (("Tell me something about {t}.", "What do you know about {t}?", "Do you know {t}?"), "I am a small model, so I do not know much about {t}."),
    (("I am going to {C} next week.", "We are travelling to {C} soon.", "My next trip goes to {C}."), "Have a good trip to {C}!"),
    (("I bought a new {t} today.", "I found a {t} in the street.", "Someone gave me a {t}."), "How nice! What will you do with the {t}?"),
    (("Do you like {t}?", "Do you enjoy {t}?", "Are you fond of {t}?"), "I cannot try {t} myself, but I like to hear about it."),
    (("I met {N} this morning.", "{N} came to visit me.", "I talked to {N} today."), "That is nice. How is {N}?"),
    (("Say {t}.", "Please say {t}.", "Repeat after me: {t}", "Just say {t}."), "{t}"),
)  # fmt: skip
_PROSE: Final = (
    "The {t} stood near the {u}.", "{N} carried the {t} to the {u}.", "There was a {t} under the {u}, and {N} looked at it.",
    "In the morning {N} cleaned the {t}.", "Nobody saw the {t}.", "Then {N} put the {u} next to the {t} and went home.",
    "It was {c}, and the people of {C} were proud of it.", "After {n} days the {t} was gone.", "{N} and {M} met in {C} to talk about {t}.",
    "The {t} cost {n} coins, which was too much.", "Some said the {u} was better.",
)  # fmt: skip
_BRIEF: Final = (
    "Answer politely and keep your answers short.", "Use a tool when one fits the question.", "Never make up an answer.",
    "You work together with other agents in a team.", "If you do not know something, say so.", "Be patient with every customer of {T}.",
    "The office in {C} opens at {n} and closes late.", "Reports about {t} go to {N} at the end of the week.",
    "Section {n}: how to handle {t} and {u}.", "When a visitor asks about {t}, speak to {N} first.",
    "Our team looks after the {t}, the {u} and everything in between.", "Do not share the plans of {T} with anyone outside the team.",
    "The {c} folder holds the notes about {t}.", "Every request is answered in the order in which it came.",
    "{N} leads the group in {C}, and {M} keeps the records.", "The company {T} was founded in {C} and sells {t}.",
    "Write numbers as digits and names as they were given.", "Step {n}: check the {t}, then write down what you found.",
    "Remember what the user tells you, and repeat it exactly when asked.", "The warehouse in {C} has {n} boxes of {t}.",
    "In case of doubt, ask {N} in {C}.", "All agents share this handbook and follow the same rules.", "- keep the {t} away from the {u}",
    "- {N}: {t}, {u}", "Most questions concern {t}, {u} or the {c} list.", "A good answer is clear, correct and complete.",
    "The project {T} started {n} weeks ago and is going well.", "Customers in {C} prefer {t} over {u}.",
    "Your role is to help with {t} and to plan the next step.", "You are part of {T}, a service for people who like {t}.",
)  # fmt: skip
_SYSTEMS: Final = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.", "You are a helpful AI assistant with tools.",
    "Be kind and short.", "You are an agent. Use the tools when you need them.", "You are a chat bot.", "you're a good assistant",
    "You are a careful assistant with a good memory.",
)  # fmt: skip


def _slots(source: Source) -> dict[str, str]:
    def topic() -> str:
        return source.topic() if source.chance(0.7) else source.invented()

    return {
        "t": topic(), "u": topic(), "c": source.word("colour"), "C": source.word("city"), "N": source.word("name"),
        "M": source.word("name"), "T": source.invented(capital=True), "n": source.number(3),
    }  # fmt: skip


def small_talk(source: Source) -> tuple[str, str]:
    """A user's remark and the answer to it; neither tells a fact worth keeping."""
    form = source.rng.random()
    if form < 0.45:
        remarks, replies = source.rng.choice(_TALK)
        return source.phrase(remarks), source.rng.choice(replies)
    slots = _slots(source)
    if form < 0.55:
        return source.phrase(_QUESTIONS, **slots), "I am a small model, so I do not know that."
    if form < 0.62:
        return source.phrase(_WISHES, **slots), "I am a small model, so I cannot do that."
    remarks, reply = source.rng.choice(_CHAT)
    return source.phrase(remarks, **slots), reply.format(**slots)


def passage(source: Source, sentences: int | None = None) -> tuple[str, str]:
    """A text that the user pastes, and the answer."""
    count = sentences or source.rng.randint(3, 9)
    text = " ".join(source.phrase(_PROSE, **_slots(source)) for _ in range(count))
    return source.pick("Here is a text: ", "Listen to this. ", "Read this: ", "") + text, source.pick(
        "Thank you for the text.", "I have read it."
    )


def system_prompt(source: Source) -> str:
    """A short system prompt."""
    return source.pick(*_SYSTEMS)


def brief(source: Source, letters: int) -> list[str]:
    """About so many letters of handbook, as sentences among which facts may be hidden."""
    sentences = [system_prompt(source)]
    length = len(sentences[0])
    while length < letters:
        sentence = source.phrase(_BRIEF if source.chance(0.75) else _PROSE, **_slots(source))
        sentences.append(sentence)
        length += len(sentence)
    return sentences


def copying(source: Source) -> tuple[str, str]:
    """Words to be said again: the first thing that a model must learn here."""
    makers = (source.invented, source.invented, source.topic, source.number, source.code, source.unicode)
    count = source.rng.randint(1, 8)
    words = " ".join(source.rng.choices(makers, (4, 4, 2, 2, 1, 1))[0]() for _ in range(count))
    return source.pick("Repeat: ", "Say: ", "Echo: ", "Repeat this: ") + words, words
