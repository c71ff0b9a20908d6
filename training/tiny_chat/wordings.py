"""More sentence forms, which training alone sees.

They were added after the line between trained and held-out wordings had been drawn, and must not move it: evaluation
draws from the older sets only, so that its figures can be compared with earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CALL_NONE: Final = (
    "Please run {f}.", "I want the {n}.", "Execute {f} for me.", "{v} the {n} now", "Would you {v} the {n}?", "Let me see the {n}.",
    "Time to {v} the {n}.", "The {n}, please.", "With the {n} tool, tell me what you get.", "Try {f}.", "Check what {f} returns.",
    "Next, {v} the {n}.", "Please use {f} and tell me the result.", "Which {n} is there?", "Now call {f}().", "Result of {f}()?",
)  # fmt: skip
CALL_ONE: Final = (
    "Here is the {k}: {x}. {V} its {n}.", "I have a {k}, {x}. What is its {n}?", "With {k} {x}, what is the {n}?", "{x}: what is its {n}?",
    "For {x}, {v} the {n}.", "Take {x} and {v} the {n}.", "My {k} is {x}. Please {v} the {n}.", "Execute {f} with {x} as the {k}.",
    "Try {f} with {k} {x}.", "Ask the {n} tool about {x}.", "Let {f} work on {x}.", "How about the {n} at {x}?", "How is the {n} of {x}?",
    "How is {x} for {n}?", "Is there a {n} in {x} now?", "In {x}, how is the {n} today?", "Check the {n} in {x} right now.",
    "Evaluate {f}({x}).", "Compute {f}({k}={x}).", "Now run {f}({x}) and tell me the result.", "{V} {x} with the {n} tool.",
    "Set the {k} to {x} and {v} the {n}.", "The {k} is {x}. What {n} do I get?", "I want the {n}. Use {x} as the {k}.",
    "Would you {v} the {n} of {x}?", "Find out the {n} for {k} {x} with {f}.", "{k} {x}: {n}?", "Next, {v} the {n} for the {k} {x}.",
)  # fmt: skip
CALL_MANY: Final = (
    "Execute {f} with {kv}.", "Evaluate {f}({kv}).", "Now run {f}({kv}) for me.", "Result of {f}({kv})?", "With {kv}, {v} the {n}.",
    "For {kv}, what is the {n}?", "Here is what you need: {kv}. Now {v} the {n}.", "Would you {v} the {n} for {kv}?", "Try {f}: {kv}",
    "I have {kv}. Please {v} the {n}.", "{V} the {n}. Use {kv}.", "The {n} tool, with {kv}, please.", "Set {kv} and {v} the {n}.",
    "Compute {f}({kv}) and tell me the result.", "Next, {v} the {n} with {kv}.", "{kv}: {v} the {n}.",
)  # fmt: skip
CALL_ORDERED: Final = (
    "Would you {v} the {n} of {xs}?", "With {xs}, {v} the {n}.", "{v} {n} {xs}", "Evaluate {f}({cs}).", "{V} the {n} for {xs}.",
    "For {xs}, what is the {n}?", "Try {f} with {xs}.", "Take {xs} and {v} the {n}.", "Give me the {n} of {xs}.",
)  # fmt: skip
SAID: Final[Mapping[str, tuple[str, ...]]] = {
    "favourite": (
        "{v} is the {a} that I like best.", "No {a} beats {v} for me.", "If you ask me, {v} is the best {a}.", "I would choose {v} as my favourite {a}.",
        "As for the {a}, I always take {v}.", "When it comes to a {a}, nothing beats {v}.", "My {a} of choice is {v}.", "I prefer {v} to every other {a}.",
        "My most loved {a} is {v}.", "You should know that {v} is my favourite {a}.", "One more thing: my favourite {a} is {v}.",
        "Note that my favourite {a} is {v}.", "Favourite {a}: {v}.", "My favourite {a} has always been {v}.", "My favourite {a} is called {v}.",
    ),
    "name": (
        "Good morning, I am {v}.", "The name is {v}.", "I go by {v}.", "My parents named me {v}.", "They call me {v}.", "Everybody calls me {v}.",
        "You are talking to {v}.", "Let me introduce myself: {v}.", "Hi there, {v} speaking.", "It is me, {v}.", "Name: {v}.", "Greetings, I am called {v}.",
        "My friends know me as {v}.", "Just call me {v}.", "I am called {v}.", "By the way, I am {v}.",
    ),
    "home": (
        "I come from {v}, and I still live there.", "I have a flat in {v}.", "My house stands in {v}.", "I settled in {v}.", "{v} is where I live.",
        "{v} is my home.", "Home for me is {v}.", "I am at home in {v}.", "I reside in {v}.", "My address is in {v}.", "We live in {v}.",
        "I live in the middle of {v}.", "Since last year I live in {v}.", "I now live in {v}.", "My city is {v}.",
    ),
    "work": (
        "I am employed by {v}.", "I am with {v}.", "{v} is where I work.", "The company I work for is {v}.", "I earn my money at {v}.",
        "My company is {v}.", "My office is at {v}.", "I joined {v}.", "I have worked at {v} for years.", "Every day I go to work at {v}.",
        "{v} pays my wages.", "My workplace is {v}.", "They gave me a job at {v}.",
    ),
    "job": (
        "I am a {v}.", "By profession I am a {v}.", "I am employed as a {v}.", "For a living, I am a {v}.", "I became a {v}.", "I have a job as a {v}.",
        "I trained as a {v}.", "My trade is that of a {v}.", "Job: {v}.", "I work, as a {v}.", "They hired me as a {v}.", "My job is {v}.",
    ),
    "relative": (
        "{v} is the name of my {a}.", "We named my {a} {v}.", "My {a} goes by {v}.", "My {a} bears the name {v}.", "Everybody calls my {a} {v}.",
        "My {a}, {v}, says hello.", "I call my {a} {v}.", "The {a} I have is called {v}.", "Name of my {a}: {v}.", "You may meet my {a}, {v}.",
        "By the way, my {a} is {v}.", "There is also my {a}, {v}.", "My {a} has the name {v}.",
    ),
    "object": (
        "{v}: that is the {b} of the {a}.", "The {a} has {v} as its {b}.", "As {b} the {a} has {v}.", "The {a} has the {b} {v}.", "{b} of the {a}: {v}.",
        "We set the {b} of the {a} to {v}.", "They changed the {a} {b} to {v}.", "Do not forget: the {b} of the {a} is {v}.", "Note: {a} {b} {v}.",
        "Someone told me that the {b} of the {a} is {v}.", "You will need the {b} of the {a}, which is {v}.", "Store this: the {a} {b} is {v}.",
        "The {b} that belongs to the {a} is {v}.", "By the way, the {b} of the {a} is {v}.", "Listen, the {a} {b} is {v}.",
    ),
    "lives": (
        "{n} is at home in {v}.", "{n} has a flat in {v}.", "{v} is where {n} lives.", "{n} resides in {v}.", "{n} settled in {v}.", "{v} is the home of {n}.",
        "You can find {n} in {v}.", "{n} is based in {v}.", "These days {n} lives in {v}.", "I heard that {n} lives in {v}.", "{n} has lived in {v} for years.",
        "The city of {n} is {v}.",
    ),
    "likes": (
        "{n} loves {v}.", "{n} enjoys {v}.", "{v} is what {n} likes.", "{n} is mad about {v}.", "{n} is keen on {v}.", "I know that {n} likes {v}.",
        "It is {v} that {n} likes.", "{n} told me how nice {v} is.", "{n} has a liking for {v}.", "{n} adores {v}.", "Nothing makes {n} happier than {v}.",
    ),
    "whose": (
        "{v} is {n}'s favourite {a}.", "{n} likes {v} more than any other {a}.", "As {a} {n} prefers {v}.", "{n}'s {a} of choice is {v}.",
        "The {a} that {n} likes most is {v}.", "If you ask {n}, {v} is the best {a}.", "Of every {a}, {n} likes {v} best.", "{v} is the favourite {a} of {n}.",
        "{n} has a favourite {a}: {v}.", "I heard that {n}'s favourite {a} is {v}.", "No {a} beats {v}, says {n}.",
    ),
    "age": (
        "I have turned {v}.", "I am {v}.", "I am {v} now.", "I am aged {v}.", "My last birthday was number {v}.", "{v} is my age.", "Age: {v}.",
        "I have been {v} years old since May.", "I was born {v} years ago.", "At {v}, I have seen a lot.", "I reached the age of {v}.", "I have {v} years behind me.",
    ),
    "like": (
        "I enjoy {v}.", "I adore {v}.", "{v} is what I like.", "I am keen on {v}.", "I am mad about {v}.", "Nothing makes me happier than {v}.",
        "I have a liking for {v}.", "I have always liked {v}.", "It is {v} that I like.", "Something I like is {v}.", "You should know that I like {v}.",
    ),
    "office": (
        "{a} has {v} as its {b}.", "As {b} {a} has {v}.", "{b} of {a}: {v}.", "They say that the {b} of {a} is {v}.", "Note that the {b} of {a} is {v}.",
        "The {b} that {a} has is {v}.", "{v} is what {a} has as its {b}.", "You should know that the {b} of {a} is {v}.", "{a}'s {b} is {v}.",
        "By the way, the {b} of {a} is {v}.", "For {a}, the {b} is {v}.",
    ),
    "when": (
        "We have the {a} {b} on {v}.", "{v} is the day of the {a} {b}.", "On {v} there is the {a} {b}.", "The {a} {b} takes place on {v}.",
        "Put the {a} {b} down for {v}.", "The {a} {b} was moved to {v}.", "The day of the {a} {b} is {v}.", "We planned the {a} {b} for {v}.",
        "Do not miss the {a} {b} on {v}.", "{a} {b}: {v}.", "I heard that the {a} {b} is on {v}.",
    ),
}  # fmt: skip
"""How facts are told, by the name of their kind."""
ASKED: Final[Mapping[str, tuple[str, ...]]] = {
    "favourite": (
        "Name my favourite {a}.", "What would you say is my favourite {a}?", "I forgot my favourite {a}. What is it?", "Say what my favourite {a} is.",
        "My favourite {a} is which one?", "Do you know which {a} I like best?", "Which {a} would I choose?", "What is the {a} I like most?",
        "Could you name my favourite {a}?", "Which {a} did I call my favourite?", "What is it, my favourite {a}?", "What {a} do I prefer?",
        "Which {a} is best for me?", "Please tell me what my favourite {a} is.", "Favourite {a}?", "Have I told you my favourite {a}?",
    ),
    "name": (
        "Who is this?", "What did I say my name was?", "Say my name.", "Please tell me my name.", "Have you kept my name?", "I forgot my name. What is it?",
        "Could you tell me who I am?", "By what name do you know me?", "How should you call me?", "What do people call me?", "And my name?", "Which name is mine?",
        "Do you still know who I am?", "What name did I give you?", "Name?",
    ),
    "home": (
        "Where is my flat?", "Which city is my home?", "Where is it that I live?", "Can you tell me where I live?", "What is the name of my city?",
        "Tell me where I live.", "In what town do I live?", "Where am I at home?", "Where do I reside?", "Which place do I call home?", "Where have I settled?",
        "Do you know my city?", "And where do I live?",
    ),
    "work": (
        "At which company do I work?", "Who pays me?", "Who do I work for?", "What is my company?", "Where am I employed?", "Tell me where I work.",
        "Where did I say I work?", "What is the name of my employer?", "Where do I go to work?", "Which company is mine?", "Do you know my employer?",
        "And where do I work?",
    ),
    "job": (
        "What is my trade?", "Tell me my job.", "What job do I have?", "How do I earn my living?", "As what do I work?", "What kind of work do I do?",
        "What did I say my job was?", "Which job is mine?", "Do you know what I do for a living?", "Remind me of my job.", "And my job?",
    ),
    "relative": (
        "How is my {a} called?", "Name my {a}.", "What name does my {a} have?", "I forgot the name of my {a}. What is it?", "Tell me my {a}'s name.",
        "Which name has my {a}?", "Do you know my {a}'s name?", "What did I say my {a} is called?", "And what is my {a} called?", "Say the name of my {a}.",
        "Can you tell me what my {a} is called?", "Remind me of my {a}'s name.",
    ),
    "object": (
        "Say the {b} of the {a}.", "What does the {a} have as its {b}?", "Which {b} belongs to the {a}?", "Do you know the {a} {b}?", "And the {b} of the {a}?",
        "Please tell me the {b} of the {a}.", "I need the {b} of the {a}.", "I need the {a} {b}.", "What did I say the {b} of the {a} is?",
        "What {b} has the {a}?", "Look up the {b} of the {a}.", "Can you give me the {a} {b}?", "{a} {b}?", "For the {a}, what is the {b}?",
        "Which is the {b} of the {a}?", "What would be the {b} of the {a}?",
    ),
    "lives": (
        "Where is {n} at home?", "What is the city of {n}?", "Tell me where {n} lives.", "Do you know where {n} lives?", "Where can I find {n}?",
        "In what town does {n} live?", "Where did I say {n} lives?", "Where does {n} reside?", "Which place does {n} call home?", "And where does {n} live?",
    ),
    "likes": (
        "What does {n} love?", "What does {n} enjoy?", "Which thing does {n} like?", "What is it that {n} likes?", "Can you tell me what {n} likes?",
        "What is {n} keen on?", "What did I say {n} likes?", "Do you know what {n} likes?", "And what does {n} like?", "Name what {n} likes.",
    ),
    "whose": (
        "Name {n}'s favourite {a}.", "Which {a} does {n} prefer?", "Which {a} is {n}'s favourite?", "What {a} does {n} like best?",
        "Do you know {n}'s favourite {a}?", "Do you remember the favourite {a} of {n}?", "What did I say {n}'s favourite {a} is?",
        "And {n}'s favourite {a}?", "What is {n}'s {a} of choice?", "Say which {a} {n} likes most.",
    ),
    "age": (
        "What age am I?", "Tell me my age.", "How many years old am I?", "And my age?", "Do you know how old I am?", "Which age did I tell you?",
        "What did I say my age was?", "I forgot my age. What is it?", "How old did I say I am?", "Say my age.",
    ),
    "like": (
        "What do I enjoy?", "What do I love?", "What am I keen on?", "Can you tell me what I like?", "What is it that I like?", "Do you know what I like?",
        "What did I say I like?", "Name what I like.", "And what do I like?", "Which thing do I like?",
    ),
    "office": (
        "Say the {b} of {a}.", "What does {a} have as its {b}?", "Do you know the {b} of {a}?", "Name the {b} of {a}.", "And the {b} of {a}?",
        "What did I say the {b} of {a} is?", "Which {b} has {a}?", "Can you tell me the {b} of {a}?", "What is {a}'s {b}?", "I need the {b} of {a}.",
    ),
    "when": (
        "On what date is the {a} {b}?", "Which day is the {a} {b}?", "When do we have the {a} {b}?", "Tell me when the {a} {b} is.", "What day is the {a} {b} on?",
        "When did I say the {a} {b} is?", "When does the {a} {b} take place?", "Do you remember when the {a} {b} is?", "And when is the {a} {b}?",
        "For which day is the {a} {b} planned?",
    ),
}  # fmt: skip
"""How they are asked for."""
LEADS: Final = (
    "Well, ", "So, ", "Okay, ", "Hey, ", "By the way, ", "Also, ", "And now: ", "One thing: ", "Tell you what: ", "Before I forget, ", "Listen, ", "Right, ",
)  # fmt: skip
"""What a sentence about a fact may begin with."""
