"""A malformed checkpoint of any family gives an error that names the tensor or the key, and never anything else."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa_engine import LLM, SamplingParams
from helexa_engine.cli.info import describe, report
from helexa_engine.errors import (
    EngineDied,
    HelexaError,
    InvalidRequest,
    ModelDoesNotFit,
    ModelNotFound,
    UnsupportedCheckpoint,
)
from helexa_engine.models.config import ModelConfig
from helexa_engine.models.registry import MODELS, model_class
from helexa_engine.weights import loader
from helexa_engine.weights.canonical import text_name
from helexa_engine.weights.checkpoint import open_checkpoint

from .malformed import F16, FAMILIES, I32, Q8_0, SCALES, Specimen, gguf_bytes, safetensors_bytes, specimens

KINDS = [(family, kind) for family in FAMILIES if family in MODELS for kind in ("gguf", "folder", "fp8")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
EXPECTED = (UnsupportedCheckpoint, InvalidRequest, ModelDoesNotFit, ModelNotFound)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Specimen]:
    made = {}
    for family in dict.fromkeys(family for family, _ in KINDS):
        of_family = specimens(family, tmp_path_factory.mktemp(family) / "tokenizer")
        made |= {(family, kind): one for kind, one in zip(("gguf", "folder", "fp8"), of_family, strict=True)}
    return made


@pytest.fixture(params=KINDS, ids="-".join)
def base(request: pytest.FixtureRequest, bases: dict[tuple[str, str], Specimen]) -> Specimen:
    return bases[request.param].copy()


def load(path: Path) -> None:
    """Weights and config, without an engine around them."""
    with open_checkpoint(path) as checkpoint:
        cls = model_class(checkpoint.architecture, checkpoint.where)
        config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
        loader.load(cls(config, 64), checkpoint)


def run(path: Path) -> None:
    """The whole way, to two tokens. What loads may hold numbers that make no tokens, but not kill the engine."""
    with LLM(path, max_model_len=64, max_num_seqs=2, max_num_batched_tokens=128, num_threads=1) as llm:
        try:
            llm.generate([5, 6, 7], GREEDY)
        except EngineDied:
            raise
        except HelexaError as error:
            assert "finite" in error.message, error.message


def made_of(specimen: Specimen, path: Path) -> dict[str, set[str]]:
    """Stored tensor -> the names an error may use for it: its own, and those of what is made of it."""
    names: dict[str, set[str]] = {name: {name, text_name(name)} for name in specimen.tensors}
    with open_checkpoint(path) as checkpoint:
        for raw in checkpoint.tensors:
            for stored in raw.stored_names:
                names[stored].add(raw.name)
        for raws in checkpoint.unused.values():
            for raw in raws:
                del names[raw.name]
    return names


def is_coded(specimen: Specimen) -> bool:
    return "quantization_config" in specimen.settings


def kinds_of_tensors(specimen: Specimen, names: dict[str, set[str]]) -> Iterator[str]:
    """One tensor of each kind: layers repeat each other, so the last one stands for all (the first of another mixer too).

    Of a folder of 8-bit floats the matrices of these and their scales: the rest is as in other folders.
    """
    seen: dict[str, str] = {}
    for name in names:
        if is_coded(specimen) and name + SCALES not in names and not name.endswith(SCALES):
            continue
        parts = [part for part in name.split(".")]
        seen[".".join("#" if part.isdigit() else part for part in parts)] = name
    yield from seen.values()


def test_the_specimens_are_sound(base: Specimen, tmp_path: Path) -> None:
    run(base.write(tmp_path))


def test_a_dropped_tensor_is_named(base: Specimen, tmp_path: Path) -> None:
    names = made_of(base, base.write(tmp_path))
    for name in kinds_of_tensors(base, names):
        if name == "output.weight":
            continue  # its absence is how GGUF says that the head is the embedding
        broken = base.copy()
        del broken.tensors[name]
        with pytest.raises(UnsupportedCheckpoint) as caught:
            load(broken.write(tmp_path))
        assert any(word in caught.value.message for word in names[name]), (name, caught.value.message)


def test_a_renamed_tensor_is_named(base: Specimen, tmp_path: Path) -> None:
    names = made_of(base, base.write(tmp_path))
    for name in kinds_of_tensors(base, names):
        broken = base.copy()
        broken.tensors[f"{name}_2"] = broken.tensors.pop(name)
        with pytest.raises(UnsupportedCheckpoint) as caught:
            load(broken.write(tmp_path))
        assert any(word in caught.value.message for word in names[name]), (name, caught.value.message)


def wrong_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    longer = [(*shape[:axis], shape[axis] * 2, *shape[axis + 1 :]) for axis in range(len(shape))]
    shorter = [(*shape[:axis], shape[axis] // 2, *shape[axis + 1 :]) for axis in range(len(shape)) if shape[axis] > 1]
    turned = [shape[::-1]] if shape != shape[::-1] else []
    flat = [(math.prod(shape),)] if len(shape) > 1 and math.prod(shape) != max(shape) else []
    return [*longer, *shorter, *turned, *flat]


def test_a_tensor_of_the_wrong_shape_is_named(base: Specimen, tmp_path: Path) -> None:
    names = made_of(base, base.write(tmp_path))
    for name in kinds_of_tensors(base, names):
        for shape in wrong_shapes(base.tensors[name].shape):
            if len(shape) > 4:
                continue
            broken = base.copy()
            broken.tensors[name] = replace(broken.tensors[name], shape=shape).filled()
            with pytest.raises(UnsupportedCheckpoint) as caught:
                load(broken.write(tmp_path))
            message = caught.value.message
            if (
                name == "token_embd.weight"
            ):  # its rows are the vocabulary in GGUF, so the head may be the one that is blamed
                message = message.replace("lm_head.weight", name)
            assert any(word in message for word in names[name]), (name, shape, message)


def test_a_tensor_of_a_wrong_type_is_named(base: Specimen, tmp_path: Path) -> None:
    names = made_of(base, base.write(tmp_path))
    for name in kinds_of_tensors(base, names):
        kinds = (
            (I32, 999)
            if base.is_gguf
            else ("I32", "F8_E4M3", "NONSENSE", *(["BF16"] if name + SCALES in names else []))
        )
        for kind in kinds:
            if kind == base.tensors[name].kind:
                continue
            broken = base.copy()
            broken.tensors[name] = replace(broken.tensors[name], kind=kind).filled()
            with pytest.raises(UnsupportedCheckpoint) as caught:
                load(broken.write(tmp_path))
            assert any(word in caught.value.message for word in names[name]), (name, kind, caught.value.message)


def leaves(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in config.items():
        found += leaves(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
    return found


def put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


def drop(config: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in path[:-1]:
        config = config[key]
    del config[path[-1]]


#: Keys without which a model loads: what is absent has a meaning or a default.
OPTIONAL = {
    "text_config.model_type", "model_type", "head_dim", "tie_word_embeddings", "num_key_value_heads", "norm_topk_prob",
    "full_attention_interval", "partial_rotary_factor", "attention.key_length", "attention.value_length",
    "attention.head_count_kv", "eos_token_id", "token_type", "merges", "fmt", "activation_scheme",
}  # fmt: skip


def test_a_dropped_key_is_named(base: Specimen, tmp_path: Path) -> None:
    for path in leaves(base.settings):
        key = path[-1].removeprefix(f"{base.family}.").removeprefix("tokenizer.ggml.")
        broken = base.copy()
        drop(broken.settings, path)
        if key in OPTIONAL:
            try:
                run(broken.write(tmp_path))
            except UnsupportedCheckpoint:
                pass
            continue
        with pytest.raises(UnsupportedCheckpoint) as caught:
            run(broken.write(tmp_path))
        assert key in caught.value.message, (path, caught.value.message)


NONSENSE: list[Any] = [
    0, 1, 3, -1, 2**31, 2**63, 0.5, 1e30, float("nan"), float("inf"), True, "", "7", [], [1, 2], [0] * 5, ["a"], [[1], [2]],
]  # fmt: skip


def attempt(path: Path, seconds: float = 10.0) -> str | None:
    """The error that a checkpoint gives, or None when it runs; anything but an error of ours fails the test."""
    started = time.perf_counter()
    error = None
    for look in (lambda: report(describe(str(path))), lambda: run(path)):
        try:
            look()
        except EXPECTED as caught:
            error = caught.message
    assert time.perf_counter() - started < seconds
    return error


def short(path: tuple[str, ...]) -> str:
    """A key without what differs between families that share it."""
    return ".".join(part for part in path[-1].split(".") if part not in FAMILIES)


def test_a_key_of_any_value_gives_an_error_of_ours_or_a_model(
    base: Specimen, bases: dict[tuple[str, str], Specimen], tmp_path: Path
) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    common = {short(path) for path in leaves(bases["qwen3", "gguf" if base.is_gguf else "folder"].settings)}
    for path in leaves(base.settings):
        is_new = path[0] == "quantization_config" if is_coded(base) else short(path) not in common
        for value in NONSENSE if is_new or (base.family == "qwen3" and not is_coded(base)) else ():
            broken = base.copy()
            put(broken.settings, path, value)
            attempt(broken.write(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * 1024  # KiB


@pytest.mark.parametrize("other", FAMILIES)
def test_a_mislabelled_file(base: Specimen, bases: dict[tuple[str, str], Specimen], tmp_path: Path, other: str) -> None:
    """The architecture's name changed, and then with all that the other architecture says of itself."""
    kind = "gguf" if base.is_gguf else "fp8" if is_coded(base) else "folder"
    if other == base.family:
        return
    if base.is_gguf:
        renamed = base.copy()
        renamed.settings["general.architecture"] = other
        with pytest.raises(UnsupportedCheckpoint, match=rf"metadata {other}\.[\w.]+ is missing"):
            load(renamed.write(tmp_path))
    it = bases[other, kind]
    keys = {short(path) for path in (*leaves(base.settings), *leaves(it.settings))}
    words = keys.union(*made_of(base, base.write(tmp_path)).values(), *made_of(it, it.write(tmp_path)).values())
    base.settings = it.copy().settings
    path = base.write(tmp_path)
    if {base.family, other} == {"qwen3next", "qwen35moe"} and not base.is_gguf:
        load(path)  # the same model: the folders differ in what they fuse, and either is read as it is
        return
    with pytest.raises(UnsupportedCheckpoint) as caught:
        load(path)
    assert any(word in caught.value.message for word in words), caught.value.message


