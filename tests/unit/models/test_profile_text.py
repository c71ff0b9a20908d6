"""A written profile is true of the model it was written from, and every key it offers can be set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import made_tokenizers
from support.layer_groups import Group, live_groups, unevaluated
from support.published_configs import CONFIGS

from agent_memory_core.config import EngineConfig, SamplingParams, profile_keys
from agent_memory_core.models.cache_spec import ModelCacheSpec, cache_spec
from agent_memory_core.models.profile import Profile, read_profile
from agent_memory_core.models.profile_text import profile_text, stated_sampling, stated_thinking

WINDOW = Group("window", (0, 1, 3), 2, 32, 32, window=16)
SPECS = {
    **{name: cache_spec(live_groups(unevaluated(config)), config) for name, config in CONFIGS.items()},
    "mixed": cache_spec([WINDOW, Group("append", (2, 4), 1, 64, 64)], {"num_hidden_layers": 9}),
    "mixed values": cache_spec([Group("append", (0,), 1, 64, 64), Group("append", (1,), 1, 64, 32)], {}),
    "mixed within a type": cache_spec(
        [Group("append", (0,), 1, 512, 64), Group("append", (0,), 1, 128, 64)], {}
    ),
    "two windows": cache_spec([WINDOW, Group("window", (2, 4), 2, 32, 32, window=64)], {}),
    "states": cache_spec([Group("state", (0, 1, 2))], {"num_hidden_layers": 3}),
    "hybrid": cache_spec([Group("state", (0, 1)), Group("append", (0, 1), 2, 80, 80)], {}),
    "states beside": cache_spec([Group("state", (0, 1)), Group("append", (2,), 2, 96, 96)], {}),
    "snapshots": cache_spec([Group("snapshot", (0, 1)), Group("append", (2,), 2, 96, 96)], {}),
}


def written(tmp_path: Path, spec: ModelCacheSpec, **more: Any) -> tuple[Profile, str]:
    text = profile_text("org/A-Model", spec, more.get("sampling", {}), more.get("thinks"))
    path = tmp_path / "a-model.toml"
    path.write_text(text, encoding="utf-8")
    return read_profile(path), text


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_written_profile_is_true_and_of_no_other_model(tmp_path: Path, name: str) -> None:
    profile, _ = written(tmp_path, SPECS[name])
    profile.check(SPECS[name])
    others = [spec for other, spec in SPECS.items() if other != name]
    for spec in others:
        with pytest.raises(ValueError, match="but the loaded model has"):
            profile.check(spec)


def test_a_shipped_profile_says_what_a_written_one_would(tmp_path: Path) -> None:
    for name in CONFIGS:
        profile, _ = written(tmp_path, SPECS[name])
        shipped = read_profile(Path(__file__).parents[3] / "model_configs" / f"{name}.toml")
        assert (profile.geometry, profile.layers) == (shipped.geometry, shipped.layers), name


def test_every_key_that_is_offered_can_be_set(tmp_path: Path) -> None:
    _, text = written(tmp_path, SPECS["mixed"])
    path = tmp_path / "all.toml"
    path.write_text(re.sub(r"^# (\[?\w+\]?( = .*)?)$", r"\1", text, flags=re.MULTILINE))
    profile = read_profile(path)
    sections = ("optimal", "thresholds")
    assert set(profile.settings) == {n for s in sections for n in profile_keys(EngineConfig, s).values()}
    assert set(profile.sampling) == set(profile_keys(SamplingParams, "inference"))
    assert profile.benchmark


@pytest.mark.parametrize("model_id", ['a "quoted" \\ name', "tab\tand\nline", "naïve/模型", "del\x7f"])
def test_any_name_survives(tmp_path: Path, model_id: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(profile_text(model_id, SPECS["hybrid"], {}, None), encoding="utf-8")
    assert read_profile(path).model_id == model_id


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 64}, {"temperature": 1.0, "top_k": 64}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}),
        ({"temperature": 0.5, "max_new_tokens": 99}, {"temperature": 0.5, "max_tokens": 99}),
        ({"temperature": None, "top_k": -1, "top_p": "high", "eos_token_id": 2}, {}),
        ([], {}),
    ],
)
def test_sampling_is_what_the_model_recommends(tmp_path: Path, said: Any, sampling: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert stated_sampling(tmp_path) == sampling
    profile, _ = written(tmp_path, SPECS["hybrid"], sampling=sampling)
    assert profile.sampling == sampling


def test_sampling_of_a_model_that_recommends_nothing_is_left_open(tmp_path: Path) -> None:
    assert stated_sampling(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("{")
    assert stated_sampling(tmp_path) == {}


@pytest.mark.parametrize(
    ("template", "words", "thinks"),
    [
        # mlx-lm has a model think whose vocabulary can, unless it is told not to.
        ("{{ 'x' if enable_thinking else 'y' }}", ("<think>", "</think>"), True),
        ("{{ 'x' if enable_thinking else 'y' }}", (), False),
        ("{{ messages[0].content }}", ("<think>", "</think>"), None),
        ("{{ raise_exception('no') }}", (), None),
    ],
)
def test_thinking_is_what_the_template_makes_of_it(
    tmp_path: Path, template: str, words: tuple[str, ...], thinks: bool | None
) -> None:
    tokenizer = made_tokenizers.byte_level(template, made_tokenizers.special(*words))
    assert stated_thinking(tokenizer) is thinks
    profile, _ = written(tmp_path, SPECS["hybrid"], thinks=thinks)
    assert profile.template_kwargs == ({} if thinks is None else {"enable_thinking": thinks})


def test_a_model_without_a_template_cannot_be_told_to_think() -> None:
    assert stated_thinking(made_tokenizers.untemplated()) is None
