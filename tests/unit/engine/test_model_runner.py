"""The contract with mlx-lm's generator: what it feeds, answers and hands back, and rows grouped by length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from support import tiny_models

from agent_memory_core import SamplingParams
from agent_memory_core.engine.model_runner import PADDING_FLOOR, DecodeSlot, ModelRunner
from agent_memory_core.engine.sampling import make_processors, make_sampler
from agent_memory_core.kv.layout import KvLayout

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build(tiny_models.LLAMA)


@pytest.fixture
def runner(model: Any) -> ModelRunner:
    return make_runner(model, batches=True)


def decoding(runner: ModelRunner) -> int:
    """Rows that decode, in groups and by themselves."""
    return sum(len(group.rows) for group in runner._groups) + len(runner._alone)


def prompt(length: int) -> list[int]:
    return [(11 * i) % 900 + 3 for i in range(length)]


def plain(model: Any, ids: list[int], new: int) -> list[int]:
    steps = generate_step(mx.array(ids), model, max_tokens=new)
    return [int(token) for token, _ in steps]


def started(runner: ModelRunner, seq_id: int, ids: list[int], new: int) -> tuple[DecodeSlot, list[int]]:
    row = runner.slot(seq_id, SamplingParams(max_tokens=new), make_prompt_cache(runner._model))
    logits = runner.prefill(row, ids, logits=True)
    assert logits is not None
    first = runner.sample(row, logits, ids)
    runner.join(row, [*ids, first], new - 1)
    return row, [first]


def test_rows_decode_as_alone_and_their_caches_cover_every_token_fed(model: Any, runner: ModelRunner) -> None:
    lengths, new = [5, 40, 17], 9
    rows = [started(runner, i, prompt(n), new) for i, n in enumerate(lengths)]
    caches: dict[int, Any] = {}
    while decoding(runner):
        for step in runner.decode():
            rows[step.slot.seq_id][1].append(step.token)
            if step.cache is not None:
                assert step.finish_reason == "length"
                caches[step.slot.seq_id] = step.cache
    for i, n in enumerate(lengths):
        assert rows[i][1] == plain(model, prompt(n), new)
        assert caches[i][0].offset == n + new


def test_a_row_taken_out_mid_batch_hands_back_what_it_was_fed(model: Any, runner: ModelRunner) -> None:
    row, tokens = started(runner, 0, prompt(30), 50)
    other, others = started(runner, 1, prompt(12), 8)
    for _ in range(4):
        for step in runner.decode():
            (tokens if step.slot is row else others).append(step.token)
    cache = runner.stop(row)
    assert cache[0].offset == row.fed == 30 + len(tokens)
    fresh = make_prompt_cache(model)
    model(mx.array([prompt(30) + tokens]), cache=fresh)
    assert mx.allclose(
        KvLayout(model).cut(cache, "block", 0, 34)["0.k"],
        KvLayout(model).cut(fresh, "block", 0, 34)["0.k"],
        atol=1e-4,
    )
    while decoding(runner):
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
    row = runner.slot(0, SamplingParams(), make_prompt_cache(runner._model))
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


# Rows that decode by themselves


@dataclass
class Outcome:
    """What one row came to: all its tokens, how it ended, and what its cache covers."""

    tokens: list[int]
    logprobs: list[list[tuple[int, float]]]
    row: DecodeSlot
    reason: str | None = None
    cache: Any = None


class Recorder:
    """A logits processor that keeps the tokens it was shown and makes one of the next impossible."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        self.seen.append(tokens.tolist())
        return mx.where(mx.arange(logits.shape[-1])[None] == tokens[-1], -mx.inf, logits)


def make_runner(model: Any, *, batches: bool | None, eos: int = 1241) -> ModelRunner:
    runner = ModelRunner(model, KvLayout(model), [eos])
    runner.batches = batches
    return runner


