"""What every family's layers keep, whether it resumes and batches exactly, and what its conversations take on disk.

The models are the tests' tiny random ones, in float32: what is shown is that the arithmetic is the same, not how good
or fast an answer is. A gap is the root mean square of the difference of two rows of logits, in units of their spread.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from record import argument_parser, write_result
from support import families
from support.engine_driver import SteppedEngine

from agent_memory_core import ChatRequest, EngineConfig, Message, SamplingParams, SessionKey
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.messages import Delta
from agent_memory_core.models.parity import ParityResult
from agent_memory_core.storage.block_store import BlockStore

BLOCK, BOUNDARIES, TOKENS = 64, 8, 4096


class _Ticket:
    def deliver(self, delta: Delta) -> None:
        """Nobody reads the answer."""

    def fail(self, error: Exception) -> None:
        raise error


def main() -> None:
    """Measure every family."""
    options = argument_parser("families", __doc__).parse_args()
    results = {name: measured(name) for name in families.CONFIGS}
    settings = {
        "block_tokens": BLOCK,
        "boundaries": BOUNDARIES,
        "tokens": TOKENS,
        "targets": {"resumed gap": "<= 0"},
    }
    write_result(options.out, settings, results, {"random": "tests/support/families.py", "dtype": "float32"})


def measured(name: str) -> dict[str, Any]:
    """One family: the kinds of its layers, the verdict, and the bytes of a conversation beside KV of full length."""
    loaded = families.loaded(name)
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(folder) / "store")
        config = EngineConfig(model=name, block_tokens=BLOCK, kv_bits=None)
        engine = SteppedEngine(loaded, config, 256 * 2**20, store)
        layout = engine.blocks.layout
        verdict: ParityResult = engine.parity.verify(BLOCK, BOUNDARIES)
        tokens = converse(engine)
        stored = store.catalog.budget.total_bytes()
        engine.close()
    live = layout.live_bytes
    full = tokens * (live.per_token + live.per_window_token)
    return {
        "layers": kinds(layout),
        "resumed gap": verdict.resumed_gap,
        "batched": verdict.batched,
        "batched gap": verdict.batched_gap,
        "reason": verdict.reason,
        "disk": stored,
        "full length": full,
    }


def converse(engine: SteppedEngine) -> int:
    """One conversation of about `TOKENS` tokens, turn by turn; return its length."""
    talk: list[Message] = []
    length = 0
    while length < TOKENS:
        talk.append(Message("user", "Tell me " + "1" * 500))
        request = ChatRequest(tuple(talk), sampling=SamplingParams(max_tokens=4))
        engine.submit(request, SessionKey("s"), _Ticket())
        while engine.busy:
            engine.step()
        engine.flush()
        talk.append(Message("assistant", "Yes."))
        length = engine.sessions.infos(None, "model")[0].tokens
    return length


def kinds(layout: KvLayout) -> str:
    """What the layers keep, in words."""
    words = {"append": "all tokens", "window": "a window", "state": "a state", "snapshot": "a snapshot"}
    return ", ".join(words[kind] for kind in words if any(group.kind == kind for group in layout.groups))


if __name__ == "__main__":
    main()
