"""How long models are kept, as clients of other local servers say it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agent_memory_core.server.errors import ApiError
from agent_memory_core.server.keeping import kept_for


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ({}, None),
        ({"ttl": None}, None),
        ({"ttl": 300}, 300),
        ({"keep_alive": 0}, 0),
        ({"keep_alive": "0"}, 0),
        ({"keep_alive": "5m"}, 300),
        ({"keep_alive": "1h30m10s"}, 5410),
        ({"keep_alive": "1.5s"}, 1.5),
        ({"keep_alive": "500ms"}, 0.5),
        ({"keep_alive": -1}, math.inf),
        ({"keep_alive": "-1m"}, math.inf),
        ({"keep_alive": "5m", "ttl": 1}, 300),
    ],
)
def test_every_way_to_say_it_is_read(body: dict[str, Any], seconds: float | None) -> None:
    assert kept_for(body) == seconds


@pytest.mark.parametrize("value", ["", "soon", "5 m", "5d", "m", True, [], math.nan])
def test_what_is_no_time_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(ApiError) as refused:
        kept_for({"keep_alive": value})
    assert refused.value.param == "keep_alive"
