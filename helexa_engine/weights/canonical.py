"""The one form in which a checkpoint, whatever its kind, shows its tensors to the models.

Names are HuggingFace's where it has one; *values* follow GGUF: the ``1 +`` of the hybrids' norms is folded in, ``a_coefficient``
is ``-exp(A_log)``, the convolution is [channels, taps]. What files have fused or split in several ways is split in one:

=================================================  ===========================================================
``self_attn.{q,k,v}_proj.weight``                  also out of one fused ``attn_qkv`` (rows q | k | v)
``linear_attn.in_proj_qkv.weight``, ``in_proj_z``  also out of ``in_proj_qkvz`` / ``ssm_in`` (per key head q | k | v.. | z..)
``linear_attn.in_proj_b.weight``, ``in_proj_a``    also out of ``in_proj_ba`` / ``ssm_ba`` (per key head b.. | a..)
``mlp.experts.{gate,up,down}_proj.weight``         [experts, out, in]; also out of one tensor an expert, or gate | up fused
=================================================  ===========================================================

Rows move byte by byte, so quantised tensors stay as they are. The order of the value heads cannot be changed in a quantised output
projection (it is the order of its columns): models take it as it comes, and the config says which it is (``value_head_order``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UnsupportedCheckpoint
from .raw_tensor import Bytes, RawTensor, stack

_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
#: Norms whose multiplier HuggingFace stores without its 1; the delta net's own norm is not among them.
_OFFSET_NORM = re.compile(
    r"model\.norm\.weight|.+\.(input_layernorm|post_attention_layernorm|[qk]_norm|nextn\.(enorm|hnorm|shared_head_norm))\.weight"
)
#: What stands beside the block that predicts a further token: HuggingFace's name after ``mtp.`` -> GGUF's after ``nextn.``
_NEXTN = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head_norm",
}

Split = Callable[["_Shape", str, RawTensor], list[RawTensor]]


class _Shape:
    """The numbers of a config that splitting a fused tensor needs, each checked when it is asked for."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self.where = where

    def __getitem__(self, key: str) -> int:
        value = self._config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise UnsupportedCheckpoint(f"{key}: expected a positive integer, got {value!r}", self.where)
        return value

    @property
    def head_dim(self) -> int:
        if self._config.get("head_dim") is None:
            return self["hidden_size"] // self["num_attention_heads"]
        return self["head_dim"]

    @property
    def has_output_gate(self) -> bool:
        return bool(self._config.get("attn_output_gate"))

    def check_rows(self, raw: RawTensor, expected: int, what: str, ndim: int = 2) -> None:
        """Raises :class:`UnsupportedCheckpoint` unless ``raw`` has ``ndim`` dimensions and the last but one is ``expected``."""
        if len(raw.shape) != ndim or raw.shape[-2] != expected:
            raise UnsupportedCheckpoint(
                f"expected {expected} rows ({what}), got shape {list(raw.shape)}", f"{self.where}: tensor {raw.label}"
            )


def from_huggingface(
    config: Mapping[str, Any], stored: Iterable[RawTensor], *, is_hybrid: bool, where: str
) -> dict[str, RawTensor]:
    """Tensors of a HuggingFace folder, vision and MTP left out, in the canonical form."""
    renamed: dict[str, RawTensor] = {}
    for raw in stored:
        name = text_name(raw.name)
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            name += ".weight"
        if not is_hybrid:
            made = raw.presented(name)
        elif _OFFSET_NORM.fullmatch(name):
            made = raw.mapped(name, lambda w: 1 + w)
        elif name.endswith(".linear_attn.A_log"):
            made = raw.mapped(name.removesuffix("A_log") + "a_coefficient", lambda a: -np.exp(a))
        elif name.endswith(".linear_attn.conv1d.weight") and len(raw.shape) == 3 and raw.shape[1] == 1:
            made = raw.presented(name, (raw.shape[0], raw.shape[2]))
        else:
            made = raw.presented(name)
        _add(renamed, made, where)
    return split(config, renamed.values(), where)


