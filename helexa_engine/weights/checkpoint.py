"""One view of a model on disk, whether GGUF or a HuggingFace folder: config, tensors, tokenizer, defaults.

Tensor names, shapes and values have one canonical form (see :mod:`.canonical`); config keys are HuggingFace's; bytes are as in a GGUF
file of the tensor's type.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..architectures import ARCHITECTURES, HYBRIDS, TILED
from ..errors import ModelNotFound, UnsupportedCheckpoint
from ..quant import types
from . import canonical, gguf_names
from .fp8 import SCALE_SUFFIXES, Fp8Scheme
from .gguf import GGUFFile
from .raw_tensor import RawTensor, scaled
from .safetensors import SafetensorsFolder


class Checkpoint(ABC):
    """A model on disk. A context manager only so that its maps are dropped at a known point.

    Attributes:
        path: file or folder.
        architecture: GGUF's word for it (``qwen3``), for either kind.
        config: HuggingFace config names, of the text part. Two keys are ours: ``value_head_order``, and ``rotary_dim`` from GGUF.
        generation_config: sampling defaults under HuggingFace's names; ``eos_token_id`` may be a list.
        metadata: GGUF metadata when the tokenizer is in it, else None: then it is in the folder ``path``.
        chat_template: Jinja source, or None.
        nbytes: size of the weight files.
        unused: tensors that belong to the model and that nothing here reads, as stored, by kind (``vision``, ``MTP``).
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    metadata: Mapping[str, Any] | None
    chat_template: str | None
    nbytes: int
    unused: dict[str, list[RawTensor]]
    _tensors: dict[str, RawTensor]

    @property
    def where(self) -> str:
        """The place that errors about the config name."""
        return str(self.path)

    def tensor_names(self) -> list[str]:
        """Canonical names, in file order."""
        return list(self._tensors)

    def tensor(self, name: str) -> RawTensor:
        """One tensor. Raises KeyError."""
        return self._tensors[name]

    def release(self, name: str) -> None:
        """Gives the memory under a tensor's bytes back once they have been copied elsewhere."""
        self.release_stored(self._tensors[name].stored_names)

    def release_stored(self, names: Iterable[str]) -> None:
        """:meth:`release` by the names that the files have."""
        for name in names:
            self._release_stored(name)

    def tile_value_heads(self) -> None:
        """Puts the delta nets' value heads into the order of the architecture's GGUF files, where they are not: quantised on
        loading, the tensors are then those of a file. Raises :class:`UnsupportedCheckpoint`.
        """
        return None

    @abstractmethod
    def _release_stored(self, name: str) -> None:
        """:meth:`release` for one tensor of the file."""

    @property
    def tensors(self) -> Iterator[RawTensor]:
        """All tensors, in file order; nothing is read yet."""
        return iter(self._tensors.values())

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
        self.unused = {}
        self._tensors = {}
        if architecture not in ARCHITECTURES:
            return  # the registry refuses it, in its own words
        tensors = self._file.tensors
        if "token_embd.weight" not in tensors:
            raise UnsupportedCheckpoint(
                "tensor 'token_embd.weight' is missing; the file holds no whole model", str(path)
            )
        embedding = tensors["token_embd.weight"]
        self.config = gguf_names.hf_config(metadata, embedding.shape[0], "output.weight" not in tensors, str(path))
        self._tensors = canonical.split(self.config, self._renamed(), str(path))

    @property
    def stored_metadata(self) -> Mapping[str, memoryview]:
        """The file's metadata as it stands there, for copying."""
        return self._file.stored_metadata

    def stored_tensors(self) -> Iterator[RawTensor]:
        """Every tensor of the file under its own name, also those that no model here reads."""
        for name, record in self._file.tensors.items():
            yield RawTensor(name, record.quant_type, record.shape, record.data, (name,))

    def _renamed(self) -> list[RawTensor]:
        """The file's tensors under HuggingFace's names; what is not used goes to ``unused``."""
        layer_types = self.config.get("layer_types", ())
        num_layers = self.config["num_hidden_layers"] if layer_types else 2**31
        used, scales = [], {}
        for raw in self.stored_tensors():
            owners = gguf_names.owners(raw.name)
            if self.architecture not in owners:
                raise UnsupportedCheckpoint(
                    f"only files of {' and '.join(owners)} have it, general.architecture says {self.architecture}; "
                    "convert the model again",
                    f"{self.path}: tensor {raw.name!r}",
                )
            kind = gguf_names.unused_kind(raw.name, num_layers)
            if kind is not None:
                self.unused.setdefault(kind, []).append(raw)
            elif raw.name.endswith(".scale"):
                scales[raw.name.removesuffix("scale") + "weight"] = raw
            else:
                used.append(raw)
        where = str(self.path)
        made = [scaled(raw, scales.pop(raw.name), where) if raw.name in scales else raw for raw in used]
        for name, scale in scales.items():
            raise UnsupportedCheckpoint(
                f"a scale without its matrix {name!r}; convert the model again", f"{where}: tensor {scale.name!r}"
            )
        return [raw.presented(gguf_names.hf_name(raw.name, layer_types) or raw.name) for raw in made]

    def _release_stored(self, name: str) -> None:
        self._file.release(name)


