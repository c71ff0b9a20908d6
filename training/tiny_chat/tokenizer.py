"""The tokenizer: frequent words of the corpus are whole tokens, everything else falls into short pieces.

Values, names and schema words are always pieces, and a piece never takes the space before it, so a value
is written alike after a space, a quote or an underscore: copying it is copying tokens.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.tiny_chat.corpus import conversation, render
from training.tiny_chat.words import RESERVED, WORDS, Source, is_held_out

VOCABULARY: Final = 1344
MERGES: Final = 512
SPECIAL: Final = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>")
OPENERS: Final = (' "', " {", " [", " (", " '")
ROLES: Final = ("system", "user", "assistant", "tool")
WORD: Final = r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]|\s"
TEMPLATE: Final = Path(__file__).with_name("chat_template.jinja")


def corpus_texts(count: int = 6000) -> list[str]:
    """The conversations that the words are counted in."""
    return [
        render(conversation(seed, tokens=400, system_tokens=200 if seed % 4 == 0 else 0))
        for seed in range(-count, 0)
    ]


def learn_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges learned on names, values and invented words alone."""
    source = Source(5)
    pieces = [source.invented(capital=source.chance(0.4)) for _ in range(30_000)]
    for words in WORDS.values():
        pieces += [part for word in words if not is_held_out(word) for part in word.split("_") if part] * 300
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        pieces, trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return dict(model["vocab"]), [(first, second) for first, second in model["merges"]]


def whole_words(texts: list[str]) -> list[str]:
    """The corpus's own words, most frequent first; never a value or a schema word."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(re.findall(WORD, re.sub(r"<\|?[a-z_/]+\|?>", " \n", text)))
    values = {part.lower() for words in WORDS.values() for word in words for part in word.split("_")}
    usable = (word for word, count in counts.most_common() if count >= 12)
    return [
        w
        for w in usable
        if len(w.strip()) > 1
        and w.strip().isalpha()
        and w.strip().lower() not in (values | RESERVED) - {"name"}
    ]


def build() -> Tokenizer:
    """The tokenizer."""
    vocabulary, merges = learn_pieces()
    for word in [*ROLES, *OPENERS, *whole_words(corpus_texts())]:
        if len(vocabulary) == VOCABULARY - len(SPECIAL):
            break
        vocabulary.setdefault(word.replace(" ", "Ġ"), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(text, special=text.startswith("<|"), normalized=False) for text in SPECIAL]
    )
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORD), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer and its configuration as mlx-lm reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "add_bos_token": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": TEMPLATE.read_text(encoding="utf-8").rstrip("\n"),
    }
    text = json.dumps(configuration, indent=1, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Build the tokenizer into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    tokenizer = build()
    save(tokenizer, parser.parse_args().out)
    texts = [render(conversation(seed)) for seed in range(300)]
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    print(f"{tokenizer.get_vocab_size()} tokens; {sum(map(len, texts)) / tokens:.2f} letters a token")


if __name__ == "__main__":
    main()