def text_name(name: str) -> str:
    """A HuggingFace name without the prefix that multimodal models put before their text part."""
    return "model." + name.removeprefix("model.language_model.") if name.startswith("model.language_model.") else name


def unused_kind(name: str) -> str | None:
    """``vision`` or ``MTP`` for a HuggingFace tensor that no text model here reads, else None."""
    if name.startswith(("model.visual.", "visual.")):
        return "vision"
    if name.startswith(("mtp.", "model.mtp.")):
        return "MTP"
    return None


def mtp_name(name: str, num_layers: int) -> str:
    """A HuggingFace folder's MTP tensor as one of the blocks that follow ``num_layers`` others, as GGUF counts them."""
    name = name.removeprefix("model.").removeprefix("mtp.")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return f"model.layers.{num_layers + int(match[1])}.{match[2]}"
    module, _, kind = name.rpartition(".")
    return f"model.layers.{num_layers}.nextn.{_NEXTN.get(module, module)}.{kind}"


def whole_mtp_block(tensors: Mapping[str, RawTensor], mtp: Mapping[str, RawTensor], num_layers: int) -> bool:
    """Whether ``mtp`` is one block, with the tensors and shapes of the full-attention blocks among ``tensors``, and its ``nextn``."""

    def shapes(tensors: Mapping[str, RawTensor], prefix: str) -> dict[str, tuple[int, ...]]:
        return {name.removeprefix(prefix): raw.shape for name, raw in tensors.items() if name.startswith(prefix)}

    query = next((name for name in tensors if name.endswith(".self_attn.q_proj.weight")), None)
    if query is None:
        return False
    expected = shapes(tensors, query.removesuffix("self_attn.q_proj.weight"))
    hidden = tensors[query].shape[1]
    expected |= {f"nextn.{name}.weight": (hidden,) for name in _NEXTN.values()}
    expected["nextn.eh_proj.weight"] = (hidden, 2 * hidden)
    return shapes(mtp, f"model.layers.{num_layers}.") == expected and len(mtp) == len(expected)


def split(config: Mapping[str, Any], tensors: Iterable[RawTensor], where: str) -> dict[str, RawTensor]:
    """Tensors under HuggingFace's names with what is fused taken apart and experts stacked.

    Raises:
        UnsupportedCheckpoint: a fused tensor of the wrong shape, an expert that is missing, or two tensors for one place.
    """
    shape = _Shape(config, where)
    made: dict[str, RawTensor] = {}
    experts: dict[str, dict[int, RawTensor]] = {}
    for raw in tensors:
        match = _LAYER.fullmatch(raw.name)
        expert = _EXPERT.fullmatch(match[2]) if match else None
        if match and expert:
            name = f"{match[1]}.mlp.experts.{expert[2]}_proj.weight"
            experts.setdefault(name, {})[int(expert[1])] = raw
        elif match and match[2] in _SPLITS:
            for part in _SPLITS[match[2]](shape, match[1], raw):
                _add(made, part, where)
        else:
            _add(made, raw, where)
    for name, by_index in experts.items():
        for index in range(shape["num_experts"]):
            if index not in by_index:
                raise UnsupportedCheckpoint(
                    f"expert {index} of {shape['num_experts']} is missing", f"{where}: {name!r}"
                )
        if len(by_index) != shape["num_experts"]:
            raise UnsupportedCheckpoint(f"{len(by_index)} experts, num_experts is {shape['num_experts']}", where)
        _add(made, stack(name, [by_index[index] for index in sorted(by_index)], where), where)
    return made


