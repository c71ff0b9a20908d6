"""`agent-memory manager`: several models in one memory, by a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from agent_memory_core.cli.options import err, out
from agent_memory_core.manager import ManagedModel, ManagerConfig, ModelManager

app = typer.Typer(
    no_args_is_help=True, help="Check, use and load the models of a configuration of ModelManager."
)

ConfigFile = Annotated[Path, typer.Argument(help="A .json or .toml file.", show_default=False)]
ConfigOption = Annotated[
    Path, typer.Option("--config", help="A .json or .toml file.", envvar="AGENT_MEMORY_MANAGER_CONFIG")
]
Name = Annotated[str, typer.Argument(help="The name of the model.", show_default=False)]

_MIB = 2**20


@app.command()
def check(config: ConfigFile) -> None:
    """Check a configuration, and show what each model takes and which of them fit together. Loads nothing."""
    with ModelManager(ManagerConfig.from_file(config)) as manager:
        limit = manager.get_memory_usage()["limit_mb"]
        table = Table("model", "type", "MiB", "priority", "idle s", "fits with", title=f"{limit} MiB in all")
        names = manager.list_available_models()
        for name in names:
            model = manager.get_model(name, load=False).config
            need = manager.estimate(name)
            others = [o for o in names if o != name and need + manager.estimate(o) <= limit * _MIB]
            fits = "nothing: too large" if need > limit * _MIB else ", ".join(others) or "no other"
            idle = "never" if model.idle_limit is None else f"{model.idle_limit:g}"
            priority = f"{model.memory_priority}{' pinned' if model.pinned else ''}"
            table.add_row(name, model.type, f"{need / _MIB:.1f}", priority, idle, fits)
    out.print(table)


@app.command()
def chat(
    name: Name,
    config: ConfigOption = Path("src/models/config.json"),
    session: Annotated[str | None, typer.Option(help="The session, for a model on MLX.")] = None,
) -> None:
    """Talk to a model of a configuration; an empty line ends the command."""
    with ModelManager(config) as manager:
        with err.status(f"loading {name}"):
            model = manager.get_model(name)
        history: list[dict[str, str]] = []
        while text := _read_line():
            history.append({"role": "user", "content": text})
            history.append({"role": "assistant", "content": _answer(model, history, session)})


def _read_line() -> str:
    try:
        return out.input("[bold]> [/bold]", markup=True).strip()
    except EOFError:
        return ""


def _answer(model: ManagedModel, history: list[dict[str, str]], session: str | None) -> str:
    text = ""
    with model.stream(history, session=session) as answer:
        for delta in answer:
            text += delta.text
            out.print(delta.text, end="")
    out.print()
    return text


@app.command()
def load(name: Name, config: ConfigOption = Path("src/models/config.json")) -> None:
    """Load a model, unload it, and show what it took and what is left of that."""
    with ModelManager(config) as manager:
        before = manager.get_memory_usage()
        estimate = manager.estimate(name)
        manager.get_model(name, fallback=False)
        loaded, stats = manager.get_memory_usage(), manager.get_model_stats()[name]
        manager.unload_model(name, force=True)
        after = manager.get_memory_usage()
    table = Table("", "before", "loaded", "unloaded")
    for label, key in (
        ("by the books, MiB", "total_mb"),
        ("the process, MiB", "process_rss_mb"),
        ("MLX in use, MiB", "mlx_active_mb"),
        ("MLX kept, MiB", "mlx_cache_mb"),
    ):
        table.add_row(label, f"{before[key]:.1f}", f"{loaded[key]:.1f}", f"{after[key]:.1f}")
    out.print(table)
    out.print(f"loaded in {stats.load_seconds:.2f} s; {estimate / _MIB:.1f} MiB were expected.")
