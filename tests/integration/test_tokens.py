"""Token exactness: what the KV stands for is what the template says, and nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlx_lm import load
from support import engine_driver, made_tokenizers, tiny_models

BEGINNING = "A question of some length, so that it is worth keeping a part of it, with many words and "
Open = Callable[..., engine_driver.Driver]


@pytest.fixture(scope="module", params=["chatml", "with-bos"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model behind a tokenizer without and with a BOS."""
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "chatml":
        return tiny_models.write(folder, tiny_models.LLAMA)
    tokenizer = made_tokenizers.llama3()
    config = tiny_models.LLAMA | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tiny_models.write(folder, config)
    tokenizer._tokenizer.save_pretrained(folder)
    return str(folder)


def test_after_six_turns_the_ids_are_the_rendered_text_with_no_token_lost_or_doubled(
    model: str, open_driver: Open
) -> None:
    driver = open_driver(model, kv_bits=None)
    _, tokenizer = load(model)
    history: engine_driver.History = [{"role": "system", "content": "You are  helpful.\n\tBe brief."}]
    branch: list[int] = []
    for turn in range(6):
        history.append({"role": "user", "content": f"Question {turn}: what  is {turn} + 1?"})
        seen = driver.turn(history, "s", max_tokens=9)
        prompt = driver.prompts[-1]
        rendered = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(prompt) == rendered
        if tokenizer.bos_token_id is not None:
            assert prompt.count(tokenizer.bos_token_id) == 1
        assert prompt[: len(branch)] == branch, "what was generated is never rendered again"
        new = len(prompt) - len(branch)
        computed = seen.prompt_tokens - seen.cache_read
        assert computed == new if branch else computed == seen.prompt_tokens
        branch = prompt + seen.token_ids
        history.append({"role": "assistant", "content": seen.text})


def test_an_answer_cut_by_a_stop_string_leaves_no_token_behind_the_cut(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama, kv_bits=None)
    history: engine_driver.History = [{"role": "user", "content": "Say something."}]
    whole = driver.turn(history, "probe", max_tokens=24)
    stop = whole.text[len(whole.text) // 2 :][:2]
    seen = driver.turn(history, "s", max_tokens=24, stop=(stop,))
    assert seen.text == whole.text[: whole.text.index(stop)]
    history += [{"role": "assistant", "content": seen.text}, {"role": "user", "content": "And now?"}]
    driver.turn(history, "s")
    _, tokenizer = load(llama)
    rendered = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(driver.prompts[-1]) == rendered


def test_a_retry_and_an_edit_leave_what_they_share(llama: str, open_driver: Open, tmp_path: Path) -> None:
    driver = open_driver(llama, kv_bits=None)
    asked: engine_driver.History = [{"role": "user", "content": BEGINNING + "a number 12345."}]
    first = driver.turn(asked, "s", max_tokens=20)
    again = driver.turn(asked, "s", max_tokens=20)
    assert (again.token_ids, again.cache_read) == (first.token_ids, again.prompt_tokens - 1)
    assert driver.memory.sessions()[0].branches == 1, "a retry rewinds its branch"
    gone_on: engine_driver.History = [
        *asked,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Go on."},
    ]
    driver.turn(gone_on, "s")
    edited: engine_driver.History = [{"role": "user", "content": BEGINNING + "another number."}]
    fork = driver.turn(edited, "s")
    assert driver.memory.sessions()[0].branches == 2, "an edit forks"
    assert fork.cache_read >= 32
    back: engine_driver.History = [*gone_on, {"role": "assistant", "content": driver.turn(gone_on, "s").text}]
    back.append({"role": "user", "content": "And then?"})
    new = len(driver.prompts[-1])
    seen = driver.turn(back, "s")
    assert seen.cache_read >= new, "the old branch is still warm"
