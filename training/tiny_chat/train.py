"""Train the model on conversations written as it goes.

The rate warms up, stays, and falls straight to zero. When it falls may be said beforehand (``--decay 2500:3000``:
at step 2,500, over 3,000 steps) or while it runs, by writing ``3000`` into the file ``decay`` of the output folder.
The checkpoint records when it fell, so that the run can be repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.tiny_chat.corpus import COPYING, Conversation, render, write
from training.tiny_chat.network import Network, Shape
from training.tiny_chat.optimizer import Optimizer
from training.tiny_chat.words import Source

# Steps are large until copying is learned, then small: more of them for the same tokens.
LARGE, SMALL = 8192, 4096
WARMUP: Final = 60
# The loss is taken at this share of the places: all that the assistant says, and some of the rest.
CHOSEN: Final = 3 / 8
# Share of steps by row length: while the rate stays, in the first 60 % of its fall, and in the rest.
LENGTHS: Final = {256: (50, 40, 25), 512: (38, 36, 35), 1024: (12, 22, 30), 2048: (0, 2, 10)}
GAPS: Final = 1500
Integers = NDArray[np.int64]


@dataclass
class Schedule:
    """The share of the full rate at each step; ``falls`` lists (first step, number of steps, share at the start)."""

    falls: list[tuple[int, int, float]] = field(default_factory=list)

    def fall(self, step: int, steps: int) -> None:
        """Let the rate fall to zero from this step on, in so many steps."""
        self.falls.append((step, steps, self.share(step)))

    def share(self, step: int) -> float:
        """The share at a step: by the latest fall that has begun."""
        for first, steps, start in reversed(self.falls):
            if step >= first:
                return max(0.0, start * (1 - (step - first) / steps))
        return min(1.0, step / WARMUP)

    def falling(self, step: int) -> bool:
        """Whether the rate has begun to fall."""
        return any(step >= first for first, _, _ in self.falls)

    def finished(self, step: int) -> bool:
        """Whether the rate has come to zero."""
        return bool(self.falls) and step >= sum(self.falls[-1][:2])


@dataclass(frozen=True)
class Batch:
    """Rows of one length: tokens, positions, next tokens and their weights, and the assistant's turns in them.

    ``chosen`` are the places, in all rows together, at which the loss is taken.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    chosen: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    turns: list[list[tuple[str, int, int]]]


