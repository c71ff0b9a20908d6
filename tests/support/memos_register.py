"""Let the real MemOS run on managed weights: make test-memos, with this package's libraries before those of MemOS."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from memos.configs.mem_cube import GeneralMemCubeConfig
from memos.mem_cube.general import GeneralMemCube

import agent_memory_core
from agent_memory_core.manager import ManagerConfig, ModelManager, get_llm_for_memos
from agent_memory_core.manager.memos import register

FOLDER = str(Path(agent_memory_core.__file__).parent / "tiny_chat")
MODEL: dict[str, Any] = {
    "name": "tiny",
    "type": "huggingface",
    "path": FOLDER,
    "parameters": {"max_tokens": 24},
}


def check(manager: ModelManager) -> None:
    """A cube has no weights of its own, and its model stays in memory for as long as the cube lives."""
    llm = get_llm_for_memos("huggingface_singleton", "tiny", manager=manager)
    act: dict[str, Any] = {"memory_filename": "kv.pkl", "extractor_llm": llm}
    config = GeneralMemCubeConfig(user_id="ada", cube_id="c", act_mem={"backend": "kv_cache", "config": act})
    cube = GeneralMemCube(config)
    with manager.get_model("tiny").lease() as native:
        assert cube.act_mem.llm.model is native
    item = cube.act_mem.extract("My name is Ada.")
    cube.act_mem.add([item])
    asked = [{"role": "user", "content": "What is my name?"}]
    answer = cube.act_mem.llm.generate(asked, past_key_values=cube.act_mem.get_cache([item.id]))
    assert answer
    assert not manager.unload_model("tiny")
    del cube, item, native
    gc.collect()
    assert manager.unload_model("tiny")
    print(f"on managed weights it says {answer!r}")


if __name__ == "__main__":
    with ModelManager(ManagerConfig.model_validate({"models": [MODEL]})) as made:
        register(made)
        check(made)
