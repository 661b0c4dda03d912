import json

import pytest

pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")

from make_videos import folder_of, moving_square, numbered_video, refusal
from tables import read_metadata, stem_of


@pytest.fixture
def folder(tmp_path):
    """A folder videos/ with a.mp4 and b.mp4, of two frames each, and no table."""
    folder = folder_of(tmp_path, a=moving_square(2), b=moving_square(2))
    (folder / "metadata.jsonl").unlink()
    return folder


ROWS = "video,prompt\na.mp4,a ball\nb.mp4,a box\n"


@pytest.mark.parametrize("columns", [
    ("video", "prompt"), ("file_path", "text"), ("video_path", "caption"), ("path", "cap"), ("file_name", "text")])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_other_trainers_is_read(folder, columns, kind):
    (folder / "b.mp4").unlink()
    rows = {
        "jsonl": "\ufeff" + json.dumps(dict(zip(columns, ("a.mp4", 'a "red" ball, rolling')))) + "\n",
        "csv": f'\ufeff{",".join(columns)},other\na.mp4,"a ""red"" ball, rolling",1\n',
    }
    (folder / f"metadata.{kind}").write_text(rows[kind], encoding="utf-8")
    ((where, path, prompt),) = read_metadata(folder)
    assert where == f"{folder}/metadata.{kind}:{1 if kind == 'jsonl' else 2}"
    assert path == folder / "a.mp4" and prompt == 'a "red" ball, rolling'


@pytest.mark.parametrize("table, says", [
    (b"video,prompt\na.mp4\n", "metadata.csv:2: no prompt for a.mp4"),
    (b"video,prompt\n\na.mp4,\n", "metadata.csv:3: no prompt for a.mp4"),
    (b"clip,prompt\na.mp4,x\n", "metadata.csv:2: no video; expected a column `video` with a file name (also read: "
                                "file_name, file_path, video_path, path); the row has ['clip', 'prompt']"),
    (b"video,prompt\na.mp4,gr\xfcn\n", "metadata.csv: not a CSV table in UTF-8 after line"),
    (b"video,prompt\na.mp4," + b"x" * 200_000, "metadata.csv: not a CSV table in UTF-8 after line 1 (field larger"),
    (b"video,prompt,prompt\na.mp4,x,y\n", "metadata.csv:1: two columns of one name"),
    # more cells than columns: a comma in a prompt without quotes
    (b"video,prompt\na.mp4,a red ball, rolling on grass, slow motion\n", "metadata.csv:2: 4 cells, but the table has"),
    (b"video,prompt\na.mp4,a ball\nb.mp4,a box,\n", "metadata.csv:3: 3 cells, but the table has 2 columns"),
    # quotes with backslashes
    (b'video,prompt\na.mp4,"a \\"red\\" ball, rolling"\n', "after line 1 (',' expected after '\"')"),
    (b'video,prompt\na.mp4,"a ball, \\"red\\""\nb.mp4,a box\n', "after line 1 (',' expected after '\"')"),
    (b'video,prompt\na.mp4,"a ball called \\""\nb.mp4,"a box"\n', "after line 1 ("),
    # a quote that swallows rows
    (b'video,prompt\na.mp4,"a ball\nb.mp4,a box\n', "after line 1 (unexpected end of data)"),
    (b'video,prompt\na.mp4,"a ball\nb.mp4,a box"\n',
     "metadata.csv:2: a cell does not end with its line and takes in 'b.mp4,a box'"),
    (b'video,prompt\na.mp4,a ball\nb.mp4,"a box\nc.mp4,a cat\nd.mp4,a "dog"\n', "after line 2 ("),
    (b'prompt,video\na ball,a.mp4\n"a box,b.mp4\na cat,c.mp4\na dog", d.mp4\n', "metadata.csv:3: a cell does not end"),
])
def test_a_bad_csv_is_named_with_its_line(folder, table, says):
    (folder / "metadata.csv").write_bytes(table)
    message = refusal(read_metadata, folder)
    assert says in message and str(folder / "metadata.csv") in message


