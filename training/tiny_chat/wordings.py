"""More sentence forms, which training alone sees.

They were added after the line between trained and held-out wordings had been drawn, and must not move it: evaluation
draws from the older sets only, so that its figures can be compared with earlier ones.
"""

from __future__ import annotations

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
