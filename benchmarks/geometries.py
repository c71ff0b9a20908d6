"""Time to first token on the true geometries of three published models, with random weights, on Metal or CUDA.

What a turn costs depends on the shape of a model and not on what its weights say, so nothing has to be downloaded:
each model is made in the shape of its published ``config.json``, quantised to 4 bits, and written to a folder.

    cold      the first prompt, of which nothing is known
    hot       the next message, of 32 tokens, in the same process
    resumed   the next message in a new process that has loaded the model and said something else

Beside each stands what the forerunner's paper (arXiv 2603.04428) reports for a Mac with an M4 Pro. A CPU would take
hours, so it is refused, and so is a machine with too little memory. ``--small`` runs every step on small models.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import TOKENIZER, _one_token_words, drop_page_cache
from record import argument_parser, median_of, write_result
from ttft import ANSWER, NEW, begin, first_prompt, sample

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model

from agent_memory_core import AgentMemory
from agent_memory_core.cli.published import MILLISECONDS

GIB = 2**30
ROOM = 4 * GIB
"""For keys and values, and for what a forward pass makes on the way."""
GROUP, BITS = 64, 4


@dataclass(frozen=True)
class Geometry:
    """The shape of a published model."""

    config: Mapping[str, Any]
    """What its ``config.json`` says."""
    small: Mapping[str, Any]
    """What differs in a model that has its layers of every kind and runs anywhere."""
    weights: int
    """bytes, quantised"""
    paper: Mapping[int, tuple[int, int, int]]
    """cold, warm (from disk) and hot milliseconds by tokens of the prompt, of the forerunner on an M4 Pro"""


_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # More than the tokenizer has, as in the large ones.
    "vocab_size": 4096,
}

GEOMETRIES: Mapping[str, Geometry] = {
    "Gemma 3 12B": Geometry(
        {
            "model_type": "gemma3_text",
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 262208,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 131072,
        },
        {"num_hidden_layers": 6, "head_dim": 64, "sliding_window": 128},
        7 * GIB,
        MILLISECONDS["Gemma 3 12B"],
    ),
    "Llama 3.1 8B": Geometry(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": False,
            "max_position_embeddings": 131072,
        },
        {"num_hidden_layers": 2, "head_dim": 64},
        5 * GIB,
        MILLISECONDS["Llama 3.1 8B"],
    ),
    "DeepSeek-Coder-V2-Lite": Geometry(
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "vocab_size": 102400,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 163840,
        },
        {
            "num_hidden_layers": 2,
            "moe_intermediate_size": 128,
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        },
        9 * GIB,
        MILLISECONDS["DeepSeek-Coder-V2-Lite"],
    ),
}


def main() -> None:
    """Measure every geometry and write the result file; as a worker, do one step and print what it found."""
    parser = argument_parser("geometries", __doc__)
    parser.add_argument("--small", action="store_true", help="small models, on any device")
    parser.add_argument("--only", nargs="+", choices=list(GEOMETRIES), default=list(GEOMETRIES))
    parser.add_argument("--prompts", nargs="+", type=int, help="tokens of the first prompts")
    parser.add_argument("--samples", type=int, default=3, help="hot and resumed samples of each length")
    parser.add_argument("--worker", choices=["make", "first", "resumed"], help=SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](**json.load(sys.stdin))))
        return
    if not options.small and (lack := refusal(options.only)):
        sys.exit(lack)
    prompts = options.prompts or ([320] if options.small else [1024, 4096, 16384])
    results = {name: measure(name, prompts, options.samples, small=options.small) for name in options.only}
    settings = {"prompts": prompts, "samples": options.samples, "answer": ANSWER, "new": NEW, "targets": {}}
    model = {"quantization": {"group_size": GROUP, "bits": BITS}, "small": options.small}
    write_result(options.out, settings, results, model)


def refusal(names: list[str]) -> str | None:
    """Why this machine cannot run these geometries; None if it can."""
    if mx.default_device() == mx.Device(mx.DeviceType.cpu):
        return (
            "These models need Metal or CUDA: on a CPU one prompt would take hours. "
            "Run this on such a machine, or give --small to see every step on small models."
        )
    said = mx.device_info()
    memory = int(said.get("max_recommended_working_set_size") or said.get("total_memory") or 0)
    for name in names:
        needed = GEOMETRIES[name].weights + ROOM
        if memory < needed:
            fitting = [fits for fits, shape in GEOMETRIES.items() if memory >= shape.weights + ROOM]
            choice = f"--only {fitting[0]!r} would fit" if fitting else "--small runs anywhere"
            return f"{name} needs {needed / GIB:.0f} GiB of GPU memory, and here are {memory / GIB:.1f}: {choice}."
    free = shutil.disk_usage(tempfile.gettempdir()).free
    needed = max(GEOMETRIES[name].weights for name in names) + ROOM
    if free < needed:
        return f"The models need {needed / GIB:.0f} GiB in {tempfile.gettempdir()}, and {free / GIB:.1f} are free."
    return None


def measure(name: str, prompts: list[int], samples: int, *, small: bool) -> dict[str, Any]:
    """All lengths of one geometry: medians in seconds, and the paper's figures beside them."""
    with tempfile.TemporaryDirectory() as folder:
        model, store = str(Path(folder, "model")), str(Path(folder, "store"))
        worker("make", folder=model, name=name, small=small)
        found = {}
        for prompt in prompts:
            first = worker("first", model=model, store=store, prompt=prompt, samples=samples)
            resumed = []
            for number, history in enumerate(first["histories"], start=samples):
                drop_page_cache(Path(store))
                job = {"model": model, "store": store, "history": history, "session": f"session {number}"}
                resumed.append(worker("resumed", **job, known=prompt + ANSWER))
            found[str(prompt)] = summary(first, resumed, GEOMETRIES[name].paper.get(prompt))
        return found


