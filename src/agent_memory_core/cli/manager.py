"""`agent-memory manager`: several models in one memory, by a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agent_memory_core.cli.formats import duration, print_json, size, table
from agent_memory_core.cli.options import Json, err, out, read_line, say
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


def _manager(file: Path) -> ModelManager:
    """The models of a file, of which none is loaded before the command asks for it."""
    config = ManagerConfig.from_file(file)
    models = tuple(model.model_copy(update={"preload": False}) for model in config.models)
    return ModelManager(config.replaced(models=models))


@app.command()
def check(config: ConfigFile, as_json: Json = False) -> None:
    """Check a configuration, and show what each model takes and which of them fit together. Loads nothing."""
    with _manager(config) as manager:
        limit = manager.get_memory_usage()["limit_mb"]
        needs = {name: manager.estimate(name) for name in manager.list_available_models()}
        found = [_checked(manager, name, needs, limit) for name in needs]
    if as_json:
        print_json({"limit_mb": limit, "models": found})
        return
    rows = table("model", "type", "size", "priority", "idle", "fits with", title=f"{limit} MiB in all")
    for model in found:
        fits = "nothing: too large" if model["too_large"] else ", ".join(model["fits_with"]) or "no other"
        idle = "never" if model["idle_seconds"] is None else f"{model['idle_seconds']:g} s"
        priority = f"{model['priority']}{' pinned' if model['pinned'] else ''}"
        rows.add_row(model["name"], model["type"], size(model["nbytes"]), priority, idle, fits)
    out.print(rows)


def _checked(manager: ModelManager, name: str, needs: dict[str, int], limit: int) -> dict[str, Any]:
    config, need = manager.get_model(name, load=False).config, needs[name]
    return {
        "name": name,
        "type": config.type,
        "nbytes": need,
        "priority": config.memory_priority,
        "pinned": config.pinned,
        "idle_seconds": config.idle_limit,
        "too_large": need > limit * _MIB,
        "fits_with": [other for other in needs if other != name and need + needs[other] <= limit * _MIB],
    }


@app.command()
def chat(
    name: Name,
    config: ConfigOption = Path("src/models/config.json"),
    session: Annotated[str | None, typer.Option(help="The session, for a model on MLX.")] = None,
) -> None:
    """Talk to a model of a configuration; an empty line ends the command."""
    with _manager(config) as manager:
        with err.status(f"loading {name}"):
            model = manager.get_model(name)
        history: list[dict[str, str]] = []
        while text := read_line():
            history.append({"role": "user", "content": text})
            history.append({"role": "assistant", "content": _answer(model, history, session)})


def _answer(model: ManagedModel, history: list[dict[str, str]], session: str | None) -> str:
    text = ""
    with model.stream(history, session=session) as answer:
        for delta in answer:
            text += delta.text
            out.print(delta.text, end="")
    out.print()
    return text


@app.command()
def load(name: Name, config: ConfigOption = Path("src/models/config.json"), as_json: Json = False) -> None:
    """Load a model, unload it, and show what it took and what is left of that."""
    with _manager(config) as manager:
        before = manager.get_memory_usage()
        estimate = manager.estimate(name)
        manager.get_model(name, fallback=False)
        loaded, stats = manager.get_memory_usage(), manager.get_model_stats()[name]
        manager.unload_model(name, force=True)
        after = manager.get_memory_usage()
    if as_json:
        usage = {"before": before, "loaded": loaded, "unloaded": after}
        print_json(usage | {"load_seconds": stats.load_seconds, "expected_bytes": estimate})
        return
    rows = table("", "before", "loaded", "unloaded", right=("before", "loaded", "unloaded"))
    for label, key in (
        ("by the books", "total_mb"),
        ("the process", "process_rss_mb"),
        ("MLX in use", "mlx_active_mb"),
        ("MLX kept", "mlx_cache_mb"),
    ):
        rows.add_row(label, *(size(usage[key] * _MIB) for usage in (before, loaded, after)))
    out.print(rows)
    say(f"loaded in {duration(stats.load_seconds)}; {size(estimate)} were expected.")
