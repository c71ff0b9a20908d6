"""The configuration of a cluster is checked before Ray sees it, and says what the application needs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import command_line

from agent_memory_core import InvalidSetting
from agent_memory_core.scale import deploy, serve_config, status
from agent_memory_core.scale.config import DEPLOYMENT, Arguments

ENGINE = {"cold_url": "s3://bucket/folder", "cold_ack": "remote"}


def test_only_the_number_of_replicas_differs_between_sizes() -> None:
    """What Ray restarts replicas for is everything else."""
    three, four = (serve_config(nodes, engine=ENGINE) for nodes in (3, 4))
    assert three["applications"][0]["deployments"] == [{"name": DEPLOYMENT, "num_replicas": 3}]
    four["applications"][0]["deployments"][0]["num_replicas"] = 3
    assert three == four


def test_what_a_replica_is_given_is_what_was_asked_for() -> None:
    (application,) = serve_config(1, engine=ENGINE, server={"max_tokens": 9}, drain=7.0)["applications"]
    given = Arguments(**application["args"])
    assert (given.engine, given.server, given.drain) == (ENGINE, {"max_tokens": 9}, 7.0)
    assert json.loads(json.dumps(application)) == application


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"nodes": 0, "engine": ENGINE}, "nodes=0 is not valid"),
        ({"nodes": 2}, "give the engine a cold_url"),
        ({"nodes": 2, "engine": ENGINE | {"cache_dir": None}}, "and a cache_dir"),
        ({"nodes": 2, "engine": ENGINE | {"kv_bits": 3}}, "kv_bits=3 is not valid"),
        ({"nodes": 2, "engine": ENGINE, "drain": 0}, "drain=0 is not valid"),
        ({"nodes": 2, "engine": ENGINE, "drains": 1}, "drains=1 is not valid"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSetting, match=says):
        serve_config(**values)


@pytest.mark.parametrize("dashboard", ["http://127.0.0.1:9", "nowhere"])
def test_without_ray_the_message_says_how_to_start_it(dashboard: str) -> None:
    with pytest.raises(InvalidSetting, match="Start Ray with: ray start --head"):
        deploy(serve_config(1, engine=ENGINE), dashboard)
    with pytest.raises(InvalidSetting, match="does not answer"):
        status(dashboard)


def test_the_command_prints_what_it_would_deploy() -> None:
    printed = command_line.command("scale", "up", "--nodes", "3", "--cold-url", "s3://b/f", "--print").stdout
    wanted = serve_config(3, engine={"cold_url": "s3://b/f", "cold_ack": "remote"})
    assert json.loads(printed) == wanted
