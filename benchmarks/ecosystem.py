"""What conversations inside packages that others wrote reuse: from turn to turn, and after their process was killed.

Each is run by `tests/support/ecosystem.py` on the real package and on tiny-chat: two turns in a process that is then
killed with SIGKILL, and a third one in another process. A turn has several calls of the model, whose prompts are added.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from record import argument_parser, write_result
from support.ecosystem import QUESTIONS, SCENARIOS, counts, run


def main() -> None:
    """Measure every package that is installed."""
    options = argument_parser("ecosystem", __doc__).parse_args()
    missing = sorted({known.package for known in SCENARIOS.values() if not known.is_installed})
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}. Run make ecosystem.")
    results = {name: measured(name) for name in SCENARIOS}
    settings = {"questions": QUESTIONS, "targets": {"new after a restart / new before": "<= 1.5"}}
    write_result(options.out, settings, results, {"name": "tiny-chat"})


def measured(name: str) -> dict[str, Any]:
    """The turns of one package's conversation."""
    scenario = SCENARIOS[name]
    with tempfile.TemporaryDirectory() as folder:
        turns = [*run(name, Path(folder), 0, 2, kill=True), *run(name, Path(folder), 2, 3)]
    return {
        "package": scenario.package,
        "version": version(scenario.package),
        "what": (scenario.open.__doc__ or "").rstrip("."),
        "turns": [counts(turn) for turn in turns],
    }


if __name__ == "__main__":
    main()
