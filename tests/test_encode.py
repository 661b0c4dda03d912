import json
import runpy
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")

import encode
import toy
from conftest import ROOT, write_video
from samples import fingerprint, read_empty_caption, read_sample, sample_files, write_sample
from encode import check_clip, clip_starts, main, parse_args
from make_videos import VIDEOS, folder_of, moving_square, numbered_video, psnr, read_all, refusal
from model import CONFIGS
from video import look_at, read_clips
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
    files = sample_files(tmp_path / "real")
    assert [file.name for file in files] == ["square_000000.safetensors", "square_000008.safetensors"]
    for start, file in zip((0, 8), files):
        sample = read_sample(file)
        assert sample["metadata"] == {
            "prompt": "a square", "source": "square.mp4", "start": str(start), "fps": "8", "frames": "8",
            "size": "32 48", "stride_frames": "8", "encoder": "pixel",
            "video_fingerprint": fingerprint([folder / "square.mp4"])}
        assert torch.equal(sample["context"], toy.encode_text("a square"))
        codec_alone = psnr(
            toy.decode_pixels(toy.encode_pixels(video[:, start : start + 8])), video[:, start : start + 8]
        )
        back = toy.decode_pixels(sample["latents"])
        assert psnr(back, video[:, start : start + 8]) > codec_alone - 0.5  # the mp4 costs next to nothing
        assert psnr(back, video[:, start + 1 : start + 9]) < codec_alone - 3  # one frame off would show

    run("--decode", tmp_path / "real", "--out", tmp_path / "look")
    assert sorted(file.name for file in (tmp_path / "look").iterdir()) == [
        "sheet.png", "square_000000.mp4", "square_000008.mp4"]
    film = look_at(tmp_path / "look" / "square_000008.mp4")
    assert len(film.stamps) == 8 and (film.stamps[1] - film.stamps[0]) * film.tick == Fraction(1, 8)  # as it was cut
    shown = read_all(tmp_path / "look" / "square_000008.mp4", 8, (256, 384))  # 8 times as large
    assert psnr(shown, back.repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)) > 30


