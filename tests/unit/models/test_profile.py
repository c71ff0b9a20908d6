"""Profiles: every key is used, checked or refused; the loaded model has the last word."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.layer_groups import Group, live_groups, unevaluated
from support.published_configs import CONFIGS

from agent_memory_core.config import EngineConfig, SamplingParams
from agent_memory_core.environment import ALWAYS_ON
from agent_memory_core.errors import InvalidSetting
from agent_memory_core.models.cache_spec import ModelCacheSpec, cache_spec
from agent_memory_core.models.profile import (
    _REFUSED,
    CONFIGS_VARIABLE,
    Profile,
    find_profile,
    read_profile,
    sampling_for,
    settings_for,
    shipped_directory,
)

SHIPPED = sorted(shipped_directory().glob("*.toml"))
FULL = """
[model]
model_id = "org/Some-Model-4bit"
n_layers = 32
n_kv_heads = 8
head_dim = 192
v_head_dim = 128
sliding_window = 1024

[model.layers.global]
count = 8
head_dim = [192, 256]

[inference]
temperature = 0.7
top_p = 0.95
top_k = 50
min_p = 0.05
repetition_penalty = 1.1
max_tokens = 99
supports_thinking = true
extended_thinking = false

[optimal]
max_batch_size = 2
kv_bits = "none"
block_tokens = 64
prewarm = "idle"
prefill_step_size = 512
chunked_prefill_min_chunk = 128
scheduler_enabled = true
evict_to_disk = true

[thresholds]
context_length = 4096
memory_budget_mb = 1000
disk_budget_mb = 2000
min_free_mb = 10

