"""The network: a small llama with grouped-query attention and tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

CHUNK: Final = 512


@dataclass(frozen=True)
class Shape:
    """The sizes of the network."""

    vocabulary: int
    width: int = 256
    layers: int = 5
    heads: int = 4
    key_heads: int = 2
    head_width: int = 64
    hidden: int = 512
    theta: float = 100_000.0
    epsilon: float = 1e-5
    positions: int = 8192

    def configuration(self, end: int, padding: int) -> dict[str, Any]:
        """The ``config.json`` that mlx-lm reads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_width,
            "rms_norm_eps": self.epsilon,
            "vocab_size": self.vocabulary,
            "rope_theta": self.theta,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": padding,
        }


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.epsilon = shape.epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last axis."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def repeated(heads: Tensor, times: int) -> Tensor:
    """Each head so many times in a row."""
    rows, count, length, width = heads.shape
    return heads[:, :, None].expand(rows, count, times, length, width).reshape(rows, -1, length, width)


def look_back(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention, written out: the backward pass of torch's own takes several times as long on a CPU.

    Queries go in chunks, so that none is compared with the keys of later chunks.
    """
    length, width = queries.shape[-2:]
    chunk = min(length, CHUNK)
    later = torch.full((length, length), -torch.inf, device=queries.device).triu(1)
    mixed = []
    for first in range(0, length, chunk):
        end = first + chunk
        scores = (queries[:, :, first:end] @ keys[:, :, :end].mT).float() * width**-0.5
        scores = scores + later[first:end, :end]
        mixed.append(scores.softmax(-1).to(values.dtype) @ values[:, :, :end])
    return torch.cat(mixed, dim=-2)


class Attention(nn.Module):
    """Causal attention with fewer key heads than query heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, queries, bias=False)
        self.k_proj = nn.Linear(shape.width, keys, bias=False)
        self.v_proj = nn.Linear(shape.width, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Let every position look back."""
        rows, length, _ = x.shape
        queries = rotate(self.q_proj(x).view(rows, length, -1, self.shape.head_width), cos, sin)
        keys = rotate(self.k_proj(x).view(rows, length, -1, self.shape.head_width), cos, sin)
        values = self.v_proj(x).view(rows, length, -1, self.shape.head_width)
        group = self.shape.heads // self.shape.key_heads
        keys, values = (repeated(y.transpose(1, 2), group) for y in (keys, values))
        mixed = look_back(queries.transpose(1, 2), keys, values)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1)))


class FeedForward(nn.Module):
    """The gated layer between attentions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position alone."""
        return cast(Tensor, self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """Attention and the gated layer, each on a normed copy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = Norm(shape)
        self.post_attention_layernorm = Norm(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One layer."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Trunk(nn.Module):
    """Embeddings, layers and the last norm, named as llama checkpoints name them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)


class Network(nn.Module):
    """The model; its loss weighs each token, since only the assistant's words need to be learned well."""

    inverse: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Trunk(shape)
        steps = torch.arange(0, shape.head_width, 2).float() / shape.head_width
        self.register_buffer("inverse", shape.theta**-steps, persistent=False)
        for name, parameter in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() == 2:
                gain = 0.3 if "o_proj" in name or "down_proj" in name else 0.7
                nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)

    def states(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What the layers make of every position."""
        table = self.model.embed_tokens.weight
        angles = positions[:, :, None].float() * self.inverse
        cos, sin = (f(angles)[:, :, None].to(table.dtype) for f in (torch.cos, torch.sin))
        x = functional.embedding(ids, table)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return cast(Tensor, self.model.norm(x))

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The scores of the next token at every position."""
        return functional.linear(self.states(ids, positions), self.model.embed_tokens.weight)

    def forward(
        self, ids: Tensor, positions: Tensor, chosen: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        """The weighted mean loss at the chosen places: scores of all others would cost as much as a layer."""
        states = self.states(ids, positions).flatten(0, 1)[chosen]
        scores = functional.linear(states, self.model.embed_tokens.weight).float()
        losses = functional.cross_entropy(scores, targets.flatten()[chosen], reduction="none")
        weighed = weights.flatten()[chosen]
        return (losses * weighed).sum() / weighed.sum()
