"""A configuration is checked whole when it is read, and says in one sentence what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_memory_core import InvalidSetting
from agent_memory_core.manager import ManagerConfig, ModelConfig


def model(**values: Any) -> dict[str, Any]:
    return {"name": "m", "type": "mlx", "path": "tiny-chat", **values}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown setting": ({"max_memory_gb": 4}, "did you mean 'max_memory_mb'"),
    "an unknown setting of a model": (
        {"models": [model(memory_prioity=1)]},
        "did you mean 'memory_priority'",
    ),
    "a value outside its range": ({"models": [model(memory_priority=6)]}, "memory_priority=6"),
    "an unknown type": ({"models": [model(type="onnx")]}, "type='onnx'"),
    "an unknown parameter": ({"models": [model(parameters={"temprature": 1})]}, "did you mean 'temperature'"),
    "a parameter of another type": ({"models": [model(parameters={"n_gpu_layers": 1})]}, "'n_gpu_layers'"),
    "a parameter outside its range": ({"models": [model(parameters={"top_p": 3})]}, "top_p=3"),
    "a setting of the engine outside its range": (
        {"models": [model(parameters={"kv_bits": 5})]},
        "kv_bits=5",
    ),
    "two names for one parameter": (
        {"models": [model(parameters={"max_tokens": 1, "max_new_tokens": 2})]},
        "another name of 'max_tokens'",
    ),
    "one name twice": ({"models": [model(), model(path="other/x")]}, "two models are called 'm'"),
    "one engine twice": ({"models": [model(), model(name="n")]}, "'m' and 'n' are the same"),
    "an agent's model": ({"models": [model()], "agents": {"a": "x"}}, r"agents\['a'\] names the model 'x'"),
    "the default model": ({"models": [model()], "default_model": "x"}, "default_model names the model 'x'"),
    "a fallback": ({"models": [model(fallback=["x"])]}, "fallback of 'm' names the model 'x'"),
    "a circle of fallbacks": (
        {"models": [model(fallback=["n"]), model(name="n", path="a/b", fallback=["m"])]},
        "m -> n -> m",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_is_wrong_is_said(case: str) -> None:
    values, says = WRONG[case]
    with pytest.raises(InvalidSetting, match=says):
        ManagerConfig(**values)


def test_parameters_have_one_name_each() -> None:
    config = ModelConfig(
        **model(type="huggingface", parameters={"max_new_tokens": 5, "torch_dtype": "float16"})
    )
    assert config.parameters == {"max_tokens": 5, "dtype": "float16"}
    assert config.native == {"dtype": "float16"}


def test_greedy_wins_over_a_temperature() -> None:
    from agent_memory_core.manager.parameters import sampling_of

    assert sampling_of({"temperature": 0.7, "do_sample": False})["temperature"] == 0
    assert sampling_of({"temperature": 0.7, "do_sample": True})["temperature"] == 0.7


@pytest.mark.parametrize(("given", "seconds"), [(None, None), (-1, None), (0, 0), (5.5, 5.5)])
def test_how_long_a_model_may_idle(given: float | None, seconds: float | None) -> None:
    assert ModelConfig(**model(max_idle_time=given)).idle_limit == seconds


def test_files_are_json_or_toml_and_paths_count_from_where_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "own").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "c.json"
    paths = ["./own", "./here", "tiny-chat", "org/remote"]
    models = [model(name=str(i), path=path) for i, path in enumerate(paths)]
    file.write_text(json.dumps({"models": models, "agent_mapping": {"a": "1"}}))
    config = ManagerConfig.from_file(file)
    found = [one.path for one in config.models]
    assert found == [str(tmp_path / "conf" / "own"), str(tmp_path / "here"), "tiny-chat", "org/remote"]
    assert config.agents == {"a": "1"}
    toml = tmp_path / "c.toml"
    toml.write_text('max_memory_mb = 7\n[[models]]\nname = "m"\ntype = "mlx"\npath = "tiny-chat"\n')
    assert ManagerConfig.from_file(toml).max_memory_mb == 7
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(InvalidSetting, match=r"c\.json"):
            ManagerConfig.from_file(file)
    with pytest.raises(InvalidSetting, match=r"nothing\.json"):
        ManagerConfig.from_file(tmp_path / "nothing.json")
