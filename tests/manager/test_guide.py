"""Code that was written for the package `models` runs through the distribution in `compat/`, block by block."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.docs_page import printed
from support.tiny_models import TOKENIZER

from agent_memory_core.manager import get_model_manager

COMPAT = Path(__file__).parents[2] / "compat"
CONFIG = {
    "max_memory_mb": 8192,
    "models": [
        {
            "name": "SmolLM3-3B",
            "type": "huggingface",
            "path": "./smollm",
            "context_length": 16384,
            "parameters": {"temperature": 0.01, "max_tokens": 16384, "do_sample": False},
            "memory_priority": 1,
            "max_idle_time": 300,
            "preload": True,
        }
    ],
}
"""A configuration as it stands in projects that use `models`."""

BLOCKS = [
    """
from models import initialize_model_manager

manager = initialize_model_manager("src/models/config.json")
""",
    """
from models.integration import get_agent_model

class MyAgent:
    def __init__(self):
        self.model = get_agent_model("CodebaseExpertAgent")

    def process(self, prompt):
        return self.model.generate(prompt)

assert MyAgent().process("My name is Ada.") == "Nice to meet you, Ada."
""",
    """
from models.integration import get_llm_for_memos

extractor_llm_config = get_llm_for_memos(
    backend="huggingface",
    model_path="./smollm"
)
cube_config = dict(
    act_mem={
        "backend": "kv_cache",
        "config": {
            "memory_filename": "activation_cache.pkl",
            "extractor_llm": extractor_llm_config
        }
    }
)
""",
    """
from models.integration import create_model_adapter

adapter = create_model_adapter("CodebaseExpertAgent")
model = adapter.model
assert model.generate("Hello!")
""",
    """
from models import get_model_manager

class CodebaseExpertAgent:
    def __init__(self):
        self.manager = get_model_manager()

    def get_model(self):
        return self.manager.get_model("SmolLM3-3B")

    def process(self, query):
        model = self.get_model()
        return model.generate(query)

assert CodebaseExpertAgent().process("Hello!")
""",
    """
manager = get_model_manager()

memory_info = manager.get_memory_usage()
print(f"Using {memory_info['total_mb']}MB of {memory_info['limit_mb']}MB")
assert 0 < memory_info["total_mb"] <= memory_info["limit_mb"] == 8192
manager.unload_model("SmolLM3-3B", force=True)
manager.set_memory_limit(4096)
assert manager.get_memory_usage()["total_mb"] == 0
""",
    """
class CodeGeneratorAgent:
    def __init__(self):
        self.adapter = create_model_adapter("CodeGeneratorAgent")

    @property
    def model(self):
        return self.adapter.model

assert CodeGeneratorAgent().model is manager.get_model("SmolLM3-3B")
""",
    """
try:
    model = manager.get_model("MyModel")
except ValueError as e:
    print(f"Model not found: {e}")
except Exception as e:
    raise AssertionError(e)
""",
    """
seen = []
manager.register_callback('loaded', lambda name: seen.append(f"Loaded {name}"))
manager.register_callback('evicted', lambda name: seen.append(f"Evicted {name}"))
manager.get_model("SmolLM3-3B")
stats = manager.get_model_stats()
for name, stat in stats.items():
    print(f"{name}: {stat.access_count} accesses, {stat.memory_usage_mb}MB")
manager.unload_model("SmolLM3-3B")
manager.get_model("SmolLM3-3B")
assert seen == ["Loaded SmolLM3-3B"]
manager.shutdown()
""",
]


OLDER = """
from models import ModelConfig, get_model_manager
from models.integration import ModelManagerAdapter, get_llm_for_memos

manager = get_model_manager()
assert manager is get_model_manager()
manager.add_model_config(ModelConfig(
    name="remote", type="openai", path="some-model", context_length=2048,
    parameters={"api_base": "http://localhost:1/v1", "temperature": 0.01}, memory_priority=5, max_idle_time=1,
))
assert "remote" in manager.list_available_models()
assert manager.get_model("remote") is manager.get_model("remote")
assert manager.list_loaded_models() == ["remote"]
before = manager.get_memory_usage()["limit_mb"]
manager.set_memory_limit(1024)
assert manager.get_memory_usage()["limit_mb"] == 1024
manager.set_memory_limit(before)
assert manager.unload_model("remote", force=True) is True
assert manager.list_loaded_models() == []
manager.load_config("other.json")
assert manager.list_available_models() == ["later"]
assert manager.get_memory_usage()["limit_mb"] == 2048
config = get_llm_for_memos(backend="openai", model_path="later")
assert set(config) == {"backend", "config"}
adapter = ModelManagerAdapter("AnyAgent")
assert adapter.agent_name == "AnyAgent"
assert adapter.get_memory_usage()["total_mb"] == 0
"""
"""What tests of `models` ask of it: models of endpoints, a manager that begins empty, and another configuration."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a model in ``smollm``, and `models` to import."""
    shutil.copytree(TOKENIZER, tmp_path / "smollm")
    (tmp_path / "src" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(COMPAT))
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    yield tmp_path
    for name in [name for name in sys.modules if name == "models" or name.startswith("models.")]:
        del sys.modules[name]
    get_model_manager().shutdown()


@pytest.mark.parametrize(
    "type_",
    [
        "mlx",
        pytest.param(
            "huggingface",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("torch") is None,
                reason="torch is not installed: make test-huggingface",
            ),
        ),
    ],
)
def test_code_for_models_runs(project: Path, type_: str) -> None:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    config["models"][0]["type"] = type_
    config["models"][0]["context_length"] = 4096
    (project / "src" / "models" / "config.json").write_text(json.dumps(config))
    said = printed("\n".join(BLOCKS))
    assert "Using" in said
    assert "Model not found: there is no model 'MyModel'" in said
    assert "accesses" in said


def test_what_was_tested_of_models_holds(project: Path) -> None:
    later = {
        "name": "later",
        "type": "openai",
        "path": "gpt",
        "parameters": {"api_base": "http://localhost:1/v1"},
    }
    (project / "other.json").write_text(json.dumps({"max_memory_mb": 2048, "models": [later]}))
    printed(OLDER)


def test_the_configuration_is_valid_as_it_stands(project: Path) -> None:
    from agent_memory_core.manager import ManagerConfig

    file = project / "src" / "models" / "config.json"
    file.write_text(json.dumps(CONFIG))
    (model,) = ManagerConfig.from_file(file).models
    assert (model.name, model.path, model.idle_limit) == ("SmolLM3-3B", str(project / "smollm"), 300)


def test_the_alias_has_the_names_of_the_manager_and_no_code_of_its_own() -> None:
    import agent_memory_core.manager as manager

    for file in (COMPAT / "models").glob("*.py"):
        text = file.read_text()
        exported: dict[str, Any] = {}
        exec(compile(text, str(file), "exec"), exported)
        assert all(exported[name] is getattr(manager, name) for name in exported["__all__"])
        assert "def " not in text