def tiled(config: Mapping[str, Any], tensors: Iterable[RawTensor], where: str) -> dict[str, RawTensor]:
    """Canonical tensors of unquantised weights with the delta nets' value heads in tiled order instead of grouped: what was head
    ``k * r + i`` (of key head ``k``) becomes head ``i * K + k``, everywhere.

    Raises:
        UnsupportedCheckpoint: a tensor has not the rows or columns that the config gives it.
    """
    shape = _Shape(config, where)
    keys, ratio, k_dim, v_dim = _delta_net(shape)
    heads, k_rows, v_rows = keys * ratio, 2 * keys * k_dim, keys * ratio * v_dim

    def swapped(rows: Bytes) -> Bytes:
        return rows.reshape(keys, ratio, -1).swapaxes(0, 1).reshape(rows.shape)

    def after_keys(rows: Bytes) -> Bytes:
        return np.concatenate([rows[:k_rows], swapped(rows[k_rows:])])

    def columns(rows: Bytes) -> Bytes:
        return rows.reshape(len(rows), keys, ratio, -1).swapaxes(1, 2).reshape(rows.shape)

    reorder: dict[str, tuple[int, int, Callable[[Bytes], Bytes]]] = {  # axis, its expected size, what to do to the rows
        "in_proj_qkv.weight": (0, k_rows + v_rows, after_keys),
        "conv1d.weight": (0, k_rows + v_rows, after_keys),
        "in_proj_z.weight": (0, v_rows, swapped),
        "in_proj_b.weight": (0, heads, swapped),
        "in_proj_a.weight": (0, heads, swapped),
        "a_coefficient": (0, heads, swapped),
        "dt_bias": (0, heads, swapped),
        "out_proj.weight": (1, v_rows, columns),
    }
    made = {}
    for raw in tensors:
        axis, size, function = reorder.get(raw.name.partition(".linear_attn.")[2], (0, 0, None))
        if function is None:
            made[raw.name] = raw
            continue
        if axis >= len(raw.shape) or raw.shape[axis] != size:
            raise UnsupportedCheckpoint(
                f"expected {size} {'columns' if axis else 'rows'}, got shape {list(raw.shape)}",
                f"{where}: tensor {raw.name!r}",
            )
        assert raw.quant_type.is_float
        matrix = raw.shape if len(raw.shape) == 2 else (size, 1)
        made[raw.name] = (
            raw.presented(raw.name, matrix).rearranged(raw.name, matrix, function).presented(raw.name, raw.shape)
        )
    return made


def merge_ba(config: Mapping[str, Any], b: RawTensor, a: RawTensor, name: str, where: str) -> RawTensor:
    """``in_proj_b`` and ``in_proj_a`` as one matrix, per key head b.. | a..: the reverse of splitting ``in_proj_ba``."""
    shape = _Shape(config, where)
    groups, ratio, _, _ = _delta_net(shape)
    for raw in (b, a):
        shape.check_rows(raw, groups * ratio, "a value head each")
    if (a.shape, a.quant_type) != (b.shape, b.quant_type):
        raise UnsupportedCheckpoint(f"{b.name!r} and {a.name!r} differ in shape or type", where)

    def take() -> np.ndarray:
        parts = [raw.data.reshape(groups, ratio, -1) for raw in (b, a)]
        return np.concatenate(parts, axis=1).reshape(-1)

    return replace(
        b, name=name, shape=(2 * b.shape[0], b.shape[1]), source=take, stored_names=b.stored_names + a.stored_names
    )


def _add(made: dict[str, RawTensor], raw: RawTensor, where: str) -> None:
    if raw.name in made:
        stored = ", ".join(repr(n) for n in (*made[raw.name].stored_names, *raw.stored_names)[:4])
        raise UnsupportedCheckpoint(f"two tensors give {raw.name!r}: {stored}", where)
    made[raw.name] = raw


def _split_attention(shape: _Shape, prefix: str, raw: RawTensor) -> list[RawTensor]:
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    q, kv = heads * shape.head_dim * (2 if shape.has_output_gate else 1), kv_heads * shape.head_dim
    shape.check_rows(raw, q + 2 * kv, "q, k, v")
    return [
        raw.rearranged(f"{prefix}.self_attn.{part}_proj.weight", (end - start, raw.shape[1]), _slice(start, end))
        for part, start, end in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv))
    ]


