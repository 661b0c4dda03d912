"""Pairs from the scores of any scorer: which samples are compared, which pairs are kept, what is refused and where."""
import json
import math

import pytest
import torch

import data
from data import open_data, pairs_from_scores, read_scores
from samples import fingerprint, write_sample


def sample(path, prompt="a", shape=(2, 3, 4, 4), value=0.0, more=None, **conditions):
    metadata = ({} if prompt is None else {"prompt": prompt}) | (more or {})
    write_sample(path, torch.full(shape, value), torch.zeros(2, 5), metadata, **conditions)
    return path


def scores(folder, rows):
    """A file of scores with these rows, each (name, score) or any value that JSON can hold."""
    lines = [json.dumps(row if isinstance(row, (dict, list)) else dict(zip(("sample", "score"), row))) for row in rows]
    (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "scores.jsonl"


def names_of(pairs):
    return [(win.path.stem, lose.path.stem) for win, lose in pairs]


@pytest.fixture
def scored_folder(tmp_path):
    """Four samples of one prompt, two of a second, one of a third."""
    table = {"a1": 0.1, "a2": 0.9, "a3": 0.4, "a4": 0.4, "b1": 5, "b2": 5, "c1": -3}
    rows = [(sample(tmp_path / "made" / f"{name}.safetensors", prompt=name[0]), score)
            for name, score in table.items()]
    return scores(tmp_path, [(f"made/{path.name}", score) for path, score in rows])


def test_the_best_of_a_prompt_wins_over_its_worst_or_all_over_all_that_are_beyond_the_margin(scored_folder):
    scored = read_scores(scored_folder)
    assert [(row.path.stem, row.score, row.prompt) for row in scored[:2]] == [("a1", 0.1, "a"), ("a2", 0.9, "a")]
    pairs, prompts, alone = pairs_from_scores(scored, 0.0)
    assert names_of(pairs) == [("a2", "a1")] and (prompts, alone) == (3, 1)    # b: a tie; c: alone
    every = [("a2", "a3"), ("a2", "a4"), ("a2", "a1"), ("a3", "a1"), ("a4", "a1")]         # a3 and a4: a tie
    assert names_of(pairs_from_scores(scored, 0.0, all_pairs=True)[0]) == every
    assert names_of(pairs_from_scores(scored, 0.4, all_pairs=True)[0]) == every[:3]        # 0.9 - 0.4 = 0.5, not 0.3
    assert pairs_from_scores(scored, 0.8)[0] == []         # beyond it, not at it
    assert names_of(pairs_from_scores(scored, 0.79)[0]) == [("a2", "a1")]


def test_the_command_writes_pairs_that_train_and_prints_what_it_left_out(scored_folder, tmp_path, capsys):
    data.main(["--scores", str(scored_folder), "--out", str(tmp_path / "pairs.jsonl")])
    assert capsys.readouterr().out == (
        f"7 samples of 3 prompts: 1 pairs in {tmp_path / 'pairs.jsonl'}, of 1 prompts; left out: 1 prompts with one "
        "sample, 1 whose scores differ by 0 or less\n")
    data.main(["--scores", str(scored_folder), "--out", str(tmp_path / "made" / "all.jsonl"), "--all"])
    for name, count in (("pairs.jsonl", 1), ("made/all.jsonl", 5)):            # names are relative to the .jsonl
        dataset = open_data(tmp_path / name, pairs=True)
        assert len(dataset) == count and dataset.pairs[-1][1].name == "a1.safetensors"
    assert json.loads((tmp_path / "pairs.jsonl").read_text()) == {
        "win": "made/a2.safetensors", "lose": "made/a1.safetensors", "prompt": "a"}


def test_samples_of_one_prompt_are_compared_only_under_the_same_conditions(tmp_path):
    for name, picture in (("1", 0.0), ("2", 1.0), ("3", 0.0), ("4", 1.0)):
        sample(tmp_path / f"{name}.safetensors", y=torch.full((1, 3), picture))
    scored = read_scores(scores(tmp_path, [(f"{i}.safetensors", i) for i in (1, 2, 3, 4)]))
    pairs, prompts, _ = pairs_from_scores(scored, 0.0, all_pairs=True)
    assert names_of(pairs) == [("3", "1"), ("4", "2")] and prompts == 2


def test_a_negative_may_win_over_another_of_the_same_real_sample(tmp_path):
    real = sample(tmp_path / "real" / "a.safetensors")
    for i in (1, 2):
        sample(tmp_path / f"negatives_{i}" / "a.safetensors", value=float(i), more={"real": fingerprint([real])})
    rows = [("real/a.safetensors", 0.5), ("negatives_1/a.safetensors", 1), ("negatives_2/a.safetensors", 0)]
    data.main(["--scores", str(scores(tmp_path, rows)), "--out", str(tmp_path / "pairs.jsonl"), "--all"])
    dataset = open_data(tmp_path / "pairs.jsonl", pairs=True)
    assert [(win.parent.name, lose.parent.name) for win, lose in dataset.pairs] == [
        ("negatives_1", "real"), ("negatives_1", "negatives_2"), ("real", "negatives_2")]
    sample(real, value=9.0)                                # what the loser was made for has changed
    with pytest.raises(ValueError, match="it has changed"):
        open_data(tmp_path / "pairs.jsonl", pairs=True)


@pytest.mark.parametrize("row, words", [
    ({"sample": "2.safetensors"}, "the keys are sample; expected sample and score"),
    ({"sample": "2.safetensors", "score": 1, "prompt": "a"}, "the keys are prompt, sample, score; expected sample and"),
    ({"sample": 2, "score": 1}, "`sample` is 2, expected the name of a sample file"),
    (("2.safetensors", math.nan), "`score` is nan, expected a finite number"),
    (("2.safetensors", math.inf), "`score` is inf, expected a finite number"),
    (("2.safetensors", 10 ** 400), "`score` is 1000"),
    (("2.safetensors", "0.5"), "`score` is '0.5', expected a finite number"),
    (("2.safetensors", True), "`score` is True, expected a finite number"),
    (("2.safetensors", None), "`score` is None, expected a finite number"),
    (("1.safetensors", 2), "scores.jsonl:1 already; expected one of each sample"),
    (("sub/../1.safetensors", 2), "scores.jsonl:1 already; expected one of each sample"),
    (("3.safetensors", 2), "no file '3.safetensors' in"),
    (("../outside.safetensors", 2), "leads out of"),
    (("scores.jsonl", 2), "not a whole safetensors file"),
    (("unnamed.safetensors", 2), "has no prompt in its header"),
    ([], "a list, expected one object a line"),
])
def test_what_is_no_score_of_a_sample_is_refused_with_file_and_line(tmp_path, row, words):
    for name in ("1", "2"):
        sample(tmp_path / f"{name}.safetensors")
    sample(tmp_path / "unnamed.safetensors", prompt=None)
    (tmp_path / "sub").mkdir()
    path = scores(tmp_path, [("1.safetensors", 1), row])
    with pytest.raises(ValueError) as error:
        data.main(["--scores", str(path), "--out", str(tmp_path / "pairs.jsonl")])
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_samples_of_two_sizes_are_named_and_flags_that_cannot_work_are_refused(tmp_path, scored_folder):
    def refusal(*flags):
        with pytest.raises(ValueError) as error:
            data.main(["--scores", str(scored_folder), "--out", str(tmp_path / "pairs.jsonl"), *flags])
        return str(error.value)

    before = scored_folder.read_bytes()
    assert "no two of 7 samples" in refusal("--margin", "0.8") and "1 of 3 prompts have one" in refusal("--margin", "2")
    assert "--margin -1.0: expected a number of 0 or more" in refusal("--margin", "-1")
    assert "--margin nan" in refusal("--margin", "nan")
    assert "--scores nowhere.jsonl: no such file" in refusal("--scores", "nowhere.jsonl")
    assert "a new file that ends in .jsonl" in refusal("--out", str(scored_folder))
    assert "a new file that ends in .jsonl" in refusal("--out", str(tmp_path / "pairs.json"))
    (tmp_path / "elsewhere").mkdir()
    assert "choose an --out next to or above the samples" in refusal("--out", str(tmp_path / "elsewhere" / "p.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl: no rows" in refusal("--scores", str(tmp_path / "empty.jsonl"))
    sample(tmp_path / "made" / "a5.safetensors", shape=(2, 3, 4, 6))
    with open(scored_folder, "a") as file:
        file.write('{"sample": "made/a5.safetensors", "score": 7}\n')
    assert f"{scored_folder}:8: latents of " in refusal() and not (tmp_path / "pairs.jsonl").exists()
    assert scored_folder.read_bytes().startswith(before)
