"""The command line about models: which profiles there are, what one says, and how to write one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

from agent_memory_core import AgentMemory, ParityResult
from agent_memory_core.config import KvBits
from agent_memory_core.environment import from_environment
from agent_memory_core.errors import InvalidSetting
from agent_memory_core.kv.codec import KvCodec
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.models.cache_spec import (
    GLOBAL,
    HYBRID,
    RECURRENT,
    SLIDING,
    SNAPSHOT,
    LayerShape,
    ModelCacheSpec,
    cache_spec,
)
from agent_memory_core.models.folder import find_model
from agent_memory_core.models.loader import LoadedModel, load_model
from agent_memory_core.models.profile import (
    CONFIGS_VARIABLE,
    Profile,
    find_profile,
    profile_directories,
    read_profile,
    sampling_for,
    settings_for,
    shipped_directory,
)
from agent_memory_core.models.profile_text import profile_text, stated_sampling, stated_thinking
from agent_memory_core.storage.block_file import ALIGNMENT

app = typer.Typer(no_args_is_help=True, help="Profiles of models: listed, shown, written.")
out = Console(markup=False, highlight=False)
err = Console(markup=False, highlight=False, stderr=True)

Model = Annotated[str, typer.Argument(help="A profile, an embedded name, a folder or a hub id.")]


@app.command("list")
def list_profiles() -> None:
    """All profiles, in the order they are looked for."""
    table = Table()
    for name in ("profile", "model", "layers", "KV heads", "head", "window", "from"):
        table.add_column(name)
    broken = []
    for path in [path for directory in profile_directories() for path in sorted(directory.glob("*.toml"))]:
        try:
            profile = read_profile(path)
        except InvalidSetting as wrong:
            broken.append(str(wrong))
            continue
        table.add_row(profile.name, profile.model_id, *_geometry_cells(profile), _origin(path))
    out.print(table)
    for sentence in broken:
        err.print(f"error: {sentence}", style="red")
    if broken:
        raise typer.Exit(1)


@app.command()
def show(
    model: Model,
    load: Annotated[bool, typer.Option("--load", help="Load the model and check its profile.")] = False,
) -> None:
    """What is known of a model, where each value comes from, and what its KV costs."""
    profile = find_profile(model)
    if profile is None and not load:
        raise InvalidSetting(
            f"there is no profile for {model!r}: write one with `agent-memory models new`, or add --load "
            "to ask the model itself."
        )
    spec, item_bytes = None, 2
    if load:
        spec, item_bytes = _ask(_loaded(profile.model_id if profile and profile.name == model else model))
        if profile is not None:
            profile.check(spec)
    if profile is not None:
        _say(f"{profile.name}: {profile.path}")
    out.print(_geometry_table(profile, spec))
    _note(spec)
    out.print(_settings_table(model, profile))
    shapes = spec.shapes if spec else _profile_shapes(profile)
    if not shapes:
        _say("what its KV costs cannot be told from this.")
        return
    block_tokens = settings_for({"model": model}).block_tokens
    out.print(_bytes_table(shapes, item_bytes, block_tokens))
    _say(f"at rest, in blocks of {block_tokens} tokens; a running sequence takes what kv_bits none does.")
    if {RECURRENT, HYBRID, SNAPSHOT} & set(spec.layer_types if spec else profile.layers if profile else ()):
        _say("states and snapshots are kept besides, whole, at some places of a conversation.")


@app.command()
def new(
    folder: Annotated[str, typer.Argument(help="A model's folder, or its embedded name or hub id.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="Where to write the profile.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a profile from a model's own files and live caches. The model is loaded to look at them."""
    at = find_model(folder)
    model_id = Path(folder).expanduser().resolve().name if Path(folder).expanduser().is_dir() else folder
    path = out_file or _default_path(model_id)
    if path.exists() and not force:
        raise InvalidSetting(f"{path} is there already: give another --out, or --force to replace it.")
    loaded = _loaded(folder)
    spec, _ = _ask(loaded)
    text = profile_text(model_id, spec, stated_sampling(at), stated_thinking(loaded.tokenizer))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidSetting(f"{path} cannot be written: {error}. Give another --out.") from error
    read_profile(path).check(spec)
    _say(f"wrote {path}, read it back and checked it against the model.")
    _note(spec)
    if path.resolve().parent not in [directory.resolve() for directory in profile_directories()]:
        _say(f"to use it: export {CONFIGS_VARIABLE}={path.resolve().parent}")


