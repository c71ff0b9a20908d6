"""Tokens per second of 1, 8 and 16 sessions at once, against `mlx_lm.batch_generate` on the same prompts.

    whole   from handing all prompts over until all answers are there: both sides prefill their prompts, and the
            engine also writes every session to disk
    decode  without prefill: while all rows decode; for mlx-lm the time that it says it spent decoding

Both sides run the same model, greedily, to the same number of tokens, and take turns; each turn has new prompts.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import user, write_model
from mlx_lm import batch_generate, load
from record import argument_parser, median_of, write_result

from agent_memory_core import AgentMemory, ChatStream

LAYERS, SESSIONS, PROMPT, ANSWER = 4, (1, 8, 16), 64, 96
TARGETS = {"decode, 1": ">= 0.9", "decode, 8": ">= 0.9", "decode, 16": ">= 0.9"}
Rates = dict[str, float]
Request = list[dict[str, str]]


def main() -> None:
    """Measure both sides in turns and write the result file."""
    parser = argument_parser("throughput", __doc__)
    parser.add_argument("--samples", type=int, default=7, help="turns of each side")
    options = parser.parse_args()
    samples: list[dict[str, Rates]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        plain, tokenizer = load(model)[:2]
        with AgentMemory(model=model, cache_dir=Path(folder, "store")) as memory:
            for number in range(1 + options.samples):
                taken: dict[str, Rates] = {"mlx-lm": {}, "engine": {}}
                for count in SESSIONS:
                    requests = [[user(PROMPT, 100 * number + count + i, first=True)] for i in range(count)]
                    plainly = mlx_lm_rates(plain, tokenizer, requests)
                    ours = engine_rates(memory, requests, f"{number} {count}")
                    taken["mlx-lm"] |= {f"{part}, {count}": rate for part, rate in plainly.items()}
                    taken["engine"] |= {f"{part}, {count}": rate for part, rate in ours.items()}
                if number:  # The first round warms up.
                    samples.append(taken)
    settings = {
        "layers": LAYERS,
        "sessions": SESSIONS,
        "prompt": PROMPT,
        "answer": ANSWER,
        "targets": TARGETS,
    }
    write_result(options.out, settings, summary(samples))


def mlx_lm_rates(model: Any, tokenizer: Any, requests: list[Request]) -> Rates:
    """Tokens per second of mlx-lm's own batch."""
    prompts = [tokenizer.apply_chat_template(request, add_generation_prompt=True) for request in requests]
    assert all(len(prompt) == PROMPT for prompt in prompts)
    started = time.perf_counter()
    answers = batch_generate(model, tokenizer, prompts, max_tokens=ANSWER, return_token_ids=True)
    seconds = time.perf_counter() - started
    assert answers.token_ids is not None
    assert all(len(ids) == ANSWER for ids in answers.token_ids)
    return {"whole": len(requests) * ANSWER / seconds, "decode": answers.stats.generation_tps}


def engine_rates(memory: AgentMemory, requests: list[Request], name: str) -> Rates:
    """Tokens per second of the engine's, each session read by a thread of its own."""
    started = time.perf_counter()
    readers = [
        Reader(memory.chat(request, session=f"{name}.{i}", stream=True, max_tokens=ANSWER, temperature=0))
        for i, request in enumerate(requests)
    ]
    for reader in readers:
        reader.join()
    seconds = time.perf_counter() - started
    # What comes with the first delta after the window opened was decoded before.
    opened = max(reader.arrivals[0][0] for reader in readers)
    closed = min(reader.arrivals[-2][0] for reader in readers)
    tokens = sum(count for reader in readers for at, count in reader.arrivals if opened < at <= closed)
    return {"whole": len(requests) * ANSWER / seconds, "decode": tokens / (closed - opened)}


class Reader(threading.Thread):
    """Reads one stream to its end and notes when how many tokens arrived."""

    def __init__(self, stream: ChatStream) -> None:
        super().__init__()
        self._stream = stream
        self.arrivals: list[tuple[float, int]] = []
        self.start()

    def run(self) -> None:
        """Read."""
        for delta in self._stream:
            self.arrivals.append((time.perf_counter(), len(delta.token_ids)))
        report = self._stream.report
        assert report is not None
        assert report.persisted
        assert (report.usage.prompt_tokens, report.usage.completion_tokens) == (PROMPT, ANSWER)
        assert report.usage.cache_read == 0


def summary(samples: list[dict[str, Rates]]) -> dict[str, Any]:
    """Median rates, and the medians of the ratios within each round."""
    parts = list(samples[0]["engine"])
    medians = {
        side: {part: median_of([sample[side][part] for sample in samples]) for part in parts}
        for side in ("engine", "mlx-lm")
    }
    ratios = {part: median_of([s["engine"][part] / s["mlx-lm"][part] for s in samples]) for part in parts}
    return {"medians": medians, "ratios": ratios, "samples": samples}


if __name__ == "__main__":
    main()
