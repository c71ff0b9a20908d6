"""Whether a model is the same in a batch and when it is resumed: a wrong one is refused, reported and recorded."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import KVCache
from support import families, tiny_models
from support.cases import some_of
from support.catalog_rows import catalog_at
from support.gpu_rounding import GpuRounding
from support.spoiled_models import InBatch, noise

from agent_memory_core.blocks.block import RecordKind
from agent_memory_core.kv import parity_runs
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.parity_runs import Gap
from agent_memory_core.models import parity
from agent_memory_core.models.parity import (
    LIMITS,
    ParityCheck,
    ParityResult,
    check_batched,
    check_resumed,
    parity_key,
)
from agent_memory_core.storage.catalog import Catalog

pytestmark = pytest.mark.model

SIZE = 500
"""Token ids that the prompts of these tests are made of."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build(tiny_models.LLAMA)


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test finds out of a model is not known to the next."""
    monkeypatch.setattr(parity, "_RESULTS", {})


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = catalog_at(tmp_path / "catalog.db")
    yield catalog
    catalog.close()


# In a batch


def test_a_sound_model_passes_far_below_the_limit(model: Any) -> None:
    result = check_batched(model, KvLayout(model), SIZE)
    assert result.batched
    assert result.reason == ""
    assert result.batched_gap is not None
    assert result.batched_gap < result.limit / 10
    assert result.limit == LIMITS[mx.float32]


@pytest.mark.parametrize("size", [0.005, 1.0])
def test_a_model_that_is_wrong_in_a_batch_only_is_refused_and_the_reason_names_the_gap(
    model: Any, size: float
) -> None:
    wrong = InBatch(model, noise(size))
    result = check_batched(wrong, KvLayout(model), SIZE)
    assert wrong.batches > 0
    assert not result.batched
    assert result.batched_gap is not None
    assert result.batched_gap > result.limit
    assert f"by {result.batched_gap:.2g} of their spread" in result.reason


def test_rounding_in_a_batch_is_no_reason(model: Any) -> None:
    assert check_batched(InBatch(model, noise(1e-5)), KvLayout(model), SIZE).batched


def test_one_step_that_differs_is_no_reason(model: Any) -> None:
    """Two tokens that are all but equally likely may change places once; a wrong batch is wrong on most steps."""

    def once(logits: mx.array) -> mx.array:
        return noise(1.0)(logits) if spoilt.batches == 3 else logits

    spoilt = InBatch(model, once)
    assert check_batched(spoilt, KvLayout(model), SIZE).batched
    assert spoilt.batches > 3


def test_rows_are_compared_one_by_one(model: Any) -> None:
    """One row that is wrong is enough, whichever it is."""
    for row in range(len(parity.LENGTHS)):
        only = mx.arange(len(parity.LENGTHS))[:, None, None] == row

        def spoil(logits: mx.array, only: mx.array = only) -> mx.array:
            return mx.where(only[: logits.shape[0]], noise(1.0)(logits), logits)

        assert not check_batched(InBatch(model, spoil), KvLayout(model), SIZE).batched


@pytest.mark.parametrize("kind", [ValueError, TypeError, AttributeError, IndexError, RuntimeError])
def test_a_model_that_fails_in_a_batch_is_refused_with_its_error(model: Any, kind: type[Exception]) -> None:
    def fail(logits: mx.array) -> mx.array:
        raise kind("shapes do not fit")

    result = check_batched(InBatch(model, fail), KvLayout(model), SIZE)
    assert not result.batched
    assert result.reason == "a batch of it fails: shapes do not fit"
    assert result.batched_gap is None


def test_what_is_no_number_is_an_infinite_gap(model: Any) -> None:
    def nothing(logits: mx.array) -> mx.array:
        return logits * math.nan

    result = check_batched(InBatch(model, nothing), KvLayout(model), SIZE)
    assert not result.batched
    assert result.batched_gap == math.inf
    assert "differ from those of a row alone by inf" in result.reason
    some = mx.array([1.0, 2.0, 3.0])
    assert parity_runs.gap_between(some, mx.array([1.0, math.nan, 3.0])) == Gap(math.inf)
    assert parity_runs.gap_between(some, some) == Gap(0)


def test_a_family_without_batched_caches_is_refused_unseen() -> None:
    model = families.build("llama4")
    result = check_batched(InBatch(model, noise(0)), KvLayout(model), SIZE)
    assert (result.batched, result.batched_gap) == (False, None)
    assert "no batched form" in result.reason


# From what is at rest


@pytest.fixture(scope="module", params=["llama", "gpt_oss", "gemma3", "lfm2"])
def kept(request: pytest.FixtureRequest) -> Any:
    return families.build(request.param)


class Layout(KvLayout):
    """A layout that puts back something else than it took out."""

    harm = ""

    def cut(self, cache: Any, record: RecordKind, start: int, stop: int) -> Any:
        segment = super().cut(cache, record, start, stop)
        match (self.harm, record):
            case ("scaled", "block") | ("scaled windows", "window"):
                return {name: x * 1.01 for name, x in segment.items()}
            case ("rolled", "window"):
                return {name: mx.roll(x, 1, 2) for name, x in segment.items()}
            case ("dropped", "window"):
                # The next to last token of the window is lost, and the one before it stands in its place.
                return {
                    name: mx.concatenate([x[:, :, :-2], x[:, :, -3:-2], x[:, :, -1:]], 2)
                    for name, x in segment.items()
                }
            case ("emptied", "tail"):
                return {name: x * 0 if x.dtype == mx.float32 else x for name, x in segment.items()}
        return segment


def test_a_layout_that_puts_back_what_it_took_leaves_no_gap(kept: Any) -> None:
    found = check_resumed(kept, KvLayout(kept), SIZE, 16, 5)
    assert found.passes
    assert found.gap <= found.limit / 10


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("name", some_of(["gemma3", "olmo3"], ["gemma3"]))
def test_a_window_that_rounds_as_on_a_gpu_is_stored_and_a_token_that_is_lost_from_it_is_found(
    name: str, scale: float
) -> None:
    """A live window still holds tokens that no record has, so its kernels add in another order."""
    model = GpuRounding(families.build(name, mx.bfloat16), scale)
    layout = Layout(model)
    found = check_resumed(model, layout, SIZE, 64, 3)
    assert found.floor > 0.001
    assert found.passes
    for layout.harm in ("dropped", "rolled"):
        assert not check_resumed(model, layout, SIZE, 64, 3).passes, layout.harm


@pytest.mark.parametrize(
    ("name", "harm"),
    [("llama", "scaled"), ("gpt_oss", "rolled"), ("gemma3", "scaled windows"), ("lfm2", "emptied")],
)
def test_a_layout_that_loses_or_moves_anything_shows_in_the_gap(name: str, harm: str) -> None:
    model = families.build(name)
    layout = Layout(model)
    layout.harm = harm
    found = check_resumed(model, layout, SIZE, 16, 5)
    assert not found.passes
    assert found.gap > found.limit
    assert found.gap > found.floor


def test_the_worst_boundary_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only fails at the third boundary is found, and looking at two of them does not find it."""
    layout = Layout(model)
    copied = parity_runs.copied

    def third(layout: Layout, live: Any, length: int, size: int) -> Any:
        layout.harm = "scaled" if length == 3 * size else ""
        return copied(layout, live, length, size)

    monkeypatch.setattr(parity_runs, "copied", third)
    for blocks, good in ((2, True), (3, False), (5, False)):
        assert check_resumed(model, layout, SIZE, 16, blocks).passes == good


