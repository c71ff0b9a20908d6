"""Tokenizers made in process, one for each habit that real ones have. No file, no network."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from mlx_lm.tool_parsers import json_tools
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import agent_memory_core

CORPUS = [
    "You are a helpful assistant. The user asks and the assistant answers.",
    'Call the tool with {"name": "get_weather", "arguments": {"city": "Paris"}} and wait for the result.',
    "def add(a, b):\n    return a + b\n\nHello there! What is the weather like in Paris today?\n",
    "My favourite colour is green, and yours is blue. I remember that you told me so, many turns ago.",
] * 4

CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LLAMA3 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)
THINKS = (
    "{%- for m in messages -%}{%- set content = m.content.split('</think>')[-1].lstrip('\\n') -%}"
    "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ content ~ '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
LLAMA2 = (
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant') -}}{%- endif -%}"
    "{%- if m.role == 'user' -%}{{- bos_token ~ '[INST] ' ~ m.content ~ ' [/INST]' -}}"
    "{%- else -%}{{- ' ' ~ m.content ~ eos_token -}}{%- endif -%}{%- endfor -%}"
)
BARE = (
    "{%- for m in messages -%}{{- m.role ~ ':\\n' ~ m.content ~ '\\n\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:\\n' -}}{%- endif -%}"
)


def wrap(tokenizer: Tokenizer, template: str | None, **names: str) -> TokenizerWrapper:
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names),
        eos_token_ids=[tokenizer.token_to_id(names["eos_token"])] if "eos_token" in names else None,
    )


def special(*names: str, **habits: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **habits) for name in names]


@cache
def tiny_chat() -> TokenizerWrapper:
    """The embedded model's own: ChatML-like, with tools."""
    return load(Path(str(agent_memory_core.__file__)).parent / "tiny_chat")


def byte_level(template: str | None, added: list[AddedToken], **names: str) -> TokenizerWrapper:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    if bos := names.get("bos_token"):
        # As Llama 3: encoding adds a BOS unless told otherwise, and the template writes one too.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return wrap(tokenizer, template, **names)


@cache
def llama3() -> TokenizerWrapper:
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_level(LLAMA3, special(*names), bos_token=names[0], eos_token=names[3])


@cache
def thinks() -> TokenizerWrapper:
    """As Qwen 3: text is normalised; thinking is in the vocabulary and stripped from history. It knows no tools."""
    added = special("<|im_start|>", "<|im_end|>")
    added += [AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    made = byte_level(THINKS, added, eos_token="<|im_end|>")
    made._tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return TokenizerWrapper(
        made._tokenizer,
        eos_token_ids=made.eos_token_ids,
        tool_call_start=json_tools.tool_call_start,
        tool_call_end=json_tools.tool_call_end,
        tool_parser=json_tools.parse_tool_call,
    )


@cache
def bare() -> TokenizerWrapper:
    """No special token stands round the turns."""
    return byte_level(BARE, special("<|endoftext|>"), eos_token="<|endoftext|>")


@cache
def untemplated() -> TokenizerWrapper:
    return byte_level(None, special("<s>", "</s>"), bos_token="<s>", eos_token="</s>")


@cache
def swallows() -> TokenizerWrapper:
    """As Phi 3: special tokens swallow the whitespace after them, so ids do not decode to their text."""
    return byte_level(CHATML, special("<|im_start|>", "<|im_end|>", rstrip=True), eos_token="<|im_end|>")


def sentencepiece(template: str, added: list[AddedToken], *, legacy: bool, **names: str) -> TokenizerWrapper:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *learned["vocab"],
        "\n",
        "▁▁",
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [("▁", "▁"), *((a, b) for a, b in learned["merges"])]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps: list[Any] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([*special("<unk>", "<s>", "</s>"), *added])
    return wrap(tokenizer, template, **names)


@cache
def metaspace() -> TokenizerWrapper:
    """A space is put before a text, unless it begins with a special token."""
    return sentencepiece(CHATML, special("<|im_start|>", "<|im_end|>"), legacy=False, eos_token="<|im_end|>")


@cache
def llama2() -> TokenizerWrapper:
    """A space is put after every special token, so ids do not decode to their text."""
    return sentencepiece(LLAMA2, [], legacy=True, bos_token="<s>", eos_token="</s>")


@cache
def _words(tokenizer: TokenizerWrapper) -> tuple[dict[str, int], int]:
    added = tokenizer.added_tokens_decoder
    words = {w: i for w, i in tokenizer.get_vocab().items() if i not in added and not w.startswith("<0x")}
    return words, max(map(len, words))


def spell(tokenizer: TokenizerWrapper, text: str, seed: int) -> list[int]:
    """Token ids that stand for ``text`` inside a text, chosen at random among all that do."""
    words, longest = _words(tokenizer)
    rng = random.Random(seed)
    byte_level = "Ġ" in words
    characters = "".join(_BYTES[b] for b in text.encode()) if byte_level else text.replace(" ", "▁")
    ids: list[int] = []
    at = 0
    while at < len(characters):
        choices = [
            characters[at:end] for end in range(at + 1, at + longest + 1) if characters[at:end] in words
        ]
        word = rng.choice(choices) if choices else characters[at]
        ids += [words[word]] if choices else [tokenizer.get_vocab()[f"<0x{b:02X}>"] for b in word.encode()]
        at += len(word)
    return ids


_BYTES: dict[int, str] = bytes_to_unicode()
