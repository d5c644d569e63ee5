"""One view of a model on disk, whether GGUF or a HuggingFace folder: config, tensors, tokenizer, defaults.

Tensor names and config keys are HuggingFace's; bytes are as in a GGUF file of the tensor's type.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelNotFound, UnsupportedCheckpoint
from ..quant.types import QuantType
from . import gguf_names
from .gguf import GGUFFile, StringArray
from .safetensors import SafetensorsFolder


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as stored: ``shape`` in PyTorch's order ([out, in]), ``data`` uint8 as in a GGUF file, usually a view of a map."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


class Checkpoint(ABC):
    """A model on disk. A context manager only so that its maps are dropped at a known point.

    Attributes:
        path: file or folder.
        architecture: GGUF's word for it (``qwen3``), for either kind.
        config: HuggingFace config names.
        generation_config: sampling defaults under HuggingFace's names; ``eos_token_id`` may be a list.
        metadata: GGUF metadata when the tokenizer is in it, else None: then it is in the folder ``path``.
        chat_template: Jinja source, or None.
        nbytes: size of the weight files.
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    metadata: Mapping[str, Any] | None
    chat_template: str | None
    nbytes: int

    @property
    def where(self) -> str:
        """The place that errors about the config name."""
        return str(self.path)

    @abstractmethod
    def tensor_names(self) -> list[str]:
        """HuggingFace names, in file order."""

    @abstractmethod
    def tensor(self, name: str) -> RawTensor:
        """One tensor. Raises KeyError."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Gives the memory under a tensor's bytes back once they have been copied elsewhere."""

    @property
    def tensors(self) -> Iterator[RawTensor]:
        """All tensors, in file order; only views, nothing is read."""
        return (self.tensor(name) for name in self.tensor_names())

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class GGUFCheckpoint(Checkpoint):
    """A GGUF file (or its parts)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        metadata = self._file.metadata
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise UnsupportedCheckpoint("metadata general.architecture is missing; convert the model again", str(path))
        self.architecture = architecture
        self.metadata = metadata
        self.nbytes = self._file.nbytes
        self.generation_config = gguf_names.generation_config(metadata, str(path))
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        self.config = {}
        self._index: dict[str, tuple[str, slice | None]] = {}
        if architecture != "qwen3":
            return  # the registry refuses it, in its own words
        tensors = self._file.tensors
        if "token_embd.weight" not in tensors:
            raise UnsupportedCheckpoint(
                "tensor 'token_embd.weight' is missing; the file holds no whole model", str(path)
            )
        embedding = tensors["token_embd.weight"]
        self.config = gguf_names.hf_config(metadata, embedding.shape[0], "output.weight" not in tensors, str(path))
        for name in tensors:
            fused = gguf_names.fused_qkv_names(name)
            if name.endswith(".scale"):
                raise UnsupportedCheckpoint(
                    "a matrix with a separate scale (of NVFP4 or FP8 origin) is not supported; take a file quantised to one "
                    "of the usual types, such as Q8_0 or Q4_K_M",
                    f"{path}: tensor {name!r}",
                )
            if fused:
                self._index.update(self._split_qkv(name, fused))
            else:
                self._index[gguf_names.hf_name(name) or name] = (name, None)

    def _split_qkv(self, name: str, fused: tuple[str, str, str]) -> dict[str, tuple[str, slice | None]]:
        config, rows = self.config, self._file.tensors[name].shape[0]
        try:
            heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
            head_dim = int(config["head_dim"] or config["hidden_size"] // heads)
        except (TypeError, ValueError, ZeroDivisionError):
            raise UnsupportedCheckpoint("the attention shape in the metadata makes no sense", self.where) from None
        borders = [0, heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim]
        if rows != borders[-1]:
            raise UnsupportedCheckpoint(
                f"expected {borders[-1]} rows (q, k, v), got {rows}", f"{self.path}: tensor {name!r}"
            )
        return {part: (name, slice(*borders[i : i + 2])) for i, part in enumerate(fused)}

    def tensor_names(self) -> list[str]:
        return list(self._index)

    def tensor(self, name: str) -> RawTensor:
        stored, rows = self._index[name]
        record = self._file.tensors[stored]
        if rows is None:
            return RawTensor(name, record.quant_type, record.shape, record.data)
        data = record.data.reshape(record.shape[0], -1)[rows]
        return RawTensor(name, record.quant_type, (data.shape[0], *record.shape[1:]), data.reshape(-1))

    def release(self, name: str) -> None:
        self._file.release(self._index[name][0])


class FolderCheckpoint(Checkpoint):
    """A HuggingFace folder: ``config.json`` and safetensors."""

    _ARCHITECTURES = {"qwen3": "qwen3"}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = None
        config_path = path / "config.json"
        if not config_path.is_file():
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            fix = (
                f"name one of its GGUF files: {', '.join(ggufs[:5])}"
                if ggufs
                else "give the folder that holds config.json"
            )
            raise UnsupportedCheckpoint(f"config.json is missing; {fix}", str(path))
        self.config = read_json(config_path)
        kind = self.config.get("model_type")
        if not isinstance(kind, str):
            raise UnsupportedCheckpoint("model_type is missing", str(config_path))
        self.architecture = self._ARCHITECTURES.get(kind, kind)
        quantization = self.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise UnsupportedCheckpoint(
                f"weights quantised by {method!r} are not supported; take the original checkpoint or a GGUF file",
                str(config_path),
            )
        self._folder = SafetensorsFolder(path)
        self.nbytes = self._folder.nbytes
        if "lm_head.weight" not in self._folder.names():
            self.config.setdefault("tie_word_embeddings", True)
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        if "eos_token_id" not in self.generation_config and self.config.get("eos_token_id") is not None:
            self.generation_config["eos_token_id"] = self.config["eos_token_id"]
        self.chat_template = self._read_template()

    @property
    def where(self) -> str:
        return str(self.path / "config.json")

    def _read_template(self) -> str | None:
        jinja = self.path / "chat_template.jinja"
        if jinja.is_file():
            return jinja.read_text(encoding="utf-8")
        tokenizer = self.path / "tokenizer_config.json"
        template = read_json(tokenizer).get("chat_template") if tokenizer.is_file() else None
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def tensor_names(self) -> list[str]:
        tied = self.config.get("tie_word_embeddings")
        return [name for name in self._folder.names() if not (tied and name == "lm_head.weight")]

    def tensor(self, name: str) -> RawTensor:
        quant_type, shape, data = self._folder.read(name)
        return RawTensor(name, quant_type, shape, data)

    def release(self, name: str) -> None:
        self._folder.release(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises :class:`UnsupportedCheckpoint`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"not readable as JSON: {error}", str(path)) from None
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint("expected a JSON object", str(path))
    return value


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The model at ``path``: a ``.gguf`` file (the first part of a split one) or a HuggingFace folder.

    Raises:
        ModelNotFound: no such file or folder.
        UnsupportedCheckpoint: what is there is malformed or of a kind helexa cannot read.
    """
    path = Path(path)
    if path.is_dir():
        return FolderCheckpoint(path)
    if not path.is_file():
        raise ModelNotFound(str(path), "no such file or folder")
    return GGUFCheckpoint(path)


__all__ = [
    "Checkpoint",
    "FolderCheckpoint",
    "GGUFCheckpoint",
    "RawTensor",
    "StringArray",
    "open_checkpoint",
    "read_json",
]
