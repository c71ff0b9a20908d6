"""`agent-memory models` on real folders."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import command_line, families, tiny_models
from support.catalog_rows import catalog_at

from agent_memory_core.cli import formats
from agent_memory_core.models.parity import ParityResult
from agent_memory_core.models.profile import read_profile, shipped_directory

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `agent-memory models` in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return partial(command_line.command, "models")


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """Makes a random model folder ``mine`` with these files and config keys changed."""

    def make(files: dict[str, Any] | None = None, **config: Any) -> Path:
        folder = Path(tiny_models.write(tmp_path / "models" / "Mine", tiny_models.LLAMA | config))
        for name, said in (files or {}).items():
            known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            (folder / name).write_text(json.dumps(known | said))
        return folder

    return make


def cells(text: str, name: str) -> list[str]:
    """The cells of the row of a table that begins with ``name``."""
    row = next(line for line in text.splitlines() if re.match(rf"\s*{re.escape(name)}(\s{{2,}}|$)", line))
    return re.split(r"\s{2,}", row.strip())


def test_every_shipped_profile_is_listed(run: Run) -> None:
    listed = run("list").stdout
    for path in shipped_directory().glob("*.toml"):
        profile = read_profile(path)
        row = cells(listed, profile.name)
        assert row[1:3] == [profile.model_id, str(profile.geometry["n_layers"])]
        assert row[-1] == "shipped"
    assert cells(listed, "gemma-3-12b-it-4bit")[3:6] == ["8", "256", "1024"]


def test_a_profile_that_cannot_be_read_is_named_and_the_others_are_listed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "bad.toml").write_text('[model]\nmodel_id = "x"\nlayerz = 3\n')
    (tmp_path / "own" / "good.toml").write_text('[model]\nmodel_id = "x"\nhead_dim = [32, 64]\n')
    done = run("list", code=1, AGENT_MEMORY_MODEL_CONFIGS=str(tmp_path / "own"))
    assert re.search(r"good .* 32, 64 ", done.stdout)
    assert "bad.toml, [model] layerz is not a known key" in done.stderr.replace("\n", " ")


def test_a_profile_is_shown_with_where_each_value_comes_from(run: Run) -> None:
    shown = run("show", "gemma-3-12b-it-4bit", AGENT_MEMORY_TOP_K="7").stdout
    assert cells(shown, "n_layers") == ["n_layers", "48", "profile"]
    assert cells(shown, "sliding_window layers: count")[1] == "40"
    assert cells(shown, "temperature")[1:] == ["1.0", "profile"]
    assert cells(shown, "top_k")[1:] == ["7", "environment"]
    assert cells(shown, "min_p")[1:] == ["0.0", "default"]
    assert cells(run("show", "Qwen3-8B-4bit").stdout, "enable_thinking")[1:] == ["True", "profile"]


def test_what_kv_costs_is_what_the_codecs_make_of_it(run: Run) -> None:
    shown = run("show", "gemma-3-12b-it-4bit").stdout
    whole = 8 * 256 * 2 * 2  # heads, width, keys and values, two bytes: of one layer
    scales = 8 * 256 * 2 // 64 * 4  # a scale and a bias for each 64
    assert cells(shown, "none")[1] == formats.size(8 * whole)
    assert cells(shown, "none")[3] == formats.size(40 * whole * 1024)
    assert cells(shown, "8")[1] == formats.size(8 * (whole // 2 + scales))
    assert cells(shown, "8/4")[1] == formats.size(8 * (whole * 3 // 8 + scales))
    assert cells(shown, "4")[1] == formats.size(8 * (whole // 4 + scales))
    assert cells(shown, "4")[2] == formats.size(8 * (whole // 4 + scales) + 4096 / 128)
    unequal = run("show", "deepseek-coder-v2-lite-4bit").stdout
    assert cells(unequal, "none")[1] == formats.size(27 * 16 * (192 + 128) * 2)
    assert cells(unequal, "none")[3] == "none"


@pytest.mark.parametrize(
    ("geometry", "said"),
    [
        ("n_layers = 2\nhead_dim = 64\n", "does not tell enough"),
        ("n_layers = 2\nn_kv_heads = 1\nhead_dim = [64, 96]\n", "does not tell enough"),
        (
            "n_layers = 2\nn_kv_heads = 1\nhead_dim = 64\n[model.layers.recurrent]\ncount = 2\n",
            "does not tell enough",
        ),
        (
            "n_kv_heads = 1\nhead_dim = 64\n[model.layers.hybrid]\ncount = 2\n",
            "keep states or snapshots",
        ),
    ],
)
def test_what_a_profile_does_not_tell_is_not_made_up(
    run: Run, tmp_path: Path, geometry: str, said: str
) -> None:
    (tmp_path / "m.toml").write_text(f'[model]\nmodel_id = "[m]"\n{geometry}')
    shown = run("show", "m", AGENT_MEMORY_MODEL_CONFIGS=str(tmp_path)).stdout
    assert said in shown
    assert ("512 B" in shown) == ("keep states" in shown)


def test_a_loaded_model_is_shown_as_it_is(run: Run, llama: Callable[..., Path]) -> None:
    folder = llama(sliding_window=512)
    assert "there is no profile for" in run("show", str(folder), code=1).stderr
    shown = run("show", str(folder), "--load").stdout
    assert cells(shown, "global layers: count")[1:] == ["2", "live caches"]
    assert cells(shown, "global layers: head_dim")[1] == "64"
    assert cells(shown, "none")[1] == formats.size(2 * 1 * (64 + 64) * 4)
    assert "sliding_window = 512, but the live caches have no window" in shown
    assert cells(run("show", "tiny-chat", "--load").stdout, "n_layers")[1] == "5"


@pytest.mark.parametrize("width", [80, 192])
def test_a_new_profile_is_true_of_its_model(
    run: Run, llama: Callable[..., Path], tmp_path: Path, width: int
) -> None:
    folder = llama(head_dim=width, num_key_value_heads=2)
    written = run("new", "models/Mine")
    profile = read_profile(tmp_path / "mine.toml")
    assert profile.model_id == "Mine"
    assert dict(profile.geometry) == {"n_layers": 2, "n_kv_heads": 2, "head_dim": width}
    assert f"export AGENT_MEMORY_MODEL_CONFIGS={tmp_path}" in written.stdout
    shown = run("show", str(folder), "--load", AGENT_MEMORY_MODEL_CONFIGS=str(tmp_path)).stdout
    assert "mine.toml" in shown
    wrong = (tmp_path / "mine.toml").read_text().replace(f"head_dim = {width}", "head_dim = 72")
    (tmp_path / "mine.toml").write_text(wrong)
    refused = run("show", str(folder), "--load", code=1, AGENT_MEMORY_MODEL_CONFIGS=str(tmp_path))
    assert f"head_dim = 72, but the loaded model has {width}" in refused.stderr.replace("\n", " ")


def test_a_new_profile_takes_over_what_the_model_says_of_itself(
    run: Run, llama: Callable[..., Path], tmp_path: Path
) -> None:
    files = {
        "generation_config.json": {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": 1},
        "tokenizer_config.json": {"chat_template": "{{ 'think' if enable_thinking }}hi"},
    }
    llama(files, sliding_window=512)
    noted = run("new", "models/Mine", "--out", "sub.toml").stdout
    profile = read_profile(tmp_path / "sub.toml")
    assert dict(profile.sampling) == {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    assert dict(profile.template_kwargs) == {"enable_thinking": False}
    assert "note: config.json says sliding_window = 512" in noted
    assert "# Note: config.json says sliding_window = 512" in (tmp_path / "sub.toml").read_text()


def test_a_new_profile_goes_where_own_profiles_are(
    run: Run, llama: Callable[..., Path], tmp_path: Path
) -> None:
    llama()
    (tmp_path / "own").mkdir()
    written = run("new", "models/Mine", AGENT_MEMORY_MODEL_CONFIGS=str(tmp_path / "own"))
    assert (tmp_path / "own" / "mine.toml").is_file()
    assert "export" not in written.stdout


def test_a_file_that_is_there_stays_unless_forced(
    run: Run, llama: Callable[..., Path], tmp_path: Path
) -> None:
    llama()
    (tmp_path / "mine.toml").write_text("mine")
    assert "mine.toml is there already" in run("new", "models/Mine", code=1).stderr
    assert (tmp_path / "mine.toml").read_text() == "mine"
    run("new", "models/Mine", "--force")
    assert read_profile(tmp_path / "mine.toml").model_id == "Mine"


def test_what_cannot_be_loaded_or_written_leaves_nothing(
    run: Run, llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llama()
    unwritable = run("new", "models/Mine", "--out", "no/such/place.toml", code=1).stderr
    assert "cannot be written" in unwritable.replace("\n", " ")
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "mlx-lm cannot load" in run("new", "models/Mine", code=1).stderr.replace("\n", " ")
    assert "no config.json" in run("new", "models", code=1).stderr.replace("\n", " ")
    assert list(tmp_path.glob("**/*.toml")) == []


def test_a_random_model_is_written_but_never_over_anything(run: Run, tmp_path: Path) -> None:
    assert "wrote mine" in run("random", "mine", "--family", "qwen3").stdout
    assert cells(run("show", "./mine", "--load").stdout, "global layers: head_dim")[1] == "32"
    weights = (tmp_path / "mine" / "model.safetensors").read_bytes()
    assert "is not empty" in run("random", "mine", "--seed", "1", code=1).stderr
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == weights
    assert "choose from llama, olmo2, qwen3" in run("random", "other", "--family", "gpt", code=1).stderr
    assert not (tmp_path / "other").exists()


# Verified


def chatted(folder: Path, store: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own that says one thing to a model."""
    arguments = ("chat", "--model", str(folder), "--max-tokens", "3")
    return command_line.process(*arguments, typed="Hello\n\n", store=store)