[benchmark]
machine = "M4 Pro, 24 GB"
prefill_tokens_per_second = 310.5
"""


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """An environment whose directory of profiles is ``tmp_path``."""
    return {CONFIGS_VARIABLE: str(tmp_path)}


def write(directory: Path, text: str, name: str = "some-model-4bit") -> Path:
    path = directory / f"{name}.toml"
    path.write_text(text)
    return path


def with_key(section: str, line: str) -> str:
    """A profile with one key more than its name."""
    text = '[model]\nmodel_id = "org/m"\n'
    return text + line if section == "model" else f"{text}[{section}]\n{line}"


# What is shipped


def test_every_shipped_profile_has_a_model_to_hold_it_against() -> None:
    assert {path.stem for path in SHIPPED} == set(CONFIGS)
    assert len(SHIPPED) >= 7


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def shipped(request: pytest.FixtureRequest) -> tuple[Profile, ModelCacheSpec]:
    """A shipped profile, and what mlx-lm's own class of full size keeps for the model's real config."""
    config = CONFIGS[request.param]
    profile = read_profile(shipped_directory() / f"{request.param}.toml")
    return profile, cache_spec(live_groups(unevaluated(config)), config)


def test_every_shipped_profile_is_true(shipped: tuple[Profile, ModelCacheSpec]) -> None:
    profile, spec = shipped
    profile.check(spec)
    assert {"n_layers", "n_kv_heads", "head_dim"} <= set(profile.geometry)
    assert ("sliding_window" in profile.geometry) == (spec.values_of("sliding_window") != set())
    assert sum(layer["count"] for layer in profile.layers.values()) in (0, spec.n_layers)  # type: ignore[misc]
    assert spec.contradictions == ()


def test_every_number_of_a_shipped_profile_is_checked(shipped: tuple[Profile, ModelCacheSpec]) -> None:
    profile, spec = shipped

    def refuses(changed: Profile, said: str) -> None:
        with pytest.raises(InvalidSetting, match=said):
            changed.check(spec)

    def one_more(geometry: Mapping[str, Any], key: str) -> dict[str, Any]:
        return {**geometry, key: geometry[key] + 1}

    for key in profile.geometry:
        changed = replace(profile, geometry=one_more(profile.geometry, key))
        refuses(
            changed, rf"{key} = {changed.geometry[key]}, but the loaded model has {profile.geometry[key]}"
        )
    for layer_type, geometry in profile.layers.items():
        for key in geometry:
            layers = {**profile.layers, layer_type: one_more(geometry, key)}
            refuses(replace(profile, layers=layers), rf"layers\.{layer_type}\.{key} = ")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_profile_is_valid_and_found_by_its_names(path: Path) -> None:
    profile = read_profile(path)
    hub_id = profile.model_id
    for model in (hub_id, hub_id.split("/")[-1].upper(), f"/models/{hub_id.split('/')[-1]}/", path.stem):
        assert find_profile(model, {}) == profile
    assert settings_for({"model": hub_id}, {}).model == hub_id


# Reading


def test_every_key_goes_to_its_place(tmp_path: Path) -> None:
    assert read_profile(write(tmp_path, FULL)) == Profile(
        name="some-model-4bit",
        model_id="org/Some-Model-4bit",
        geometry={
            "n_layers": 32,
            "n_kv_heads": 8,
            "head_dim": 192,
            "v_head_dim": 128,
            "sliding_window": 1024,
        },
        settings={
            "max_batch_size": 2,
            "kv_bits": None,
            "block_tokens": 64,
            "prewarm": "idle",
            "prefill_chunk": 512,
            "prefill_chunk_busy": 128,
            "context_length": 4096,
            "memory_budget_mb": 1000,
            "disk_budget_mb": 2000,
            "min_free_mb": 10,
        },
        sampling={
            "temperature": 0.7,
            "top_p": 0.95,
            "top_k": 50,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "max_tokens": 99,
        },
        template_kwargs={"enable_thinking": False},
        benchmark={"machine": "M4 Pro, 24 GB", "prefill_tokens_per_second": 310.5},
        layers={"global": {"count": 8, "head_dim": (192, 256)}},
    )


def test_settings_and_sampling_of_a_model_take_its_profile(tmp_path: Path, own: dict[str, str]) -> None:
    write(tmp_path, FULL)
    environ = {**own, "AGENT_MEMORY_MODEL": "org/Some-Model-4bit", "AGENT_MEMORY_TOP_K": "1"}
    config = settings_for({"block_tokens": 256}, environ)
    assert (config.max_batch_size, config.block_tokens, config.kv_bits) == (2, 256, None)
    sampling = sampling_for(config.model, {"top_p": 1.0}, environ)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 1, 1.0)


def test_a_model_without_a_profile_runs_on_the_defaults() -> None:
    assert find_profile("org/never-heard-of", {}) is None
    assert settings_for({"model": "org/never-heard-of"}, {}) == EngineConfig(model="org/never-heard-of")
    assert sampling_for("org/never-heard-of", {}, {}) == SamplingParams()


def test_an_own_profile_comes_before_a_shipped_one(tmp_path: Path, own: dict[str, str]) -> None:
    write(tmp_path, '[model]\nmodel_id = "tiny-chat"\n[optimal]\nmax_batch_size = 3\n', name="mine")
    assert settings_for({}, own).max_batch_size == 3
    assert settings_for({}, {}).max_batch_size == EngineConfig().max_batch_size


def test_what_macos_leaves_beside_a_profile_is_not_read(tmp_path: Path, own: dict[str, str]) -> None:
    """On a disk of another format each file gets a companion of binary data."""
    write(tmp_path, FULL)
    (tmp_path / "._some-model-4bit.toml").write_bytes(b"\x00\x05\x16\x07\xff")
    found = find_profile("org/Some-Model-4bit", own)
    assert found is not None
    assert found.path == tmp_path / "some-model-4bit.toml"


@pytest.mark.parametrize("age", [0, 3600])
def test_a_profile_that_changes_appears_or_goes_is_noticed(
    tmp_path: Path, own: dict[str, str], age: int
) -> None:
    """Also where a file is written twice within a tick of the file system's clock (age 0)."""

    def batch() -> int:
        return settings_for({"model": "mine"}, own).max_batch_size

    def written(size: int, step: int) -> None:
        path = write(
            tmp_path, f'[model]\nmodel_id = "mine"\n[optimal]\nmax_batch_size = {size}\n', name="mine"
        )
        if age:
            for changed in (path, tmp_path):
                os.utime(changed, (time.time() - age + step,) * 2)

    for turn in range(3):
        assert batch() == EngineConfig().max_batch_size
        for size in (2, 3, 4):
            written(size, 100 * turn + size)
            assert (batch(), batch()) == (size, size)
        (tmp_path / "mine.toml").unlink()