def test_a_prompt_of_two_lines_and_a_quote_in_a_cell_without_quotes_are_read(folder):
    table = 'video,prompt\r\na.mp4,"a ball,\nit is red: a ""ball"""\r\nb.mp4,a "box"\r\n'
    (folder / "metadata.csv").write_text(table, newline="")
    assert [prompt for _, _, prompt in read_metadata(folder)] == ['a ball,\nit is red: a "ball"', 'a "box"']


def test_rows_end_at_line_feeds_only(folder):
    rows = [json.dumps({"video": f"{name}.mp4", "prompt": f"a\u2028{name}\x85\x0b\x1c"}, ensure_ascii=False)
            for name in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert [prompt for _, _, prompt in read_metadata(folder)] == ["a\u2028a\x85\x0b\x1c", "a\u2028b\x85\x0b\x1c"]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("video,prompt\na.mp4,a\u2028a\x85\x0b\x1c\nb.mp4,b\n", encoding="utf-8")
    assert [prompt for _, _, prompt in read_metadata(folder)] == ["a\u2028a\x85\x0b\x1c", "b"]


def test_what_is_not_a_video_does_not_stop_a_run_and_a_video_without_a_row_does(folder):
    (folder / "metadata.csv").write_text(ROWS)
    for name in ("notes.txt", "desktop.ini", "Thumbs.db", "captions.srt", "a.json", "cover.jpg", "README", "x.bin"):
        (folder / name).write_bytes(b"not a video \x00\xff" * 50)
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a caption")
    assert len(read_metadata(folder)) == 2
    for name in ("c.mp4", "c.MP4", "c.bin", "sub/c"):
        content = (folder / "a.mp4").read_bytes()
        (folder / name).write_bytes(content)
        assert f"{name}: a video without a row in {folder}/metadata.csv" in refusal(read_metadata, folder)
        (folder / name).unlink()
    (folder / "c.mp4").write_bytes(b"half a video")
    assert f"{folder}/c.mp4: not a video that can be read" in refusal(read_metadata, folder)
    assert len(read_metadata(folder, skip_damaged=True)) == 2


@pytest.mark.parametrize("row, says", [
    ({"video": "b.mp4", "prompt": "a \ud800 box"}, "'a \\ud800 box' is not UTF-8"),
    ({"video": "b\udcff.mp4", "prompt": "a box"}, "'b\\udcff.mp4' is not UTF-8"),
])
def test_captions_and_names_that_cannot_be_written_are_refused_with_file_and_line(folder, row, says):
    (folder / "metadata.jsonl").write_text('{"video": "a.mp4", "prompt": "a"}\n' + json.dumps(row))
    message = refusal(read_metadata, folder)
    assert message.startswith(f"{folder}/metadata.jsonl:2: ") and says in message


def test_a_colon_in_a_file_name_is_a_file_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    numbered_video("plain.mp4", 2)
    (folder / "plain.mp4").rename(folder / "12:30.mp4")
    (folder / "metadata.csv").write_text(ROWS + "12:30.mp4,half past\n")
    assert [path.name for _, path, _ in read_metadata(".")] == ["a.mp4", "b.mp4", "12:30.mp4"]


def test_stems_are_safe_and_never_meet(tmp_path):
    names = ("plain-1.mp4", "sub/plain-1.mp4", "sub_plain-1.mp4", "grün.mp4", "gr n.mp4", "a.b.mp4",
             "x" * 200 + "1.mp4", "x" * 200 + "2.mp4")
    stems = [stem_of(tmp_path / name, tmp_path) for name in names]
    assert stems[0] == "plain-1" and stems[2] == "sub_plain-1" and len(set(stems)) == 8
    safe = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert all(len(stem) < 100 and set(stem) <= safe for stem in stems)