def summary(
    first: dict[str, Any], resumed: list[dict[str, Any]], paper: tuple[int, int, int] | None
) -> dict[str, Any]:
    """Medians in seconds, what they were taken from, and the paper's milliseconds."""
    samples = {"cold": first["cold"], "hot": first["hot"], "resumed": resumed}
    medians = {part: median_of([one["seconds"] for one in found]) for part, found in samples.items()}
    ratio = round(medians["cold"] / medians["resumed"], 2)
    said = dict(zip(("cold", "resumed", "hot"), paper, strict=True)) if paper else None
    return {"medians": medians, "cold / resumed": ratio, "paper_ms": said, "samples": samples}


def worker(step: str, **job: Any) -> Any:
    """Do a step in a process of its own; return what it printed."""
    command = [sys.executable, __file__, "--worker", step]
    done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make(folder: str, name: str, small: bool) -> dict[str, int]:
    """Write a model of a geometry; return the bytes of its weights."""
    geometry = GEOMETRIES[name]
    config = dict(geometry.config) | (_SMALL | dict(geometry.small) if small else {})
    config["eos_token_id"] = json.loads((TOKENIZER / "config.json").read_text())["eos_token_id"]
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text":
        # Weights without an output layer say that it is the embedding.
        model.sanitize({})
    only_words(getattr(model, "lm_head", None) or model.model.embed_tokens)
    model.set_dtype(mx.bfloat16)
    model, config = quantize_model(model, config, GROUP, BITS)
    for _, module in model.named_modules():
        # One after the other: all of them unquantised would need four times the memory.
        mx.eval(module.parameters() if not module.children() else [])
    return {"bytes": write(Path(folder), config, model)}


def only_words(output: Any) -> None:
    """Let no token be greatest but words of the tokenizer: all others get a logit of zero."""
    is_word = mx.zeros((output.weight.shape[0], 1), output.weight.dtype)
    is_word[mx.array(list(_one_token_words().values()))] = 1
    output.weight = output.weight * is_word


def write(folder: Path, config: dict[str, Any], model: Any) -> int:
    """Write a model with tiny-chat's tokenizer; return the bytes of its weights."""
    folder.mkdir(parents=True)
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    said = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    said["model_max_length"] = config["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    mx.save_safetensors(str(file), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return file.stat().st_size


def first(model: str, store: str, prompt: int, samples: int) -> dict[str, Any]:
    """A cold prompt, sessions that begin, and hot turns of the first half of them."""
    with AgentMemory(model=model, cache_dir=store) as memory:
        memory.chat("hello", max_tokens=2)
        cold = [sample(memory, first_prompt(2 * samples, prompt), "cold", prompt)]
        histories = [begin(memory, number, prompt) for number in range(2 * samples)]
        hot = [
            sample(memory, histories[number], f"session {number}", NEW, prompt + ANSWER)
            for number in range(samples)
        ]
        return {"cold": cold, "hot": hot, "histories": histories[samples:]}


def resumed(model: str, store: str, history: Any, session: str, known: int) -> dict[str, Any]:
    """A turn in a process that has not seen the session."""
    with AgentMemory(model=model, cache_dir=store) as memory:
        memory.chat("hello", max_tokens=2)
        return sample(memory, history, session, NEW, known)


WORKERS = {"make": make, "first": first, "resumed": resumed}

if __name__ == "__main__":
    main()
