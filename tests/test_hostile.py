"""
Thousands of files and names from anyone: each is read, or refused with a ValueError that names it.

None reaches outside its folder; nothing is unpickled.
"""

import ast
import csv
import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import encode
import step_folder
from data import open_data
from samples import read_header, read_sample, write_sample
from ref_cache import open_errors
from conftest import ROOT

hypothesis = pytest.importorskip("hypothesis", reason="hostile inputs are drawn by hypothesis (requirements-video.txt)")
from hypothesis import HealthCheck, given, settings, strategies as st  # noqa: E402


def inputs(number):
    """This many drawn inputs, the same in every run; one that takes five seconds counts as a hang."""
    return settings(
        max_examples=number, deadline=5000, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """house/secret.safetensors is whole and off limits; house/set/ may be read: two samples, room for hostile ones."""
    house = tmp_path_factory.mktemp("house")
    for name in ("secret", "set/w", "set/l", "videos/w"):
        write_sample(house / f"{name}.safetensors", torch.zeros(2, 1, 2, 2), torch.zeros(1, 3), {"prompt": "a"})
    (house / "set" / "link.safetensors").symlink_to(house / "secret.safetensors")
    (house / "set" / "ring").symlink_to(house / "set" / "ring")
    return house


def read_or_refused(call, *arguments):
    try:
        return call(*arguments)
    except ValueError as error:
        # said by us, not by the way
        assert str(error) and not isinstance(error, (UnicodeError, json.JSONDecodeError)), repr(
            error
        )
        assert re.search(r"[./]", str(error)), error  # and with a file in it


WHOLE = save({"latents": torch.ones(2, 1, 2, 2), "context": torch.ones(1, 3)}, metadata={"prompt": "a"})
SHAPES = (
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**31, 2**62, -1]), max_size=6) | st.just([2, 1, 2, 2]) | st.just([1, 3])
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "Q4", 3]), "shape": SHAPES,
        "data_offsets": st.lists(st.sampled_from([0, 4, 12, 16, 32, 44, 64, 2**40, -1]), max_size=3)}
)
HEADER = st.dictionaries(
    st.sampled_from(["latents", "context", "win", "y", "", "../x", "\0"]) | st.text(max_size=5),
    ENTRY
    | st.none()
    | st.integers()
    | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers(), max_size=2),
    max_size=4,
)
METADATA = st.none() | st.dictionaries(
    st.sampled_from(["prompt", "seed", "source"]) | st.text(max_size=4),
    st.text(max_size=6) | st.integers() | st.none(), max_size=3)