def test_a_second_run_makes_only_what_is_missing(tmp_path, monkeypatch, capsys):
    folder, out = folder_of(tmp_path, a=moving_square(16), b=moving_square(8)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    run(*flags, "--limit", 1)
    assert [file.name for file in sample_files(out)] == ["a_000000.safetensors"]
    run(*flags)
    first = {file.name: file.stat().st_mtime_ns for file in sample_files(out)}
    assert sorted(first) == ["a_000000.safetensors", "a_000008.safetensors", "b_000000.safetensors"]
    again = read_sample(out / "a_000008.safetensors")
    (out / "a_000008.safetensors").unlink()
    read = []

    def spy(film, *args):
        read.append(film.path.name)
        return read_clips(film, *args)
    monkeypatch.setattr(encode, "read_clips", spy)
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
    "row, says",
    [
        ('{"prompt": "x"}', "metadata.jsonl:2: no video; expected a column `video`"),
        ('{"video": "b.mp4"}', "metadata.jsonl:2: no prompt for b.mp4"),
        ('{"video": "b.mp4", "prompt": " "}', "metadata.jsonl:2: no prompt for b.mp4"),
        ('{"video": "b.mp4", "prompt": ["x"]}', "metadata.jsonl:2: no prompt for b.mp4"),
        ('{"video": "b.mp4", ', "metadata.jsonl:2: not JSON"),
        ('{"video": "gone.mp4", "prompt": "x"}', "metadata.jsonl:2: no file 'gone.mp4' in"),
        ('{"video": "../out.mp4", "prompt": "x"}', "metadata.jsonl:2: '../out.mp4' leads out of"),
        ('{"video": "a.mp4", "prompt": "x"}', "metadata.jsonl:2: a.mp4 is in"),
        ('{"video": "text.mp4", "prompt": "x"}', "metadata.jsonl:2: {}/text.mp4: not a video that can be read"),
        ('{"video": "half.mp4", "prompt": "x"}', "metadata.jsonl:2: {}/half.mp4: not a video that can be read"),
        ('{"video": "sound.mp4", "prompt": "x"}', "metadata.jsonl:2: {}/sound.mp4: no video in it"),
        (
            '{"video": "short.mp4", "prompt": "x"}',
            "metadata.jsonl:2: {}/short.mp4 has 7 frames at 8 fps (7 in the file), but a clip has --frames 8;",
        ),
        ('{"video": "sub/../a.mp4", "prompt": "x"}', "metadata.jsonl:2: sub/../a.mp4 is in"),
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


def test_samples_made_with_another_stride_are_refused_by_name(tmp_path):
    folder, out = folder_of(tmp_path, a=moving_square(16)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    run(*flags, "--stride_frames", 1)
    says = refusal(run, *flags)
    assert "a_000000.safetensors: exists and was made with stride_frames 1, but this run has 8;" in says
    run(*flags, "--stride_frames", 1)  # 0 is --frames
    (out / "a_000000.safetensors").unlink()
    assert "a_000008.safetensors: exists and was made with stride_frames 1" in refusal(run, *flags)


def test_samples_of_a_replaced_video_are_made_anew_and_said(tmp_path, capsys):
    folder, out = folder_of(tmp_path, a=moving_square(16), b=moving_square(8)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 32, 48)
    run(*flags)
    before = read_sample(out / "a_000000.safetensors")["latents"]
    kept = (out / "b_000000.safetensors").stat().st_mtime_ns
    write_video(folder / "a.mp4", -moving_square(8), 8)  # another film, of one clip
    capsys.readouterr()
    run(*flags)
    said = capsys.readouterr().out
    assert "1 samples were made from other videos of the same names and are encoded again" in said
    assert "1 samples that no row asks for: a_000008.safetensors" in said and "1 samples written" in said
    new = read_sample(out / "a_000000.safetensors")
    assert psnr(toy.decode_pixels(new["latents"]), -toy.decode_pixels(before)) > 20
    assert new["metadata"]["video_fingerprint"] == fingerprint([folder / "a.mp4"])
    assert (out / "b_000000.safetensors").stat().st_mtime_ns == kept
    run(*flags)
    assert "0 samples written, 2 were there already" in capsys.readouterr().out


def test_a_sample_that_does_not_know_its_video_is_refused_by_name(tmp_path):
    folder, out = folder_of(tmp_path, a=moving_square(8)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    run(*flags)
    sample = read_sample(out / "a_000000.safetensors")
    del sample["metadata"]["video_fingerprint"]
    write_sample(out / "a_000000.safetensors", sample["latents"], sample["context"], sample["metadata"])
    assert "a_000000.safetensors: exists and was made with video_fingerprint unknown" in refusal(run, *flags)


def test_samples_that_no_row_asks_for_are_named_and_deleted_with_a_flag(tmp_path, capsys):
    folder, out = folder_of(tmp_path, a=moving_square(8), b=moving_square(16)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    run(*flags)
    (folder / "b.mp4").unlink()
    (folder / "metadata.jsonl").write_text('{"video": "a.mp4", "prompt": "a a"}')
    run(*flags)
    said = capsys.readouterr().out
    assert "2 samples that no row asks for: b_000000.safetensors, b_000008.safetensors; they are trained on" in said
    assert len(sample_files(out)) == 3
    run(*flags, "--prune")
    assert "2 samples that no row asks for are deleted: b_000000" in capsys.readouterr().out
    assert [file.name for file in sample_files(out)] == ["a_000000.safetensors"]
    run(*flags, "--limit", 1, "--prune")
    assert "no row asks" not in capsys.readouterr().out


def test_a_limit_does_not_make_samples_unasked(tmp_path, capsys):
    folder, out = folder_of(tmp_path, a=moving_square(8), b=moving_square(16)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    run(*flags)
    run(*flags, "--limit", 1, "--prune")
    assert "no row asks" not in capsys.readouterr().out and len(sample_files(out)) == 3


def test_the_empty_caption_is_stored_with_the_samples(tmp_path):
    folder, out = folder_of(tmp_path, a=moving_square(8)), tmp_path / "real"
    run("--videos", folder, "--out", out, "--size", 16, 24)
    context, metadata = read_empty_caption(out)
    assert torch.equal(context, toy.encode_text("")) and context.shape == (0, 32) and metadata == {"encoder": "pixel"}
    (out / "empty_caption.context").unlink()
    assert read_empty_caption(out) is None
    run("--videos", folder, "--out", out, "--size", 16, 24)  # the samples are there already, the caption is added
    assert read_empty_caption(out) is not None
    (out / "empty_caption.context").write_bytes(b"half")
    assert f"{out}/empty_caption.context: not what encode.py writes" in refusal(read_empty_caption, out)


# damaged videos

@pytest.fixture
def damaged(tmp_path):
    """A folder videos/ with a good film, one with flipped bits, one cut off, one joined from two, and a broken one."""
    folder = folder_of(tmp_path, good=moving_square(16))
    (folder / "flipped.mkv").write_bytes((VIDEOS / "flipped_bits.mkv").read_bytes())
    joined = numbered_video(folder / "joined.ts", 30)
    joined.write_bytes(joined.read_bytes() * 2)
    half = numbered_video(folder / "half.mkv", 30)
    half.write_bytes(half.read_bytes()[:-3000])
    (folder / "broken.mp4").write_bytes((folder / "good.mp4").read_bytes()[:500])
    with open(folder / "metadata.jsonl", "a") as file:
        for path in sorted(folder.iterdir()):
            if path.name not in ("good.mp4", "metadata.jsonl"):
                file.write(json.dumps({"video": path.name, "prompt": "a film"}) + "\n")
    return folder


def test_a_damaged_video_is_refused_by_name_and_none_of_its_samples_is_written(tmp_path):
    folder = folder_of(tmp_path, a=moving_square(8))
    (folder / "b.mkv").write_bytes((VIDEOS / "flipped_bits.mkv").read_bytes())
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"video": "b.mkv", "prompt": "b"}')
    says = refusal(run, "--videos", folder, "--out", tmp_path / "real", "--size", 64, 64)
    assert says.startswith(f"{folder}/b.mkv: the picture at ") and "is damaged" in says
    assert [file.name for file in sample_files(tmp_path / "real")] == ["a_000000.safetensors"]


def test_damaged_videos_are_left_out_counted_and_listed_with_a_flag(tmp_path, damaged, capsys):
    run("--videos", damaged, "--out", tmp_path / "real", "--size", 16, 24, "--skip_damaged")
    said = capsys.readouterr().out
    assert [file.stem for file in sample_files(tmp_path / "real")] == ["good_000000", "good_000008"]
    assert "2 samples written" in said and "4 damaged videos are left out:" in said
    for name in ("flipped.mkv", "joined.ts", "half.mkv", "broken.mp4"):
        assert f"{damaged}/{name}: " in said
    with open(damaged / "metadata.jsonl", "a") as file:
        file.write('{"video": "gone.mp4", "prompt": "x"}')  # other mistakes stay errors
    says = refusal(run, "--videos", damaged, "--out", tmp_path / "real", "--size", 16, 24, "--skip_damaged")
    assert "no file 'gone.mp4'" in says


def test_samples_of_a_video_that_is_damaged_now_are_named_and_pruned(tmp_path, capsys):
    folder, out = folder_of(tmp_path, a=moving_square(8), b=moving_square(64, 64, 192)), tmp_path / "real"
    flags = ("--videos", folder, "--out", out, "--size", 16, 24, "--skip_damaged")
    run(*flags)
    noise = torch.rand(3, 32, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(folder / "b.mp4", noise, 8)
    spoil(folder / "b.mp4")
    capsys.readouterr()
    run(*flags)
    said = capsys.readouterr().out.split("samples written")
    assert "4 samples that no row asks for: b_000032" in said[0]  # the new video is shorter
    assert "4 samples that no row asks for: b_000000" in said[1]  # and damaged
    run(*flags, "--prune")
    assert [file.name for file in sample_files(out)] == ["a_000000.safetensors"]


def spoil(path):
    """An mp4 that has lost half of its pictures but not its table of contents: only decoding shows it."""
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat"), content.index(b"moov")
    middle = (start + end) // 2
    content[middle:end - 4] = bytes(end - 4 - middle)
    path.write_bytes(content)


def test_a_file_that_breaks_in_the_middle_is_named_and_samples_of_others_stay(tmp_path):
    noise = torch.rand(3, 32, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder = folder_of(tmp_path, a=moving_square(8), b=noise)
    spoil(folder / "b.mp4")
    says = refusal(run, "--videos", folder, "--out", tmp_path / "real", "--size", 16, 16)
    assert says.startswith(f"{folder}/b.mp4: ") and "repair it" in says
    assert [file.name for file in sample_files(tmp_path / "real")] == ["a_000000.safetensors"]


def test_interlaced_and_wide_videos_are_named_once(tmp_path, capsys):
    folder = folder_of(tmp_path, a=moving_square(8))
    for name in ("b.ts", "c.ts"):
        numbered_video(folder / name, 8, 8, "h264", {"x264-params": "interlaced=1"})
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"video": "b.ts", "prompt": "b"}\n{"video": "c.ts", "prompt": "c"}')
    run("--videos", folder, "--out", tmp_path / "real", "--size", 16, 24)
    said = capsys.readouterr().out
    assert said.count("interlaced material is encoded as it is stored") == 1
    assert "2 videos, b.ts, c.ts" in said and "bwdif" in said


def test_a_codec_that_needs_4n_plus_1_frames_says_which(tmp_path):
    codecs = Encoders(tmp_path, CONFIGS["wan2.1-t2v-1.3b"], torch.device("cpu"))
    for frames in (1, 5, 81):
        check_clip(codecs, frames, (480, 832))
    assert refusal(check_clip, codecs, 80, (480, 832)) == "--frames 80: encoder wan takes 4n+1 frames; use 77 or 81"
    assert refusal(check_clip, codecs, 0, (480, 832)) == "--frames 0: encoder wan takes 4n+1 frames; use 1 or 5"
    assert "--size 480 830" in refusal(check_clip, codecs, 81, (480, 830))
    check_clip(toy.PixelCodec(), 80, (480, 832))


def test_decoding_refuses_what_no_encoder_here_wrote(tmp_path):
    write_sample(tmp_path / "a.safetensors", torch.zeros(4, 2, 4, 4), torch.zeros(1, 5), {})
    assert "a.safetensors: latents of 4 channels; 12 (pixel) can be decoded, and" in refusal(
        run, "--decode", tmp_path, "--out", tmp_path / "look"
    )
    assert f"{tmp_path}/empty: no such folder" in refusal(
        run, "--decode", tmp_path / "empty", "--out", tmp_path / "look"
    )


def test_without_pyav_the_command_says_what_to_install(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, square=moving_square())
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(sys, "argv", ["encode.py", "--videos", str(folder), "--out", str(tmp_path / "real")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "encode.py"), run_name="__main__")
    assert "av" in end.value.code and "pip install -r requirements-video.txt" in end.value.code
