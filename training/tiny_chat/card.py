"""Write the model card from the measured figures, so that no number in it is typed by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

_TEXT: Final = """# Tiny chat

A chat model of {parameters:.1f} million parameters ({megabytes:.1f} MB in bfloat16) for tests, demonstrations and
benchmarks that need a real model but no download. It is llama-shaped ({layers} layers, width {width}, {heads} heads over
{key_heads} key heads of width {head_width}), reads up to {positions:,} tokens, and was trained from scratch on synthetic
conversations alone: no text by anybody, no other model's output.

It can do what those conversations show: keep facts that it is told and say them again, copy names and values into tool
calls, answer from a tool's result, fill in small JSON objects, and make small talk from a short list. **It is a copying
toy without knowledge of the world.** It does not know the capital of France, it cannot add, and outside plain English
sentences of this kind it fails. Do not use it for anything that matters.

## Measured

Greedy decoding through mlx-lm. Every value and name is one that training never saw; "held out" wordings are sentence
forms that training never saw either. *Exact* means: the value whole and in place for recall; names and arguments equal
for tool calls; the whole answer equal for the rest. *Closed* means the model ended its turn.

{table}

## Training

{training}

The scripts are in `training/tiny_chat` of the repository, with how to repeat the run. The tokenizer is a byte-level
one, so any text can be read; digits stand alone, and values fall into short pieces that do not depend on the space
before them.

Licence: that of the package.
"""


def figure(cell: dict[str, Any], name: str) -> str:
    """A count out of the samples."""
    return f"{cell['right'][name]}/{cell['n']}" if name in cell["right"] else ""


def table(cells: list[dict[str, Any]]) -> str:
    """The figures, a line each."""
    lines = [
        "| task | wordings | prompt tokens | exact | call parsed | right name | closed |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        figures = " | ".join(figure(cell, name) for name in ("right", "parsed", "name", "closed"))
        lines.append(f"| {cell['task']} | {cell['wordings']} | {cell['mean_prompt_tokens']} | {figures} |")
    return "\n".join(lines)


def card(model: Path, evaluation: dict[str, Any]) -> str:
    """The card's text."""
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    size = (model / "model.safetensors").stat().st_size
    return _TEXT.format(
        parameters=size / 2e6,
        megabytes=size / 1e6,
        layers=shape["num_hidden_layers"],
        width=shape["hidden_size"],
        heads=shape["num_attention_heads"],
        key_heads=shape["num_key_value_heads"],
        head_width=shape["head_dim"],
        positions=shape["max_position_embeddings"],
        table=table(evaluation["cells"]),
        training=evaluation["training"],
    )


def main() -> None:
    """Write ``MODEL_CARD.md`` into the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--evaluation", type=Path, default=Path(__file__).with_name("evaluation.json"))
    options = parser.parse_args()
    evaluation = json.loads(options.evaluation.read_text(encoding="utf-8"))
    (options.model / "MODEL_CARD.md").write_text(card(options.model, evaluation), encoding="utf-8")


if __name__ == "__main__":
    main()
