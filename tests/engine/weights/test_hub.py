"""The hub against a local server that speaks its API: choosing, downloading, resuming, offline, and every refusal."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helexa_engine import env
from helexa_engine.errors import DownloadFailed, InvalidRequest, ModelNotFound
from helexa_engine.weights import hub, hub_cache, hub_download
from helexa_engine.weights.hub import HubId, Transfer, Variant, choose, file_tag, format_bytes, variants

from .hub_server import HubServer, Repo, hub_server

BIG = bytes(range(256)) * 300


def gguf(name: str, architecture: str = "qwen3") -> bytes:
    """The head of a GGUF file, and enough after it to be a large file."""
    text = architecture.encode()
    key = b"general.architecture"
    head = b"GGUF" + b"".join(n.to_bytes(size, "little") for n, size in ((3, 4), (0, 8), (1, 8), (len(key), 8)))
    head += key + (8).to_bytes(4, "little") + len(text).to_bytes(8, "little") + text
    return head + hashlib.sha256(name.encode()).digest() + BIG


def repo(*names: str, **contents: bytes) -> Repo:
    return Repo({"README.md": b"# hello", **{name: gguf(name) for name in names}, **contents})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HELEXA_OFFLINE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_download, "RETRY_SECONDS", 0.0)
    with hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def get(text: str, **options: object) -> Path:
    wanted = HubId.parse(text)
    assert wanted is not None
    return hub.locate(wanted, **options)  # type: ignore[arg-type]


def pull(text: str) -> Path:
    wanted = HubId.parse(text)
    assert wanted is not None
    return hub_download.download(hub_download.plan(wanted))


# Names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("Qwen/Qwen3-0.6B-GGUF:Q4_K_M", HubId("Qwen/Qwen3-0.6B-GGUF", tag="Q4_K_M")),
        ("org/name:*q4*.gguf", HubId("org/name", tag="*q4*.gguf")),
        ("org/name:sub/file.gguf", HubId("org/name", tag="sub/file.gguf")),
        ("org/name@refs/pr/1:Q8_0", HubId("org/name", "refs/pr/1", "Q8_0")),
        ("demo", None),
        ("./org/name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("models/file.gguf", None),
        ("org/name@../x", None),
        ("org/name:", None),
        ("org/na me", None),
        ("../name", None),
    ],
)
def test_ids(text: str, expected: HubId | None) -> None:
    assert HubId.parse(text) == expected
    if expected is not None:
        assert str(expected) == text


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("Qwen3-8B-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-7b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("model.Q8_0.gguf", "Q8_0"),
        ("Qwen3-30B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("UD-Q2_K_XL/Qwen3-235B-UD-Q2_K_XL.gguf", "UD-Q2_K_XL"),
        ("IQ4_XS/model.gguf", "IQ4_XS"),
        ("Qwen3-0.6B-BF16.gguf", "BF16"),
        ("model-f16.gguf", "F16"),
        ("Q4_0-of-Q8_0.gguf", "Q8_0"),
        ("Qwen3.5-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("model.gguf", None),
        ("FAQ1_book.gguf", None),
    ],
)
def test_tags_of_files(name: str, tag: str | None) -> None:
    assert file_tag(name) == tag


def test_projectors_and_importance_matrices_are_no_models() -> None:
    names = ["m-Q4_K_M.gguf", "mmproj-F16.gguf", "m.mmproj-Q8_0.gguf", "imatrix.gguf", "m-imatrix.gguf", "README.md"]
    assert variants(names) == [Variant("Q4_K_M", ("m-Q4_K_M.gguf",))]


def test_a_split_model_is_one_and_says_what_it_lacks() -> None:
    names = ["q/m-Q8_0-00001-of-00003.gguf", "q/m-Q8_0-00003-of-00003.gguf", "m-Q4_0.gguf"]
    split, single = variants(names)[::-1]
    assert single == Variant("Q4_0", ("m-Q4_0.gguf",))
    assert split.files == tuple(f"q/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    assert (split.tag, split.missing) == ("Q8_0", ("q/m-Q8_0-00002-of-00003.gguf",))


def test_a_folder_is_its_weights_config_and_tokenizer_and_nothing_else() -> None:
    wanted = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.json",
        "chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }  # fmt: skip
    others = {
        "pytorch_model.bin", "model.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "README.md", "x.pt",
        "consolidated.safetensors", "adapter_model.safetensors", "original/model.safetensors", "tf_model.h5",
    }  # fmt: skip
    (found,) = variants(wanted | others)
    assert found.is_folder and set(found.files) == wanted and found.files[0] == "config.json"
    (single,) = variants({"config.json", "model.safetensors", "model.bin"})
    assert single.files == ("config.json", "model.safetensors")


def chosen(names: list[str], text: str) -> str:
    wanted = HubId.parse(text)
    assert wanted is not None
    return choose(variants(names), wanted, "the repository", {name: 4_700_000_000 for name in names}).files[0]


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("ud-q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        ("Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("m-Q8_0.gguf", "sub/m-Q8_0.gguf"),
        ("sub/m-Q8_0.gguf", "sub/m-Q8_0.gguf"),
        ("*Q8*", "sub/m-Q8_0.gguf"),
    ],
)
def test_the_tag_picks_the_file(tag: str, file: str) -> None:
    assert chosen(["m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-UD-Q4_K_M.gguf", "sub/m-Q8_0.gguf"], f"o/n:{tag}") == file


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"], "m-Q4_K_M.gguf"),
        (["m-Q2_K.gguf", "m-BF16.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["m-IQ1_S.gguf"], "m-IQ1_S.gguf"),
        (["m-Q4_K_M.gguf", "config.json", "model.safetensors"], "config.json"),
    ],
)
def test_without_a_tag_the_stated_order_decides(names: list[str], file: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(names, "o/n") == file
    assert ("no quant named; taking" in caplog.text) == (len(names) > 1 and file.endswith("gguf"))


@pytest.mark.parametrize(
    ("names", "text", "words"),
    [
        (["m-Q8_0.gguf", "m-Q2_K.gguf"], "o/n:Q4_K_M", ["no 'Q4_K_M'", "Q8_0 (4.7 GB)", "Q2_K (4.7 GB)"]),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "o/n:Q8_0", ["names 2 models", "a-Q8_0.gguf, b-Q8_0.gguf"]),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "o/n", ["name one", "o/n:Q8_0"]),
        (["m-IQ1_S.gguf", "m-IQ2_M.gguf"], "o/n", ["o/n:IQ1_S", "IQ2_M (4.7 GB)"]),
        (["config.json", "model.safetensors"], "o/n:q4_k_m", ["safetensors folder", "'o/n'", "--quant Q4_K_M"]),
        (["pytorch_model.bin", "config.json"], "o/n", ["neither GGUF files nor config.json with safetensors"]),
        (["README.md"], "o/n", ["neither"]),
    ],
)
def test_what_cannot_be_chosen_lists_what_there_is(names: list[str], text: str, words: list[str]) -> None:
    with pytest.raises(ModelNotFound) as caught:
        chosen(names, text)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_bytes_are_readable() -> None:
    assert [format_bytes(n) for n in (7, 1500, 4_700_000_000, 12_000_000)] == ["7 bytes", "1.5 kB", "4.7 GB", "12.0 MB"]


# Downloading


def test_a_quant_is_downloaded_once_and_then_needs_no_network(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos["org/m-GGUF"] = repo("m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf")
    path = get("org/m-GGUF:q8_0")
    assert path.name == "m-Q8_0.gguf" and path.read_bytes() == gguf("m-Q8_0.gguf")
    assert {name for name, count in server.sent.items() if count} == {"m-Q8_0.gguf"}
    assert not list(env.hub_cache().rglob("*.incomplete"))
    asked = len(server.requests)
    assert get("org/m-GGUF:Q8_0") == path and get("org/m-GGUF:m-Q8_0.gguf") == path
    assert get("org/m-GGUF") == path  # the only one here, though the hub has a better default
    assert len(server.requests) == asked
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert get("org/m-GGUF:Q8_0", offline=True) == path


def test_other_programs_find_it_in_the_cache(server: HubServer) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    server.repos["org/m"] = repo("m-Q8_0.gguf")
    path = get("org/m:Q8_0")
    assert try_to_load_from_cache("org/m", "m-Q8_0.gguf", cache_dir=env.hub_cache()) == str(path)
    (found,) = scan_cache_dir(env.hub_cache()).repos
    assert found.repo_id == "org/m" and found.size_on_disk == path.stat().st_size
    assert [revision.refs for revision in found.revisions] == [frozenset({"main"})]


def test_a_safetensors_folder(server: HubServer, hf_folder: Path) -> None:
    server.repos["org/m"] = whole = Repo.of_folder(hf_folder)
    whole.files |= {"pytorch_model.bin": BIG, "onnx/model.onnx": BIG, "tokenizer.json": b"{}"}
    path = get("org/m")
    assert {p.name for p in path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    assert (path / "model.safetensors").read_bytes() == (hf_folder / "model.safetensors").read_bytes()
    asked = len(server.requests)
    assert get("org/m") == path and len(server.requests) == asked


def test_all_parts_of_a_split_model_come_and_the_first_is_opened(server: HubServer) -> None:
    names = [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    server.repos["org/m"] = repo(*names, "m-Q2_K.gguf")
    path = get("org/m:Q8_0")
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == [Path(name).name for name in names]


def test_a_split_model_with_a_part_missing_on_the_hub(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0-00001-of-00002.gguf")
    with pytest.raises(ModelNotFound, match="lacks m-Q8_0-00002-of-00002.gguf"):
        get("org/m:Q8_0")


def test_progress_reaches_the_end_of_every_file(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "_REPORT_BYTES", 10_000)
    names = [f"m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    server.repos["org/m"] = repo(*names)
    seen: list[Transfer] = []
    get("org/m:Q8_0", on_transfer=seen.append)
    for name in names:
        mine = [t for t in seen if t.file == name]
        assert mine[0].done_bytes == 0 and len(mine) > 2
        assert mine[-1].done_bytes == mine[-1].total_bytes == len(gguf(name))
    shares = [t.all_done_bytes / t.all_total_bytes for t in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    server.cut["m-Q8_0.gguf"] = [10_000, 0, 5_000, 20_000]
    path = get("org/m:Q8_0")
    assert path.read_bytes() == gguf("m-Q8_0.gguf")
    ranges = [headers.get("range") for headers in server.asked("GET", "/cdn/org/m/m-Q8_0.gguf")]
    assert ranges == [None, "bytes=10000-", "bytes=10000-", "bytes=15000-", "bytes=35000-"]


def stop_after(server: HubServer, name: str, nbytes: int) -> None:
    """Downloads ``nbytes`` of a file and no more."""
    server.cut[name] = [nbytes, *[0] * hub_download.MAX_ATTEMPTS]
    with pytest.raises(DownloadFailed, match="cannot be reached"):
        get("org/m:Q8_0")
    server.cut.clear()
    server.sent.clear()
    server.requests.clear()


def test_another_process_goes_on_with_a_half_downloaded_file(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    stop_after(server, "m-Q8_0.gguf", 30_000)
    (partial,) = env.hub_cache().rglob("*.incomplete")
    assert partial.stat().st_size == 30_000
    with pytest.raises(
        ModelNotFound, match=f"half there: 30.0 kB of an unfinished file lie in {partial}.*helexa pull org/m:Q8_0"
    ):
        get("org/m:Q8_0", offline=True)
    program = "from helexa_engine.weights import hub; print(hub.locate(hub.HubId.parse('org/m:Q8_0')).read_bytes()[-1000:].hex())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert bytes.fromhex(done.stdout) == gguf("m-Q8_0.gguf")[-1000:]
    assert [h.get("range") for h in server.asked("GET", "/cdn/org/m/m-Q8_0.gguf")] == ["bytes=30000-"]
    assert server.sent["m-Q8_0.gguf"] == len(gguf("m-Q8_0.gguf")) - 30_000
    assert get("org/m:Q8_0").read_bytes() == gguf("m-Q8_0.gguf") and not partial.exists()


def test_a_server_without_ranges_sends_all_again(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    stop_after(server, "m-Q8_0.gguf", 30_000)
    server.ignore_range = True
    assert get("org/m:Q8_0").read_bytes() == gguf("m-Q8_0.gguf")


@pytest.mark.parametrize("nbytes", [30_000, 10**6])
def test_a_rotten_half_is_thrown_away(server: HubServer, nbytes: int) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    stop_after(server, "m-Q8_0.gguf", 30_000)
    (partial,) = env.hub_cache().rglob("*.incomplete")
    partial.write_bytes(b"\x55" * nbytes)
    assert get("org/m:Q8_0").read_bytes() == gguf("m-Q8_0.gguf")


def test_contents_that_are_not_the_hubs_are_refused(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    server.corrupt = True
    with pytest.raises(DownloadFailed, match="m-Q8_0.gguf: its SHA-256 is not what the hub states"):
        get("org/m:Q8_0")
    assert not list(env.hub_cache().rglob("blobs/*"))


def test_threads_that_note_a_revision_at_once_do_not_disturb_each_other(server: HubServer) -> None:
    commits = [f"{number:040x}" for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda commit: hub_cache.write_ref("org/m", "main", commit), commits * 4))
    (ref,) = (hub_cache.repo_folder("org/m") / "refs").iterdir()
    assert ref.read_text() in commits


def test_two_who_want_the_same_file_download_it_once(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(get, ["org/m:Q8_0"] * 4))
    assert set(paths) == {get("org/m")} and paths[0].read_bytes() == gguf("m-Q8_0.gguf")
    assert server.sent["m-Q8_0.gguf"] == len(gguf("m-Q8_0.gguf"))


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    plan = hub_download.plan(HubId("org/m"))
    server.fail = [503]
    assert hub_download.download(plan).read_bytes() == gguf("m-Q8_0.gguf")


def test_a_new_commit_is_fetched_by_pull_and_bytes_it_shares_are_not(server: HubServer) -> None:
    server.repos["org/m"] = first = repo("m-Q4_K_M.gguf", "m-Q8_0.gguf")
    old = pull("org/m:Q8_0")
    pull("org/m:Q4_K_M")
    server.repos["org/m"] = Repo({**first.files, "m-Q4_K_M.gguf": gguf("new")}, commit="b" * 40)
    assert get("org/m:Q8_0") == old  # on disk: not asked
    server.sent.clear()
    new = pull("org/m:Q8_0")
    assert new != old and new.resolve() == old.resolve() and not server.sent
    assert get("org/m:Q8_0") == new
    assert get("org/m:Q4_K_M").read_bytes() == gguf("m-Q4_K_M.gguf")  # of the old commit, but complete
    assert pull("org/m:Q4_K_M").read_bytes() == gguf("new")
    assert get("org/m:Q4_K_M").read_bytes() == gguf("new")


def test_a_revision(server: HubServer) -> None:
    server.repos["org/m"] = Repo({"m-Q8_0.gguf": gguf("old")}, commit="c" * 40, revisions=("v1", "refs/pr/1"))
    assert get("org/m@v1").read_bytes() == gguf("old")
    assert get("org/m@refs/pr/1:Q8_0", offline=False).read_bytes() == gguf("old")
    assert get("org/m@refs/pr/1", offline=True) == get(f"org/m@{'c' * 40}", offline=True)
    with pytest.raises(ModelNotFound, match="no branch, tag or commit 'v2'"):
        get("org/m@v2")


def test_the_token_goes_to_the_hub_and_not_to_where_large_files_lie(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    server.repos["org/m"].gated, server.token = True, "hf_abc"
    with pytest.raises(DownloadFailed, match=f"gated; accept its terms at {server.url}/org/m, then log in"):
        get("org/m")
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    assert get("org/m").read_bytes() == gguf("m-Q8_0.gguf")
    (large,) = server.asked("GET", "/cdn/org/m/m-Q8_0.gguf")
    assert "authorization" not in large
    assert all(h["authorization"] == "Bearer hf_abc" for h in server.asked("HEAD", "/m-Q8_0.gguf")[-1:])


# Refusals


def test_a_repository_that_is_not_there(server: HubServer) -> None:
    with pytest.raises(ModelNotFound, match=f"no file or folder.*no public repository at {server.url}/org/absent"):
        get("org/absent")


@pytest.mark.parametrize(
    ("status", "words"),
    [(500, "answers 500; try again later"), (429, "too many requests"), (403, "permissions"), (418, "HF_ENDPOINT")],
)
def test_a_hub_that_refuses(server: HubServer, status: int, words: str) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    server.fail = [status]
    with pytest.raises(DownloadFailed, match=words) as caught:
        get("org/m")
    assert caught.value.facts["status"] == status


def test_a_wrong_tag_lists_the_tags_with_sizes(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf", "m-Q2_K.gguf", "mmproj-F16.gguf")
    with pytest.raises(ModelNotFound, match=r"no 'Q4_K_M'; there is Q2_K \(76.9 kB\), Q8_0 \(76.9 kB\)$"):
        get("org/m:Q4_K_M")
    assert not env.hub_cache().exists()


def test_no_network(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadFailed, match="org/m: http://127.0.0.1:1 cannot be reached .*check the network"):
        get("org/m")


def test_something_that_is_no_hub(server: HubServer) -> None:
    server.repos["org/m"] = Repo({"m-Q8_0.gguf": gguf("m")}, commit="not a commit")
    with pytest.raises(DownloadFailed, match="answers, but not as a hub does"):
        get("org/m")


@pytest.mark.parametrize("variable", ["HELEXA_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_by_the_environment(server: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert env.offline()
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(InvalidRequest, match=variable):
        env.offline()


def test_offline_names_what_is_missing(server: HubServer, sharded_folder: Path) -> None:
    server.repos["org/m"] = whole = Repo.of_folder(sharded_folder)
    whole.files["tokenizer.json"] = b"{}"
    with pytest.raises(ModelNotFound, match="nothing of it is in .*offline mode is on.*helexa pull org/m`"):
        get("org/m", offline=True)
    assert not server.requests
    path = get("org/m")
    shards = sorted(path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelNotFound, match=f"only half there: {shards[1].name} is missing from {path}"):
        get("org/m", offline=True)
    server.sent.clear()
    assert get("org/m") == path and shards[1].exists() and not server.sent  # its blob was still there
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match="half there: tokenizer.json is missing"):
        get("org/m", offline=True)
    for shard in (*shards, path / "model.safetensors.index.json"):
        shard.unlink()
    with pytest.raises(ModelNotFound, match="half there: model.safetensors is missing"):
        get("org/m", offline=True)


def test_a_missing_part_of_a_split_model_is_named_offline(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf")
    path = get("org/m")
    path.with_name("m-Q8_0-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelNotFound, match="half there: m-Q8_0-00002-of-00002.gguf is missing"):
        get("org/m:Q8_0", offline=True)


def test_a_full_disk_is_found_before_the_download(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    size = len(gguf("m-Q8_0.gguf"))
    stop_after(server, "m-Q8_0.gguf", 30_000)
    usage = hub_download.shutil.disk_usage(Path.cwd())
    free = hub_download.SPARE_BYTES + size - 30_000 - 1
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(DownloadFailed, match="needs 46.9 kB on disk and .*helexa rm") as caught:
        get("org/m")
    assert caught.value.facts == {"needed_bytes": size - 30_000, "free_bytes": free}
    assert not server.sent
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage._replace(free=free + 1))
    assert get("org/m").stat().st_size == size
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert pull("org/m").stat().st_size == size  # nothing is needed any more


def test_a_disk_that_fills_up_while_downloading(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/the/disk")

    monkeypatch.setattr(hub_download, "_append", full)
    with pytest.raises(DownloadFailed, match="m-Q8_0.gguf: /the/disk: No space left on device; make room"):
        get("org/m")


def test_a_cache_that_is_no_folder(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(DownloadFailed, match="set HF_HUB_CACHE"):
        get("org/m")


@pytest.mark.parametrize("etag", ["../../x", "", "a b", "/etc/x"])
def test_an_etag_cannot_leave_the_cache(server: HubServer, monkeypatch: pytest.MonkeyPatch, etag: str) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    monkeypatch.setattr(Repo, "etag", lambda self, name: etag)
    with pytest.raises(DownloadFailed, match="the ETag of m-Q8_0.gguf is"):
        get("org/m")


# Listing and deleting


def test_models_on_disk(server: HubServer, hf_folder: Path) -> None:
    assert hub_cache.models() == ([], [])
    server.repos["org/g"] = repo("m-Q8_0.gguf", "m-Q2_K.gguf", **{"m-F16.gguf": gguf("x", "gnome")})
    server.repos["org/f"] = whole = Repo.of_folder(hf_folder)
    whole.files["tokenizer.json"] = b"{}"
    server.repos["other/arch"] = Repo({"m-Q8_0.gguf": gguf("m", "llama")})
    for text in ("org/g:Q8_0", "org/g:Q2_K", "org/g:F16", "other/arch"):
        get(text)
    folder = get("org/f")
    found, others = hub_cache.models()
    assert [(m.id, m.quant, m.architecture, m.missing) for m in found] == [
        ("org/f", None, "qwen3", None),
        ("org/g:Q2_K", "Q2_K", "qwen3", None),
        ("org/g:Q8_0", "Q8_0", "qwen3", None),
    ]
    assert others == ["other/arch"]
    assert found[1].nbytes == len(gguf("m-Q2_K.gguf")) and found[0].path == folder
    assert found[0].nbytes == sum(p.stat().st_size for p in folder.iterdir())
    (folder / "model.safetensors").unlink()
    assert [m.missing for m in hub_cache.models()[0] if m.id == "org/f"] == ["model.safetensors"]


def removal(text: str) -> int:
    wanted = HubId.parse(text)
    assert wanted is not None
    plan = hub_cache.plan_removal(wanted)
    before = hub_cache._tree_bytes(hub_cache.repo_folder(wanted.repo))
    hub_cache.remove(plan)
    after = hub_cache._tree_bytes(hub_cache.repo_folder(wanted.repo))
    assert before - after == pytest.approx(plan.nbytes, abs=200)  # refs and markers are not counted
    return plan.nbytes


def test_deleting_a_quant_leaves_the_others(server: HubServer) -> None:
    names = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]
    server.repos["org/m"] = repo(*names, "m-Q2_K.gguf")
    kept = get("org/m:Q2_K")
    gone = get("org/m:Q8_0")
    assert removal("org/m:q8_0") == sum(len(gguf(name)) for name in names)
    assert kept.read_bytes() == gguf("m-Q2_K.gguf") and not gone.exists()
    assert get("org/m:Q2_K", offline=True) == kept
    with pytest.raises(ModelNotFound, match="no 'Q8_0'; there is Q2_K"):
        removal("org/m:Q8_0")
    assert removal("org/m:Q2_K") == len(gguf("m-Q2_K.gguf"))  # the last one takes the repository with it
    assert not hub_cache.repo_folder("org/m").exists()


def test_bytes_that_another_file_shares_stay(server: HubServer) -> None:
    server.repos["org/m"] = Repo({"a-Q8_0.gguf": gguf("same"), "b-Q2_K.gguf": gguf("same")})
    kept = get("org/m:Q2_K")
    get("org/m:Q8_0")
    assert removal("org/m:Q8_0") == 0
    assert kept.read_bytes() == gguf("same")


def test_deleting_a_repository_takes_every_commit_and_what_is_half_there(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    stop_after(server, "m-Q8_0.gguf", 30_000)
    assert removal("org/m") == 30_000
    get("org/m")
    server.repos["org/m"] = Repo({"m-Q8_0.gguf": gguf("new")}, commit="b" * 40)
    pull("org/m")
    assert removal("org/m") == 2 * len(gguf("new")) + len(b"")
    with pytest.raises(ModelNotFound, match="nothing of it is in .*helexa list"):
        removal("org/m")


def test_deleting_what_is_not_there(server: HubServer) -> None:
    with pytest.raises(ModelNotFound, match="nothing of it is in"):
        removal("org/absent:Q8_0")
    with pytest.raises(InvalidRequest, match="all its revisions; give org/m:Q8_0"):
        removal("org/m@v1:Q8_0")


# Price


def test_finding_a_model_on_disk_brings_neither_torch_nor_an_http_client(server: HubServer) -> None:
    server.repos["org/m"] = repo("m-Q8_0.gguf")
    get("org/m")
    program = (
        "import sys, json; from helexa_engine.weights import hub; hub.locate(hub.HubId.parse('org/m:Q8_0'))\n"
        "from helexa_engine.weights import hub_cache; assert hub_cache.models()[0]\n"
        "print(json.dumps([m for m in ('torch', 'httpx2', 'huggingface_hub', 'rich') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