class Rows:
    """Turns conversations into rows of tokens."""

    def __init__(self, tokenizer: Tokenizer, other_weight: float) -> None:
        self.tokenizer = tokenizer
        self.other_weight = other_weight
        self.start, self.end, self.padding, self.assistant = (
            self._id(text) for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "assistant")
        )

    def _id(self, text: str) -> int:
        found = self.tokenizer.token_to_id(text)
        if found is None:
            raise ValueError(f"the tokenizer has no token {text!r}")
        return found

    def batch(
        self, source: Source, length: int, *, tokens: int = 8192, copying: float = 0.0, gaps: bool = True
    ) -> Batch:
        """Rows that fill one step."""
        rows = tokens // length
        ids = np.full((rows, length + 1), self.padding, dtype=np.int64)
        weights = np.zeros((rows, length + 1), dtype=np.float32)
        positions = np.tile(np.arange(length + 1, dtype=np.int64), (rows, 1))
        turns: list[list[tuple[str, int, int]]] = []
        for row in range(rows):
            talk = self._conversation(source, length, copying)
            encoded: Integers = np.array(
                self.tokenizer.encode(render(talk)).ids[: length + 1], dtype=np.int64
            )
            spans = self._spans(talk, encoded)
            ids[row, : len(encoded)] = encoded
            weights[row, : len(encoded)] = self.other_weight
            for _, first, last in spans:
                weights[row, first:last] = 1.0
            turns.append(spans)
            if gaps and source.chance(0.5):
                self._spread(source, ids[row], positions[row])
        arrays = (ids[:, :-1], positions[:, :-1], ids[:, 1:], weights[:, 1:])
        inputs, places, targets, weighed = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return Batch(inputs, places, self._choose(source, arrays[3]), targets, weighed, turns)

    def _choose(self, source: Source, weights: NDArray[np.float32]) -> torch.Tensor:
        """The heaviest places, and chance among equals; always as many, so that nothing is compiled again."""
        chance = np.random.default_rng(source.rng.getrandbits(32)).random(weights.size) * 1e-3
        order = np.argsort(-(weights.ravel() + chance))
        return torch.from_numpy(np.sort(order[: int(weights.size * CHOSEN)]))

    def _conversation(self, source: Source, length: int, copying: float) -> Conversation:
        if source.chance(copying):
            return write(source, length, mix=COPYING, tool_share=0)
        system = 0
        if length >= 512 and source.chance(0.15 if length == 512 else 0.4):
            system = source.rng.randint(100, min(1500, int(length * 0.6)))
        return write(source, length + 20, tool_share=0.7, system_tokens=system)

    def _spans(self, talk: Conversation, tokens: Integers) -> list[tuple[str, int, int]]:
        """The kind and the place of each assistant turn that is whole; its end mark belongs to it."""
        kinds = [turn.kind for turn in talk.turns if turn.role == "assistant"]
        starts = np.flatnonzero(tokens == self.start)
        starts = starts[starts + 3 < len(tokens)]
        starts = starts[tokens[starts + 1] == self.assistant]
        ends = np.flatnonzero(tokens == self.end)
        spans = []
        for kind, start in zip(kinds, starts.tolist(), strict=False):
            later = ends[ends > start]
            spans.append(
                (kind if len(later) else "cut", start + 3, int(later[0]) + 1 if len(later) else len(tokens))
            )
        return spans

    def _spread(self, source: Source, ids: Integers, positions: Integers) -> None:
        """Leave gaps between turns, so that short rows teach long distances too."""
        starts = np.flatnonzero(ids == self.start)
        for _ in range(source.rng.randint(1, 3)):
            positions[source.rng.choice(starts.tolist()) :] += int(source.rng.random() ** 2 * GAPS)


