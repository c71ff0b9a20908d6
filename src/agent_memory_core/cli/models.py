"""`agent-memory models`: profiles listed, shown and written, and models compared with themselves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import agent_memory_core as core
from agent_memory_core.cli.formats import print_json, size, table
from agent_memory_core.cli.options import Json, err, out, say

if TYPE_CHECKING:
    from rich.table import Table

    from agent_memory_core import KnownValue, KvCost, ModelDescription, ParityResult, Profile

app = typer.Typer(no_args_is_help=True, help="Show, write and check what is known about a model.")

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="The model: a profile, an embedded name, a folder or a Hugging Face hub id.", show_default=False
    ),
]


@app.command("list")
def list_profiles(as_json: Json = False) -> None:
    """List all profiles, in the order in which they are searched."""
    profiles, errors = core.list_profiles()
    if as_json:
        print_json(profiles)
    else:
        rows = table("profile", "model", "layers", "KV heads", "head", "window", "from")
        for profile in profiles:
            rows.add_row(profile.name, profile.model_id, *_geometry_cells(profile), _folder(profile))
        out.print(rows)
    for error in errors:
        err.print(f"error: {error}", style="red", soft_wrap=True)
    if errors:
        raise typer.Exit(1)


@app.command()
def show(
    model: ModelArgument,
    load: Annotated[
        bool, typer.Option("--load", help="Load the model and check its profile against it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is known about a model, where each value comes from, and how large its KV is."""
    with err.status(f"loading {model}" if load else "reading the profile"):
        found = core.describe_model(model, load=load)
    if as_json:
        print_json(found)
    else:
        _tell(found)


def _tell(found: ModelDescription) -> None:
    if found.profile is not None:
        say(f"{found.profile.name}: {found.profile.path}")
    out.print(_values("geometry", found.geometry))
    _note(found.contradictions)
    out.print(_values("setting", found.settings))
    if not found.costs:
        say("The profile does not tell enough to compute how large the KV is.")
        return
    out.print(_costs(found.costs))
    say(
        f"Sizes of stored KV, in blocks of {found.block_tokens} tokens. "
        "A running sequence always needs the memory shown for kv_bits none."
    )
    if found.keeps_states:
        say("Some layers also keep states or snapshots, which are stored whole and are not counted here.")


@app.command()
def new(
    model: Annotated[
        str,
        typer.Argument(help="The folder of the model, its embedded name or its hub id.", show_default=False),
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="The file to write.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there already.")] = False,
) -> None:
    """Write a profile for a model. The model is loaded to look at its caches."""
    with err.status(f"loading {model}"):
        written = core.write_profile(model, out_file, replace=force)
    say(f"wrote {written.path}, read it back and checked it against the model.")
    _note(written.contradictions)
    if not written.is_found:
        say(f"to use it: export AGENT_MEMORY_MODEL_CONFIGS={written.path.resolve().parent}")


@app.command()
def verify(
    model: ModelArgument,
    blocks: Annotated[int, typer.Option(min=1, help="The number of block boundaries to resume at.")] = 8,
    forget: Annotated[
        bool, typer.Option("--forget", help="Compare nothing, and drop the recorded result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that batching and resuming do not change a model's logits. The result is recorded and used."""
    with core.AgentMemory(model=model) as memory:
        with err.status(f"loading {model}"):
            memory.load()
        if forget:
            say(_forgotten(memory.forget_verified()))
            return
        with err.status("comparing logits"):
            result = memory.verify(blocks)
        folder = memory.config.cache_dir
    if as_json:
        print_json(result)
    else:
        out.print(_parity(result))
        for sentence in _consequences(result, model):
            say(sentence)
        where = f"in {folder}" if folder is not None else "nowhere: there is no folder for sessions"
        say(f"recorded {where}.")
    if not result.resumed:
        raise typer.Exit(1)


@app.command()
def random(
    folder: Annotated[Path, typer.Argument(help="The folder to write the model to.", show_default=False)],
    family: Annotated[str, typer.Option(help="The architecture: llama, olmo2 or qwen3.")] = "llama",
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 0,
) -> None:
    """Write a small model with random weights, to try things on. Its answers are nonsense."""
    # Imported here because it imports MLX, and the other commands here must not wait for that.
    from agent_memory_core.testing import write_random_model

    folder = folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise core.InvalidSetting(f"{folder} is there already and is not empty: give another folder.")
    say(f"wrote {write_random_model(folder, family, seed=seed)}")


def _note(contradictions: Iterable[str]) -> None:
    for sentence in contradictions:
        say(f"note: {sentence}.")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, sorted(value)))
    return "none" if value is None else str(value)


def _folder(profile: Profile) -> str:
    return "shipped" if profile.is_shipped or profile.path is None else str(profile.path.parent)


def _geometry_cells(profile: Profile) -> Iterable[str]:
    """Layers, heads, head width and window: of all layers, or of each type that has its own."""
    for key in ("n_layers", "n_kv_heads", "head_dim", "sliding_window"):
        own = [f"{_text(layers[key])} ({name})" for name, layers in profile.layers.items() if key in layers]
        yield _text(profile.geometry[key]) if key in profile.geometry else ", ".join(own)


def _values(title: str, values: Iterable[KnownValue]) -> Table:
    rows = table(title, "value", "from")
    for known in values:
        rows.add_row(known.name, _text(known.value), known.source)
    return rows


def _costs(costs: Iterable[KvCost]) -> Table:
    rows = table("kv_bits", "memory per token", "disk per token", "window layers at most")
    for cost in costs:
        windows = size(cost.windows) if cost.windows else "none"
        rows.add_row(_text(cost.kv_bits), size(cost.memory_per_token), size(cost.disk_per_token), windows)
    return rows


def _parity(result: ParityResult) -> Table:
    rows = table("compared", "gap", "floor", "limit", "result")
    limit = f"{result.limit:g}"
    rows.add_row(
        "in a batch and alone",
        _gap(result.batched_gap),
        _gap(result.batched_floor),
        limit,
        "equal" if result.batched else "one at a time",
    )
    rows.add_row(
        f"resumed and uninterrupted, at {result.boundaries} boundaries",
        _gap(result.resumed_gap),
        _gap(result.resumed_floor),
        limit,
        "equal" if result.resumed else "not stored",
    )
    return rows


def _gap(gap: float | None) -> str:
    return f"{gap:.2g}" if gap is not None else ""


def _consequences(result: ParityResult, model: str) -> Iterable[str]:
    """What the numbers mean, what follows from them, and how to undo that."""
    yield (
        "The floor is the gap that rounding alone makes. "
        "A gap counts as equal up to the limit, or up to three times a floor that can come from rounding."
    )
    if not result.batched:
        yield f"the model decodes one sequence at a time: {result.reason}."
        yield "To decode sequences together all the same: export AGENT_MEMORY_BATCHING=always"
    if not result.resumed:
        yield f"from the next start on, nothing of this model is stored: {result.resumed_reason}."
    if not (result.batched and result.resumed):
        yield f"To undo this: agent-memory models verify {model} --forget"


def _forgotten(result: ParityResult | None) -> str:
    """What was dropped."""
    if result is None:
        return "nothing is recorded about this model."
    batched = "decodes in batches" if result.batched else "decodes one sequence at a time"
    return (
        f"dropped what was recorded: the model {batched} and {'is' if result.resumed else 'is not'} stored."
    )
