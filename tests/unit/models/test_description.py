"""What is known of a model: a profile alone tells the same cost as the model itself, or tells nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.layer_groups import live_groups, unevaluated
from support.published_configs import CONFIGS

from agent_memory_core import InvalidSetting, describe_model
from agent_memory_core.models.cache_spec import cache_spec
from agent_memory_core.models.description import kv_costs, profile_shapes
from agent_memory_core.models.profile import read_profile, shipped_directory


@pytest.mark.model
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_profile_alone_tells_the_cost_of_the_model_itself(name: str) -> None:
    told = profile_shapes(read_profile(shipped_directory() / f"{name}.toml"))
    found = cache_spec(live_groups(unevaluated(CONFIGS[name])), CONFIGS[name]).shapes
    if told:
        assert kv_costs(told, 2, 128) == kv_costs(found, 2, 128)


def test_what_is_described_without_loading_comes_from_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_TOP_K", "7")
    found = describe_model("gemma-3-12b-it-4bit")
    assert found.profile is not None
    assert {value.source for value in found.geometry} == {"profile"}
    sources = {value.name: value.source for value in found.settings}
    assert (sources["top_k"], sources["temperature"], sources["min_p"]) == (
        "environment",
        "profile",
        "default",
    )
    assert found.contradictions == ()
    sizes = [cost.memory_per_token for cost in found.costs]
    assert all(larger > smaller for larger, smaller in pairwise(sizes))
    assert all(cost.disk_per_token > cost.memory_per_token for cost in found.costs)


def test_without_a_profile_the_model_has_to_be_loaded() -> None:
    with pytest.raises(InvalidSetting, match="no profile for 'nobody/nothing'"):
        describe_model("nobody/nothing")