class FolderCheckpoint(Checkpoint):
    """A HuggingFace folder: ``config.json`` and safetensors."""

    #: ``model_type`` of a config -> architecture.
    MODEL_TYPES = {
        "qwen3": "qwen3",
        "qwen3_moe": "qwen3moe",
        "qwen3_next": "qwen3next",
        "qwen3_5": "qwen35",
        "qwen3_5_text": "qwen35",
        "qwen3_5_moe": "qwen35moe",
        "qwen3_5_moe_text": "qwen35moe",
    }

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
        self.config = _text_config(read_json(config_path), str(config_path))
        kind = self.config.get("model_type")
        if not isinstance(kind, str):
            raise UnsupportedCheckpoint("model_type is missing", str(config_path))
        self.architecture = self.MODEL_TYPES.get(kind, kind)
        quantization = self.config.get("quantization_config")
        self._fp8 = Fp8Scheme.from_config(quantization, str(config_path)) if quantization else None
        self._folder = SafetensorsFolder(path)
        self.nbytes = self._folder.nbytes
        if "lm_head.weight" not in self._folder.names():
            self.config.setdefault("tie_word_embeddings", True)
        self.unused = {}
        self._tensors = canonical.from_huggingface(
            self.config, self._stored(), is_hybrid=self.architecture in HYBRIDS, where=str(path)
        )
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        if "eos_token_id" not in self.generation_config and self.config.get("eos_token_id") is not None:
            self.generation_config["eos_token_id"] = self.config["eos_token_id"]
        self.chat_template = self._read_template()

    @property
    def where(self) -> str:
        return str(self.path / "config.json")

    def tile_value_heads(self) -> None:
        if self.architecture not in TILED or self.config.get("value_head_order") == "tiled":
            return
        self._tensors = canonical.tiled(self.config, self._tensors.values(), str(self.path))
        self.config["value_head_order"] = "tiled"

    def mtp_block(self) -> dict[str, RawTensor]:
        """The block that predicts a further token, as canonical tensors of the block after the last. Empty where there is none, where
        it is not whole, and where there are several, for which GGUF has no form.
        """
        stored = (
            raw.presented(canonical.mtp_name(raw.name, self.num_layers))
            for raw in self.unused.get("MTP", ())
            if self.architecture in HYBRIDS
        )
        try:
            tensors = canonical.from_huggingface(self.config, stored, is_hybrid=True, where=str(self.path))
        except UnsupportedCheckpoint:
            return {}
        return tensors if canonical.whole_mtp_block(self._tensors, tensors, self.num_layers) else {}

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

    def _stored(self) -> Iterator[RawTensor]:
        """The folder's tensors of the text model; what is not used goes to ``unused``."""
        for raw in self._dequantized():
            name = raw.name
            kind = canonical.unused_kind(name)
            if kind is not None:
                self.unused.setdefault(kind, []).append(raw)
            elif not (self.config.get("tie_word_embeddings") and name == "lm_head.weight"):
                yield raw

    def _dequantized(self) -> Iterator[RawTensor]:
        """The folder's tensors, those of 8-bit floats with their scales as bfloat16."""
        raws = {name: self._folder.tensor(name) for name in self._folder.names()}
        in_8_bits = [name for name, raw in raws.items() if raw.quant_type is types.I8]
        found = {name: [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in raws] for name in in_8_bits}
        scales = {scale for some in found.values() for scale in some[:1]}
        coded: dict[str, str] = {}  # matrix -> its scales
        for name in in_8_bits:
            if name in scales:
                continue
            scale = next(iter(found[name]), None)
            if scale is None or self._fp8 is None:
                missing = f"its scales ({name}_scale_inv)" if scale is None else "quantization_config in config.json"
                raise UnsupportedCheckpoint(
                    f"8-bit floats without {missing}; download it again", f"{self.path}: tensor {name!r}"
                )
            coded[name] = scale
        for name, raw in raws.items():
            if name in scales:
                continue
            if name in coded:
                assert self._fp8 is not None
                yield self._fp8.dequantized(raw, raws[coded[name]], str(self.path))
            else:
                yield raw

    def _release_stored(self, name: str) -> None:
        self._folder.release(name)


def _text_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config of the text part: what a multimodal one nests, with the outer model's tying and end tokens."""
    inner = config.get("text_config")
    if inner is None:
        return _renamed_keys(config)
    if not isinstance(inner, dict):
        raise UnsupportedCheckpoint(f"text_config: expected an object, got {type(inner).__name__}", where)
    outer = {
        key: config[key] for key in ("tie_word_embeddings", "eos_token_id", "quantization_config") if key in config
    }
    outer = {key: value for key, value in outer.items() if value is not None}
    return _renamed_keys({"model_type": config.get("model_type")} | inner | outer)


def _renamed_keys(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes ``num_local_experts`` where the released files have ``num_experts``."""
    return {"num_experts": config["num_local_experts"]} | config if "num_local_experts" in config else config


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
