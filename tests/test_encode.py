import json
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")

import encode
import toy
from conftest import write_video
from data import read_sample, write_sample
from encode import PixelCodec, check_clip, clip_starts, main, parse_args, stem_of
from make_videos import folder_of, moving_square, psnr, refusal
from model import CONFIGS
from video import frame_times, read_clips
from wan_encoders import Encoders


def run(*args):
    main(parse_args([str(arg) for arg in args]))


def test_clips_are_cut_end_to_end_or_by_stride_and_spread_over_the_video():
    assert clip_starts(20, 8, 0, 0) == [0, 8]
    assert clip_starts(16, 8, 0, 0) == [0, 8]
    assert clip_starts(15, 8, 4, 0) == [0, 4]
    assert clip_starts(100, 10, 10, 4) == [0, 20, 50, 70]  # of 0, 10, ... 90
    assert clip_starts(20, 8, 0, 5) == [0, 8]  # no more than there are


def test_a_moving_square_goes_through_mp4_and_samples_and_back(tmp_path):
    video = moving_square(20)
    folder = folder_of(tmp_path, square=video)
    run("--videos", folder, "--out", tmp_path / "real", "--fps", 8, "--size", 32, 48, "--frames", 8)
    files = sorted((tmp_path / "real").iterdir())
    assert [file.name for file in files] == ["square_000000.safetensors", "square_000008.safetensors"]
    for start, file in zip((0, 8), files):
        sample = read_sample(file)
        assert sample["metadata"] == {
            "prompt": "a square",
            "source": "square.mp4",
            "start": str(start),
            "fps": "8",
            "frames": "8",
            "size": "32 48",
            "encoder": "pixel",
        }
        assert torch.equal(sample["context"], toy.encode_text("a square"))
        codec_alone = psnr(
            toy.decode_pixels(toy.encode_pixels(video[:, start : start + 8])), video[:, start : start + 8]
        )
        back = toy.decode_pixels(sample["latents"])
        assert psnr(back, video[:, start : start + 8]) > codec_alone - 0.5  # the mp4 costs next to nothing
        assert psnr(back, video[:, start + 1 : start + 9]) < codec_alone - 3  # one frame off would show

    run("--decode", tmp_path / "real", "--out", tmp_path / "look")
    assert sorted(file.name for file in (tmp_path / "look").iterdir()) == [
        "sheet.png",
        "square_000000.mp4",
        "square_000008.mp4",
    ]
    times = frame_times(tmp_path / "look" / "square_000008.mp4")
    assert len(times) == 8 and times[1] - times[0] == Fraction(1, 8)  # the rate it was cut at
    # 8 times as large
    ((_, shown),) = read_clips(
        tmp_path / "look" / "square_000008.mp4", list(range(8)), [0], 8, (256, 384)
    )
    assert psnr(shown, back.repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)) > 30


