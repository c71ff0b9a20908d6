"""The command line on a real store; `chat` and `demo` as real processes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from support import command_line, engine_driver

from agent_memory_core.demos import restart as demo

Open = Callable[..., engine_driver.Driver]


@pytest.fixture
def store(llama: str, open_driver: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    driver = open_driver(llama)
    for name in ("ada", "bob"):
        driver.turn([{"role": "user", "content": "A shared beginning. " * 20 + name}], name)
    driver.memory.close()
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


def run(*arguments: str, code: int = 0) -> str:
    done = command_line.command(*arguments, code=code)
    return done.stdout + done.stderr


def test_sessions_are_listed_shown_pinned_and_forgotten(store: Path) -> None:
    listed = run("sessions", "list")
    assert "ada" in listed
    assert "bob" in listed
    assert "branch 1" in run("sessions", "show", "ada")
    run("sessions", "pin", "ada")
    assert ", pinned" in run("sessions", "show", "ada")
    run("sessions", "pin", "ada", "--off")
    assert ", pinned" not in run("sessions", "show", "ada")
    files = len(list(store.rglob("*.safetensors")))
    assert "was deleted" in run("sessions", "forget", "ada")
    assert "ada" not in run("sessions", "list")
    assert 0 < len(list(store.rglob("*.safetensors"))) < files
    assert "no session 'ada'" in run("sessions", "forget", "ada", code=1)


def test_an_empty_list_says_how_a_session_is_made(tmp_path: Path) -> None:
    none = ("sessions", "list", "--cache-dir", str(tmp_path / "store"))
    assert run(*none) == "there is no session yet: agent-memory chat makes one.\n"
    assert json.loads(run(*none, "--json")) == []


def test_lists_and_sessions_are_json_too(store: Path) -> None:
    listed = json.loads(run("sessions", "list", "--json"))
    assert {info["session_id"] for info in listed} == {"ada", "bob"}
    shown = json.loads(run("sessions", "show", "ada", "--json"))
    assert shown["branches"][0]["tokens"] == shown["tokens"]
    assert datetime.fromisoformat(shown["last_use"]) <= datetime.now(UTC)
    assert json.loads(run("check", "--json"))["clean"] is True
    assert "all is well" in run("check")
    gone = json.loads(run("sessions", "prune", "--older-than", "0s", "--dry-run", "--json"))
    assert len(gone) == 2


def test_a_shell_proposes_the_sessions_of_the_namespace(store: Path) -> None:
    completion = {"_AGENT_MEMORY_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    done = command_line.process(
        store=store, **completion, COMP_WORDS="agent-memory sessions show a", _TYPER_COMPLETE_ARGS=""
    )
    assert done.stdout.split() == ["ada"]


def test_the_bench_measures_and_judges(llama: str, tmp_path: Path) -> None:
    options = ["--model", llama, "--cache-dir", str(tmp_path / "store"), "--repeat", "1"]
    found = json.loads(run("bench", *options, "--tokens", "300,40", "--json"))
    assert [row["tokens"] for row in found["seconds"]] == [40, 300]
    assert all(row[kind] > 0 for row in found["seconds"] for kind in ("cold", "hot", "resumed", "shared"))
    assert "worth it" in found["verdict"]
    assert found["published"]["measured_here"] is False
    assert list(tmp_path.iterdir()) == [], "what it stored is deleted, and the sessions' folder untouched"
    assert "give numbers from 32 on" in run("bench", *options, "--tokens", "8", code=2)


def test_a_chat_takes_a_system_message_a_temperature_and_a_seed(llama: str, tmp_path: Path) -> None:
    common = (
        "chat",
        "--model",
        llama,
        "--cache-dir",
        str(tmp_path),
        "--temperature",
        "2",
        "--max-tokens",
        "8",
    )
    told = [
        command_line.command(
            *common, "--session", name, "--seed", seed, "--system", "Be brief.", typed="hi\n\n"
        )
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    assert told[0].stdout == told[1].stdout != told[2].stdout
    (message, *_) = json.loads(next((tmp_path / "transcripts").iterdir()).read_text())
    assert message == {"role": "system", "content": "Be brief."}
    refused = command_line.command(*common, "--session", "a", "--system", "Be long.", typed="hi\n\n", code=1)
    assert "leave --system out" in refused.stderr


def test_sessions_that_nobody_used_for_a_time_are_pruned(store: Path) -> None:
    with sqlite3.connect(store / "catalog.db") as database:
        database.execute("UPDATE branches SET last_use = last_use - 86400 * 40 WHERE session = 1")
    database.close()
    assert "1 session would be deleted" in run("sessions", "prune", "--older-than", "30d", "--dry-run")
    assert "0 sessions" in run("sessions", "prune", "--older-than", "8w")
    assert "0 sessions" in run("sessions", "prune", "--older-than", "30d", "--namespace", "other")
    pruned = run("sessions", "prune", "--older-than", "30d")
    assert "'ada'" in pruned
    assert "1 session was deleted" in pruned
    listed = run("sessions", "list")
    assert "ada" not in listed
    assert "bob" in listed
    assert "'soon' is not a time" in " ".join(
        run("sessions", "prune", "--older-than", "soon", code=2).split()
    )


def test_listing_sessions_imports_nothing_that_only_a_model_needs(store: Path) -> None:
    program = (
        "import sys\n"
        "from agent_memory_core.cli.main import main\n"
        "sys.argv = ['agent-memory', 'sessions', 'list']\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(sorted(set(sys.modules) & {'huggingface_hub', 'mlx', 'mlx_lm', 'numpy', 'torch', 'transformers'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "ada" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_check_finds_a_flipped_byte_and_mends_it(store: Path) -> None:
    run("check")
    path = next(store.rglob("blocks/*/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    assert path.name in run("check", code=1).replace("\n", "")
    run("check", "--fix")
    run("check")


def test_stats_are_sentences_or_json(store: Path) -> None:
    assert "2 sessions with 2 branches" in run("stats")
    assert json.loads(run("stats", "--json"))["files"] == len(list(store.rglob("*.safetensors")))


def test_a_check_keeps_every_session_and_knows_the_budget(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    driver, store = open_driver(llama), tmp_path / "store"
    for name in ("ada", "bob", "cyd"):
        driver.turn([{"role": "user", "content": f"I am {name}. " * 300}], name)
    driver.memory.close()
    files = sorted(store.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 2**20, "more than the smallest budget holds"
    (tmp_path / "small.toml").write_text('[model]\nmodel_id = "small"\n[thresholds]\ndisk_budget_mb = 1\n')
    profiles = {"AGENT_MEMORY_MODEL_CONFIGS": str(tmp_path)}
    for budget, options, variables in (
        (1, [], {"AGENT_MEMORY_MODEL": "small", **profiles}),
        (1, ["--disk-budget-mb", "1"], {"AGENT_MEMORY_DISK_BUDGET_MB": "200000"}),
        (200000, [], {"AGENT_MEMORY_DISK_BUDGET_MB": "200000"}),
    ):
        checked = command_line.process("check", "--fix", *options, store=store, **variables)
        assert checked.returncode == 0, checked.stderr
        assert ("over the disk budget" in checked.stdout) == (budget == 1)
        assert sorted(store.rglob("*.safetensors")) == files
    known = json.loads(run("stats", "--json", "--disk-budget-mb", "1", "--cache-dir", str(store)))
    assert known["quota"] == 2**20
    listed = run("sessions", "list", "--cache-dir", str(store))
    assert [name for name in ("ada", "bob", "cyd") if name in listed] == ["ada", "bob", "cyd"]


def test_a_chat_goes_on_in_another_process(tmp_path: Path) -> None:
    first = command_line.process(
        "chat", "--session", "s", typed="My favourite colour is teal.\n\n", store=tmp_path / "store"
    )
    assert first.returncode == 0, first.stderr
    second = command_line.process(
        "chat", "--session", "s", typed="What is my favourite colour?\n\n", store=tmp_path / "store"
    )
    assert "teal" in second.stdout
    assert "after 2 messages" in second.stderr
    assert "(warm)" in second.stderr
    listed = command_line.process("sessions", "list", store=tmp_path / "store")
    assert "s" in listed.stdout


def test_a_chat_without_a_folder_answers_and_says_that_nothing_is_kept(tmp_path: Path) -> None:
    done = command_line.process(
        "chat", typed="My name is Ada.\nWhat is my name?\n\n", store="none", HOME=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "Ada" in done.stdout
    assert "nothing of this chat is kept" in done.stderr
    assert list(tmp_path.iterdir()) == []


STORE_COMMANDS = (
    ("sessions", "list"),
    ("sessions", "show", "s"),
    ("sessions", "forget", "s"),
    ("sessions", "pin", "s"),
    ("check",),
    ("stats",),
)
COMMANDS = (
    *STORE_COMMANDS, ("chat",), ("models", "show", "tiny-chat"), ("models", "verify", "tiny-chat", "--blocks", "1")
)  # fmt: skip


def failed(*arguments: str, **variables: str) -> str:
    """The one sentence with which a command fails. Any exception but ours is a failed test."""
    done = command_line.command(*arguments, code=1, typed="hi\n\n", **variables)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return sentence


@pytest.mark.parametrize("command", STORE_COMMANDS, ids=" ".join)
def test_without_a_folder_a_command_says_how_to_name_one(command: tuple[str, ...]) -> None:
    assert "give --cache-dir" in failed(*command, AGENT_MEMORY_CACHE_DIR="none")


@pytest.mark.parametrize("command", [*STORE_COMMANDS, ("chat",), COMMANDS[-1]], ids=" ".join)
@pytest.mark.parametrize("kind", ["a file", "a place that cannot be", "read only"])
def test_a_folder_that_cannot_be_used_is_named(command: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if kind == "a file":
        folder.write_text("")
    elif kind == "a place that cannot be":
        folder = Path("/dev/null/sessions")
    else:
        folder.mkdir(mode=0o500)
    assert str(folder) in failed(*command, AGENT_MEMORY_CACHE_DIR=str(folder))
    assert not (tmp_path / "folder" / "catalog.db").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_setting_that_is_wrong_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    sentence = failed(*command, AGENT_MEMORY_CACHE_DIR=store, AGENT_MEMORY_DISK_BUDGET_MB="lots")
    assert "lots" in sentence


@pytest.mark.parametrize(
    "command",
    [("chat", "--model"), ("models", "show", "--load"), ("models", "verify"), ("models", "new")],
    ids=" ".join,
)
def test_a_model_that_is_not_there_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    assert "./no-such-folder" in failed(*command, "./no-such-folder", AGENT_MEMORY_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize("command", [("show",), ("pin",), ("forget",)], ids=" ".join)
def test_a_session_that_is_not_there_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    assert "'nobody'" in failed("sessions", *command, "nobody", AGENT_MEMORY_CACHE_DIR=str(tmp_path))


def test_a_damaged_transcript_is_named(tmp_path: Path) -> None:
    command_line.command("chat", typed="hi\n\n", AGENT_MEMORY_CACHE_DIR=str(tmp_path))
    (transcript,) = (tmp_path / "transcripts").iterdir()
    transcript.write_text("[1]")
    assert str(transcript) in failed("chat", AGENT_MEMORY_CACHE_DIR=str(tmp_path))


def test_an_error_is_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    done = command_line.process("chat", "--model", "./no-such-folder", typed="hi\n", store=tmp_path / "store")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demonstration_shows_the_point(tmp_path: Path) -> None:
    console = Console(record=True, width=100)
    outcome = demo.run(console, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert len(outcome.lines) == 3
    for line in outcome.lines:
        assert line.reused >= 0.95 * line.prompt_tokens
        assert line.expected in line.answer, line
    # Tails are stored as they were computed, so in float32 they weigh more beside the brief.
    assert outcome.bytes_unshared > 1.5 * outcome.bytes_shared
    text = console.export_text()
    assert "SIGKILL" in text
    assert "agent-memory ui" in text
