"""The committed benchmark results, and what the README says of them."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load
from support.benchmark_scripts import BENCHMARKS, load_benchmark

from agent_memory_core import EngineConfig

NAMES = (
    "ttft",
    "waiting",
    "append_cost",
    "throughput",
    "quality",
    "families",
    "ecosystem",
    "encryption",
    "reliability",
    "coordination",
    "eviction",
    "rivals",
    "cold",
    "raylets",
    "cold_loss",
    "fleet",
    "server",
    "server_load",
)
HELPERS = {
    "common",
    "first_day",
    "record",
    "report",
    "talks",
    "outliers",
    "quality_plot",
    "ttft_plot",
    "agent_traces",
    "eviction_policies",
    # It runs where Metal or CUDA is, and was not run yet.
    "geometries",
    "rival_systems",
    "watched",
}


report = load_benchmark("report")
quality = load_benchmark("quality")
quality_plot = load_benchmark("quality_plot")
ttft_plot = load_benchmark("ttft_plot")
talks = load_benchmark("talks")


def new_tokens(turn: dict[str, int]) -> int:
    return turn["prompt"] - turn["reused"]


def ratios(name: str) -> dict[str, dict[str, float]]:
    """What the targets of a result speak of, by codec where there are several."""
    found = report.read(name)["results"]
    if name == "quality":
        return {found["default"]: quality.measured(found["codecs"][found["default"]], found["codecs"])}
    if name == "cold":
        link = report.read(name)["settings"]["link of the target"]
        return {tokens: {"cold / prefill": measured["ratios"][link]} for tokens, measured in found.items()}
    if name in ("ttft", "encryption"):
        return {codec: measured["ratios"] for codec, measured in found.items()}
    if name == "families":
        return {family: {"resumed gap": measured["resumed gap"]} for family, measured in found.items()}
    if name == "ecosystem":
        return {
            package: {"new after a restart / new before": new_tokens(turns[2]) / new_tokens(turns[1])}
            for package, turns in ((package, measured["turns"]) for package, measured in found.items())
        }
    if name == "reliability":
        wrong = sum(found[part]["wrong"] for part in ("kills", "damage", "soak"))
        share = found["kills"]["largest_share"]
        return {name: {"lost": found["kills"]["lost"], "wrong": wrong, "largest share of the budget": share}}
    if name == "rivals":
        return {
            system: {
                "answers changed by a restart": found[system]["changed"],
                "tokens computed after a restart": found[system]["times"]["resumed"]["computed"],
                "tokens computed after a kill": found[system]["times"]["killed"]["computed"],
            }
            for system in ("agent-memory", "agent-memory, raw")
        }
    return {name: found["slopes" if name == "append_cost" else "ratios"]}


def test_every_benchmark_has_a_result_and_a_table() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - HELPERS
    assert scripts == {path.stem for path in (BENCHMARKS / "results").glob("*.json")} == set(report.TABLES)
    assert scripts == set(NAMES)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_program_finds_what_it_imports(name: str) -> None:
    assert load_benchmark(name).__name__ == name


@pytest.mark.parametrize("name", NAMES)
def test_a_result_says_where_it_was_measured(name: str) -> None:
    result = report.read(name)
    assert set(result) == {"machine", "commit", "versions", "model", "settings", "results"}
    assert set(result["machine"]) >= {"cpu", "cores", "platform", "device"}
    assert set(result["versions"]) == {"python", "mlx", "mlx-lm", "agent-memory-mlx"}
    assert result["commit"] not in ("", "unknown")


@pytest.mark.parametrize("name", NAMES)
def test_a_result_meets_its_targets(name: str) -> None:
    targets = report.read(name)["settings"]["targets"]
    assert targets
    for measured in ratios(name).values():
        for ratio, target in targets.items():
            assert report.meets(measured[ratio], target), (ratio, measured[ratio], target)


def test_no_benchmark_touches_the_users_sessions_or_ends_processes_by_name() -> None:
    for file in BENCHMARKS.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"pkill|killall|\.agent_memory\b|default_cache_dir", text), file.name


def test_medians_are_those_of_the_samples() -> None:
    for measured in report.read("ttft")["results"].values():
        for kind, samples in measured["samples"].items():
            assert measured["medians"][kind] == pytest.approx(_median(samples, "seconds"), abs=1e-6)
    throughput = report.read("throughput")["results"]
    for side, rates in throughput["medians"].items():
        of_side = [sample[side] for sample in throughput["samples"]]
        for part, rate in rates.items():
            assert rate == pytest.approx(_median(of_side, part), abs=1e-6)
    append_cost = report.read("append_cost")["results"]
    for length, middle in append_cost["middles"].items():
        assert middle["turn"] == pytest.approx(_median(append_cost["samples"][length], "turn"), abs=1e-6)


def test_perplexity_lost_is_that_of_the_conversations() -> None:
    results = report.read("quality")["results"]
    raw = results["conversations"]["raw"]
    for name, sums in results["conversations"].items():
        assert sums["tokens"] == raw["tokens"]
        more = (sum(sums["nats"]) - sum(raw["nats"])) / sum(raw["tokens"])
        assert results["codecs"][name]["loss"] == pytest.approx(math.expm1(more), abs=1e-5)
    assert results["codecs"][results["default"]]["loss error"] < 0.002, "too few conversations to tell 0.5 %"


def test_the_default_is_the_smallest_codec_that_meets_the_targets() -> None:
    results = report.read("quality")["results"]
    default = results["codecs"][results["default"]]
    assert default["setting"] == EngineConfig().kv_bits
    assert results["chosen"] == results["default"] == quality.choose(results["codecs"])


def test_the_four_bit_setting_is_the_best_of_its_size_on_outlier_keys() -> None:
    codecs = report.read("quality")["results"]["codecs"]
    size = next(row["bytes"] for row in codecs.values() if row.get("setting") == 4)
    rivals = [row for row in codecs.values() if row["bytes"] == size and "key error" in row]
    assert len(rivals) >= 3
    assert min(rivals, key=lambda row: row["key error"])["setting"] == 4


def test_sizes_and_encodings_are_those_of_the_codecs_in_use() -> None:
    for name, row in report.read("quality")["results"]["codecs"].items():
        encoding = quality.CANDIDATES[name].encoding
        assert row["encoding"] == {
            "keys": encoding.keys.name(),
            "values": encoding.values.name(),
        }
        assert row["bytes"] == quality.bytes_per_token(encoding)
        if "setting" in row:
            assert quality.ENCODINGS[row["setting"]] == encoding


@pytest.mark.parametrize("name", ["quality", "ttft"])
def test_a_picture_was_drawn_from_the_result(name: str, tmp_path: Path) -> None:
    plot = {"quality": quality_plot, "ttft": ttft_plot}[name]
    assert plot.source().encode() in plot.PICTURE.read_bytes()
    plot.draw(report.read(name), tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000


def test_loss_and_its_error_are_of_pairs() -> None:
    def walked(*nats: float) -> list[Any]:
        return [talks.Score("talk", [n], [0], True) for n in nats]

    raw = [walked(1, 1), walked(2, 2), walked(3, 3)]
    assert quality.perplexity_loss(raw, raw) == (0, 0)
    shifted = [walked(*(score.nats[0] + 0.01 for score in of)) for of in raw]
    loss, error = quality.perplexity_loss(shifted, raw)
    assert loss == pytest.approx(math.expm1(0.01))
    assert error == pytest.approx(0, abs=1e-12)
    _, error = quality.perplexity_loss([walked(1.3, 1), *raw[1:]], raw)
    # Two conversations lose nothing, one loses 0.3 of six tokens' 0.05 each: deviations 0.2, 0.1, 0.1.
    assert error == pytest.approx(math.exp(0.05) * math.sqrt(0.2**2 + 0.1**2 + 0.1**2) / 6)


def test_what_is_asked_for_was_told_in_full_blocks() -> None:
    tokenizer = load(str(quality.TOKENIZER))[1]
    for seed in range(5):
        talk, known = talks.recall(seed)
        walk = talks.tokenize(tokenizer, (talk, known))
        opening = talks.Conversation()
        talks.fill(talks._source(seed), opening, talks.OPENING)
        first = len(opening.turns)
        assert opening.messages() == talk.messages()[:first]
        before, told = (
            len(tokenizer.apply_chat_template(talk.messages()[:n])) for n in (first, first + 2 * talks.FACTS)
        )
        assert before >= talks.BLOCK
        assert told + talks.BLOCK <= walk.known // talks.BLOCK * talks.BLOCK
        assert [turn.kind for turn in walk.turns] == ["recall"] * talks.FACTS
        for turn, message in zip(walk.turns, talk.messages()[known + 1 :: 2], strict=True):
            assert message["content"] in tokenizer.decode(walk.ids[turn.answer : turn.stop])


@pytest.mark.model
def test_a_walk_without_rounding_is_the_model_alone() -> None:
    model, tokenizer = load(str(quality.TOKENIZER))[:2]
    walk = talks.tokenize(tokenizer, talks.recall(0))
    memory = talks.Memory(model, quality.codec(quality.ENCODINGS[None]))
    scores = talks.walk(model, walk, talks.begin(model, walk), memory)
    logits = model(mx.array([walk.ids]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for turn, score in zip(walk.turns, scores, strict=True):
        wanted = [-logprobs[i - 1, walk.ids[i]].item() for i in range(turn.answer, turn.stop)]
        assert score.nats == pytest.approx(wanted, abs=0.05)


def test_what_is_lost_is_measured_against_chance() -> None:
    def row(lost: int, gained: int) -> dict[str, Any]:
        task = {"right": 50, "of": 100, "lost": lost, "gained": gained}
        return {"recall": task, "tool calls": task, "loss": 0.001, "loss error": 0.002, "key error": 0.05}

    codecs = {"8/4": {"key error": 0.1}}
    found = quality.measured(row(8, 1), codecs)
    assert found == {
        "loss": pytest.approx(0.003),
        "recall lost": pytest.approx(7 / 3),
        "tool calls lost": pytest.approx(7 / 3),
        "key error / 8/4": pytest.approx(0.5),
    }
    assert quality.measured(row(0, 0), codecs)["recall lost"] == 0
    assert quality.tally([(True, True), (True, False), (False, True), (False, True)]) == {
        "right": 2,
        "of": 4,
        "lost": 2,
        "gained": 1,
    }


@pytest.mark.heavy
@pytest.mark.model
def test_a_quick_run_judges_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One conversation, short keys, and one candidate of each sort: the way through the program is the same."""
    sorts = ("raw", "8/4", "6/4 by channel", "4 by channel, first block 8/4")
    monkeypatch.setattr(quality, "CANDIDATES", {name: quality.CANDIDATES[name] for name in sorts})
    monkeypatch.setattr(quality, "KEYS_ONLY", {"6/4 rotated": quality.KEYS_ONLY["6/4 rotated"]})
    monkeypatch.setattr(quality, "QUICK", {"tool calls": 1})
    monkeypatch.setattr(quality.outliers, "TOKENS", 2 * talks.BLOCK)
    out = tmp_path / "quick.json"
    monkeypatch.setattr(sys, "argv", ["quality.py", "--quick", "--out", str(out)])
    quality.main()
    results = json.loads(out.read_text())["results"]
    codecs = results["codecs"]
    assert list(codecs) == list(sorts)
    assert results["default"] == "6/4 by channel"
    assert set(results["key errors"]) == {*sorts[:3], "6/4 rotated"}
    assert (codecs["raw"]["loss"], codecs["raw"]["agreement"]) == (0, 1)
    assert all(row["loss"] != 0 for name, row in codecs.items() if name != "raw")


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_rectangular_and_full(name: str) -> None:
    lines = [line for line in report.table(name).splitlines() if line.startswith("|")]
    assert len(lines) >= 4
    assert len({line.count("|") for line in lines}) == 1
    assert "nan" not in report.table(name)


def test_a_marked_table_is_made_anew_and_the_rest_is_left_alone() -> None:
    before, after = "# Title\n\n<!-- bench:ttft -->\n", "<!-- /bench -->\n\nThe end.\n"
    text = report.render(f"{before}old\n{after}")
    assert text == f"{before}{report.table('ttft')}\n{after}"
    assert report.render(text) == text


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_a_page_says_what_was_measured(page: Path) -> None:
    assert report.rendered(page) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "target", "met"), [(1, "<= 1", True), (1.1, "<= 1", False), (0.9, ">= 1", False)]
)
def test_a_target_is_a_bound(value: float, target: str, met: bool) -> None:
    assert report.meets(value, target) is met


def _median(samples: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(sample[name] for sample in samples))


def test_a_new_result_describes_the_machine_and_the_device(tmp_path: Path) -> None:
    record = load_benchmark("record")
    record.write_result(tmp_path / "new.json", {}, {})
    machine = json.loads((tmp_path / "new.json").read_text())["machine"]
    described = {"cpu", "cores", "memory", "platform", "macos", "gflops", "blas", "device", "device_info"}
    assert described == set(machine)
    assert machine["memory"] > 2**28
    assert machine["device_info"] == mx.device_info()