def _slice(start: int, end: int) -> Callable[[Bytes], Bytes]:
    return lambda rows: rows[start:end]


def _of_each_group(groups: int, start: int, end: int) -> Callable[[Bytes], Bytes]:
    """Rows ``start:end`` of each of the groups that stand one after the other."""
    return lambda rows: rows.reshape(groups, -1, rows.shape[1])[:, start:end].reshape(-1, rows.shape[1])


def _delta_net(shape: _Shape) -> tuple[int, int, int, int]:
    """Key heads, value heads a key head, and the two head dims. Raises when value heads do not divide evenly."""
    key_heads, value_heads = shape["linear_num_key_heads"], shape["linear_num_value_heads"]
    if value_heads % key_heads:
        raise UnsupportedCheckpoint(
            f"linear_num_value_heads ({value_heads}) is not a multiple of linear_num_key_heads ({key_heads})",
            shape.where,
        )
    return key_heads, value_heads // key_heads, shape["linear_key_head_dim"], shape["linear_value_head_dim"]


def _split_qkvz(shape: _Shape, prefix: str, raw: RawTensor) -> list[RawTensor]:
    groups, ratio, k_dim, v_dim = _delta_net(shape)
    v_rows = ratio * v_dim
    shape.check_rows(raw, groups * (2 * k_dim + 2 * v_rows), "q, k, v, z of each key head")
    borders = (0, k_dim, 2 * k_dim, 2 * k_dim + v_rows, 2 * k_dim + 2 * v_rows)
    q, k, v, z = (_of_each_group(groups, *borders[i : i + 2]) for i in range(4))
    qkv_rows, z_rows, cols = groups * borders[3], groups * v_rows, raw.shape[1]
    return [
        raw.rearranged(
            f"{prefix}.linear_attn.in_proj_qkv.weight",
            (qkv_rows, cols),
            lambda rows: np.concatenate([q(rows), k(rows), v(rows)]),
        ),
        raw.rearranged(f"{prefix}.linear_attn.in_proj_z.weight", (z_rows, cols), z),
    ]


def _split_ba(shape: _Shape, prefix: str, raw: RawTensor) -> list[RawTensor]:
    groups, ratio, _, _ = _delta_net(shape)
    shape.check_rows(raw, groups * 2 * ratio, "b, a of each key head")
    return [
        raw.rearranged(
            f"{prefix}.linear_attn.in_proj_{part}.weight",
            (groups * ratio, raw.shape[1]),
            _of_each_group(groups, start, start + ratio),
        )
        for part, start in (("b", 0), ("a", ratio))
    ]


def _split_gate_up(shape: _Shape, prefix: str, raw: RawTensor) -> list[RawTensor]:
    width = shape["moe_intermediate_size"]
    shape.check_rows(raw, 2 * width, "gate, up", ndim=3)
    experts, _, cols = raw.shape

    def half(number: int) -> Callable[[], np.ndarray]:
        return lambda: raw.data.reshape(experts, 2, -1)[:, number]  # a view, so that it can stay in the mapped file

    return [
        replace(raw, name=f"{prefix}.mlp.experts.{part}_proj.weight", shape=(experts, width, cols), source=half(number))
        for number, part in enumerate(("gate", "up"))
    ]


def _as_row(shape: _Shape, prefix: str, raw: RawTensor) -> list[RawTensor]:
    """A gate of one output, which some files store as a vector, is a matrix of one row."""
    row = (1, raw.shape[0]) if len(raw.shape) == 1 else raw.shape
    return [raw.presented(raw.name, row)]


_SPLITS: dict[str, Split] = {
    "self_attn.qkv_proj.weight": _split_attention,
    "linear_attn.in_proj_qkvz.weight": _split_qkvz,
    "linear_attn.in_proj_ba.weight": _split_ba,
    "mlp.experts.gate_up_proj.weight": _split_gate_up,
    "mlp.shared_expert_gate.weight": _as_row,
}