def recorded(store: Path) -> list[tuple[str, ParityResult]]:
    """What a store's catalog holds of models, as one who opens it later reads it."""
    with closing(sqlite3.connect(store / "catalog.db")) as db:
        found = db.execute("SELECT key, text FROM notes").fetchall()
    return [(subject, ParityResult.from_json(text)) for subject, text in found]


def test_a_sound_model_is_verified_and_the_verdict_is_recorded_and_read(
    run: Run, llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = llama(), tmp_path / "store"
    said = run("verify", str(folder), "--blocks", "2", AGENT_MEMORY_CACHE_DIR=str(store)).stdout
    assert cells(said, "in a batch and alone")[-1] == "equal"
    assert cells(said, "resumed and uninterrupted, at 2 boundaries")[-1] == "equal"
    assert f"recorded in {store}." in said
    ((subject, verdict),) = recorded(store)
    assert (verdict.batched, verdict.resumed, verdict.boundaries) == (True, True, 2)
    good = chatted(folder, store)
    assert good.returncode == 0, good.stderr
    assert "nothing of this model is stored" not in good.stderr
    with closing(catalog_at(store / "catalog.db")) as catalog:
        catalog.write_note(subject, replace(verdict, resumed=False, resumed_gap=0.25).to_json())
    bad = chatted(folder, store)
    assert bad.returncode == 0, bad.stderr
    assert "nothing of this model is stored: resumed from stored KV" in bad.stderr
    assert "they differ by 0.25 of their spread" in bad.stderr
    assert "--forget drops the record" in bad.stderr
    dropped = run("verify", str(folder), "--forget", AGENT_MEMORY_CACHE_DIR=str(store)).stdout
    assert dropped == "dropped what was recorded: the model decodes in batches and is not stored.\n"
    assert recorded(store) == []
    assert "nothing of this model is stored" not in chatted(folder, store).stderr
    again = run("verify", str(folder), "--forget", AGENT_MEMORY_CACHE_DIR=str(store)).stdout
    assert again == "nothing is recorded about this model.\n"


def test_a_family_that_is_wrong_in_a_batch_is_said_to_decode_one_at_a_time(run: Run, tmp_path: Path) -> None:
    folder, store = families.write(tmp_path / "afm7", "afm7"), tmp_path / "store"
    said = run("verify", folder, "--blocks", "2", AGENT_MEMORY_CACHE_DIR=str(store)).stdout
    assert cells(said, "in a batch and alone")[-1] == "one at a time"
    assert cells(said, "resumed and uninterrupted, at 2 boundaries")[-1] == "equal"
    assert "the model decodes one sequence at a time: its logits in a batch differ" in said
    ((_, verdict),) = recorded(store)
    assert (verdict.batched, verdict.resumed) == (False, True)
    assert f"To undo this: agent-memory models verify {folder} --forget" in said
    assert "export AGENT_MEMORY_BATCHING=always" in said
    assert "nothing of this model is stored" not in chatted(Path(folder), store).stderr


def test_without_a_folder_a_verdict_is_recorded_nowhere(run: Run, llama: Callable[..., Path]) -> None:
    said = run("verify", str(llama()), "--blocks", "1", AGENT_MEMORY_CACHE_DIR="none").stdout
    assert "recorded nowhere: there is no folder for sessions." in said
