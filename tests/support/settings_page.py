"""Prints docs/settings.md from the declarations of the settings.

python tests/support/settings_page.py > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterator

from agent_memory_core.adapter.options import CALL_OPTIONS, NEUTRAL, OTHER_NAMES, WITHOUT_EFFECT
from agent_memory_core.config import EngineConfig, SamplingParams, SettingsClass
from agent_memory_core.environment import PREFIX
from agent_memory_core.setting_words import source_of, values_of
from llama_index_agent_memory import MLXPersistentLLM

HEAD = """# Settings

A value comes from the first of these that has one: the constructor, the environment, the model's profile, the default.
`AgentMemory` takes the settings of the engine by these names, and its calls those of sampling. `ChatMLXPersistent` and
`MLXPersistentLLM` take both, and their calls those of sampling again. An unknown name is refused.

Relative paths are made absolute where they are read, so a later change of the working directory moves nothing. However
a model's folder is spelled (`d`, `d/`, `./d`, a link, a `Path`), it is one engine.

This page is printed by `tests/support/settings_page.py` from `src/agent_memory_core/config.py` and
`src/agent_memory_core/adapter/options.py`.
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


OPTIONS_HEAD = """Programs that are written for any model hand over the options of several providers. Of each it is
known what becomes of it; every other name is refused with the nearest one that there is. A model takes these names too
where it has such a field, and there the constructor of `ChatMLXPersistent` warns of unknown names instead, because
LangChain's own tests forbid an error."""


def options() -> Iterator[str]:
    """The lines of the table of a call's options."""
    yield "| option | what becomes of it |"
    yield "| --- | --- |"
    yield f"| {', '.join(f'`{name}`' for name in SamplingParams.model_fields)} | understood: see above |"
    for name, what in CALL_OPTIONS.items():
        yield f"| `{name}` | understood: {what} |"
    for name, own in OTHER_NAMES.items():
        yield f"| `{name}` | {_as_other_name(own)} |"
    for name, neutral in NEUTRAL.items():
        only = ", ".join(f"`{value!r}`" for value in (*neutral, None))
        yield f"| `{name}` | only {only}, which change nothing; anything else is refused |"
    for name, why in WITHOUT_EFFECT.items():
        yield f"| `{name}` | ignored: {why} |"
    for name in sorted(MLXPersistentLLM.OTHER_NAMES.keys() - OTHER_NAMES.keys()):
        yield f"| `{name}` | LlamaIndex: understood as `{MLXPersistentLLM.OTHER_NAMES[name]}` |"
    for name in sorted(MLXPersistentLLM.WITHOUT_EFFECT - WITHOUT_EFFECT.keys()):
        yield f"| `{name}` | LlamaIndex: ignored, since LlamaIndex itself hands it to every model |"


def _as_other_name(own: str) -> str:
    if own in EngineConfig.model_fields and own not in CALL_OPTIONS:
        return f"understood as `{own}` where the model is made; refused by a call"
    return f"understood as `{own}`"


def page() -> str:
    """The whole page."""
    tables = (("The engine", EngineConfig), ("Sampling", SamplingParams))
    parts = [HEAD, *("\n".join((f"## {title}\n", *rows(of), "")) for title, of in tables)]
    parts.append("\n".join(("## Options of a call\n", OPTIONS_HEAD, "", *options(), "")))
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
