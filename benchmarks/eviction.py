"""What leaves a full memory or disk first: prefill that has to be done again, by rule and budget, on agents' turns.

Each trace is replayed over the books of a store for each rule and each budget, as a share of all its blocks. What
counts is the time to compute again what was at hand before and had left, by the model cost of its position, as a share
of what would be computed without any store. The traces are made from seeds; a published one can be named besides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from agent_traces import BLOCK_TOKENS, MIXES, RECORDED_TOKENS, Turn, make, recorded
from eviction_policies import EQUAL_AT, TOKENS_PER_SECOND, Books, Policy, policies, prefill_seconds
from record import argument_parser, median_of, write_result

KEPT, FUTURE, RECORDED = "LRU", "the future", "a recorded hour"
SEEDS = (1, 2, 3)
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
TARGETS = {f"{KEPT} / best rule, all of them": "<= 1.05"}

Curve = list[dict[str, dict[str, float]]]
"""For each budget, what `replay` finds with each rule."""


def main() -> None:
    """Replay every trace and write the result file."""
    parser = argument_parser("eviction", __doc__)
    parser.add_argument("--recorded", type=Path, help="a trace of JSON lines with hash_ids, replayed besides")
    options = parser.parse_args()
    traces = {name: [make(mix, seed) for seed in SEEDS] for name, mix in MIXES.items()}
    if options.recorded is not None:
        traces[RECORDED] = [recorded(options.recorded)]
    curves = {
        name: averaged([curve(turns, SHARES, tokens_of(name)) for turns in found])
        for name, found in traces.items()
    }
    settings = {
        "block_tokens": BLOCK_TOKENS,
        "tokens_per_second": TOKENS_PER_SECOND,
        "equal_at": EQUAL_AT,
        "seeds": SEEDS,
        "shares": SHARES,
        "traces": {name: size(found[0]) for name, found in traces.items()},
        "targets": TARGETS,
    }
    write_result(options.out, settings, {"curves": curves, "ratios": ratios(curves)})


def size(turns: Sequence[Turn]) -> dict[str, int]:
    """How many turns a trace has, and how many blocks of different names."""
    return {"turns": len(turns), "blocks": len({name for turn in turns for name in turn.blocks})}


def tokens_of(trace: str) -> int:
    """Tokens of a trace's blocks."""
    return RECORDED_TOKENS if trace == RECORDED else BLOCK_TOKENS


def curve(turns: Sequence[Turn], shares: Sequence[float], tokens: int = BLOCK_TOKENS) -> Curve:
    """For each budget what each rule has to compute again, see `replay`."""
    blocks = size(turns)["blocks"]
    budgets = [max(1, round(blocks * share)) for share in shares]
    return [
        {name: replay(turns, budget, policy, tokens) for name, policy in policies(turns, budget).items()}
        for budget in budgets
    ]


def replay(
    turns: Sequence[Turn], budget: int, policy: Policy, tokens: int = BLOCK_TOKENS
) -> dict[str, float]:
    """The share of known prefill that is done again, in seconds, and the share of known blocks that is found."""
    books, seen = Books(budget, policy, tokens), set[int]()
    again = known = found_blocks = known_blocks = 0.0
    for turn in turns:
        before = sum(1 for _ in itertools.takewhile(seen.__contains__, turn.blocks))
        found = min(before, books.turn(turn.blocks))
        again += sum(prefill_seconds(index, tokens) for index in range(found, before))
        known += sum(prefill_seconds(index, tokens) for index in range(before))
        found_blocks, known_blocks = found_blocks + found, known_blocks + before
        seen.update(turn.blocks)
    return {"again": again / known, "hits": found_blocks / known_blocks}


def averaged(curves: Sequence[Curve]) -> Curve:
    """The medians of several traces of one kind."""
    return [
        {
            name: {part: median_of([at[name][part] for at in same]) for part in ("again", "hits")}
            for name in same[0]
        }
        for same in zip(*curves, strict=True)
    ]


def ratios(curves: dict[str, Curve]) -> dict[str, float]:
    """How much more LRU computes again than the best rule that does not know the future, over the whole curve."""
    found = {}
    for trace, rows in curves.items():
        totals = {rule: sum(row[rule]["again"] for row in rows) for rule in rows[0] if rule != FUTURE}
        found[f"{KEPT} / best rule, {trace}"] = round(totals[KEPT] / min(totals.values()), 3)
    return found


if __name__ == "__main__":
    main()