def test_a_missing_directory_of_profiles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=f"{CONFIGS_VARIABLE}=.*not a directory"):
        find_profile("tiny-chat", {CONFIGS_VARIABLE: str(tmp_path / "absent")})


@pytest.mark.parametrize(
    ("section", "line", "said"),
    [
        ("model", 'n_layers = "many"', "n_layers = 'many'"),
        ("model", "head_dim = 0", "head_dim = 0"),
        ("model", "n_kv_heads = true", "n_kv_heads = True"),
        ("model", "layer = 3", "layer is not a known key: choose from .*n_layers"),
        ("inference", "temperature = -1", "temperature=-1"),
        ("inference", "seed = 1", "seed is not a known key"),
        ("inference", 'supports_thinking = "yes"', "supports_thinking = 'yes'"),
        ("inference", "extended_thinking = true", "supports_thinking = False"),
        ("optimal", 'max_batch_size = "2"', "max_batch_size='2'"),
        ("optimal", "kv_bits = 5", "kv_bits=5"),
        ("optimal", "block_token = 64", "block_token is not a known key: choose from .*block_tokens"),
        ("optimal", "prefill_chunk = 64\nprefill_step_size = 128", "prefill_chunk is already 64"),
        ("optimal", "evict_to_disk = false", "evict_to_disk = False is not possible"),
        ("thresholds", "context_length = 0", "context_length=0"),
        ("thresholds", "max_batch_size = 2", "max_batch_size is not a known key"),
        ("cache", "kv_bits = 4", "cache is not a known section"),
        ("model", "head_dim = [64]", r"head_dim = \[64\]"),
        ("model", "head_dim = [64, 0]", r"head_dim = \[64, 0\]"),
        ("model", "n_layers = [1, 2]", r"n_layers = \[1, 2\]"),
        ("model", "layers = 3", "layers = 3"),
        ("model.layers.local", "count = 3", r"model.layers.local\] is not a known type of layer: .*global"),
        ("model.layers.global", "n_layers = 3", "n_layers is not a known key: choose from count"),
        ("model.layers.global", "count = 0", "count = 0"),
    ],
)
def test_what_cannot_be_used_is_refused_by_file_and_name(
    tmp_path: Path, section: str, line: str, said: str
) -> None:
    path = write(tmp_path, with_key(section, line))
    with pytest.raises(InvalidSetting, match=said) as refused:
        read_profile(path)
    assert str(path) in str(refused.value)
    assert section in str(refused.value)


@pytest.mark.parametrize("key", sorted(_REFUSED))
def test_a_key_without_effect_says_what_to_use_instead(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"{key} has no effect here") as refused:
        read_profile(write(tmp_path, with_key("optimal", f"{key} = 1")))
    assert _REFUSED[key] in str(refused.value)


@pytest.mark.parametrize("key", sorted(ALWAYS_ON))
def test_a_switch_that_says_what_is_so_is_taken(tmp_path: Path, key: str) -> None:
    profile = read_profile(write(tmp_path, with_key("optimal", f"{key} = true")))
    assert profile.settings == {}


@pytest.mark.parametrize("text", ["", "[model]\n", '[model]\nmodel_id = ""\n', "[model]\nmodel_id = 3\n"])
def test_a_profile_of_nothing_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSetting, match="model_id"):
        read_profile(write(tmp_path, text))