@app.command()
def verify(
    model: Model,
    blocks: Annotated[int, typer.Option(min=1, help="How many block boundaries to resume at.")] = 8,
) -> None:
    """Compare a model's logits: in a batch and alone, resumed and uninterrupted. What is found is recorded."""
    with AgentMemory(model=model) as memory:
        with err.status(f"loading {model}"):
            memory.load()
        with err.status("comparing logits"):
            result = memory.verify(blocks)
        folder = memory.config.cache_dir
    out.print(_verdict_table(result))
    if not result.batched:
        _say(f"the model decodes one sequence at a time: {result.reason}.")
    _say(
        f"recorded in {folder}."
        if folder is not None
        else "recorded nowhere: there is no folder for sessions."
    )
    if not result.resumed:
        raise typer.Exit(1)


def _verdict_table(result: ParityResult) -> Table:
    table = Table("compared", "largest gap", "limit", "result")
    gap = _said(result.batched_gap) if result.batched_gap is not None else ""
    table.add_row("batched, alone", gap, f"{result.limit:g}", "equal" if result.batched else "one at a time")
    where = f"resumed, uninterrupted at {result.boundaries} boundaries"
    table.add_row(
        where, _said(result.resumed_gap), f"{result.limit:g}", "equal" if result.resumed else "not stored"
    )
    return table


def _say(text: str) -> None:
    out.print(text, soft_wrap=True)


def _note(spec: ModelCacheSpec | None) -> None:
    for sentence in spec.contradictions if spec else ():
        _say(f"note: {sentence}.")


def _default_path(model_id: str) -> Path:
    own = [directory for directory in profile_directories() if directory != shipped_directory()]
    return (own[0] if own else Path()) / f"{model_id.rstrip('/').rsplit('/', 1)[-1].lower()}.toml"


def _loaded(model: str) -> LoadedModel:
    with err.status(f"loading {model}"):
        return load_model(model)


def _ask(loaded: LoadedModel) -> tuple[ModelCacheSpec, int]:
    """What the live caches say, and the bytes of one number in them."""
    groups = KvLayout(loaded.model).groups
    sizes = [group.shape.dtype.size for group in groups if group.shape is not None]
    return cache_spec(groups, loaded.config), max(sizes, default=2)


def _origin(path: Path) -> str:
    return "shipped" if path.parent == shipped_directory() else str(path.parent)


def _said(value: Any) -> str:
    if isinstance(value, (tuple, list, set)):
        return ", ".join(map(str, sorted(value)))
    return "none" if value is None else str(value)


def _geometry_cells(profile: Profile) -> Iterable[str]:
    """Layers, heads, head width and window: of all layers, or of each type that has its own."""
    for key in ("n_layers", "n_kv_heads", "head_dim", "sliding_window"):
        tables = [f"{_said(g[key])} ({t})" for t, g in profile.layers.items() if key in g]
        yield _said(profile.geometry[key]) if key in profile.geometry else ", ".join(tables)


# What a model is


