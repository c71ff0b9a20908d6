"""The first day: its steps run here too, and whatever fails or is not there, the report is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_scripts import BENCHMARKS, load_benchmark
from support.keys import KEY, give

first_day: Any = load_benchmark("first_day")


def options(folder: Path) -> Any:
    return first_day.Options("tiny-chat", folder, folder / "report.md")


@pytest.mark.slow
@pytest.mark.model
def test_cheap_steps_run_here_and_are_in_the_report(tmp_path: Path) -> None:
    environ = {**os.environ, "HOME": str(tmp_path), "AGENT_MEMORY_MIN_FREE_MB": "0"}
    report = tmp_path / "report.md"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "first_day.py"), "--steps", "1,3,9", "--report", str(report)],
        env=environ, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = report.read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+)\.", text, re.MULTILINE) == ["1", "3", "9"]
    assert text.count("*Look at:*") == 3
    assert "variables: AGENT_MEMORY_MIN_FREE_MB=0" in text
    assert '"budget_bytes"' in text
    assert "sound file" in text
    assert "Traceback" not in text
    if sys.platform != "darwin":
        assert "`sw_vers`: not on this system" in text
        assert "`tmutil listlocalsnapshots /`: not on this system" in text
    # The store of this run is gone.
    assert list(tmp_path.glob(".agent-memory-first-day-*")) == []


def test_a_command_is_shown_with_how_it_ended_and_its_last_lines(tmp_path: Path) -> None:
    said = first_day.command(options(tmp_path), "sh", "-c", "seq 9; cat; exit 3", text="end\n", kept=2)
    assert re.fullmatch(r"`sh -c .*`: exit 3, [\d.]+ s\n\n````text\n9\nend\n````", said)
    assert first_day.command(options(tmp_path), "no-such-command", "-x") == (
        "`no-such-command -x`: not on this system"
    )


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    said = first_day.command(
        options(tmp_path), "sh", "-c", "echo begun; sleep 1000 & echo $!; wait", timeout=2
    )
    assert "stopped after 2 s" in said
    child = int(re.findall(r"begun\n(\d+)", said)[0])
    ends = time.monotonic() + 20
    while not _has_ended(child):
        assert time.monotonic() < ends
        time.sleep(0.05)


def _has_ended(pid: int) -> bool:
    state = subprocess.run(
        ["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return state.stdout.strip() in ("", "Z")


def test_a_talk_hears_what_is_printed_and_ends_by_kill(tmp_path: Path) -> None:
    program = "for line in iter(input, 'never'): print('heard', line, flush=True)"
    with first_day.Talk([sys.executable, "-c", program], dict(os.environ)) as talk:
        talk.say("one")
        assert talk.wait(lambda text: "heard one" in text, 60)
        talk.say("two")
        assert talk.wait(lambda text: "heard two" in text, 60)
    assert talk.text == "heard one\nheard two\n"
    # Nobody hears this, and nothing fails.
    with first_day.Talk(["sh", "-c", "exit 1"], dict(os.environ)) as gone:
        assert not gone.wait(lambda text: bool(text), 60)
        gone.say("hello?")


def test_memory_is_sampled_until_it_is_enough(tmp_path: Path) -> None:
    watch = first_day.MemoryWatch(os.getpid())
    time.sleep(0.2)
    rows = watch.stop()
    assert rows
    assert any(word in rows[0] for word in ("resident", "ootprint"))


def test_the_report_is_on_disk_after_every_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def step(given: Any) -> Iterator[str]:
        yield "first paragraph"
        seen.append(given.report.read_text(encoding="utf-8"))
        yield "second paragraph"

    monkeypatch.setattr(first_day, "STEPS", (first_day.Step("A step", "this", step),))
    first_day.run(first_day.Options("tiny-chat", tmp_path, tmp_path / "report.md", steps=(1,)))
    assert "first paragraph" in seen[0]
    assert "second paragraph" not in seen[0]


def test_steps_are_named_by_numbers_and_ranges() -> None:
    assert first_day.numbers("1-3,5") == (1, 2, 3, 5)
    assert len(first_day.STEPS) == 10
    for wrong in ("0", "11", "", "a", "3-2"):
        with pytest.raises(ValueError, match=r"."):
            first_day.numbers(wrong)


def test_the_report_does_not_tell_the_master_key(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, KEY)
    monkeypatch.setenv("AGENT_MEMORY_ENCRYPTION", "env")
    assert [told for told in first_day.told_variables() if "AGENT" in told] == ["AGENT_MEMORY_ENCRYPTION=env"]
