"""Which source of settings goes before which, and what of the environment is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_memory_core.config import EngineConfig, SamplingParams
from agent_memory_core.environment import (
    _VARIABLES,
    ALWAYS_ON,
    RETIRED,
    from_environment,
    resolve_sampling,
    resolve_settings,
)
from agent_memory_core.errors import InvalidSetting

NOTHING: dict[str, str] = {}


# The order of the sources


def test_constructor_then_environment_then_profile_then_default() -> None:
    profile = {"max_batch_size": 2, "block_tokens": 64, "prefill_chunk": 512}
    environ = {"AGENT_MEMORY_MAX_BATCH_SIZE": "3", "AGENT_MEMORY_BLOCK_TOKENS": "256"}
    config = resolve_settings({"max_batch_size": 4}, environ, profile)
    assert (config.max_batch_size, config.block_tokens, config.prefill_chunk) == (4, 256, 512)
    assert config.kv_bits == EngineConfig().kv_bits


def test_sampling_has_the_same_order_and_its_own_variables() -> None:
    environ = {"AGENT_MEMORY_TEMPERATURE": "0.5", "AGENT_MEMORY_MAX_TOKENS": "9", "AGENT_MEMORY_MODEL": "m"}
    params = resolve_sampling({"max_tokens": 7}, environ, {"temperature": 0.1, "top_k": 40})
    assert params == SamplingParams(max_tokens=7, temperature=0.5, top_k=40)


def test_an_explicit_none_is_given() -> None:
    environ = {"AGENT_MEMORY_CACHE_DIR": "/somewhere", "AGENT_MEMORY_KV_BITS": "4"}
    config = resolve_settings({"cache_dir": None, "kv_bits": None}, environ)
    assert config.cache_dir is None
    assert config.kv_bits is None


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_MODEL", "from-the-process")
    monkeypatch.setenv("SEMANTIC_MLX_DEFAULT_MAX_TOKENS", "11")
    assert resolve_settings({}).model == "from-the-process"
    assert resolve_sampling({}).max_tokens == 11


# Reading the environment


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("AGENT_MEMORY_KV_BITS", "6/4", "kv_bits", "6/4"),
        ("AGENT_MEMORY_KV_BITS", "8/4", "kv_bits", "8/4"),
        ("AGENT_MEMORY_KV_BITS", "4", "kv_bits", 4),
        ("AGENT_MEMORY_KV_BITS", "none", "kv_bits", None),
        ("AGENT_MEMORY_CACHE_DIR", "none", "cache_dir", None),
        ("AGENT_MEMORY_CACHE_DIR", "~/kv", "cache_dir", Path.home() / "kv"),
        ("AGENT_MEMORY_MEMORY_BUDGET_MB", "none", "memory_budget_mb", None),
        ("AGENT_MEMORY_DURABILITY", "power", "durability", "power"),
        ("AGENT_MEMORY_PREWARM", "idle", "prewarm", "idle"),
        ("AGENT_MEMORY_BATCHING", "never", "batching", "never"),
        ("AGENT_MEMORY_SEED", "7", "seed", 7),
        ("SEMANTIC_MLX_MODEL_ID", "org/m", "model", "org/m"),
        ("SEMANTIC_MLX_CACHE_BUDGET_MB", "4096", "memory_budget_mb", 4096),
        ("SEMANTIC_MLX_MAX_BATCH_SIZE", "2", "max_batch_size", 2),
        ("SEMANTIC_MLX_KV_BITS", "None", "kv_bits", None),
        ("SEMANTIC_MLX_BLOCK_TOKENS", "256", "block_tokens", 256),
        ("SEMANTIC_MLX_MAX_CONTEXT_LENGTH", "100000", "context_length", 100000),
        ("SEMANTIC_MLX_PREFILL_STEP_SIZE", "1024", "prefill_chunk", 1024),
        ("SEMANTIC_MLX_DEFAULT_TEMPERATURE", "0.7", "temperature", 0.7),
        ("SEMANTIC_AGENT_CACHE_DIR", "/kv", "cache_dir", Path("/kv")),
    ],
)
def test_a_variable_is_read_as_its_field(variable: str, text: str, field: str, value: object) -> None:
    assert from_environment({variable: text}) == {field: value}


def test_every_field_has_a_variable_but_those_of_a_single_request() -> None:
    names = {*EngineConfig.model_fields, *SamplingParams.model_fields}
    assert set(_VARIABLES.values()) == names - {"stop", "logprobs", "top_logprobs"}


@pytest.mark.parametrize("variable", sorted(_VARIABLES))
def test_an_empty_variable_is_refused(variable: str) -> None:
    with pytest.raises(InvalidSetting, match=f"{variable}=''"):
        from_environment({variable: ""})


@pytest.mark.parametrize("name", ["kv_bits", "max_batch_size", "memory_budget_mb", "temperature", "seed"])
def test_words_are_no_numbers(name: str) -> None:
    with pytest.raises(InvalidSetting, match=f"'plenty' cannot be read as {name}"):
        from_environment({f"AGENT_MEMORY_{name.upper()}": "plenty"})


def test_a_value_outside_its_range_names_the_variable_too() -> None:
    with pytest.raises(InvalidSetting, match=r"AGENT_MEMORY_BLOCK_TOKENS='100'.*64, 128 or 256"):
        resolve_settings({}, {"AGENT_MEMORY_BLOCK_TOKENS": "100"})
    with pytest.raises(InvalidSetting, match="SEMANTIC_MLX_DEFAULT_TEMPERATURE='-1'"):
        resolve_sampling({}, {"SEMANTIC_MLX_DEFAULT_TEMPERATURE": "-1"})


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("AGENT_MEMORY_MODLE", "AGENT_MEMORY_MODEL"),
        ("AGENT_MEMORY_KVBITS", "AGENT_MEMORY_KV_BITS"),
        ("SEMANTIC_MLX__MODEL_ID", "SEMANTIC_MLX_MODEL_ID"),
        ("SEMANTIC_MLX_CACHE_BUDGET", "SEMANTIC_MLX_CACHE_BUDGET_MB"),
        ("SEMANTIC_AGENT_CACHEDIR", "SEMANTIC_AGENT_CACHE_DIR"),
    ],
)
def test_an_unknown_variable_is_refused_with_its_nearest_neighbour(variable: str, near: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"{variable}: did you mean {near}\?"):
        resolve_settings({}, {variable: "1"})
    with pytest.raises(InvalidSetting, match=variable):
        resolve_sampling({}, {variable: "1"})


@pytest.mark.parametrize("name", sorted(RETIRED))
def test_a_variable_without_meaning_here_says_what_to_use_instead(name: str) -> None:
    with pytest.raises(InvalidSetting, match="has no effect here") as refused:
        from_environment({f"SEMANTIC_MLX_{name.upper()}": "1"})
    assert RETIRED[name] in str(refused.value)


@pytest.mark.parametrize("name", sorted(ALWAYS_ON))
def test_a_switch_may_say_what_is_so_but_not_the_contrary(name: str) -> None:
    variable = f"SEMANTIC_AGENT_{name.upper()}"
    assert from_environment({variable: "true"}) == {}
    with pytest.raises(InvalidSetting, match=f"{variable}='false' is not possible"):
        from_environment({variable: "false"})


def test_a_name_and_its_alias_must_agree() -> None:
    both = {"AGENT_MEMORY_MAX_BATCH_SIZE": "4", "SEMANTIC_MLX_MAX_BATCH_SIZE": " 4"}
    assert resolve_settings({}, both).max_batch_size == 4
    both["SEMANTIC_MLX_MAX_BATCH_SIZE"] = "2"
    with pytest.raises(InvalidSetting, match=r"AGENT_MEMORY_MAX_BATCH_SIZE='4' and SEMANTIC_\w+='2'"):
        resolve_settings({}, both)


def test_none_and_a_value_under_two_names_do_not_agree() -> None:
    with pytest.raises(InvalidSetting, match="both set cache_dir"):
        from_environment({"AGENT_MEMORY_CACHE_DIR": "none", "SEMANTIC_AGENT_CACHE_DIR": "/kv"})


def test_other_peoples_variables_are_left_alone() -> None:
    environ = {"HOME": "/", "MODEL": "x", "SEMANTIC_SERVER_PORT": "1", "AGENT_MEMORY_MODEL_CONFIGS": "/p"}
    assert from_environment(environ) == {}


def test_a_relative_folder_in_a_variable_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"AGENT_MEMORY_CACHE_DIR": "kv of this test"}
    before = resolve_settings({}, environ).cache_dir
    monkeypatch.chdir("/")
    assert resolve_settings({}, environ).cache_dir == before == tmp_path / "kv of this test"