def _geometry_table(profile: Profile | None, spec: ModelCacheSpec | None) -> Table:
    table = Table("geometry", "value", "from")
    if spec is None:
        assert profile is not None
        for key, value in profile.geometry.items():
            table.add_row(key, _said(value), "profile")
        for layer_type, geometry in profile.layers.items():
            for key, value in geometry.items():
                table.add_row(f"{layer_type} layers: {key}", _said(value), "profile")
        return table
    table.add_row("n_layers", str(spec.n_layers), "live caches, config.json")
    for layer_type in sorted(set(spec.layer_types)):
        for key in ("count", "n_kv_heads", "head_dim", "v_head_dim", "sliding_window"):
            if values := spec.values_of(key, layer_type):
                table.add_row(f"{layer_type} layers: {key}", _said(values), "live caches")
    table.add_row("context_length", _said(spec.context_length), "config.json")
    return table


def _settings_table(model: str, profile: Profile | None) -> Table:
    table = Table("setting", "value", "from")
    surroundings = from_environment()
    settings, sampling = settings_for({"model": model}), sampling_for(model, {})
    for values, said in ((settings, profile and profile.settings), (sampling, profile and profile.sampling)):
        for name in type(values).model_fields:
            if name in ("model", "seed", "stop"):
                continue
            origin = "default"
            if said and name in said:
                origin = "profile"
            if name in surroundings:
                origin = "environment"
            table.add_row(name, _said(getattr(values, name)), origin)
    for key, value in (profile.template_kwargs if profile else {}).items():
        table.add_row(key, _said(value), "profile")
    return table


# What its KV costs


def _profile_shapes(profile: Profile | None) -> tuple[LayerShape, ...]:
    """The shapes a profile tells of; none unless it tells one head count and one width for each type of layer."""
    if profile is None:
        return ()
    shapes = []
    for layer_type, own in (profile.layers or {GLOBAL: {}}).items():
        if layer_type in (RECURRENT, SNAPSHOT):
            continue
        said: dict[str, Any] = {"count": profile.geometry.get("n_layers"), **profile.geometry, **own}
        said.setdefault("v_head_dim", said.get("head_dim"))
        form = [said.get(key) for key in ("count", "n_kv_heads", "head_dim", "v_head_dim")]
        window = said.get("sliding_window") if layer_type == SLIDING else None
        numbers = [number for number in form if isinstance(number, int)]
        if len(numbers) < len(form) or isinstance(window, tuple):
            return ()
        count, heads, key_dim, value_dim = numbers
        shapes.append(LayerShape(layer_type, tuple(range(count)), heads, key_dim, value_dim, window))
    return tuple(shapes)


def _bytes_table(shapes: tuple[LayerShape, ...], item_bytes: int, block_tokens: int) -> Table:
    table = Table("kv_bits", "memory a token", "disk a token", "window layers at most")
    for kv_bits in _codecs():
        growing = sum(_at_rest(s, kv_bits, item_bytes, block_tokens) for s in shapes if s.window is None)
        windows = sum(
            _at_rest(s, kv_bits, item_bytes, block_tokens) * s.window for s in shapes if s.window is not None
        )
        header = ALIGNMENT / block_tokens
        table.add_row(
            _said(kv_bits), _bytes(growing), _bytes(growing + header), _bytes(windows) if windows else "none"
        )
    return table


def _codecs() -> Iterable[KvBits]:
    return (None, 8, "8/4", "6/4", 4)


def _at_rest(shape: LayerShape, kv_bits: KvBits, item_bytes: int, block_tokens: int) -> float:
    """Bytes a token of ``shape`` at rest. The codec itself says so, on zeros that are never evaluated."""
    dtype = mx.float32 if item_bytes == 4 else mx.bfloat16
    size = (len(shape.layers), shape.heads, block_tokens)
    raw = {"0.k": mx.zeros((*size, shape.key_dim), dtype), "0.v": mx.zeros((*size, shape.value_dim), dtype)}
    encoded = KvCodec(kv_bits, {"0.k": shape.key_dim, "0.v": shape.value_dim}).encode(raw)
    return sum(part.nbytes for part in encoded.values()) / block_tokens


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 1024:,.2f} KiB"