def test_a_second_run_makes_only_what_is_missing(tmp_path, monkeypatch, capsys):
    folder, out = folder_of(tmp_path, a=moving_square(16), b=moving_square(8)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    run(*flags, "--limit", 1)
    assert [file.name for file in out.iterdir()] == ["a_000000.safetensors"]
    run(*flags)
    first = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert sorted(first) == ["a_000000.safetensors", "a_000008.safetensors", "b_000000.safetensors"]
    again = read_sample(out / "a_000008.safetensors")
    (out / "a_000008.safetensors").unlink()
    read = []
    monkeypatch.setattr(encode, "read_clips", lambda path, *args: read.append(path.name) or read_clips(path, *args))
    run(*flags)
    assert read == ["a.mp4"] and capsys.readouterr().out.endswith("1 samples written, 2 were there already\n")
    redone = read_sample(out / "a_000008.safetensors")
    assert torch.equal(redone["latents"], again["latents"]) and redone["metadata"] == again["metadata"]
    assert all(
        (out / name).stat().st_mtime_ns == changed for name, changed in first.items() if name != "a_000008.safetensors"
    )


def test_samples_made_with_other_settings_are_not_taken_for_done(tmp_path):
    folder, out = folder_of(tmp_path, a=moving_square(16)), tmp_path / "real"
    run("--videos", folder, "--out", out, "--size", 16, 24)
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    assert "a_000000.safetensors: exists and was made with fps 8, but this run has 4;" in refusal(
        run, *flags, "--fps", 4
    )
    (folder / "metadata.jsonl").write_text('{"video": "a.mp4", "prompt": "another caption"}')
    assert "a_000000.safetensors: exists and was made with prompt a a, but this run has another caption;" in refusal(
        run, *flags
    )


@pytest.mark.parametrize(
    "columns", [("video", "prompt"), ("file_path", "text"), ("video_path", "caption"), ("path", "cap")]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_other_trainers_is_read(tmp_path, columns, kind):
    folder = folder_of(tmp_path, a=moving_square(2))
    (folder / "metadata.jsonl").unlink()
    rows = {
        "jsonl": json.dumps(dict(zip(columns, ("a.mp4", 'a "red" ball, rolling')))) + "\n",
        "csv": f'\ufeff{",".join(columns)},other\na.mp4,"a ""red"" ball, rolling",1\n',
    }
    (folder / f"metadata.{kind}").write_text(rows[kind], encoding="utf-8")
    ((where, path, prompt),) = encode.read_metadata(folder)
    assert (
        where == f"{folder}/metadata.{kind}:{1 if kind == 'jsonl' else 2}"
        and path == folder / "a.mp4"
        and prompt == 'a "red" ball, rolling'
    )


@pytest.mark.parametrize(
    "row, says",
    [
        ('{"prompt": "x"}', "metadata.jsonl:2: no video; expected a column `video`"),
        ('{"video": "b.mp4"}', "metadata.jsonl:2: no prompt for b.mp4"),
        ('{"video": "b.mp4", "prompt": " "}', "metadata.jsonl:2: no prompt for b.mp4"),
        ('{"video": "b.mp4", "prompt": ["x"]}', "metadata.jsonl:2: no prompt for b.mp4"),
        ('{"video": "b.mp4", ', "metadata.jsonl:2: not JSON"),
        ('{"video": "gone.mp4", "prompt": "x"}', "metadata.jsonl:2: no file 'gone.mp4' in"),
        ('{"video": "../out.mp4", "prompt": "x"}', "metadata.jsonl:2: '../out.mp4' leads out of"),
        ('{"video": "a.mp4", "prompt": "x"}', "metadata.jsonl:2: a.mp4 stands in"),
        ('{"video": "text.mp4", "prompt": "x"}', "metadata.jsonl:2: {}/text.mp4: not a video that can be read"),
        ('{"video": "half.mp4", "prompt": "x"}', "metadata.jsonl:2: {}/half.mp4: not a video that can be read"),
        ('{"video": "sound.mp4", "prompt": "x"}', "metadata.jsonl:2: {}/sound.mp4: no video in it"),
        (
            '{"video": "short.mp4", "prompt": "x"}',
            "metadata.jsonl:2: {}/short.mp4 has 7 frames at 8 fps (7 in the file), but a clip has --frames 8;",
        ),
        ('{"video": "sub/../a.mp4", "prompt": "x"}', "metadata.jsonl:2: sub/../a.mp4 stands in"),
        (
            '{"video": "a.avi", "prompt": "x"}',
            "metadata.jsonl:2: the samples of {}/a.avi and {}/a.mp4 would have one name, a;",
        ),
        ("", "b.mp4: a video without a row in"),
    ],
)
def test_bad_rows_and_files_stop_the_run_before_anything_is_encoded(tmp_path, row, says):
    folder = folder_of(tmp_path, a=moving_square(8))
    write_video(tmp_path / "out.mp4", moving_square(8), 8)
    (folder / "sub").mkdir()
    if "text.mp4" in row:
        (folder / "text.mp4").write_text("not a video\n" * 100)
    elif "half.mp4" in row:
        whole = (folder / "a.mp4").read_bytes()
        (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    elif "short.mp4" in row:
        write_video(folder / "short.mp4", moving_square(7), 8)
    elif "a.avi" in row:
        (folder / "a.avi").write_bytes((folder / "a.mp4").read_bytes())
    elif "sound.mp4" in row:
        with av.open(str(folder / "sound.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    elif "b.mp4" in row or not row:
        write_video(folder / "b.mp4", moving_square(8), 8)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(row)
    assert says.replace("{}", str(folder)) in refusal(
        run, "--videos", folder, "--out", tmp_path / "real", "--size", 16, 24
    )
    assert not (tmp_path / "real").exists()


@pytest.mark.parametrize(
    "content",
    [
        "some notes\n" * 50,
        "",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile a.mp4\n",
    ],
)
def test_a_file_that_is_no_video_is_named_and_no_playlist_is_followed(tmp_path, content):
    folder = folder_of(tmp_path, a=moving_square(8))
    (folder / "other.mp4").write_text(content)
    assert f"{folder}/other.mp4: not a video that can be read" in refusal(
        run, "--videos", folder, "--out", tmp_path / "real"
    )
    (folder / "other.mp4").rename(folder / ".other.mp4")  # hidden files are left alone
    run("--videos", folder, "--out", tmp_path / "real")


def test_a_file_that_breaks_in_the_middle_is_named_and_finished_samples_stay(tmp_path):
    noise = torch.rand(3, 32, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder = folder_of(tmp_path, a=moving_square(8), b=noise)
    content = bytearray((folder / "b.mp4").read_bytes())
    start, end = content.index(b"mdat"), content.index(b"moov")
    middle = (start + end) // 2
    # half of the pictures lost, the table of contents whole: seen on decoding only
    content[middle : end - 4] = bytes(
        end - 4 - middle
    )
    (folder / "b.mp4").write_bytes(content)
    says = refusal(run, "--videos", folder, "--out", tmp_path / "real", "--size", 16, 16)
    assert says.startswith(f"{folder}/b.mp4: decoding failed")
    assert sorted(file.name for file in (tmp_path / "real").iterdir()) == [
        "a_000000.safetensors",
        "b_000000.safetensors",
    ]


def test_a_file_with_fewer_frames_than_it_says_is_named(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(16), 8)
    says = refusal(list, read_clips(tmp_path / "a.mp4", list(range(24)), [0, 8, 16], 8, (16, 16)))
    assert says == f"{tmp_path}/a.mp4: only 16 frames could be decoded, 24 are needed; the file is damaged"


@pytest.mark.parametrize(
    "table, says",
    [
        (b"video,prompt\na.mp4\n", "metadata.csv:2: no prompt for a.mp4"),
        (b"video,prompt\n\na.mp4,\n", "metadata.csv:3: no prompt for a.mp4"),
        (
            b"clip,prompt\na.mp4,x\n",
            "metadata.csv:2: no video; expected a column `video` with a file name "
            "(also read: file_path, video_path, path); "
            "the row has ['clip', 'prompt']",
        ),
        (b"video,prompt\na.mp4,gr\xfcn\n", "metadata.csv: not a CSV table in UTF-8 after line"),
        (
            b"video,prompt\na.mp4," + b"x" * 200_000,
            "metadata.csv: not a CSV table in UTF-8 after line 1 (field larger than field limit",
        ),
    ],
)
def test_a_bad_csv_is_named_with_its_line(tmp_path, table, says):
    folder = folder_of(tmp_path, a=moving_square(8))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(table)
    assert says in refusal(run, "--videos", folder, "--out", tmp_path / "real")


def test_flags_that_cannot_be_are_named(tmp_path):
    folder = folder_of(tmp_path, a=moving_square(8))
    flags = ("--videos", folder, "--out", tmp_path / "real")
    assert "--size 30 32: encoder pixel takes heights and widths that are multiples of 8" in refusal(
        run, *flags, "--size", 30, 32
    )
    assert "--frames 0: expected a number above 0" in refusal(run, *flags, "--frames", 0)
    assert "--fps 0: expected a number above 0" in refusal(run, *flags, "--fps", 0)
    assert "--limit -1: expected 0 (no limit) or more" in refusal(run, *flags, "--limit", -1)
    assert f"--videos {tmp_path}/gone: no such folder" in refusal(
        run, "--videos", tmp_path / "gone", "--out", tmp_path / "real"
    )
    assert f"--out {folder}/real: inside --videos" in refusal(run, "--videos", folder, "--out", folder / "real")
    (folder / "metadata.csv").write_text("video,prompt\n")
    assert f"--videos {folder}: both metadata.jsonl and metadata.csv in it; expected one of them" in refusal(
        run, *flags
    )
    (folder / "metadata.jsonl").unlink()
    assert "metadata.csv: no rows" in refusal(run, *flags)
    (folder / "metadata.csv").unlink()
    assert f"--videos {folder}: no metadata.jsonl or metadata.csv in it; expected one of them" in refusal(run, *flags)
    for wrong in (["--out", "x"], ["--out", "x", "--videos", "a", "--decode", "b"], ["--out", "x", "--vid", "a"]):
        with pytest.raises(SystemExit):
            parse_args(wrong)


def test_a_codec_that_needs_4n_plus_1_frames_says_which(tmp_path):
    codecs = Encoders(tmp_path, CONFIGS["wan2.1-t2v-1.3b"], torch.device("cpu"))
    for frames in (1, 5, 81):
        check_clip(codecs, frames, (480, 832))
    assert refusal(check_clip, codecs, 80, (480, 832)) == "--frames 80: encoder wan takes 4n+1 frames; use 77 or 81"
    assert refusal(check_clip, codecs, 0, (480, 832)) == "--frames 0: encoder wan takes 4n+1 frames; use 1 or 5"
    assert "--size 480 830" in refusal(check_clip, codecs, 81, (480, 830))
    check_clip(PixelCodec(), 80, (480, 832))


def test_stems_are_safe_and_never_meet(tmp_path):
    names = (
        "plain-1.mp4",
        "sub/plain-1.mp4",
        "sub_plain-1.mp4",
        "grün.mp4",
        "gr n.mp4",
        "a.b.mp4",
        "x" * 200 + "1.mp4",
        "x" * 200 + "2.mp4",
    )
    stems = [stem_of(tmp_path / name, tmp_path) for name in names]
    assert stems[0] == "plain-1" and stems[2] == "sub_plain-1" and len(set(stems)) == 8
    assert all(
        len(stem) < 100 and set(stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
        for stem in stems
    )


def test_decoding_refuses_what_no_encoder_here_wrote(tmp_path):
    write_sample(tmp_path / "a.safetensors", torch.zeros(4, 2, 4, 4), torch.zeros(1, 5), {})
    assert "a.safetensors: latents of 4 channels; 12 (pixel) can be decoded, and" in refusal(
        run, "--decode", tmp_path, "--out", tmp_path / "look"
    )
    assert f"{tmp_path}/empty: no such folder" in refusal(
        run, "--decode", tmp_path / "empty", "--out", tmp_path / "look"
    )
