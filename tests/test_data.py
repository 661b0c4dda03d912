import dataclasses
import json
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import samples
from conftest import write_png
from data import PairSet, SampleSet, collate, draw, open_data, order, pairs_by_stem, pairs_from_jsonl, randomness
from samples import check_samples, fingerprint, read_header, read_sample, write_sample
from model import WanConfig


def sample(path, shape=(2, 3, 4, 4), words=3, width=5, value=0.5, prompt="a red ball", **conditions):
    write_sample(
        path, torch.full(shape, value), torch.full((words, width), value), {"prompt": prompt, "seed": 7}, **conditions
    )
    return path


def refusal(call, *args):
    """The message of the ValueError that the call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)


# one sample file

def test_a_sample_comes_back_as_it_was_written(tmp_path):
    latents, context, mask = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(0, 5), torch.tensor([True, False])
    write_sample(tmp_path / "new" / "a.safetensors", latents, context, {"prompt": "grün, 緑", "seed": 7}, mask=mask)
    back = read_sample(tmp_path / "new" / "a.safetensors")
    assert back.keys() == {"latents", "context", "mask", "metadata"}
    assert back["latents"].dtype == torch.bfloat16 and torch.equal(back["latents"], latents)
    assert back["context"].shape == (0, 5)   # the empty caption
    assert torch.equal(back["mask"], mask)
    assert back["metadata"] == {"prompt": "grün, 緑", "seed": "7"}


def test_a_view_of_a_batch_is_stored_alone(tmp_path):
    batch = torch.randn(100, 2, 3, 4, 4)
    write_sample(tmp_path / "a.safetensors", batch[3], batch[4, :, :, 0, 0], {})
    assert torch.equal(read_sample(tmp_path / "a.safetensors")["latents"], batch[3])
    assert (tmp_path / "a.safetensors").stat().st_size < 2000


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, moment):
    path = sample(tmp_path / "a.safetensors", value=1.0)
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(samples.os, moment, interrupt)
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            sample(tmp_path / name, value=2.0)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert read_sample(path)["latents"].mean() == 1.0


def test_a_sample_has_its_name_only_once_it_is_whole(tmp_path, monkeypatch):
    seen = []
    def look(source, target):
        seen.append(
            (
                os.path.dirname(source) == str(tmp_path),
                os.path.basename(source)[0],
                os.path.exists(target),
                len(read_sample(source)["latents"]),
            )
        )
        os.rename(source, target)
    monkeypatch.setattr(samples.os, "replace", look)
    sample(tmp_path / "a.safetensors")
    assert seen == [(True, ".", False, 2)]   # same folder, hidden, target absent, content complete


@pytest.mark.parametrize("latents, context, says", [
    (torch.zeros(2, 3, 4), torch.zeros(3, 5), "latents is (2, 3, 4), expected (C, F, H, W)"),
    (torch.zeros(2, 0, 4, 4), torch.zeros(3, 5), "latents is (2, 0, 4, 4), expected (C, F, H, W)"),
    (torch.zeros(2, 3, 4, 4), torch.zeros(5), "context is (5,), expected (T, D)"),
    (torch.zeros(2, 3, 4, 4), torch.zeros(5, 0), "context is (5, 0), expected (T, D)"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.zeros(3, 5), "latents is torch.int64, expected a float type"),
    (torch.tensor([1.0, math.nan, math.inf, 0.0]).reshape(1, 1, 2, 2), torch.zeros(3, 5), "latents has 2 of 4 values "
                                                                                          "NaN or infinite"),
    (torch.zeros(2, 3, 4, 4), torch.full((1, 2), math.nan), "context has 2 of 2 values NaN or infinite"),
])
def test_what_is_no_sample_is_named_when_written_and_when_read(tmp_path, latents, context, says):
    path = tmp_path / "017.safetensors"
    assert f"{path}: {says}" in refusal(write_sample, path, latents, context, {})
    assert not path.exists()
    save_file({"latents": latents, "context": context}, path)   # as another program might
    assert f"{path}: {says}" in refusal(read_sample, path)


def test_a_condition_is_looked_at_too(tmp_path):
    assert "a.safetensors: y has 1 of 2 values NaN" in refusal(
        lambda: sample(tmp_path / "a.safetensors", y=torch.tensor([1.0, math.nan]))
    )
    assert "a tensor is called win" in refusal(lambda: sample(tmp_path / "a.safetensors", win=torch.zeros(1)))


def test_truncated_foreign_and_missing_files_are_named(tmp_path):
    whole = sample(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "017.safetensors"
    for content in (
        whole[:-1],
        whole[:60],
        whole[:4],
        b"",
        whole + b"x",
        b"PK\x03\x04 a zip file, as torch.save writes it",
    ):
        path.write_bytes(content)
        for read in (read_header, read_sample):
            assert refusal(read, path).startswith(f"{path}: not a whole safetensors file")
    path.unlink()
    assert refusal(read_sample, path) == f"{path}: no such file; a sample (.safetensors) was expected here"
    save_file({"blocks.0.weight": torch.zeros(2)}, path)
    assert f"{path}: no `latents` among its tensors (blocks.0.weight)" in refusal(read_header, path)
    save_file({"latents": torch.zeros(1, 1, 2, 2), "context": torch.zeros(1, 2).to(torch.float8_e4m3fn)}, path)
    assert f"{path}: context is F8_E4M3" in refusal(read_header, path)


def test_a_header_with_impossible_shapes_is_refused(tmp_path):
    entries = {"latents": {"dtype": "F32", "shape": [0, 2 ** 31, 2 ** 31, 2 ** 31], "data_offsets": [0, 0]}}
    head = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    assert "a.safetensors: latents is (0, 2147483648" in refusal(read_header, tmp_path / "a.safetensors")


# sets of samples and pairs

def test_a_set_lists_whole_files_by_name_and_leaves_hidden_ones_alone(tmp_path):
    for name in ("b", "a", "c"):
        sample(tmp_path / f"{name}.safetensors", value=float(ord(name)))
    (tmp_path / ".d.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / ".e.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("x")
    samples = SampleSet(tmp_path)
    assert [samples[i]["name"] for i in range(len(samples))] == [
        str(tmp_path / f"{name}.safetensors") for name in "abc"
    ]
    assert [samples[i]["win"].mean().item() for i in range(3)] == [97, 98, 99]
    assert samples[0].keys() == {"win", "context", "name", "metadata"}


def test_every_folder_of_negatives_adds_its_pairs_by_stem(tmp_path):
    for stem, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        sample(tmp_path / "real" / f"{stem}.safetensors", value=value, y=torch.full((2,), value).bfloat16())
    for folder, stem, value in (("n1", "a", -1.0), ("n1", "b", -2.0), ("n2", "b", -20.0)):
        sample(tmp_path / folder / f"{stem}.safetensors", value=value)
    pairs = pairs_by_stem(tmp_path / "real", [tmp_path / "n1", tmp_path / "n2"])
    assert [
        (pair["win"].mean().item(), pair["lose"].mean().item()) for pair in (pairs[i] for i in range(len(pairs)))
    ] == [(1, -1), (2, -2), (2, -20)]
    assert pairs.unpaired == ["c"]
    assert pairs[2].keys() == {"win", "lose", "context", "y", "name", "source", "metadata"}
    # the win's, for both, as float32
    assert pairs[2]["context"].mean() == 2 and torch.equal(pairs[2]["y"], torch.tensor([2.0, 2.0]))
    assert pairs[2]["name"] == f"win {tmp_path}/real/b.safetensors, lose {tmp_path}/n2/b.safetensors"


def test_negatives_without_a_real_sample_are_named(tmp_path):
    sample(tmp_path / "real" / "a.safetensors")
    for i in range(7):
        sample(tmp_path / "negatives" / f"x{i}.safetensors")
    says = refusal(pairs_by_stem, tmp_path / "real", [tmp_path / "negatives"])
    assert f"{tmp_path}/negatives: 7 of 7 negatives have no real sample" in says and "x0, x1, x2, x3, x4, ...;" in says


def test_a_pair_of_two_sizes_is_refused_before_anything_is_read(tmp_path):
    win = sample(tmp_path / "real" / "017.safetensors", shape=(16, 21, 6, 10))
    lose = sample(tmp_path / "pairs" / "017.safetensors", shape=(16, 20, 6, 10))
    assert refusal(PairSet, [(win, lose)]).startswith(f"{lose}: win is (16, 21, 6, 10) but lose is (16, 20, 6, 10); "
                                                      "encode both at one size")


def test_a_pair_of_two_prompts_is_refused_and_a_missing_prompt_is_not(tmp_path):
    win, other = sample(tmp_path / "win.safetensors"), sample(tmp_path / "other.safetensors", prompt="a blue ball")
    silent = tmp_path / "silent.safetensors"
    write_sample(silent, torch.zeros(2, 3, 4, 4), torch.zeros(3, 5), {})
    says = refusal(PairSet, [(win, silent), (win, other)])
    assert str(other) in says and '"a blue ball"' in says and '"a red ball"' in says
    assert len(PairSet([(win, silent)])) == 1


def test_samples_of_two_encoders_do_not_mix(tmp_path):
    sample(tmp_path / "a.safetensors")
    sample(tmp_path / "b.safetensors", width=6)
    assert (
        f"{tmp_path}/b.safetensors: 2 latent channels and context width 6, but {tmp_path}/a.safetensors has 2 and 5"
        in refusal(SampleSet, tmp_path)
    )


def test_files_that_go_bad_during_a_run_are_named(tmp_path):
    win, lose = sample(tmp_path / "win.safetensors"), sample(tmp_path / "lose.safetensors")
    pairs = PairSet([(win, lose)])
    save_file({"latents": torch.full((2, 3, 4, 4), math.nan), "context": torch.zeros(3, 5)}, lose)
    assert PairSet([(win, lose)]).pairs == pairs.pairs   # headers only: values are looked at when read
    assert f"{lose}: latents has 96 of 96 values NaN" in refusal(pairs.__getitem__, 0)
    sample(lose, shape=(2, 3, 4, 5))
    assert (
        f"{lose}: it was ({{'context': (3, 5), 'latents': (2, 3, 4, 4)}}, 'a red ball', None) when it was opened and "
        f"is ({{'context': (3, 5), 'latents': (2, 3, 4, 5)}}"
        in refusal(pairs.__getitem__, 0)
    )
    lose.unlink()
    assert f"{lose}: no such file" in refusal(pairs.__getitem__, 0)


def test_with_skip_the_next_good_pair_stands_in_for_one_that_is_bad_at_the_start_or_goes_bad(tmp_path):
    for i in range(5):
        sample(tmp_path / "real" / f"{i}.safetensors"), sample(tmp_path / "negatives" / f"{i}.safetensors")
    (tmp_path / "negatives" / "1.safetensors").write_bytes(b"cut off")
    assert "1.safetensors: not a whole safetensors file" in refusal(open_data, tmp_path, True)
    pairs, wins = open_data(tmp_path, True, skip=True), open_data(tmp_path, False, skip=True)
    stands_in = lambda data: [
        int(Path(data[i]["name"].split(", ")[0].removeprefix("win ")).stem) for i in range(len(data))
    ]
    assert (
        stands_in(pairs) == [0, 2, 2, 3, 4]
        and list(pairs.bad) == [1]
        and pairs.wins.keys() == {tmp_path / "real" / f"{i}.safetensors" for i in (0, 2, 3, 4)}
    )
    assert stands_in(wins) == [0, 1, 2, 3, 4] and not wins.bad
    sample(tmp_path / "real" / "2.safetensors", shape=(2, 3, 4, 6))
    (tmp_path / "real" / "4.safetensors").unlink()
    assert stands_in(pairs) == [0, 3, 3, 3, 0] and pairs.bad.keys() == {1, 2, 4}
    assert stands_in(wins) == [0, 1, 3, 3, 0] and "it was" in wins.bad[2] and "no such file" in wins.bad[4]
    for path in (tmp_path / "real").iterdir():
        path.unlink()
    assert "none of 5 samples or pairs is good" in refusal(wins.__getitem__, 0)


def test_with_skip_a_manifest_may_name_a_file_that_has_gone_but_still_none_outside_its_folder(tmp_path):
    rows = [{"win": f"w{i}.safetensors", "lose": f"l{i}.safetensors", "prompt": "a red ball"} for i in range(3)]
    for row in rows:
        sample(tmp_path / row["win"]), sample(tmp_path / row["lose"])
    (tmp_path / "w1.safetensors").unlink()
    assert "no file 'w1.safetensors'" in refusal(open_data, manifest(tmp_path, *rows), True)
    pairs = open_data(manifest(tmp_path, *rows), True, skip=True)
    assert len(pairs) == 3 and list(pairs.bad) == [1] and pairs[1]["name"] == pairs[2]["name"]
    assert "leads out of" in refusal(open_data, manifest(tmp_path, {**rows[0], "win": "../w.safetensors"}), True, True)


# a .jsonl of pairs

def manifest(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_jsonl_names_pairs_relative_to_its_own_folder(tmp_path, monkeypatch):
    for name, value in (("a/1", 1.0), ("a/2", 2.0), ("b/1", -1.0)):
        sample(tmp_path / "set" / f"{name}.safetensors", value=value)
    row = {"lose": "b/1.safetensors", "prompt": "a red ball"}
    path = manifest(
        tmp_path / "set", {"win": "a/1.safetensors", **row}, "", {"win": "a/2.safetensors", **row, "score": 3}
    )
    monkeypatch.chdir(tmp_path)
    pairs = open_data("set/pairs.jsonl", pairs=True)
    assert [(pairs[i]["win"].mean().item(), pairs[i]["lose"].mean().item()) for i in range(len(pairs))] == [
        (1, -1),
        (2, -1),
    ]
    # sft: the wins
    assert [item["win"].mean().item() for item in (open_data(path, pairs=False)[i] for i in range(2))] == [1, 2]


@pytest.mark.parametrize("row, says", [
    ('{"win": "a', "pairs.jsonl:2: not JSON"),
    ("[" * 100_000, "pairs.jsonl:2: not JSON"),
    ("[1]", "pairs.jsonl:2: a list, expected one object a line"),
    ({"win": "w.safetensors", "prompt": "a red ball"}, "pairs.jsonl:2: `lose` is None, expected text"),
    ({"win": "w.safetensors", "lose": ["l.safetensors"], "prompt": "a red ball"}, "pairs.jsonl:2: `lose` is "
                                                                                  "['l.safetensors'], expected text"),
    ({"win": "w.safetensors", "lose": "l.safetensors"}, "pairs.jsonl:2: `prompt` is None"),
    ({"win": "w.safetensors", "lose": "w.safetensors", "prompt": "a red ball"}, "pairs.jsonl:2: win and lose are the "
                                                                                "same file"),
    ({"win": "w.safetensors", "lose": "l.safetensors", "prompt": "a cat"}, 'pairs.jsonl:2: the prompt is "a cat", but'),
    ({"win": "w.safetensors", "lose": "gone.safetensors", "prompt": "a red ball"}, "pairs.jsonl:2: no file "
                                                                                   "'gone.safetensors' in"),
    ({"win": "w.safetensors", "lose": "../out.safetensors", "prompt": "a red ball"}, "pairs.jsonl:2: "
                                                                                     "'../out.safetensors' leads out "
                                                                                     "of"),
    ({"win": "w.safetensors", "lose": "link.safetensors", "prompt": "a red ball"}, "pairs.jsonl:2: 'link.safetensors' "
                                                                                   "leads out of"),
    ({"win": "w.safetensors", "lose": "/etc/passwd", "prompt": "a red ball"}, "pairs.jsonl:2: '/etc/passwd' leads out "
                                                                              "of"),
    ({"win": "w.safetensors", "lose": "a\0b", "prompt": "a red ball"}, "pairs.jsonl:2: 'a\\x00b' is not a file name"),
    ({"win": "w.safetensors", "lose": "a" * 5000, "prompt": "a red ball"}, "pairs.jsonl:2: 'aaaa"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, says):
    sample(tmp_path / "out.safetensors")
    for name in ("w", "l"):
        sample(tmp_path / "set" / f"{name}.safetensors")
    (tmp_path / "set" / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    good = {"win": "w.safetensors", "lose": "l.safetensors", "prompt": "a red ball"}
    assert says in refusal(pairs_from_jsonl, manifest(tmp_path / "set", good, row))


def test_an_absolute_path_is_refused_even_where_it_leads_inside(tmp_path):
    win, lose = sample(tmp_path / "w.safetensors"), sample(tmp_path / "l.safetensors")
    # it would break where the folder is copied to
    path = manifest(tmp_path, {"win": win.name, "lose": str(lose), "prompt": "a red ball"})
    assert f"pairs.jsonl:1: '{lose}' leads out of {tmp_path} (or is absolute" in refusal(pairs_from_jsonl, path)


def test_a_jsonl_without_pairs_is_refused(tmp_path):
    assert "pairs.jsonl: no pairs; expected" in refusal(pairs_from_jsonl, manifest(tmp_path, "", " "))


# what --data names

def test_open_data_finds_real_samples_and_all_folders_of_negatives_in_order(tmp_path):
    sample(tmp_path / "real" / "a.safetensors", value=1.0)
    for folder, value in (("negatives_b", -2.0), ("negatives", -1.0), ("other", -9.0)):
        sample(tmp_path / folder / "a.safetensors", value=value)
    (tmp_path / "negatives_empty").mkdir()   # sampling has just begun there
    pairs = open_data(tmp_path, pairs=True)
    assert [pairs[i]["lose"].mean().item() for i in range(len(pairs))] == [-1, -2]
    assert [item["win"].mean().item() for item in [open_data(tmp_path, pairs=False)[0]]] == [1]
    assert len(open_data(tmp_path / "real", pairs=False)) == 1   # a folder of samples will do for sft


def test_missing_and_empty_data_say_what_to_run(tmp_path):
    assert f"--data {tmp_path}/gone: no such folder" in refusal(open_data, tmp_path / "gone", True)
    assert f"--data {tmp_path}/gone.jsonl: no such folder (with real/ and negatives*/) or .jsonl file" in refusal(
        open_data, tmp_path / "gone.jsonl", True
    )
    says = refusal(open_data, tmp_path, True)
    assert f"--data {tmp_path}: no folder real/" in says and f"python sample.py --pairs {tmp_path}" in says
    assert f"{tmp_path}: no samples (*.safetensors)" in refusal(open_data, tmp_path, False)
    (tmp_path / "real").mkdir()
    assert f"{tmp_path}/real: no samples (*.safetensors) in this folder" in refusal(open_data, tmp_path, True)
    sample(tmp_path / "real" / "a.safetensors")
    (tmp_path / "negatives").mkdir()
    says = refusal(open_data, tmp_path, True)
    assert (
        "has 1 samples, but there is no negatives*/ folder with any" in says
        and f"python sample.py --pairs {tmp_path}" in says
    )


# samples against the model they are for

SMALL = dict(dim=24, ffn_dim=8, num_heads=2, num_layers=1, out_dim=2, text_dim=5, text_len=6)
MODELS = {
    "t2v": WanConfig(**SMALL, in_dim=2),
    "i2v": WanConfig(**SMALL, in_dim=5),
    "i2v with CLIP": WanConfig(**SMALL, in_dim=5, image_dim=7),
    "flf2v": WanConfig(**SMALL, in_dim=5, image_dim=7, image_pos_len=514),
    "ti2v": WanConfig(**SMALL | {"out_dim": 48}, in_dim=48),
}
CONDITIONS = {"t2v": {}, "i2v": {"y": (3, 3, 4, 4)}, "i2v with CLIP": {"y": (3, 3, 4, 4), "clip_features": (257, 7)},
              "flf2v": {"y": (3, 3, 4, 4), "clip_features": (514, 7)}, "ti2v": {"first_latent": (48, 1, 4, 4)}}


def pairs_for(folder, model, latents=None, words=3, width=5, of_loser=(), **shapes):
    """
    Two pairs whose second win has these shapes and whose losers have conditions of their own, which nothing reads.
    """
    usual = (MODELS[model].out_dim, 3, 4, 4)
    for i, (shape, rows, conditions) in enumerate(
        ((usual, 3, CONDITIONS[model]), (latents or usual, words, CONDITIONS[model] | shapes))
    ):
        tensors = {name: torch.zeros(of) for name, of in conditions.items() if of}
        sample(folder / "real" / f"{i}.safetensors", shape, rows, width, **tensors)
        sample(
            folder / "negatives" / f"{i}.safetensors", shape, rows, width, **{name: torch.zeros(1) for name in of_loser}
        )
    return open_data(folder, pairs=True)


@pytest.mark.parametrize("model", MODELS)
def test_samples_that_fit_their_model_pass_and_those_of_another_variant_do_not(tmp_path, model):
    check_samples(pairs_for(tmp_path, model, of_loser=("y", "mask")).wins, MODELS[model], together=2)
    check_samples(SampleSet(tmp_path / "real").wins, MODELS[model], together=2)
    for other in MODELS.keys() - {model}:
        message = refusal(check_samples, pairs_for(tmp_path, model).wins, MODELS[other])
        assert (
            str(tmp_path / "real" / "0.safetensors") in message
            and "choose the model that it was encoded for (--init)" in message
        )


@pytest.mark.parametrize("model, changes, says", [
    ("t2v", dict(latents=(2, 3, 4, 5)), "latents are (2, 3, 4, 5); the model cuts F, H, W into patches of (1, 2, 2)"),
    ("t2v", dict(words=7), "context is (7, 5); this t2v model takes at most 6 rows of width 5"),
    ("t2v", dict(y=(3, 3, 4, 4)), "the condition y is (3, 3, 4, 4); this t2v model with latents (2, 3, 4, 4) takes no "
                                  "such condition"),
    ("i2v", dict(y=None), "the condition y is missing; this i2v model with latents (2, 3, 4, 4) takes (3, 3, 4, 4)"),
    ("i2v", dict(y=(3, 1, 4, 4)), "the condition y is (3, 1, 4, 4); this i2v model with latents (2, 3, 4, 4) takes "
                                  "(3, 3, 4, 4)"),
    ("i2v", dict(latents=(2, 3, 4, 6)), "the condition y is (3, 3, 4, 4); this i2v model with latents (2, 3, 4, 6) "
                                        "takes (3, 3, 4, 6)"),
    ("i2v", dict(clip_features=(257, 7)), "the condition clip_features is (257, 7); this i2v model with latents (2, "
                                          "3, 4, 4) takes no such condition"),
    ("i2v with CLIP", dict(clip_features=None), "the condition clip_features is missing; this i2v model with latents "
                                                "(2, 3, 4, 4) takes (257, 7)"),
    ("flf2v", dict(clip_features=(257, 7)), "the condition clip_features is (257, 7); this flf2v model with latents "
                                            "(2, 3, 4, 4) takes (514, 7)"),
    ("ti2v", dict(first_latent=(48, 3, 4, 4)), "the condition first_latent is (48, 3, 4, 4); this ti2v model with "
                                               "latents (48, 3, 4, 4) takes (48, 1, 4, 4)"),
    ("ti2v", dict(latents=(48, 1, 4, 4)), "the condition first_latent is (48, 1, 4, 4); this ti2v model with latents "
                                          "(48, 1, 4, 4) takes no such condition"),   # nothing would be left to learn
])
def test_one_sample_of_a_set_that_does_not_fit_is_named_with_what_was_found_and_expected(
    tmp_path, model, changes, says
):
    dataset = pairs_for(tmp_path, model, **changes)
    assert f"{tmp_path / 'real' / '1.safetensors'}: {says}" in refusal(check_samples, dataset.wins, MODELS[model])


def test_channels_and_text_width_of_another_encoder_are_refused(tmp_path):
    assert "latents are (2, 3, 4, 4), of 2 channels; this t2v model has 16" in refusal(
        check_samples, pairs_for(tmp_path, "t2v").wins, dataclasses.replace(MODELS["t2v"], in_dim=16, out_dim=16))
    assert "context is (3, 9); this t2v model takes at most 6 rows of width 5" in refusal(
        check_samples, pairs_for(tmp_path, "t2v", width=9).wins, MODELS["t2v"]
    )


def test_samples_that_go_through_the_model_together_must_be_alike(tmp_path):
    # another size; text-to-video among image-to-video
    for changes in (dict(latents=(48, 3, 4, 6), first_latent=(48, 1, 4, 6)), dict(first_latent=None)):
        dataset = pairs_for(tmp_path, "ti2v", **changes)
        check_samples(dataset.wins, MODELS["ti2v"])
        message = refusal(check_samples, dataset.wins, MODELS["ti2v"], 2)
        assert (
            str(tmp_path / "real" / "1.safetensors") in message
            and "2 samples go through the model together" in message
            and "--grad_accum" in message
        )


# order, noise, batches

def test_a_fingerprint_changes_with_order_names_sizes_and_values_and_with_nothing_else(tmp_path):
    files = [sample(tmp_path / f"{i}.safetensors", shape=(2, 3, 40, 40), value=float(i)) for i in range(3)]
    before = fingerprint(files)
    os.utime(files[0], (0, 0))
    assert fingerprint(files) == before and len(before) == 16
    assert (
        len(
            {
                before,
                fingerprint(files[::-1]),
                fingerprint(files[:2]),
                fingerprint([*files[:2], files[2].rename(tmp_path / "x.safetensors")]),
            }
        )
        == 4
    )
    sample(tmp_path / "2.safetensors", shape=(2, 3, 40, 40), value=2.001)
    assert fingerprint(files) != before


def test_order_is_a_fresh_permutation_every_epoch():
    n = 37
    epochs = [[order(5, epoch * n + i, n) for i in range(n)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != list(range(n))
    assert epochs[0] != [order(6, i, n) for i in range(n)]


def test_order_does_not_depend_on_the_number_of_ranks_or_on_the_past():
    n, whole, straight = 37, 8, []
    for position in range(80):
        straight.append(order(5, position, n))
    for ranks in (1, 2, 4, 8):
        share, seen = whole // ranks, {}
        for rank in reversed(range(ranks)):
            data.epoch_order.cache_clear()   # every rank is a process of its own
            for step in range(3, 10):        # resumed at step 3
                for position in range(step * whole + rank * share, step * whole + (rank + 1) * share):
                    order(1, 7, 11)
                    seen[position] = order(5, position, n)
        assert [seen[position] for position in sorted(seen)] == straight[24:]


def test_no_two_positions_of_a_run_share_a_generator():
    # why 32 bits must do
    assert torch.equal(*(torch.randn(8, generator=torch.Generator().manual_seed(7 + high)) for high in (0, 2 ** 32)))
    positions = [*range(100_000), *range(2 ** 32 - 100, 2 ** 32)]
    seeds = {randomness(3, position).initial_seed() for position in positions}
    assert len(seeds) == len(positions) and max(seeds) < 2 ** 32
    assert (
        randomness(3, 0).initial_seed() != randomness(4, 0).initial_seed() != randomness(4, 0, "order").initial_seed()
    )


def test_noise_depends_on_seed_and_position_and_on_nothing_else():
    args = ((4, 3, 8, 8), 5.0, 0, 1000)
    torch.manual_seed(0)
    sigma, noise = draw(3, 11, *args)
    torch.manual_seed(1)
    again_sigma, again = draw(3, 11, *args)
    assert (
        sigma == again_sigma and torch.equal(noise, again) and noise.dtype == torch.float32 and isinstance(sigma, float)
    )
    # 60 of 768 numbers
    others = torch.stack([draw(seed, position, *args)[1].flatten() for seed in (3, 4) for position in range(10, 40)])
    correlation = torch.corrcoef(others) - torch.eye(60)
    assert correlation.abs().max() < 6 / math.sqrt(768)   # 1770 pairs of independent normals stay within 6 deviations
    assert abs(others.mean()) < 0.03 and abs(others.std() - 1) < 0.02


def test_sigma_of_a_position_does_not_depend_on_the_shape_of_the_latents():
    assert draw(3, 11, (1, 1, 2, 2), 5.0, 0, 1000)[0] == draw(3, 11, (16, 5, 8, 8), 5.0, 0, 1000)[0]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize(
    "shift, low, high", [(1.0, 0, 1000), (5.0, 0, 1000), (5.0, 875, 1000), (12.0, 0, 875), (0.5, 200, 400)]
)
def test_sigma_has_the_shifted_distribution_within_the_limits_after_the_shift(shift, low, high, sampling):
    n = 4000
    sigmas = np.sort([draw(0, position, (1,), shift, low, high, sampling)[0] for position in range(n)])
    assert low / 1000 <= sigmas[0] and sigmas[-1] <= high / 1000 and sigmas[0] > 0
    # P(sigma' < sigma) without limits; in logits a shift is an addition, so no code is shared with draw
    def below(sigma):
        logit = torch.logit(torch.as_tensor(sigma, dtype=torch.float64)) - math.log(shift)
        return (torch.sigmoid(logit) if sampling == "uniform" else (1 + torch.erf(logit / math.sqrt(2))) / 2).numpy()
    cdf = lambda sigma: (below(sigma) - below(low / 1000)) / (below(high / 1000) - below(low / 1000))
    assert np.abs(cdf(sigmas) - (np.arange(n) + 0.5) / n).max() < 1.63 / math.sqrt(n)   # Kolmogorov-Smirnov at 1 %


def test_uniform_draws_are_those_of_the_first_release():
    # a run that is resumed, or compared with one of last year, sees the same sigma and noise
    sigma, noise = draw(0, 0, (2,), 3.0, 600, 1000)
    assert sigma == 0.8998296106820554 and noise.tolist() == pytest.approx([-0.4673, 1.0586], abs=1e-4)
    assert (
        draw(0, 1, (1,), 3.0, 600, 1000)[0] == 0.9821705711667864
        and draw(5, 123456, (1,), 5.0, 0, 875)[0] == 0.8168367074142282
    )
    assert torch.equal(draw(0, 0, (2,), 3.0, 600, 1000, "logit_normal")[1], noise)


def test_the_middle_of_the_bell_worked_by_hand(monkeypatch):
    # a random number of 1/2 gives half the bell, logit 0, u = 1/2, and at shift 3 sigma = 1.5 / 2 = 0.75
    monkeypatch.setattr(data.torch, "rand", lambda *args, **kwargs: torch.tensor(0.5, dtype=torch.float64))
    assert draw(0, 0, (1,), 3.0, 0, 1000, "logit_normal")[0] == pytest.approx(0.75, abs=1e-12)


def test_the_middle_of_the_shift_worked_by_hand(monkeypatch):
    # limits 875..1000 at shift 5: u from 0.875 / (5 - 4 * 0.875) = 7/12 to 1; a random number of 1/2 gives u = 19/24
    # and sigma = (95/24) / (1 + 76/24) = 0.95. Without limits a random number of 0 gives u = 1 and sigma = 1.
    monkeypatch.setattr(data.torch, "rand", lambda *args, **kwargs: torch.tensor(0.5, dtype=torch.float64))
    assert draw(0, 0, (1,), 5.0, 875, 1000)[0] == pytest.approx(0.95, abs=1e-12)
    monkeypatch.setattr(data.torch, "rand", lambda *args, **kwargs: torch.tensor(0.0, dtype=torch.float64))
    assert draw(0, 0, (1,), 5.0, 0, 1000)[0] == 1.0


def test_rounding_does_not_take_sigma_over_a_limit(monkeypatch):
    # the ends of what rand gives; without the clamp every seventh of these limits would be crossed
    for number in (0.0, 1 - 2 ** -53):
        monkeypatch.setattr(data.torch, "rand", lambda *args, **kwargs: torch.tensor(number, dtype=torch.float64))
        for low in (*range(0, 999, 7), 999):
            for sampling in ("uniform", "logit_normal"):
                assert low / 1000 <= draw(0, 0, (1,), 5.0, low, low + 1, sampling)[0] <= (low + 1) / 1000
        assert 0 <= draw(0, 0, (1,), 5.0, 0, 1000, "logit_normal")[0] <= 1


@pytest.mark.parametrize(
    "args, says",
    [
        ((0.0, 0, 1000), "--flow_shift 0.0"),
        ((math.nan, 0, 1000), "--flow_shift nan"),
        ((1.0, 500, 500), "--min_timestep 500 --max_timestep 500"),
        ((1.0, -1, 500), "--min_timestep -1"),
        ((1.0, 0, 1001), "--max_timestep 1001"),
    ],
)
def test_impossible_timestep_ranges_are_refused(args, says):
    assert says in refusal(draw, 0, 0, (1,), *args)


def test_a_batch_pads_context_with_zeros_and_keeps_names():
    items = [
        {
            "win": torch.full((1, 1, 2, 2), float(i)),
            "lose": torch.full((1, 1, 2, 2), -float(i)),
            "context": torch.ones(words, 3),
            "y": torch.tensor([i]),
            "name": str(i),
        }
        for i, words in enumerate((2, 0, 4))
    ]
    batch = collate(items)
    assert batch.keys() == {"win", "lose", "context", "y", "names"} and batch["names"] == ["0", "1", "2"]
    assert (
        batch["win"].shape == (3, 1, 1, 2, 2)
        and batch["lose"][2].mean() == -2
        and batch["y"].tolist() == [[0], [1], [2]]
    )
    assert (
        batch["context"].shape == (3, 4, 3)
        and batch["context"].sum(dim=(1, 2)).tolist() == [6, 0, 12]
        and batch["context"][0, 2:].abs().max() == 0
    )
    assert "lose" not in collate([{key: item[key] for key in ("win", "context", "name")} for item in items])
    assert collate(items[1:2])["context"].shape == (1, 0, 3)


def test_a_batch_of_two_sizes_or_two_kinds_is_refused_by_name():
    a = {"win": torch.zeros(1, 2, 2, 2), "context": torch.zeros(1, 3), "name": "a.safetensors"}
    b = {"win": torch.zeros(1, 3, 2, 2), "context": torch.zeros(1, 3), "name": "b.safetensors"}
    assert "b.safetensors: win is (1, 3, 2, 2) but (1, 2, 2, 2) in a.safetensors" in refusal(collate, [a, b])
    assert "c has ['context', 'name', 'win', 'y'] but a.safetensors has" in refusal(
        collate, [a, {**a, "y": torch.zeros(1), "name": "c"}]
    )


def test_a_png_holds_the_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    content, chunks = (tmp_path / "a.png").read_bytes(), {}
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    place = 8
    while place < len(content):
        length, kind = struct.unpack(">I4s", content[place:place + 8])
        chunks[kind] = content[place + 8:place + 8 + length]
        assert struct.unpack(">I", content[place + 8 + length : place + 12 + length])[0] == zlib.crc32(
            kind + chunks[kind]
        )
        place += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"] and struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (
        7,
        5,
        8,
        2,
        0,
        0,
        0,
    )
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 1 + 7 * 3)
    assert not rows[:, 0].any() and np.array_equal(rows[:, 1:].reshape(5, 7, 3), image)


# contents

def test_a_sample_written_twice_is_the_same_file_whatever_the_order_of_its_metadata(tmp_path):
    metadata = {f"name {i}": str(i) for i in range(8)}
    tensors = torch.zeros(2, 3, 4, 4), torch.zeros(3, 5)
    write_sample(tmp_path / "a.safetensors", *tensors, metadata)
    write_sample(tmp_path / "b" / "a.safetensors", *tensors, dict(reversed(metadata.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b" / "a.safetensors").read_bytes()
    assert read_sample(tmp_path / "a.safetensors")["metadata"] == metadata


def test_negatives_whose_real_sample_has_changed_since_are_refused(tmp_path):
    win = sample(tmp_path / "real" / "017.safetensors")
    lose = tmp_path / "negatives" / "017.safetensors"
    metadata = {"prompt": "a red ball", "real": fingerprint([win])}
    write_sample(lose, torch.ones(2, 3, 4, 4), torch.zeros(3, 5), metadata)
    assert len(open_data(tmp_path, pairs=True)) == 1
    sample(win, value=2.0)                                                   # another film of the same name and size
    message = refusal(open_data, tmp_path, True)
    assert message.startswith(f"{lose}: made for {win} as it was,") and "delete the negative" in message


def test_a_dataset_that_changes_in_contents_or_order_has_another_fingerprint(tmp_path):
    for stem in ("a", "b"):
        sample(tmp_path / "real" / f"{stem}.safetensors"), sample(tmp_path / "negatives" / f"{stem}.safetensors")
    before = open_data(tmp_path, pairs=True).fingerprint()
    assert before == open_data(tmp_path, pairs=True).fingerprint() != open_data(tmp_path, pairs=False).fingerprint()
    sample(tmp_path / "negatives" / "b.safetensors", value=3.0)
    assert open_data(tmp_path, pairs=True).fingerprint() != before