@pytest.mark.parametrize("data", [b"[model", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(data)
    with pytest.raises(InvalidSetting, match="not a readable TOML file"):
        read_profile(path)


# Against the loaded model

GEMMA = cache_spec(
    [
        Group("window", tuple(range(40)), 8, 256, 256, window=1024),
        Group("append", tuple(range(40, 48)), 8, 256, 256),
    ],
    {"model_type": "gemma3", "text_config": {"sliding_window": 1024, "max_position_embeddings": 131072}},
)
DEEPSEEK = cache_spec([Group("append", tuple(range(27)), 16, 192, 128)], {"max_position_embeddings": 163840})


MIXED = cache_spec(
    [
        Group("window", (0, 1, 3, 4), 2, 32, 32, window=16),
        Group("append", (2, 5), 1, 64, 64),
    ],
    {"num_hidden_layers": 10},
)


def test_the_spec_reads_nested_configs() -> None:
    windows = [spec.values_of("sliding_window") for spec in (GEMMA, DEEPSEEK)]
    assert (GEMMA.n_layers, windows[0], GEMMA.context_length) == (48, {1024}, 131072)
    assert (DEEPSEEK.n_layers, windows[1], DEEPSEEK.context_length) == (27, set(), 163840)


@pytest.mark.parametrize(
    ("geometry", "spec"),
    [
        ({"n_layers": 48, "n_kv_heads": 8, "head_dim": 256, "sliding_window": 1024}, GEMMA),
        ({"n_layers": 27, "head_dim": 192, "v_head_dim": 128}, DEEPSEEK),
        ({}, DEEPSEEK),
        ({"n_layers": 10, "n_kv_heads": (1, 2), "head_dim": (32, 64), "sliding_window": 16}, MIXED),
    ],
)
def test_a_true_profile_passes(geometry: dict[str, int], spec: ModelCacheSpec) -> None:
    Profile("p", "org/m", geometry, {"context_length": 131072}).check(spec)


@pytest.mark.parametrize(
    ("geometry", "spec", "has"),
    [
        ({"n_layers": 47}, GEMMA, "n_layers = 47, but the loaded model has 48"),
        ({"n_kv_heads": 1}, GEMMA, "n_kv_heads = 1"),
        ({"head_dim": 128}, DEEPSEEK, "head_dim = 128, but the loaded model has 192"),
        ({"head_dim": 192}, DEEPSEEK, r"v_head_dim = 192 \(head_dim alone.*but the loaded model has 128"),
        ({"head_dim": 64}, MIXED, "head_dim = 64, but the loaded model has 32 and 64"),
        ({"head_dim": (64, 128)}, MIXED, "head_dim = 64 and 128, but the loaded model has 32 and 64"),
        ({"n_layers": 6}, MIXED, "n_layers = 6, but the loaded model has 10"),
        ({"v_head_dim": 192}, DEEPSEEK, "v_head_dim = 192, but the loaded model has 128"),
        ({"sliding_window": 512}, DEEPSEEK, "sliding_window = 512, but the loaded model has None"),
    ],
)
def test_a_profile_of_another_model_is_refused(
    geometry: dict[str, int], spec: ModelCacheSpec, has: str
) -> None:
    with pytest.raises(InvalidSetting, match=f"profile p: {has}"):
        Profile("p", "org/m", geometry).check(spec)


def test_each_type_of_layer_has_a_geometry_of_its_own() -> None:
    layers = {
        "global": {"count": 2, "n_kv_heads": 1, "head_dim": 64},
        "sliding_window": {"count": 4, "n_kv_heads": 2, "head_dim": 32, "sliding_window": 16},
    }
    Profile("p", "org/m", layers=layers).check(MIXED)
    swapped = {**layers, "global": {"head_dim": 32}}
    with pytest.raises(InvalidSetting, match=r"layers\.global\.head_dim = 32, but the loaded model has 64"):
        Profile("p", "org/m", layers=swapped).check(MIXED)
    with pytest.raises(InvalidSetting, match=r"layers\.recurrent\.count = 1, but the loaded model has 0"):
        Profile("p", "org/m", layers={"recurrent": {"count": 1}}).check(MIXED)


def test_a_width_of_values_may_stand_beside_or_above_that_of_the_keys() -> None:
    of_the_layers = {"global": {"head_dim": 192}}
    Profile("p", "org/m", {"v_head_dim": 128}, layers=of_the_layers).check(DEEPSEEK)
    Profile("p", "org/m", {"head_dim": 192}, layers={"global": {"v_head_dim": 128}}).check(DEEPSEEK)
    with pytest.raises(InvalidSetting, match=r"layers\.global\.v_head_dim = 192"):
        Profile("p", "org/m", layers=of_the_layers).check(DEEPSEEK)


def test_a_context_beyond_the_models_limit_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"context_length = 131073.*131072"):
        Profile("p", "org/m", settings={"context_length": 131073}).check(GEMMA)
