"""The comparison with rivals: prompts that go on token by token, and the script on two systems that are here anyway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_scripts import BENCHMARKS, load_benchmark

rivals = load_benchmark("rivals")
systems = load_benchmark("rival_systems")
common = load_benchmark("common")


@pytest.fixture(scope="module")
def script() -> Any:
    return rivals.Script(str(common.TOKENIZER))


def test_a_first_prompt_has_exactly_the_tokens_that_are_asked_for(script: Any) -> None:
    for tokens in (200, 2048):
        assert len(script.first("ada", [common.user(tokens, 1, first=True)]).ids) == tokens


def test_a_next_prompt_goes_on_from_what_was_answered_token_by_token(script: Any) -> None:
    first = script.first("ada", [common.user(100, 1, first=True)])
    words = script.ids([common.user(30, 7, first=True)])[4:20]
    following = script.next(first, {"ids": words}, common.user(32, 2, first=False))
    assert following.ids[:116] == [*first.ids, *words]
    assert len(following.ids) == 116 + 32
    assert following.ids == script.ids(following.messages)
    by_text = script.next(first, {"text": following.messages[1]["content"]}, following.messages[2])
    assert by_text.messages == following.messages


def test_two_rounds_share_no_words_to_begin_with(script: Any) -> None:
    prompts = [script.first("ada", [common.user(200, 1000 * number, first=True)]).ids for number in (1, 2)]
    shared = next(i for i, (a, b) in enumerate(zip(*prompts, strict=True)) if a != b)
    assert shared < 8


def test_an_environment_that_was_built_is_not_built_again(tmp_path: Path) -> None:
    (tmp_path / rivals.BUILT).touch()
    assert rivals.build(tmp_path, ("a package that is not there",)) is None
    assert [path.name for path in tmp_path.iterdir()] == [rivals.BUILT]


def test_a_rival_whose_environment_could_not_be_built_does_not_run(tmp_path: Path) -> None:
    found = {system.name: rivals._runs(system) for system in rivals.all_systems(tmp_path, "model")}
    assert {name for name, runs in found.items() if runs} == {"agent-memory", "agent-memory, raw"}
    assert len(found) == 7


def test_medians_are_those_of_the_samples() -> None:
    def one(hot: float, floor: float, rate: float, changed: bool) -> dict[str, Any]:
        times: dict[str, Any] = {name: [] for name in rivals.TIMES}
        times["hot"] = [{"seconds": hot, "floor": floor, "computed": 32}]
        times["cold"] = [{"seconds": 9.0, "floor": None, "computed": None}]
        rates = {f"decode {count}": {"decode": rate, "whole": rate / 2} for count in (1, 8)}
        return {"times": times, "stored": 10, "written": 5, "start": 1.0, "changed": changed} | rates

    found = rivals.summary(
        {"x": [one(0.2, 0.1, 60, False), one(0.3, 0.2, 50, True), one(0.9, 0.2, 40, False)]}
    )["x"]
    assert found["times"]["hot"] == {
        "seconds": 0.3, "computed": 32, "floor": 0.2, "ratio": 2.0, "above": pytest.approx(0.1),
    }  # fmt: skip
    assert found["times"]["cold"] == {"seconds": 9.0}
    assert (found["rates"]["decode 8"], found["rates"]["whole 1"], found["changed"]) == (50, 25, 1)


@pytest.mark.heavy
@pytest.mark.model
def test_the_script_runs_in_process_and_over_http(tmp_path: Path) -> None:
    """The whole script with the product and with a server, whose environments are this one."""
    made = [sys.executable, str(BENCHMARKS / "rivals.py"), "--prepare", str(tmp_path / "model")]
    subprocess.run(made, check=True, timeout=120)
    python, model = Path(sys.executable), str(tmp_path / "model")
    environment = dict(os.environ) | {"AGENT_MEMORY_MIN_FREE_MB": "0"}
    ours = systems.Product("ours", python, model, environment, "")
    ours.arguments = ("6/4",)
    floor = systems.MlxByHand("floor", python, model, environment, "")
    server = systems.MlxServer(
        "server", python, model, environment, "", {"loaded": "tried apart"}, by_ids=False
    )
    floor.start(systems.emptied(tmp_path / "floor"))
    try:
        for system in (ours, server):
            run = rivals.Round(system, rivals.Script(model), rivals.QUICK, floor, tmp_path / system.name, 0)
            found = json.loads(json.dumps(run.replay()))
            assert all(found["times"][name] for name in rivals.TIMES if name not in system.cannot)
            assert all(found[f"decode {count}"]["whole"] > 0 for count in (1, 2))
            if system is ours:
                assert not found["changed"]
                assert found["stored"] > 0
                computed = [
                    found["times"][name][0]["computed"] for name in ("hot", "resumed", "killed", "fork")
                ]
                # Less than the new message where a fork of the conversation holds its first words already.
                assert all(0 < count <= rivals.QUICK.new for count in computed)
    finally:
        for system in (ours, server, floor):
            if system.process is not None:
                system.stop(kill=True)