@st.composite
def sample_bytes(draw):
    """Anything · a header of anything before some numbers · a whole file with bytes changed, cut off or added."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        header = draw(HEADER) | ({"__metadata__": found} if (found := draw(METADATA)) is not None else {})
        text = json.dumps(header).encode()
        return (
            struct.pack("<Q", draw(st.just(len(text)) | st.sampled_from([0, 7, 2**63, len(text) + 1])))
            + text
            + draw(st.binary(max_size=64))
        )
    content = bytearray(WHOLE)
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content) + draw(
        st.binary(max_size=3)
    )


def all_inputs(number, check, **strategies):
    """check(drawn) -> was it taken? Some of many inputs are taken and some refused, or the test would prove nothing."""
    taken = []

    @inputs(number)
    @given(st.fixed_dictionaries(strategies))
    def each(drawn):
        taken.append(bool(check(**drawn)))

    each()
    assert len(taken) >= number and number / 100 < sum(taken) < number * 0.9, (sum(taken), len(taken))


@pytest.mark.slow
def test_any_sample_file_is_read_whole_or_refused_by_name(house):
    path = house / "set" / "hostile.safetensors"

    def check(content):
        path.write_bytes(content)
        (house / "set" / "p.jsonl").write_text('{"win": "hostile.safetensors", "lose": "l.safetensors", "prompt": "a"}')
        before = snapshot(house)
        read_or_refused(read_header, path)
        found = read_or_refused(read_sample, path)
        assert (
            found is None
            or found["latents"].ndim == 4
            and found["context"].ndim == 2
            and found["latents"].isfinite().all()
        )
        read_or_refused(open_errors, path, {"seed": 0}, 4)
        pairs = read_or_refused(open_data, house / "set" / "p.jsonl", True)
        item = pairs and read_or_refused(pairs.__getitem__, 0)
        assert not item or item["win"].shape == item["lose"].shape == (2, 1, 2, 2)
        assert snapshot(house) == before
        return item

    all_inputs(900, check, content=sample_bytes())
    path.unlink()


NAMES = (
    st.sampled_from(["w.safetensors", "l.safetensors"])
    | st.sampled_from(
        [
            "../secret.safetensors", "set/../../secret.safetensors", "link.safetensors", "ring", "ring/a", "", ".",
            "..", "/etc/passwd", "~", "w.safetensors/", "a\0b", "x" * 300, "w.safetensors\n", "C:\\a", "\ud800",
            "./w.safetensors", "%2e%2e/secret.safetensors"]
    )
    | st.text(max_size=8)
)
VALUE = NAMES | st.none() | st.integers() | st.floats() | st.lists(st.text(max_size=3), max_size=2)
PROMPT = st.just("a") | VALUE
ROW = (
    st.just({"win": "w.safetensors", "lose": "l.safetensors", "prompt": "a"})
    | st.fixed_dictionaries({"win": NAMES, "lose": NAMES, "prompt": PROMPT})
    | st.fixed_dictionaries({"video": NAMES, "prompt": PROMPT})
    | st.fixed_dictionaries({}, optional={"win": VALUE, "lose": VALUE, "prompt": PROMPT, "video": VALUE, "text": VALUE})
)
LINES = st.lists(
    ROW.map(json.dumps).map(str.encode)
    | st.binary(max_size=30)
    | st.sampled_from([b"[]", b"{}", b"null", b"1e999", b'{"win":', b"[" * 3000, b"\xef\xbb\xbf{}"]),
    max_size=3,
)


def inside(path, folder):
    return Path(path).resolve().is_relative_to(folder.resolve())


@pytest.mark.slow
def test_any_manifest_of_pairs_names_files_of_its_folder_or_is_refused(house):
    path = house / "set" / "p.jsonl"

    def check(lines):
        path.write_bytes(b"\n".join(lines))
        before = snapshot(house)
        pairs = read_or_refused(open_data, path, True)
        if pairs:
            assert all(inside(file, house / "set") for pair in pairs.pairs for file in pair)
            read_or_refused(pairs.__getitem__, 0)
        assert snapshot(house) == before
        return pairs

    all_inputs(900, check, lines=LINES)


@pytest.mark.slow
def test_any_table_of_videos_names_files_of_its_folder_or_is_refused(house):
    folder = house / "videos"

    def check(lines, table, cells):
        for name in ("metadata.csv", "metadata.jsonl"):
            (folder / name).unlink(missing_ok=True)
        if table:
            with open(folder / "metadata.csv", "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
                csv.writer(file).writerows([["video", "prompt"], *cells])
        else:
            (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
        before = snapshot(house)
        found = read_or_refused(encode.read_metadata, folder)
        for _, path, _ in found or []:
            assert inside(path, folder) and re.fullmatch(r"[A-Za-z0-9_-]+", encode.stem_of(path, folder))
        assert snapshot(house) == before
        return found

    cell = st.tuples(NAMES, st.just("a") | NAMES).map(list) | st.lists(NAMES, max_size=3)
    all_inputs(500, check, lines=LINES, table=st.booleans(), cells=st.lists(cell, max_size=2))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """The bytes of small video files, by suffix."""
    av = pytest.importorskip("av", reason="real video needs PyAV (requirements-video.txt)")
    from make_videos import numbered_video
    folder = tmp_path_factory.mktemp("films")
    codecs = {"mp4": "h264", "mkv": "h264", "ts": "h264", "avi": "mpeg4", "webm": "libvpx-vp9", "flv": "h264"}
    av.logging.set_level(None)
    return {suffix: numbered_video(folder / f"a.{suffix}", 10, 8, codec, size=(32, 32)).read_bytes()
            for suffix, codec in codecs.items()}


@pytest.mark.slow
def test_any_video_file_is_read_or_refused_by_name(films, tmp_path):
    import video

    def check(suffix, changes, cut, cut_front):
        content = bytearray(films[suffix])
        for place, value in changes:
            content[int(place * (len(content) - 1))] = value
        content = content[int(cut_front * len(content)):int(cut * len(content))]
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(content)
        try:
            film = video.look_at(path)
            picks = video.on_show(film, 8)
            clips = list(video.read_clips(film, video.decode_all(film), picks, [0], min(4, len(picks)), (8, 8)))
        except ValueError as error:
            assert str(path) in str(error)
            return False
        assert clips[0][1].shape[2:] == (8, 8) and clips[0][1].abs().max() <= 1
        return True
    share = st.floats(0, 1)
    all_inputs(400, check, suffix=st.sampled_from(sorted(films)),
               changes=st.lists(st.tuples(share | st.floats(0, 0.1), st.integers(0, 255)), max_size=8),
               cut=st.just(1.0) | share, cut_front=st.just(0.0) | st.floats(0, 0.5))


@pytest.mark.slow
@inputs(300)
@given(
    name=st.text(min_size=1, max_size=40).filter(lambda name: "/" not in name and "\0" not in name), change=st.data()
)
def test_any_name_of_a_video_becomes_a_safe_one_and_no_two_the_same(name, change):
    folder, other = (
        Path("videos"),
        change.draw(st.text(min_size=1, max_size=40).filter(lambda name: "/" not in name and "\0" not in name)),
    )
    stems = {encode.stem_of(folder / part, folder) for part in (f"{name}.mp4", f"{other}.mp4", f"{name}/{other}.mp4")}
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", stem) for stem in stems) and len(stems) == (2 if name == other else 3)


@pytest.mark.slow
@inputs(400)
@given(
    content=st.binary(max_size=60)
    | st.sampled_from(
        [pickle.dumps(value) for value in (eval, os.system, open, {"a": print}, 3, Path("a"), torch.float32)]
    )
)
def test_any_index_of_a_checkpoint_is_read_or_refused(house, content):
    (house / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        step_folder.Reader(house)


# ------------------------------------------------------------------------------------------------------------------
# what the sources may do

SOURCES = sorted(ROOT.glob("*.py"))
NETWORK = {
    "socket", "urllib", "http", "requests", "httpx", "ftplib", "huggingface_hub", "aiohttp", "webbrowser", "smtplib"}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield (
                ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
                node.lineno)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        ):
            yield f"import {name.split('.')[0]}", {}, node.lineno


def test_the_sources_unpickle_evaluate_and_download_nothing():
    assert {"train.py", "run_folder.py", "encode.py", "model.py"} <= {path.name for path in SOURCES}
    for path in SOURCES:
        for name, keywords, line in calls(path):
            where = f"{path.name}:{line}: {name}"
            assert name not in (
                "eval", "exec", "compile", "os.system", "os.popen", "__import__",
                "torch.hub.load") and not name.endswith("from_pretrained"), where
            assert not re.search(r"(^|\.)(pickle|marshal|shelve|dill|joblib)\.(load|loads|open)$", name), where
            assert name != "torch.load" or keywords.get("weights_only") == "True", where
            assert not (name.startswith("import ") and name.split()[1] in NETWORK), where
            assert (
                keywords.get("shell") != "True"
                and keywords.get("trust_remote_code") != "True"
                and keywords.get("allow_pickle") != "True"
            ), where
            assert name != "np.load" or keywords.get("allow_pickle") in (None, "False"), where
