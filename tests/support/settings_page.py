"""Prints docs/settings.md from the declarations of the settings.

python tests/support/settings_page.py > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterator

from agent_memory_core.config import EngineConfig, SamplingParams, SettingsClass, source_of, values_of
from agent_memory_core.environment import PREFIX

HEAD = """# Settings

A value comes from the first of these that has one: the constructor, the environment, the model's profile, the default.
`AgentMemory` takes the settings of the engine by these names, and its calls those of sampling. `ChatMLXPersistent` and
`MLXPersistentLLM` take both, and their calls those of sampling again. An unknown name is refused.

Relative paths are made absolute where they are read, so a later change of the working directory moves nothing. However
a model's folder is spelled (`d`, `d/`, `./d`, a link, a `Path`), it is one engine.

This page is printed by `tests/support/settings_page.py` from `src/agent_memory_core/config.py`.
"""


def rows(of: SettingsClass) -> Iterator[str]:
    """The lines of one table."""
    yield "| setting | what it is | values | default | variable | in profiles |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, field in of.model_fields.items():
        source = source_of(field)
        default = "`~/.agent_memory/caches`" if name == "cache_dir" else f"`{field.default!r}`"
        variable = f"`{PREFIX}{name.upper()}`" if source.in_environment else ""
        section = f"`[{source.section}]`" if source.section else ""
        cells = (f"`{name}`", field.description, values_of(field), default, variable, section)
        yield f"| {' | '.join(cell or '' for cell in cells)} |"


def page() -> str:
    """The whole page."""
    tables = (("The engine", EngineConfig), ("Sampling", SamplingParams))
    parts = [HEAD, *("\n".join((f"## {title}\n", *rows(of), "")) for title, of in tables)]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