def begin(
    runner: ModelRunner, seq_id: int, ids: list[int], params: SamplingParams, *processors: Any
) -> Outcome:
    """Prefill a row, sample its first token and let it decode."""
    row = runner.slot(seq_id, params, make_prompt_cache(runner._model), 0, processors)
    logits = runner.prefill(row, ids, logits=True)
    assert logits is not None
    first = runner.sample(row, logits, ids)
    runner.join(row, [*ids, first], params.max_tokens - 1)
    return Outcome([first], [row.logprobs], row)


def run(runner: ModelRunner, outcomes: list[Outcome], steps: int = 1000) -> list[Outcome]:
    """Decode until every row has ended, or for so many steps."""
    for _ in range(steps):
        if not decoding(runner):
            break
        for step in runner.decode():
            outcome = outcomes[step.slot.seq_id]
            outcome.tokens.append(step.token)
            outcome.logprobs.append(list(step.logprobs))
            outcome.reason, outcome.cache = step.finish_reason, step.cache
    return outcomes


def same_logprobs(one: list[list[tuple[int, float]]], other: list[list[tuple[int, float]]]) -> bool:
    """Whether the same tokens are listed with the same values, but for rounding."""
    pairs = [pair for pairs in zip(one, other, strict=True) for pair in zip(*pairs, strict=True)]
    return all(a == b and abs(x - y) < 1e-4 for (a, x), (b, y) in pairs)


def covers(model: Any, cache: Any, tokens: list[int]) -> bool:
    """Whether a live cache is that of these tokens, no more and no less."""
    fresh, layout = make_prompt_cache(model), KvLayout(model)
    model(mx.array([tokens]), cache=fresh)
    if cache[0].offset != len(tokens):
        return False
    pairs = zip(*(layout.cut(c, "block", 0, len(tokens)).values() for c in (cache, fresh)), strict=True)
    return all(mx.allclose(a, b, atol=1e-4).item() for a, b in pairs)


LENGTHS = (5, 40, 17)
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=9),
    "seeded": SamplingParams(max_tokens=9, temperature=1.0, top_p=0.95, top_k=40, seed=11),
    "penalised": SamplingParams(max_tokens=9, repetition_penalty=1.5),
    "with logprobs": SamplingParams(max_tokens=9, logprobs=True, top_logprobs=3),
}


