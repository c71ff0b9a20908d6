"""Templates give a type of agents its system prompt, and what is wrong with one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from agents.conftest import OpenManager

from agent_memory_core import InvalidRequest, InvalidSetting
from agent_memory_core.agents.templates import read_templates

OWN = """
name = "technical"
system_prompt = "You repair {thing} for {who}."
[sampling]
max_tokens = 3
[metadata]
who = "everybody"
"""


def test_those_that_come_with_the_package_need_no_metadata() -> None:
    templates = read_templates()
    assert set(templates) == {"technical", "business", "coordinator", "creative", "researcher"}
    for template in templates.values():
        assert template.description
        prompt = template.filled({})
        assert "{" not in prompt
        assert "\n" not in prompt


def test_an_agent_is_made_from_its_template(open_manager: OpenManager, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    manager = open_manager(templates=tmp_path)
    with pytest.raises(InvalidRequest, match="needs thing"):
        manager.create_agent("ada", "technical")
    agent = manager.create_agent("ada", "technical", metadata={"thing": "{pumps}"})
    assert (agent.system_prompt, agent.template) == ("You repair {pumps} for everybody.", "technical")
    manager.generate("ada", "Hello.")
    assert agent.last_report is not None
    assert agent.last_report.usage.completion_tokens <= 3
    manager.evict_lru()
    assert manager.create_agent("ada", "technical", metadata={"thing": "{pumps}"}).template == "technical"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = 3 4", "cannot be read"),
        ('name = "x"', "system_prompt"),
        ('name = "x"\nsystem_prompt = "y"\ncolour = 1', "colour"),
        ('name = "x"\nsystem_prompt = "y"\n[sampling]\ntemperature = -4', "temperature"),
    ],
)
def test_what_is_no_template_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "broken.toml").write_text(text)
    with pytest.raises(InvalidSetting, match=says):
        read_templates(tmp_path)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="nowhere"):
        read_templates(tmp_path / "nowhere")
