"""The contract with mlx-lm's generator: what it feeds, answers and hands back, and rows grouped by length."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from agent_memory_core import SamplingParams
from agent_memory_core.kv_layout import KvLayout
from agent_memory_core.model_runner import PADDING_FLOOR, ModelRunner, Row
from agent_memory_core.sampling import make_processors, make_sampler


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build(tiny_models.LLAMA)


@pytest.fixture
def runner(model: Any) -> ModelRunner:
    return ModelRunner(model, KvLayout(model), [1241], max_batch_size=4)


def prompt(length: int) -> list[int]:
    return [(11 * i) % 900 + 3 for i in range(length)]


def plain(model: Any, ids: list[int], new: int) -> list[int]:
    steps = generate_step(mx.array(ids), model, max_tokens=new)
    return [int(token) for token, _ in steps]


def started(runner: ModelRunner, seq_id: int, ids: list[int], new: int) -> tuple[Row, list[int]]:
    row = runner.row(seq_id, SamplingParams(max_tokens=new), make_prompt_cache(runner._model))
    logits = runner.prefill(row, ids, logits=True)
    assert logits is not None
    first = runner.sample(row, logits, ids)
    runner.join(row, [*ids, first], new - 1)
    return row, [first]


def test_rows_decode_as_alone_and_their_caches_cover_every_token_fed(model: Any, runner: ModelRunner) -> None:
    lengths, new = [5, 40, 17], 9
    rows = [started(runner, i, prompt(n), new) for i, n in enumerate(lengths)]
    caches: dict[int, Any] = {}
    while runner.decoding:
        for step in runner.decode():
            rows[step.row.seq_id][1].append(step.token)
            if step.cache is not None:
                assert step.finish_reason == "length"
                caches[step.row.seq_id] = step.cache
    for i, n in enumerate(lengths):
        assert rows[i][1] == plain(model, prompt(n), new)
        assert caches[i][0].offset == n + new


def test_a_row_taken_out_mid_batch_hands_back_what_it_was_fed(model: Any, runner: ModelRunner) -> None:
    row, tokens = started(runner, 0, prompt(30), 50)
    other, others = started(runner, 1, prompt(12), 8)
    for _ in range(4):
        for step in runner.decode():
            (tokens if step.row is row else others).append(step.token)
    cache = runner.stop(row)
    assert cache[0].offset == row.fed == 30 + len(tokens)
    fresh = make_prompt_cache(model)
    model(mx.array([prompt(30) + tokens]), cache=fresh)
    assert mx.allclose(
        KvLayout(model).cut(cache, 0, 34)["0.k"], KvLayout(model).cut(fresh, 0, 34)["0.k"], atol=1e-4
    )
    while runner.decoding:
        others += [step.token for step in runner.decode()]
    assert others == plain(model, prompt(12), 8)
    assert other.group is None


def test_rows_of_very_different_length_decode_apart(runner: ModelRunner) -> None:
    started(runner, 0, prompt(PADDING_FLOOR * 3), 6)
    started(runner, 1, prompt(PADDING_FLOOR * 2), 6)
    assert len(runner._groups) == 1
    started(runner, 2, prompt(10), 6)
    started(runner, 3, prompt(PADDING_FLOOR // 2), 6)
    assert [len(group.rows) for group in runner._groups] == [2, 2]


def test_without_logits_the_output_head_is_not_computed(runner: ModelRunner) -> None:
    row = runner.row(0, SamplingParams(), make_prompt_cache(runner._model))
    assert runner.prefill(row, prompt(20), logits=False) is None
    assert row.cache[0].offset == row.fed == 20


def test_a_seed_draws_the_same_tokens_whatever_the_random_state(model: Any) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, seed=7)
    logprobs = mx.log(mx.softmax(mx.random.normal((1, 300), key=mx.random.key(1))))

    def draws() -> list[int]:
        sampler = make_sampler(params, 300)
        return [int(sampler(logprobs).item()) for _ in range(12)]

    first = draws()
    mx.random.seed(123)
    assert draws() == first
    assert len(set(first)) > 1


def test_filters_keep_to_their_sets() -> None:
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))

    def seen(**given: Any) -> set[int]:
        sampler = make_sampler(SamplingParams(temperature=1.0, seed=1, **given), 4)
        return {int(sampler(logprobs).item()) for _ in range(60)}

    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.75) == {0, 1}
    assert seen(min_p=0.2) == {0, 1, 2}
    assert seen(top_k=99) == {0, 1, 2, 3}


def test_the_repetition_penalty_lowers_what_was_said() -> None:
    (penalty,) = make_processors(SamplingParams(repetition_penalty=2.0))
    logits = penalty(mx.array([1, 1, 3]), mx.array([[1.0, 1.0, 1.0, -1.0]]))
    assert logits.tolist() == [[1.0, 0.5, 1.0, -2.0]]
    assert make_processors(SamplingParams()) == []
