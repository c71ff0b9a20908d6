"""What a codec costs in quality, against KV as the model keeps it, with bytes beside it.

On tiny-chat, held-out conversations are walked turn by turn: each turn starts from what the codec kept of the earlier
ones, and its answer is judged token by token. All codecs see the same tokens, so differences are taken in pairs.

    loss        of perplexity over the assistant's tokens, with the standard error of the paired differences
    agreement   how often the first choice for the next token is the one that raw KV gives
    recall      answers that are exact, greedily, to questions for facts told, most of them two blocks before
    tool calls  calls that are exact, greedily, to tools offered before, most of them a block and more
    key error   relative error of attention's output where only keys with outlier channels are rounded, worst kind

``--quick`` walks a few conversations only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import mlx.core as mx
import outliers
import talks
from common import TOKENIZER
from mlx_lm import load
from record import argument_parser, write_result
from report import meets

from agent_memory_core.config import EngineConfig
from agent_memory_core.kv.codec import ENCODINGS, KvCodec, KvEncoding, TensorEncoding

COUNTS = {"chat": 8, "recall": 30, "tool calls": 36}
QUICK = {"chat": 0, "recall": 1, "tool calls": 1}
TASKS = {"recall": "recall", "call": "tool calls"}
"""Kinds of answers, and what they are called in the results."""
SEEDS, FIRST_SEED = 4, 9000
TARGETS = {"loss": "<= 0.005", "recall lost": "<= 2", "tool calls lost": "<= 2", "key error / 8/4": "<= 1"}
"""Loss is meant with its standard error added; what is lost is counted in standard errors of chance."""
VALUES = TensorEncoding(4)
DEFAULT = ENCODINGS[EngineConfig().kv_bits]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A codec to be judged. ``first`` keeps the first block otherwise; such a codec is no setting."""

    encoding: KvEncoding
    first: KvEncoding | None = None


def by_channel(bits: Any) -> KvEncoding:
    """Keys in groups along the tokens, 4-bit values."""
    return KvEncoding(TensorEncoding(bits, "tokens"), VALUES)


CANDIDATES = {
    "raw": Candidate(ENCODINGS[None]),
    "8": Candidate(ENCODINGS[8]),
    "8/4": Candidate(ENCODINGS["8/4"]),
    "6/4 by channel": Candidate(by_channel(6)),
    "5/4 by channel": Candidate(by_channel(5)),
    "4 by channel, first block 8/4": Candidate(by_channel(4), ENCODINGS["8/4"]),
    "4 by channel": Candidate(by_channel(4)),
    "4 rotated": Candidate(KvEncoding(TensorEncoding(4, rotated=True), VALUES)),
    "4 by token": Candidate(KvEncoding(VALUES, VALUES)),
}
KEYS_ONLY = {
    "4 by channel, groups of 32": KvEncoding(TensorEncoding(4, "tokens", 32), VALUES),
    "4 rotated, groups of 32": KvEncoding(TensorEncoding(4, group=32, rotated=True), VALUES),
    "4 by token, groups of 32": KvEncoding(TensorEncoding(4, group=32), VALUES),
    "6/4 by token": KvEncoding(TensorEncoding(6), VALUES),
    "6/4 rotated": KvEncoding(TensorEncoding(6, rotated=True), VALUES),
}
"""Encodings that are judged on keys with outlier channels only."""
Scores = list[list[talks.Score]]
"""Of each conversation, of each answer."""


def main() -> None:
    """Judge every candidate and write the result file."""
    parser = argument_parser("quality", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few conversations: for a look, not a judgement"
    )
    options = parser.parse_args()
    counts = QUICK if options.quick else COUNTS
    scores = walk_all(counts)
    errors = key_errors(1 if options.quick else SEEDS)
    results: dict[str, Any] = {"codecs": {}, "key errors": errors, "conversations": {}}
    for name, candidate in CANDIDATES.items():
        results["codecs"][name] = judge(name, candidate, scores, errors)
        results["conversations"][name] = sums(scores[name], scores["raw"])
    results["default"] = next(
        name for name, candidate in CANDIDATES.items() if is_setting(candidate, DEFAULT)
    )
    results["chosen"] = choose(results["codecs"])
    settings = {
        "counts": counts,
        "block": talks.BLOCK,
        "targets": TARGETS,
        "outliers": {"channels": outliers.OUTLIERS, "of": outliers.DIM, "size": outliers.SIZE},
    }
    write_result(options.out, settings, results, model={"name": "tiny-chat", "dtype": "bfloat16"})


def walk_all(counts: Mapping[str, int]) -> dict[str, Scores]:
    """The scores of every candidate on the same conversations."""
    model, tokenizer = load(str(TOKENIZER))[:2]
    scores: dict[str, Scores] = {name: [] for name in CANDIDATES}
    for kind, count in counts.items():
        for number in range(count):
            talk = talks.tokenize(tokenizer, talks.KINDS[kind](FIRST_SEED + number))
            prompt = talks.begin(model, talk)
            for name, candidate in CANDIDATES.items():
                memory = talks.Memory(
                    model, codec(candidate.encoding), candidate.first and codec(candidate.first)
                )
                scores[name].append(talks.walk(model, talk, prompt, memory))
    return scores


