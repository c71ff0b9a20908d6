"""The committed benchmark results, and what the README says of them."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("ttft", "append_cost", "throughput")


def _load_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_report", BENCHMARKS / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = _load_report()


def ratios(name: str) -> dict[str, dict[str, float]]:
    """What the targets of a result speak of, by codec where there are several."""
    found = report.read(name)["results"]
    if name == "ttft":
        return {codec: measured["ratios"] for codec, measured in found.items()}
    return {name: found["slopes" if name == "append_cost" else "ratios"]}


def test_every_benchmark_has_a_result_and_a_table() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"common", "record", "report"}
    assert scripts == {path.stem for path in (BENCHMARKS / "results").glob("*.json")} == set(report.TABLES)
    assert scripts == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_says_where_it_was_measured(name: str) -> None:
    result = report.read(name)
    assert set(result) == {"machine", "commit", "versions", "model", "settings", "results"}
    assert set(result["machine"]) == {"cpu", "cores", "platform", "device"}
    assert set(result["versions"]) == {"python", "mlx", "mlx-lm", "agent-memory-mlx"}
    assert result["commit"] not in ("", "unknown")


@pytest.mark.parametrize("name", NAMES)
def test_a_result_meets_its_targets(name: str) -> None:
    targets = report.read(name)["settings"]["targets"]
    assert targets
    for measured in ratios(name).values():
        for ratio, target in targets.items():
            assert report.meets(measured[ratio], target), (ratio, measured[ratio], target)


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


def test_the_readme_says_what_was_measured() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert report.render(text) == text


@pytest.mark.parametrize(
    ("value", "target", "met"), [(1, "<= 1", True), (1.1, "<= 1", False), (0.9, ">= 1", False)]
)
def test_a_target_is_a_bound(value: float, target: str, met: bool) -> None:
    assert report.meets(value, target) is met


def _median(samples: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(sample[name] for sample in samples))
