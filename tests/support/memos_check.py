"""Read configurations from standard input, and use them in the real MemOS: see `memos_run`.

Every one must make a valid `GeneralMemCubeConfig`. A real `KVCacheMemory` extracts a cache from a fact, stores it and
reads it back, and the model answers with it, word for word, as it answers without MemOS to the same tokens. A real
`VLLMKVCacheMemory` does the same on a server.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

from memos.configs.mem_cube import GeneralMemCubeConfig
from memos.memories.factory import MemoryFactory

FACT = "My name is Ada."
ASKED = [{"role": "user", "content": "What is my name?"}]


def cube(llm: dict[str, Any]) -> Any:
    """The configuration of a cube whose activation memory is made by a model."""
    backend = "vllm_kv_cache" if llm["backend"] == "vllm" else "kv_cache"
    config = {"memory_filename": "activation_cache.pkl", "extractor_llm": llm}
    return GeneralMemCubeConfig(user_id="ada", cube_id="c", act_mem={"backend": backend, "config": config})


def stored(config: Any) -> tuple[Any, Any]:
    """A memory of a fact that went through a file, and what it gives to a model."""
    memory = MemoryFactory.from_config(config.act_mem)
    memory.add([memory.extract(FACT)])
    with tempfile.TemporaryDirectory() as folder:
        memory.dump(folder)
        memory.delete_all()
        memory.load(folder)
    (found,) = memory.get_all()
    return memory, memory.get_cache([found.id])


def answered_without(llm: Any) -> str:
    """The answer of the model to the fact and the question, without a cache."""
    system = {"role": "system", "content": f"Below is some information about the user.\n{FACT}"}
    prompt = llm.tokenizer.apply_chat_template([system], tokenize=False) + llm.tokenizer.apply_chat_template(
        ASKED, tokenize=False, add_generation_prompt=True
    )
    ids = llm.tokenizer(prompt, return_tensors="pt").input_ids
    made = llm.model.generate(ids, max_new_tokens=llm.config.max_tokens, do_sample=False)
    text: str = llm.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def main() -> None:
    """Check every configuration."""
    made: dict[str, dict[str, Any]] = json.load(sys.stdin)
    cubes = {name: cube(llm) for name, llm in made.items()}
    print(f"{len(cubes)} configurations are valid in MemOS")
    for name in ("huggingface", "huggingface_singleton"):
        memory, cache = stored(cubes[name])
        answer = memory.llm.generate(ASKED, past_key_values=cache)
        expected = answered_without(memory.llm)
        assert answer == expected != "", (answer, expected)
        print(f"{name}: with the stored cache as without, {answer!r}")
    memory, prompt = stored(cubes["vllm"])
    system = {"role": "system", "content": prompt.removeprefix("System: ")}
    print(f"vllm: the server says {memory.llm.generate([system, *ASKED])!r}")


if __name__ == "__main__":
    main()