def codec(encoding: KvEncoding) -> KvCodec:
    """A codec for tiny-chat's one group of layers."""
    return KvCodec(encoding, {"0.k": 64, "0.v": 64})


def key_errors(seeds: int) -> dict[str, dict[str, outliers.Errors]]:
    """The mean errors of each candidate on each kind of outlier channels."""
    encodings = {
        name: candidate.encoding for name, candidate in CANDIDATES.items() if candidate.first is None
    } | KEYS_ONLY
    found: dict[str, dict[str, outliers.Errors]] = {name: {} for name in encodings}
    for kind in outliers.KINDS:
        runs = [outliers.errors(kind, encodings, seed) for seed in range(seeds)]
        for name in encodings:
            found[name][kind] = {
                what: round(fmean(run[name][what] for run in runs), 6) for what in runs[0][name]
            }
    return found


def judge(
    name: str, candidate: Candidate, scores: Mapping[str, Scores], errors: Mapping[str, Any]
) -> dict[str, Any]:
    """One candidate's row."""
    own, raw = scores[name], scores["raw"]
    loss, error = perplexity_loss(own, raw)
    answers = [score for walked in own for score in walked]
    pairs = list(zip(answers, (score for walked in raw for score in walked), strict=True))
    same = [a == b for score, other in pairs for a, b in zip(score.choices, other.choices, strict=True)]
    row: dict[str, Any] = {
        "encoding": {"keys": candidate.encoding.keys.name(), "values": candidate.encoding.values.name()},
        "bytes": bytes_per_token(candidate.encoding),
        "perplexity": round(math.exp(fmean(x for score in answers for x in score.nats)), 6),
        "loss": round(loss, 6),
        "loss error": round(error, 6),
        "agreement": round(fmean(same), 6),
    }
    for kind, label in TASKS.items():
        row[label] = tally([(a.right, b.right) for a, b in pairs if a.kind == kind])
    settings = [bits for bits, encoding in ENCODINGS.items() if is_setting(candidate, encoding)]
    if settings:
        row["setting"] = settings[0]
    if name in errors:
        row["key error"] = max(found["output"] for found in errors[name].values())
    return row


def tally(pairs: Sequence[tuple[bool, bool]]) -> dict[str, int]:
    """How many answers are right, and how many that raw KV gets right are lost, or gained that it does not."""
    return {
        "right": sum(own for own, _ in pairs),
        "of": len(pairs),
        "lost": sum(raw and not own for own, raw in pairs),
        "gained": sum(own and not raw for own, raw in pairs),
    }


def is_setting(candidate: Candidate, encoding: KvEncoding) -> bool:
    """Whether a setting means this candidate."""
    return candidate.first is None and candidate.encoding == encoding


def perplexity_loss(own: Scores, raw: Scores) -> tuple[float, float]:
    """By what part perplexity is above that of raw KV, and the standard error of that.

    The tokens of one conversation are not independent, so conversations are the samples of the error.
    """
    tokens = [sum(len(score.nats) for score in walked) for walked in raw]
    more = [nats(walked) - nats(other) for walked, other in zip(own, raw, strict=True)]
    mean = sum(more) / sum(tokens)
    spread = math.sqrt(sum((d - n * mean) ** 2 for d, n in zip(more, tokens, strict=True))) / sum(tokens)
    return math.expm1(mean), math.exp(mean) * spread


def nats(walked: Sequence[talks.Score]) -> float:
    """The negative log-likelihood of a conversation's answers."""
    return sum(sum(score.nats) for score in walked)


def sums(own: Scores, raw: Scores) -> dict[str, list[float]]:
    """What the loss is made of: nats of each conversation's answers, and their tokens."""
    return {
        "nats": [round(nats(walked), 4) for walked in own],
        "tokens": [sum(len(score.nats) for score in walked) for walked in raw],
    }


def choose(codecs: Mapping[str, Any]) -> str:
    """The smallest codec that meets every target."""
    fit = [
        name
        for name, row in codecs.items()
        if "key error" in row and all(meets(measured(row, codecs)[what], TARGETS[what]) for what in TARGETS)
    ]
    return min(fit, key=lambda name: codecs[name]["bytes"])


def measured(row: Mapping[str, Any], codecs: Mapping[str, Any]) -> dict[str, float]:
    """What the targets speak of.

    Where a codec changes nothing, an answer is as likely lost as gained, so that the difference has the root of
    their sum for its standard error (McNemar).
    """
    lost = {}
    for task in TASKS.values():
        changed = row[task]["lost"] + row[task]["gained"]
        lost[f"{task} lost"] = (row[task]["lost"] - row[task]["gained"]) / math.sqrt(changed or 1)
    error = row["key error"] / codecs["8/4"]["key error"]
    return {"loss": row["loss"] + row["loss error"], **lost, "key error / 8/4": error}


def bytes_per_token(encoding: KvEncoding) -> float:
    """Bytes at rest of one token of tiny-chat's five layers, in full blocks."""
    shape = (5, 2, talks.BLOCK, 64)
    block = codec(encoding).encode({name: mx.zeros(shape, mx.bfloat16) for name in ("0.k", "0.v")})
    return sum(x.nbytes for x in block.values()) / talks.BLOCK


if __name__ == "__main__":
    main()
