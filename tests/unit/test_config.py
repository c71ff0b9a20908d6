"""The declared settings: their ranges, the errors of wrong values, and which of them are equal."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from agent_memory_core.config import EngineConfig, ModelName, SamplingParams, known_settings
from agent_memory_core.environment import resolve_sampling, resolve_settings
from agent_memory_core.errors import InvalidRequest, InvalidSetting
from agent_memory_core.setting_words import shown, source_of

NOTHING: dict[str, str] = {}


# Ranges and errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("kv_bits", 3),
        ("kv_bits", "4/8"),
        ("block_tokens", 100),
        ("durability", "maybe"),
        ("prewarm", "always"),
        ("batching", "sometimes"),
        ("max_batch_size", 0),
        ("max_batch_size", True),
        ("max_batch_size", 2.0),
        ("memory_budget_mb", 0),
        ("namespace_budget_mb", 0),
        ("min_free_mb", -1),
        ("context_length", 0),
        ("prefill_chunk_busy", 0),
    ],
)
def test_an_engine_setting_outside_its_range_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(InvalidSetting, match=name) as refused:
        resolve_settings({name: value}, NOTHING)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", 2**64),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", ["END"]),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("top_logprobs", True),
    ],
)
def test_a_sampling_value_outside_its_range_is_a_wrong_request(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=name):
        resolve_sampling({name: value}, NOTHING)


def test_unknown_names_are_refused_with_a_choice() -> None:
    with pytest.raises(InvalidSetting, match=r"'kv_bit'.*kv_bits"):
        known_settings({"kv_bit": 4}, of=EngineConfig)
    with pytest.raises(InvalidSetting, match="'kv_bit'"):
        resolve_settings({"kv_bit": 4}, NOTHING)
    with pytest.raises(InvalidSetting, match="'temperatur'"):
        resolve_sampling({"temperatur": 1}, NOTHING)
    with pytest.raises(InvalidSetting, match="did you mean kv_bits"):
        EngineConfig(**{"kv_bit": 4})
    with pytest.raises(InvalidRequest, match="did you mean temperature"):
        SamplingParams(**{"temperatur": 1})


EVERY = [(of, name) for of in (EngineConfig, SamplingParams) for name in of.model_fields]


@pytest.mark.parametrize(("of", "name"), EVERY)
def test_every_field_says_what_it_is_and_where_it_is_read(of: Any, name: str) -> None:
    field = of.model_fields[name]
    assert field.description.endswith(".")
    assert source_of(field).section in (None, "inference", "optimal", "thresholds")
    assert name in of.model_json_schema()["properties"]


@pytest.mark.parametrize(("of", "name"), EVERY)
@given(value=st.sampled_from([float("inf"), -1.5, object(), b"x", ("a", 1), {}, 10**30, -(10**30)]))
def test_a_value_is_taken_or_refused_in_one_sentence(of: Any, name: str, value: object) -> None:
    refused = ""
    try:
        of(**{name: value})
    except of.ERROR as error:
        refused = str(error)
    assert refused == "" or re.fullmatch(
        rf"{name}={re.escape(shown(name, value))} is not valid: [^\n]+\.", refused
    )


def test_a_copy_with_other_values_is_checked() -> None:
    changed = SamplingParams(top_k=3).replace(temperature=0.5)
    assert (changed.top_k, changed.temperature) == (3, 0.5)
    with pytest.raises(InvalidRequest, match="temperature=-1"):
        changed.replace(temperature=-1)
    with pytest.raises(InvalidSetting, match="max_batch_size=0"):
        EngineConfig().replace(max_batch_size=0)


# What is equal


def test_equal_settings_make_equal_configurations() -> None:
    one = resolve_settings({"model": "m", "cache_dir": "/c"}, NOTHING)
    other = resolve_settings({}, {"AGENT_MEMORY_MODEL": "m", "AGENT_MEMORY_CACHE_DIR": "/c"})
    assert one == other
    assert hash(one) == hash(other)
    assert one != one.replace(kv_bits=8)
    assert hash(SamplingParams(top_k=1)) == hash(SamplingParams(top_k=1))


@pytest.fixture
def spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Names of one folder, which is below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("d").mkdir()
    Path("link").symlink_to("d")
    return ["d", "d/", "./d", "../" + tmp_path.name + "/d", "link", "~/d", Path("d"), str(tmp_path / "d")]


@pytest.mark.parametrize("name", ["model", "cache_dir", "adapter_path"])
def test_every_spelling_of_a_folder_is_one_configuration(spellings: list[Any], name: str) -> None:
    configs = [EngineConfig(**{name: spelling}) for spelling in spellings]
    assert len(set(configs)) == 1
    assert len({hash(config) for config in configs}) == 1
    os.chdir("/")
    assert EngineConfig(**{name: "d"}) not in configs


def test_a_model_is_called_what_the_user_called_it_wherever_it_is(spellings: list[Any]) -> None:
    for spelling in spellings:
        config = EngineConfig(model=spelling)
        assert (config.model, config.model_location) == (str(spelling), str(Path("d").resolve()))


CARRIED: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    lambda config: pickle.loads(pickle.dumps(config)),
    lambda config: config.replace(kv_bits=config.kv_bits),
    lambda config: config.model_copy(),
    lambda config: EngineConfig(model=config.model),
]


@pytest.mark.parametrize("carry", CARRIED)
def test_a_relative_model_is_where_it_was_when_it_was_named(
    spellings: list[Any], monkeypatch: pytest.MonkeyPatch, carry: Callable[[Any], Any]
) -> None:
    config = EngineConfig(model="./d")
    monkeypatch.chdir("/")
    assert carry(config) == config
    assert carry(config).model_location == config.model_location != EngineConfig(model="./d").model_location


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [("tiny-chat", False), ("org/model", False), ("m", False), ("./m", True), ("~/m", True), ("a/b/c", True)],
)
def test_a_name_that_can_be_no_folder_stays_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_folder: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny-chat").mkdir()  # the embedded model goes before a folder of its name
    assert Path(ModelName(name).location).is_absolute() == is_folder
    assert is_folder or ModelName(name).location == name
