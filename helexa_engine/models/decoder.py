"""The stack that every architecture here shares: embedding, layers of (norm > mixer, norm > feed-forward), final norm, head.

An architecture's file says what its mixers and feed-forwards are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import torch

from ..batch import Batch
from ..layers.embedding import Embedding
from ..layers.linear import Linear, MatrixParameter
from ..layers.norm import RMSNorm
from ..layers.rotary import rotary_table
from ..layers.weight import ParameterSlot
from ..ops.cuda import torch_device
from .config import ModelConfig


class Mixer(Protocol):
    """What mixes tokens with earlier ones: attention, a delta net."""

    def slots(self) -> dict[str, ParameterSlot]: ...

    def __call__(self, x: torch.Tensor, norm: RMSNorm, batch: Batch) -> torch.Tensor:
        """Adds ``mix(norm(x))`` to ``x`` [T, hidden_size] in place and returns it."""


class FeedForward(Protocol):
    """What works on each token by itself: a gated MLP, a mixture of experts."""

    def slots(self) -> dict[str, ParameterSlot]: ...

    def __call__(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Adds ``f(norm(x))`` to ``x`` [T, hidden_size] in place and returns it."""


class DecoderLayer:
    """norm > mixer > residual > norm > feed-forward > residual."""

    def __init__(
        self, config: ModelConfig, layer_idx: int, mixer: Mixer, feed_forward: FeedForward, device: str
    ) -> None:
        prefix = layer_prefix(layer_idx)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(f"{prefix}.input_layernorm.weight", size, eps, device)
        self.mixer = mixer
        self.post_attention_norm = RMSNorm(f"{prefix}.post_attention_layernorm.weight", size, eps, device)
        self.feed_forward = feed_forward

    def slots(self) -> dict[str, ParameterSlot]:
        return (
            self.input_norm.slots() | self.mixer.slots() | self.post_attention_norm.slots() | self.feed_forward.slots()
        )

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.feed_forward(self.mixer(x, self.input_norm, batch), self.post_attention_norm)


class Decoder(ABC):
    """Embedding, layers, final norm and head.

    Args:
        config: the model's shape.
        max_model_len: positions the rotary table covers.
        device: where it computes, ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, config: ModelConfig, max_model_len: int, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        rotary = rotary_table(config.rotary_dim, max_model_len, config.rope_theta, config.rope_scaling)
        self.rotary = rotary.to(torch_device(device))
        self.embedding = Embedding("model.embed_tokens.weight", config.vocab_size, config.hidden_size, device)
        self.layers = [
            DecoderLayer(config, i, self.make_mixer(i), self.make_feed_forward(i), device)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm("model.norm.weight", config.hidden_size, config.rms_norm_eps, device)
        if config.tie_word_embeddings:
            self.lm_head = Linear.tied(self.embedding.parameter)
        else:
            self.lm_head = Linear([("lm_head.weight", config.vocab_size)], config.hidden_size, device)
        if config.num_experts:  # a rounding that sends a token to another expert costs far more than it saves
            for slot in self.parameters_wanted().values():
                if isinstance(slot, MatrixParameter):
                    slot.exact = True

    @abstractmethod
    def make_mixer(self, layer_idx: int) -> Mixer:
        """The mixer of a layer."""

    @abstractmethod
    def make_feed_forward(self, layer_idx: int) -> FeedForward:
        """The feed-forward of a layer."""

    def parameters_wanted(self) -> dict[str, ParameterSlot]:
        """Canonical parameter name -> where it goes; every one must be loaded."""
        wanted = self.embedding.slots() | self.norm.slots()
        for layer in self.layers:
            wanted |= layer.slots()
        if not self.config.tie_word_embeddings:
            wanted |= self.lm_head.slots()
        return wanted

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, hidden_size] float32 before the final norm; what the layers remember is written."""
        x: torch.Tensor
        for x in self.stages(batch):  # noqa: B007
            pass
        return x

    def stages(self, batch: Batch) -> Iterator[torch.Tensor]:
        """The embeddings, then the output of each layer, the last of which is what :meth:`forward` returns."""
        x = self.embedding(batch.input_ids)
        yield x
        for layer in self.layers:
            x = layer(x, batch)
            yield x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, vocab_size] float32 of hidden states [M, hidden_size]."""
        return self.lm_head(hidden.contiguous(), norm=self.norm)


def layer_prefix(layer_idx: int) -> str:
    """HuggingFace's prefix of a layer's parameters."""
    return f"model.layers.{layer_idx}"