def test_what_cannot_be_stored_is_no_fault_of_its_batches(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strange(KVCache):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mystery = object()

    monkeypatch.setattr(model, "make_cache", lambda: [Strange(), KVCache()], raising=False)
    check = ParityCheck(model, KvLayout(model), "strange", SIZE, None)
    result = check.verify(16, 2)
    assert result.batched
    assert not result.resumed


# What is known of a model


def test_nothing_is_looked_into_until_it_is_asked(model: Any, catalog: Catalog) -> None:
    seen = InBatch(model, noise(0))
    layout = KvLayout(model)
    check = ParityCheck(seen, layout, "m", SIZE, catalog)
    assert check.result is None
    assert seen.batches == 0
    assert check.may_batch()
    looked = seen.batches
    assert looked > 0
    assert check.may_batch()
    assert seen.batches == looked
    recorded = catalog.note(parity_key("m", layout))
    assert recorded is not None
    assert ParityResult.from_json(recorded) == check.result


def test_a_recorded_result_is_believed_and_reported(
    model: Any, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    layout = KvLayout(model)
    recorded = ParityResult(
        False, 0.5, resumed=False, resumed_gap=0.25, boundaries=8, limit=0.1, reason="so it was"
    )
    ParityCheck(model, layout, "m", SIZE, catalog).record(recorded)
    parity._RESULTS.clear()
    seen = InBatch(model, noise(0))
    check = ParityCheck(seen, layout, "m", SIZE, catalog)
    assert check.result == recorded
    assert "they differ by 0.25 of their spread" in caplog.text
    assert "nothing of this model is stored" in caplog.text
    assert "with --forget drops the record" in caplog.text
    assert not check.may_batch()
    assert seen.batches == 0
    assert "decodes one sequence at a time: so it was." in caplog.text
    assert ParityCheck(seen, layout, "another model", SIZE, catalog).result is None


def test_a_result_is_of_one_model_layout_device_chip_system_and_version(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = KvLayout(model)
    known = {
        parity_key("m", layout),
        parity_key("n", layout),
        parity_key("m", KvLayout(families.build("qwen3"))),
    }
    changes: list[tuple[Any, str, Any]] = [
        (parity, "version", "99"),
        (mx, "default_device", "another device"),
        (mx, "device_info", {"architecture": "applegpu_g17s"}),
        (mx, "device_info", {"device_name": "Apple M5"}),
        (platform, "mac_ver", ("26.1", ("", "", ""), "arm64")),
        (platform, "system", "Another"),
        (parity, "_FORM", 99),
    ]
    for where, name, value in changes:
        monkeypatch.setattr(where, name, value if name == "_FORM" else lambda *_, value=value: value)
        known.add(parity_key("m", layout))
    assert len(known) == 3 + len(changes)


def test_what_one_engine_found_another_of_the_process_knows(model: Any, catalog: Catalog) -> None:
    layout = KvLayout(model)
    wrong = InBatch(model, noise(1.0))
    assert not ParityCheck(wrong, layout, "m", SIZE, None).may_batch()
    looked = wrong.batches
    assert not ParityCheck(wrong, layout, "m", SIZE, catalog).may_batch()
    assert wrong.batches == looked
    assert catalog.note(parity_key("m", layout)) is not None


def test_looking_anew_replaces_what_was_recorded(model: Any, catalog: Catalog) -> None:
    layout = KvLayout(model)
    check = ParityCheck(model, layout, "m", SIZE, catalog)
    check.record(ParityResult(False, reason="once"))
    result = check.verify(16, 3)
    assert (result.batched, result.resumed, result.boundaries, result.reason) == (True, True, 3, "")
    assert check.may_batch()
    parity._RESULTS.clear()
    assert ParityCheck(model, layout, "m", SIZE, catalog).result == result


def test_a_result_that_is_forgotten_is_measured_again(model: Any, catalog: Catalog) -> None:
    layout = KvLayout(model)
    refused = ParityResult(False, resumed=False, resumed_gap=1.0, reason="once")
    check = ParityCheck(model, layout, "m", SIZE, catalog)
    assert check.forget() is None
    check.record(refused)
    assert check.forget() == refused
    assert catalog.note(parity_key("m", layout)) is None
    assert check.resumes
    assert ParityCheck(model, layout, "m", SIZE, catalog).result is None
    assert check.may_batch()


def test_every_refusal_says_how_to_undo_it(
    model: Any, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    layout = KvLayout(model)
    ParityCheck(model, layout, "m", SIZE, catalog).record(ParityResult(False, 0.5, False, 0.25, reason="so"))
    assert caplog.text == ""
    check = ParityCheck(model, layout, "m", SIZE, catalog)
    assert "--forget" in caplog.text
    caplog.clear()
    assert not check.may_batch()
    assert 'batching="always"' in caplog.text
    assert "--forget" in caplog.text


def test_a_catalog_that_was_closed_meanwhile_costs_the_record_only(
    model: Any, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    check = ParityCheck(model, KvLayout(model), "m", SIZE, catalog)
    catalog.close()
    assert check.may_batch()
    assert check.result is not None
    assert "could not be recorded" in caplog.text


@pytest.mark.parametrize("text", ["", "no result", "[]", "{}", '{"batched": true, "of a later version": 1}'])
def test_a_result_that_cannot_be_read_is_none(
    model: Any, catalog: Catalog, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    layout = KvLayout(model)
    catalog.write_note(parity_key("m", layout), text)
    check = ParityCheck(model, layout, "m", SIZE, catalog)
    assert check.result is None
    assert "cannot be read" in caplog.text
    assert check.may_batch()
    recorded = catalog.note(parity_key("m", layout))
    assert recorded is not None
    assert ParityResult.from_json(recorded).batched


gaps = st.none() | st.floats(0, allow_nan=False)
results = st.builds(
    ParityResult,
    st.booleans(),
    gaps,
    st.booleans(),
    gaps,
    st.integers(0),
    st.floats(0, 1),
    st.text(),
    gaps,
    gaps,
)


@given(results)
@settings(max_examples=50)
def test_a_result_is_read_as_it_was_written(result: ParityResult) -> None:
    assert ParityResult.from_json(result.to_json()) == result
    assert json.loads(result.to_json()).keys() == {field for field in ParityResult.__dataclass_fields__}