@pytest.mark.parametrize("params", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_row_alone_gets_what_it_gets_in_a_batch(model: Any, params: SamplingParams) -> None:
    def answers(*, batches: bool) -> tuple[list[Outcome], list[Recorder]]:
        runner = make_runner(model, batches=batches)
        recorders = [Recorder() for _ in LENGTHS]
        begun = [begin(runner, i, prompt(n), params, recorders[i]) for i, n in enumerate(LENGTHS)]
        assert decoding(runner) == len(LENGTHS)
        return run(runner, begun), recorders

    (batched, shown), (alone, shown_alone) = answers(batches=True), answers(batches=False)
    for i, (one, other) in enumerate(zip(batched, alone, strict=True)):
        assert other.tokens == one.tokens
        assert (other.reason, other.row.fed) == (one.reason, one.row.fed) == ("length", LENGTHS[i] + 9)
        assert same_logprobs(other.logprobs, one.logprobs)
        assert bool(other.logprobs[0]) == params.logprobs
        assert all(covers(model, o.cache, [*prompt(LENGTHS[i]), *o.tokens]) for o in (one, other))
        seen = shown_alone[i].seen
        assert seen == [[*prompt(LENGTHS[i]), *other.tokens[:n]] for n in range(9)]
        assert shown[i].seen[:9] == seen
        assert all(a != b for a, b in pairwise([prompt(LENGTHS[i])[-1], *other.tokens]))


def test_a_row_alone_stops_at_the_end_of_its_answer_as_in_a_batch(model: Any) -> None:
    said = plain(model, prompt(17), 9)
    eos = said[4]
    runners = [make_runner(model, batches=batches, eos=eos) for batches in (True, False)]
    for runner in runners:
        (ended,) = run(runner, [begin(runner, 0, prompt(17), SamplingParams(max_tokens=30))])
        assert ended.tokens == said[: said.index(eos) + 1]
        assert ended.reason == "stop"
        assert ended.row.fed == 17 + len(ended.tokens)
        assert covers(model, ended.cache, [*prompt(17), *ended.tokens])
        assert decoding(runner) == 0


@pytest.mark.parametrize("batches", [True, False])
def test_a_look_at_a_live_cache_disturbs_nobody(model: Any, batches: bool) -> None:
    runner = make_runner(model, batches=batches)
    params = SamplingParams(max_tokens=12)
    outcomes = [begin(runner, i, prompt(n), params) for i, n in enumerate(LENGTHS)]
    assert covers(model, runner.peek(outcomes[1].row), prompt(LENGTHS[1])), "not fed yet"
    for _ in range(11):
        run(runner, outcomes, steps=1)
        for i, outcome in enumerate(outcomes):
            if outcome.reason is None:
                assert covers(model, runner.peek(outcome.row), [*prompt(LENGTHS[i]), *outcome.tokens])
    assert [outcome.tokens for outcome in outcomes] == [plain(model, prompt(n), 12) for n in LENGTHS]


def test_a_row_alone_can_be_taken_out_and_leaves_the_others_be(model: Any) -> None:
    runner = make_runner(model, batches=False)
    outcomes = [begin(runner, i, prompt(n), SamplingParams(max_tokens=12)) for i, n in enumerate(LENGTHS)]
    run(runner, outcomes, steps=4)
    taken = outcomes[1]
    cache = runner.stop(taken.row)
    assert taken.row.fed == 40 + len(taken.tokens)
    assert covers(model, cache, [*prompt(40), *taken.tokens])
    assert decoding(runner) == 2
    run(runner, outcomes)
    assert [outcomes[i].tokens for i in (0, 2)] == [plain(model, prompt(LENGTHS[i]), 12) for i in (0, 2)]
    assert len(taken.tokens) == 5


@pytest.mark.parametrize("answer", [True, False])
def test_whether_rows_may_share_a_batch_must_be_decided_once_and_only_when_two_would(
    model: Any, answer: bool
) -> None:
    runner = make_runner(model, batches=None)
    params = SamplingParams(max_tokens=6)
    for _ in range(2):
        assert not runner.must_decide(10), "one after the other shares nothing"
        run(runner, [begin(runner, 0, prompt(9), params)])
    outcomes = [begin(runner, 0, prompt(LENGTHS[0]), params)]
    run(runner, outcomes, steps=2)
    assert runner.must_decide(LENGTHS[1] + 1)
    with pytest.raises(AssertionError):
        begin(runner, 1, prompt(LENGTHS[1]), params)
    runner.batches = answer
    outcomes += [begin(runner, i, prompt(LENGTHS[i]), params) for i in (1, 2)]
    assert [outcome.row.group is not None for outcome in outcomes] == [True, answer, answer]
    run(runner, outcomes)
    assert [outcome.tokens for outcome in outcomes] == [plain(model, prompt(n), 6) for n in LENGTHS]
    assert not runner.must_decide(8)


def test_rows_that_decode_apart_need_no_decision(model: Any) -> None:
    runner = make_runner(model, batches=None)
    params = SamplingParams(max_tokens=4)
    outcomes = [begin(runner, i, prompt(n), params) for i, n in enumerate((PADDING_FLOOR * 3, 10))]
    assert outcomes[0].row.group is not outcomes[1].row.group
    run(runner, outcomes)
    assert outcomes[1].tokens == plain(model, prompt(10), 4)


def test_where_no_cache_can_be_batched_there_is_nothing_to_decide(model: Any) -> None:
    runner = make_runner(model, batches=False)
    outcomes = [begin(runner, i, prompt(9), SamplingParams(max_tokens=4)) for i in range(2)]
    assert [outcome.row.group for outcome in outcomes] == [None, None]
    assert len({tuple(outcome.tokens) for outcome in run(runner, outcomes)}) == 1


def test_a_row_that_is_forgotten_decodes_no_more(model: Any) -> None:
    for batches in (True, False):
        runner = make_runner(model, batches=batches)
        begin(runner, 0, prompt(9), SamplingParams(max_tokens=4))
        runner.close()
        assert (decoding(runner), runner.decode()) == (0, [])