def test_a_truncated_file_names_the_tensor(base: Specimen, tmp_path: Path) -> None:
    path = base.write(tmp_path)
    file = path if base.is_gguf else path / "model.safetensors"
    content = file.read_bytes()
    (*_, last) = base.tensors
    file.write_bytes(content[: -len(base.tensors[last].data) // 2])
    with pytest.raises(UnsupportedCheckpoint, match=f"{last}.*truncated"):
        load(path)
    for cut in [*range(0, min(len(content), 20_000), 997), len(content) // 2]:
        file.write_bytes(content[:cut])
        with pytest.raises(UnsupportedCheckpoint, match=file.name):
            load(path)


def write_in_two(base: Specimen, to: Path) -> tuple[Path, list[Path]]:
    """(what to open, the files with the weights), every second tensor in either file."""
    parts = [dict(list(base.tensors.items())[i::2]) for i in range(2)]
    if base.is_gguf:
        files = [to / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
        for number, (file, tensors) in enumerate(zip(files, parts, strict=True)):
            file.write_bytes(gguf_bytes(base.settings | {"split.no": number, "split.count": 2}, tensors))
        return files[0], files
    folder = base.write(to)
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, tensors in zip(files, parts, strict=True):
        file.write_bytes(safetensors_bytes(tensors))
    weight_map = {name: file.name for file, tensors in zip(files, parts, strict=True) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder, files


def test_a_half_downloaded_model_names_the_file_and_the_tensor(base: Specimen, tmp_path: Path) -> None:
    path, (first, second) = write_in_two(base, tmp_path)
    load(path)
    content = second.read_bytes()
    last = list(base.tensors)[1::2][-1]
    second.write_bytes(content[: -len(base.tensors[last].data) // 2])
    with pytest.raises(UnsupportedCheckpoint, match=f"{second.name}.*{re.escape(last)}.*truncated"):
        load(path)
    for fragment in (b"", content[:3], content[:2000]):
        second.write_bytes(fragment)
        with pytest.raises(UnsupportedCheckpoint, match=second.name):
            load(path)
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000000000\n")
    with pytest.raises(UnsupportedCheckpoint, match=f"{second.name}.*Git LFS pointer"):
        load(path)
    second.rename(second.with_name(f"{second.name}.incomplete"))
    with pytest.raises(ModelNotFound, match=second.name):
        load(path)
    shutil.copy(first, second)
    with pytest.raises(
        UnsupportedCheckpoint, match=f"{second.name}.*(the name stands twice|stands also in {first.name})"
    ):
        load(path)


def test_a_shard_of_another_model_is_named(base: Specimen, tmp_path: Path) -> None:
    """The index is right, the shard holds one tensor too few or another."""
    if base.is_gguf:
        return
    path, (_, second) = write_in_two(base, tmp_path)
    tensors = dict(list(base.tensors.items())[1::2])
    name = next(name for name in tensors if "norm" in name and "mtp" not in name)
    moved = tensors.pop(name)
    for others in ({}, {"model.layers.77.input_layernorm.weight": moved}):
        second.write_bytes(safetensors_bytes(tensors | others))
        with pytest.raises(UnsupportedCheckpoint) as caught:
            load(path)
        assert text_name(name) in caught.value.message and all(other in caught.value.message for other in others)


@pytest.mark.parametrize(
    "entry",
    [
        None, 7, [], {}, {"dtype": None}, {"dtype": []}, {"dtype": {}}, {"dtype": "f32"}, {"shape": None},
        {"shape": 64}, {"shape": [64.5]}, {"shape": ["a"]}, {"shape": [[64]]}, {"shape": [-64]}, {"shape": [-8, -8]},
        {"shape": [float("inf")]}, {"shape": [10**400]}, {"data_offsets": None}, {"data_offsets": [0]},
        {"data_offsets": [0, 128, 256]}, {"data_offsets": [None, 256]}, {"data_offsets": [-256, 0]},
        {"data_offsets": [256, 0]}, {"data_offsets": [2**63, 2**63 + 256]}, {"data_offsets": [0, 256]},
        {"data_offsets": [float("nan"), 256]}, {"shape": [1] * 100 + [64]},
    ],
    ids=lambda entry: json.dumps(entry)[:40],
)  # fmt: skip
def test_a_header_entry_that_makes_no_sense_is_named(
    bases: dict[tuple[str, str], Specimen], tmp_path: Path, entry: Any
) -> None:
    """Of safetensors; offsets of 0 to 256 are right in themselves and those of another tensor."""
    base = bases["qwen35", "folder"]
    path = base.write(tmp_path)
    name = "model.language_model.layers.3.input_layernorm.weight"
    file = path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header[name]["shape"] == [64] and header[name]["data_offsets"][0] > 256
    header[name] = header[name] | entry if isinstance(entry, dict) and entry else entry
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UnsupportedCheckpoint) as caught:
        load(path)
    assert text_name(name) in caught.value.message or name in caught.value.message


def edited(draw: Callable[[st.SearchStrategy[Any]], Any], base: Specimen) -> Specimen:
    """``base`` with a few things wrong at once."""
    broken = base.copy()
    for _ in range(draw(st.integers(1, 3))):
        names = sorted(broken.tensors)
        name = draw(st.sampled_from(names))
        tensor = broken.tensors[name]
        action = draw(
            st.sampled_from(["drop", "rename", "reshape", "retype", "data", "key", "drop key", "new key", "swap"])
        )
        if action == "drop":
            del broken.tensors[name]
        elif action == "rename":
            del broken.tensors[name]
            other = draw(st.one_of(st.sampled_from(names), st.text(max_size=20), st.just(name.replace(".0.", ".1."))))
            broken.tensors[other] = tensor
        elif action == "swap":
            other = draw(st.sampled_from(names))
            broken.tensors[name], broken.tensors[other] = broken.tensors[other], tensor
        elif action == "reshape":
            sizes = st.integers(0, 200) | st.sampled_from([2**31, 2**32, 2**40, 2**63, *tensor.shape])
            shape = draw(st.lists(sizes, min_size=0 if not base.is_gguf else 1, max_size=4).map(tuple))
            if draw(st.booleans()):
                shape = draw(st.sampled_from(wrong_shapes(tensor.shape) or [shape]))
            broken.tensors[name] = replace(tensor, shape=shape)
            if draw(st.booleans()):
                broken.tensors[name] = broken.tensors[name].filled()
        elif action == "retype":
            kinds = [F16, I32, Q8_0, 12, 999] if base.is_gguf else ["F16", "BF16", "F64", "I64", "F8_E4M3", ""]
            broken.tensors[name] = replace(tensor, kind=draw(st.sampled_from(kinds)))
            if draw(st.booleans()):
                broken.tensors[name] = broken.tensors[name].filled()
        elif action == "data":
            broken.tensors[name] = replace(
                tensor, data=draw(st.sampled_from([b"", tensor.data[:-4], b"\xff" * len(tensor.data)]))
            )
        else:
            paths = leaves(broken.settings)
            path = draw(st.sampled_from(sorted(paths)))
            if action == "drop key":
                drop(broken.settings, path)
            elif action == "key":
                put(broken.settings, path, draw(st.sampled_from(NONSENSE) | st.integers(0, 512)))
            else:
                new = ["rope.scaling.type", "rope.scaling.factor", "nextn_predict_layers", "attention.recurrent_layers"]
                theirs = [
                    "rope_scaling",
                    "rope_parameters",
                    "layer_types",
                    "quantization_config",
                    "text_config",
                    "head_dim",
                ]
                key = f"{base.family}.{draw(st.sampled_from(new))}" if base.is_gguf else draw(st.sampled_from(theirs))
                values = st.sampled_from(
                    [*NONSENSE, *([] if base.is_gguf else [None, {}, {"rope_type": "yarn"}, {"a": 1}])]
                )
                broken.settings[key] = draw(values)
    return broken


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_but_errors_of_ours(base: Specimen, tmp_path: Path, data: st.DataObject) -> None:
    broken = edited(data.draw, base)
    try:
        path = broken.write(tmp_path)
    except (OverflowError, UnicodeEncodeError):
        return  # no file can say this
    attempt(path)
