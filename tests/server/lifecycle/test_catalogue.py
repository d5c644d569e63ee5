"""Which models a server offers, from its command line and its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from helexa_engine.cli import build_parser
from helexa_engine.cli.options import UsageError, resolve_catalogue
from helexa_engine.errors import InvalidRequest
from helexa_server.lifecycle.catalogue import Catalogue

from .catalogues import catalogue_of


def listed(catalogue: Catalogue) -> list[tuple[str, str, str]]:
    return [(entry.id, entry.model, entry.settings.load) for entry in catalogue]


TABLES = {
    "small": {"model": "demo", "load": "at start", "aliases": ["gpt-4o"], "ttl_seconds": 5, "pin": True},
    "org/large": {"max_num_seqs": 2},
}


def test_without_anything_there_is_the_demo() -> None:
    assert listed(catalogue_of()) == [("demo", "demo", "at start")]


def test_the_files_models_as_their_tables_say() -> None:
    catalogue = catalogue_of(tables=TABLES)
    assert listed(catalogue) == [("small", "demo", "at start"), ("org/large", "org/large", "on request")]
    small, large = catalogue
    assert (small.settings.aliases, small.settings.ttl_seconds, small.settings.pin) == (["gpt-4o"], 5, True)
    assert large.engine.max_num_seqs == 2 and small.engine.max_num_seqs == 8


def test_the_command_line_says_what_is_loaded_at_start_and_the_file_is_offered_beside_it() -> None:
    catalogue = catalogue_of("org/large", "/models/x.gguf", tables=TABLES)
    assert listed(catalogue) == [
        ("org/large", "org/large", "at start"),
        ("x", "/models/x.gguf", "at start"),
        ("small", "demo", "on request"),
    ]
    assert next(iter(catalogue)).engine.max_num_seqs == 2, "a name in the file brings its settings"


def test_a_name_for_the_only_model_of_the_command_line() -> None:
    assert listed(catalogue_of("demo", served_model_name="x")) == [("x", "demo", "at start")]
    with pytest.raises(InvalidRequest, match="served_model_name: names one model, but 2"):
        catalogue_of("a", "b", served_model_name="x")


@pytest.mark.parametrize(
    ("models", "tables", "words"),
    [
        (["a", "a"], {}, "models: 'a' is a name of a already"),
        (["demo"], {"x": {"aliases": ["demo"]}}, r"models\.x\.aliases: 'demo' is a name of demo already"),
        ([], {"x": {"aliases": ["y"]}, "y": {}}, "models: 'y' is a name of x already"),
        ([], {"x": {"aliases": ["z"]}, "y": {"aliases": ["z"]}}, r"models\.y\.aliases: 'z' is a name of x already"),
    ],
)
def test_each_name_stands_for_one_model(models: list[str], tables: dict[str, dict[str, object]], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        catalogue_of(*models, tables=tables)


def test_sampling_defaults_go_to_their_model_and_need_one() -> None:
    first, second = catalogue_of("demo", "x", sampling={"x": {"top_k": 1}})
    assert first.sampling == {} and second.sampling == {"top_k": 1}
    with pytest.raises(InvalidRequest, match=r"sampling\.y: no model of this name is served; expected demo"):
        catalogue_of("demo", sampling={"y": {"top_k": 1}})


def from_file(path: Path, text: str, *arguments: str) -> Catalogue:
    path.write_text(text)
    parsed = build_parser("serve").parse_args(["serve", *arguments, "--config", str(path)])
    return resolve_catalogue(parsed, parsed.models, None)


def test_a_models_settings_come_before_those_for_all_and_flags_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[engine]\nmax_num_seqs = 2\nseed = 3\ndtype = "float32"\n[models.a]\nmodel = "demo"\nseed = 4\nmax_num_seqs = 5\n'
    monkeypatch.setenv("HELEXA_MAX_MODEL_LEN", "777")
    (entry,) = from_file(tmp_path / "c.toml", text, "--max-num-seqs", "6")
    engine = entry.engine
    assert (engine.max_num_seqs, engine.seed, engine.dtype, engine.max_model_len) == (6, 4, "float32", 777)


def test_a_path_in_a_file_is_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.gguf").touch()
    text = '[models.a]\nmodel = "models/x.gguf"\n[models."org/b"]\n'
    assert [entry.model for entry in from_file(tmp_path / "c.toml", text)] == [
        str(tmp_path / "models" / "x.gguf"),
        "org/b",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models.a]\nmodle = 1\n", r"models\.a\.modle: unknown key"),
        ("[models]\na = 1\n", r"models\.a: expected a table"),
        ('[models.a]\nload = "now"\n', r"models\.a\.load: expected one of at start, on request"),
        ("[models.a]\nttl_seconds = -1\n", r"models\.a\.ttl_seconds: expected at least 0"),
        ("[models.a]\naliases = [1]\n", r"models\.a\.aliases: expected a list of names"),
        ("[models.a]\naliases = 'x'\n", r"models\.a\.aliases: expected list"),
        ("[models.a]\nmax_num_seqs = 0\n", r"models\.a\.max_num_seqs: expected at least 1"),
    ],
)
def test_what_a_table_gets_wrong_is_named_with_its_path(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=rf"c\.toml: {words}"):
        from_file(tmp_path / "c.toml", text)
