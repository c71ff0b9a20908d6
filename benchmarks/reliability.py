"""What happens to stored turns when processes are killed, files are damaged, and disks fail; and over a long time.

The work is done by `tests/support/reliability` on tiny random models of three kinds of layers, in processes that are
really killed and on files that are really damaged. The result file keeps what an earlier run found of the parts that
are not run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from record import argument_parser, write_result
from support.reliability import damage, faults, kills, soak
from support.reliability.talk import MODELS, Talks, talks_of

# Imported once, so that every process that is forked has it.
import agent_memory_core.engine.engine
import agent_memory_core.models.loader  # noqa: F401

TARGETS = {
    "lost": "<= 0",
    "wrong": "<= 0",
    "largest share of the budget": "<= 1.05",
}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argument_parser("reliability", __doc__)
    parser.add_argument("--kills", type=int, default=500, help="how many processes are killed")
    parser.add_argument("--minutes", type=float, default=30, help="how long the soak takes")
    parser.add_argument("--every", type=int, default=1, help="do one in so many of the damages")
    parser.add_argument("--quick", action="store_true", help="leave out the faults that take seconds")
    parser.add_argument("--only", choices=["kills", "damage", "faults", "soak"], action="append")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", DeprecationWarning)
    results: dict[str, Any] = {}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))["results"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        talks = [talks_of(kind, folder) for kind in MODELS]
        for part, run in parts(talks, folder, options).items():
            if options.only is None or part in options.only:
                begun = time.monotonic()
                results[part] = run() | {"seconds": round(time.monotonic() - begun)}
                print(part, json.dumps(results[part]), flush=True)
                write_result(
                    options.out, {"targets": TARGETS}, results, {"random": MODELS, "dtype": "float32"}
                )


def parts(
    talks: list[Talks], folder: Path, options: argparse.Namespace
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to run, by name."""
    return {
        "kills": lambda: kills.run(talks, folder / "kills", options.kills).to_dict(),
        "damage": lambda: damage.run(talks, folder / "damage", every=options.every).to_dict(),
        "faults": lambda: faults.run(talks[0], folder / "faults", quick=options.quick).to_dict(),
        "soak": lambda: soak.run(talks, folder / "soak", options.minutes).to_dict(),
    }


if __name__ == "__main__":
    main()