class Trainer:
    """One run in one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.out: Path = options.out
        tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
        self.rows = Rows(tokenizer, options.other_weight)
        self.shape = Shape(vocabulary=tokenizer.get_vocab_size())
        self.network = Network(self.shape)
        if options.start:
            self.network.load_state_dict(load_file(str(options.start / "model.safetensors")))
        self.optimizer = Optimizer(
            self.network, matrix_rate=options.matrix_rate, vector_rate=options.vector_rate
        )
        self.schedule = Schedule()
        for first, steps in options.decay:
            self.schedule.fall(first, steps)
        self.done = 0
        self.out.mkdir(parents=True, exist_ok=True)
        held = Source(99, held_values=True, held_wordings=True)
        self.exam = [self.rows.batch(held, length, gaps=False) for length in (512, 512, 2048)]

    def run(self) -> None:
        """Train until the rate has fallen to zero."""
        self._resume()
        loss_of = torch.compile(self.network, dynamic=False)
        average, began, first = 0.0, time.monotonic(), self.done
        while not self.schedule.finished(self.done + 1):
            step = self.done + 1
            self._read_decay(step)
            share = self.schedule.share(step)
            batch = self._batch(step, share)
            loss = loss_of(batch.ids, batch.positions, batch.chosen, batch.targets, batch.weights)
            loss.backward()
            self.optimizer.step(share)
            self.done = step
            average = loss.item() if not average else 0.97 * average + 0.03 * loss.item()
            if step % 25 == 0:
                speed = (self.tokens_until(step) - self.tokens_until(first)) / (time.monotonic() - began)
                print(
                    f"step {step} share {share:.3f} row {batch.ids.shape[1]} loss {average:.4f} {speed:.0f} tok/s",
                    flush=True,
                )
            if step % 250 == 0:
                print(f"step {step} held out: {self.examine()}", flush=True)
            if step % 100 == 0:
                self.save()
        print(
            f"end: step {self.done}, {self.tokens_until(self.done) / 1e6:.1f} M tokens, held out: {self.examine()}",
            flush=True,
        )
        self.save()

    def _batch(self, step: int, share: float) -> Batch:
        phase = 0 if not self.schedule.falling(step) else 1 if share > 0.4 else 2
        source = Source(step + 1_000_003 * self.options.seed)
        length = source.rng.choices(list(LENGTHS), [shares[phase] for shares in LENGTHS.values()])[0]
        copying = max(0.03, 0.5 * (1 - step / self.options.copying_steps))
        tokens = LARGE if step <= self.options.large_steps else SMALL
        return self.rows.batch(source, length, tokens=tokens, copying=copying)

    def tokens_until(self, step: int) -> int:
        """How many tokens have been seen after a step."""
        large = min(step, self.options.large_steps)
        return LARGE * large + SMALL * (step - large)

    def _read_decay(self, step: int) -> None:
        wish = self.out / "decay"
        if wish.exists():
            self.schedule.fall(step, int(wish.read_text()))
            wish.unlink()
            print(f"step {step}: the rate falls {self.schedule.falls}", flush=True)

    @torch.no_grad()
    def examine(self) -> str:
        """The share of held-out assistant turns whose every token is the most likely one, by kind."""
        right: dict[str, list[bool]] = {}
        for batch in self.exam:
            best = self.network.logits(batch.ids, batch.positions).argmax(-1) == batch.targets
            for row, spans in enumerate(batch.turns):
                for kind, first, last in spans:
                    right.setdefault(kind, []).append(bool(best[row, first - 1 : last - 1].all()))
        return " ".join(
            f"{kind} {sum(hits) / len(hits):.2f}/{len(hits)}"
            for kind, hits in sorted(right.items())
            if kind != "cut"
        )

    def save(self) -> None:
        """Write the checkpoint, and the model as mlx-lm loads it."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state(),
            "done": self.done,
            "falls": self.schedule.falls,
        }
        torch.save(state, self.out / "checkpoint.new")
        (self.out / "checkpoint.new").replace(self.out / "checkpoint.pt")
        weights = {
            name: p.to(torch.bfloat16).contiguous().clone() for name, p in self.optimizer.masters.items()
        }
        model = self.out / "model"
        model.mkdir(exist_ok=True)
        save_file(weights, str(model / "model.safetensors"), metadata={"format": "pt"})
        configuration = self.shape.configuration(self.rows.end, self.rows.padding)
        (model / "config.json").write_text(json.dumps(configuration, indent=1) + "\n", encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.options.tokenizer / name, model / name)

    def _resume(self) -> None:
        path = self.out / "checkpoint.pt"
        if path.exists():
            state = torch.load(path)
            self.optimizer.load(state["optimizer"])
            self.done = state["done"]
            self.schedule.falls = state["falls"] or self.schedule.falls


def _fall(text: str) -> tuple[int, int]:
    first, steps = text.split(":")
    return int(first), int(steps)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the checkpoint and the model; an old run in it goes on",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--start", type=Path, help="folder of a model whose weights to start from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--decay",
        type=_fall,
        action="append",
        default=[],
        metavar="STEP:STEPS",
        help="when the rate falls to zero",
    )
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--vector-rate", type=float, default=3e-3)
    parser.add_argument(
        "--large-steps", type=int, default=250, help=f"steps of {LARGE} tokens before those of {SMALL}"
    )
    parser.add_argument(
        "--other-weight", type=float, default=0.2, help="loss weight of what the assistant did not say"
    )
    parser.add_argument(
        "--copying-steps",
        type=int,
        default=300,
        help="steps in which plain copying gives way to conversations",
    )
    return parser.parse_args()


def main() -> None:
    """Run."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    Trainer(options).run()


if __name__ == "__main__":
    main()
