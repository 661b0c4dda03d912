import os
import json
import math
import struct
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import encode
import pictures
import toy
from data import read_sample, write_sample, write_whole
from pictures import contact_sheet
from encode import check_clip, clip_starts, fit, frame_times, nearest_frames, read_clips, stem_of
from conftest import write_video
from encode import main, parse_args

av = pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")


def moving_square(frames=16, height=32, width=48):
    """A white 8 x 8 square on a dark ground, 2 pixels a frame to the right. (3, F, H, W) in [-1, 1]"""
    video = torch.full((3, frames, height, width), -0.8)
    for k in range(frames):
        video[:, k, 12:20, 2 * k:2 * k + 8] = 0.9
    return video


def grey_levels(path, levels, stamps, codec="h264", time_base=Fraction(1, 1000), aspect=None, size=(32, 32)):
    """A video of flat grey frames, each its own level in 0..255, shown at its own stamp (in units of time_base)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"crf": "0"} if codec == "h264" else {})
        stream.height, stream.width, stream.pix_fmt, stream.time_base = *size, "yuv420p", time_base
        stream.codec_context.time_base = time_base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for level, stamp in zip(levels, stamps):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def psnr(a, b):
    return 10 * math.log10(4 / ((a - b) ** 2).mean().item())   # peak to peak 2


def folder_of(tmp_path, **videos):
    """videos/ with one mp4 at 8 fps for every keyword, and metadata.jsonl."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, video in videos.items():
        write_video(folder / f"{name}.mp4", video, 8)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"video": f"{name}.mp4", "prompt": f"a {name}"}) + "\n" for name in videos))
    return folder


def run(*args):
    main(parse_args([str(arg) for arg in args]))


def refusal(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)


# resampling, cutting, cropping

def test_resampling_takes_the_frame_nearest_in_time():
    third = [Fraction(k, 30) for k in range(12)]
    assert nearest_frames(third, Fraction(30)) == list(range(12))                      # same rate: every frame once
    assert nearest_frames(third, Fraction(10)) == [0, 3, 6, 9]
    # 8 fps: 0, 3.75, 7.5, 11.25 in frames of 1/30 s; 7.5 lies as near to 7 as to 8, and the earlier is taken
    assert nearest_frames(third, Fraction(8)) == [0, 4, 7, 11]
    assert nearest_frames(third[:3], Fraction(60)) == [0, 0, 1, 1, 2, 2]               # 3 frames are on show for 0.1 s
    # variable rate: frames at 0, 0.1, 0.5 s, asked for at 0, 0.2, 0.4, 0.6 s
    assert nearest_frames([Fraction(0), Fraction(1, 10), Fraction(1, 2)], Fraction(5)) == [0, 1, 2, 2]
    assert nearest_frames([Fraction(7)], Fraction(8)) == [0]


def test_rounded_time_stamps_lose_no_frame():
    milliseconds = [Fraction(round(1000 * k / 16), 1000) for k in range(160)]           # as .mkv and .webm store 16 fps
    assert nearest_frames(milliseconds, Fraction(16)) == list(range(160))
    ntsc = [Fraction(1001 * k, 30000) for k in range(300)]
    assert nearest_frames(ntsc, Fraction(30000, 1001)) == list(range(300))


def test_resampling_by_time_stamps_in_a_real_file(tmp_path):
    levels, stamps = [16 + 20 * k for k in range(10)], [0, 40, 80, 120, 500, 540, 580, 620, 1000, 1040]   # a camera that stalls twice
    path = grey_levels(tmp_path / "a.mp4", levels, stamps)
    assert [round(1000 * time) for time in frame_times(path)] == stamps
    picks = nearest_frames(frame_times(path), Fraction(10))
    # asked for at 0, 100, ... 1000 ms; 100 lies as near to 80 as to 120, 300 and 400 nearest to 120 and 500
    assert picks == [0, 2, 3, 3, 4, 4, 6, 7, 7, 8, 8]
    (_, clip), = read_clips(path, picks, [0], len(picks), (8, 8))
    assert torch.allclose((clip.mean(dim=(0, 2, 3)) + 1) * 127.5, torch.tensor([float(levels[k]) for k in picks]), atol=3)


@pytest.mark.parametrize("name, codec", [("a.mkv", "h264"), ("a.mov", "mpeg4"), ("a.avi", "mpeg4"), ("b.avi", "h264"), ("a.ts", "h264"), ("a.gif", "gif")])
def test_other_containers_give_their_frames_in_order(tmp_path, name, codec):
    video, path = moving_square(12), tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgb8" if codec == "gif" else "yuv420p"
        for picture in pictures.to_rgb(video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    picks = nearest_frames(frame_times(path), Fraction(25))
    assert picks == list(range(12))
    (_, clip), = read_clips(path, picks, [0], 12, (32, 48))
    assert [int(clip[:, k].mean(dim=(0, 1)).topk(8).indices.float().mean().round()) for k in range(12)] == [2 * k + 4 for k in range(12)]   # middle of 2k..2k+7


def test_packets_without_a_display_time_are_counted_by_their_decoding_time(monkeypatch):
    packets = [SimpleNamespace(pts=pts, dts=dts, size=size, is_discard=discard)
               for pts, dts, size, discard in ((None, 0, 9, False), (3, 1, 9, False), (2, 2, 9, False), (4, 3, 9, True), (None, None, 0, False))]
    stream = SimpleNamespace(time_base=Fraction(1, 10))
    container = SimpleNamespace(streams=SimpleNamespace(video=[stream]), demux=lambda stream: iter(packets))
    monkeypatch.setattr(encode, "open_video", lambda path: nullcontext(container))
    monkeypatch.setattr(encode, "decode_frames", lambda path: iter(["a frame"]))
    assert frame_times("a.avi") == [0, Fraction(2, 10), Fraction(3, 10)]   # ascending; neither the frame to be discarded nor the empty last packet


def test_clips_are_cut_end_to_end_or_by_stride_and_spread_over_the_video():
    assert clip_starts(20, 8, 0, 0) == [0, 8]
    assert clip_starts(16, 8, 0, 0) == [0, 8]
    assert clip_starts(15, 8, 4, 0) == [0, 4]
    assert clip_starts(100, 10, 10, 4) == [0, 20, 50, 70]   # of 0, 10, ... 90
    assert clip_starts(20, 8, 0, 5) == [0, 8]               # no more than there are


def test_clips_that_overlap_are_read_in_one_pass(tmp_path):
    video = moving_square(16)
    write_video(tmp_path / "a.mp4", video, 8)
    clips = dict(read_clips(tmp_path / "a.mp4", list(range(16)), [0, 3, 8], 8, (32, 48)))
    assert list(clips) == [0, 3, 8]
    for start, clip in clips.items():
        assert psnr(clip, video[:, start:start + 8]) > 30 > psnr(clip, video[:, (start + 1) % 9:(start + 1) % 9 + 8])


def test_fit_scales_to_cover_and_crops_at_the_centre():
    picture = torch.zeros(3, 40, 80)
    picture[0] = torch.linspace(-1, 1, 80)[None, :]      # red tells where from the left, green where from the top
    picture[1] = torch.linspace(-1, 1, 40)[:, None]
    out = fit(picture, (20, 20))                         # halved to 20 x 40, then columns 10..29: -0.5 .. 0.5 of the width, the whole height
    assert out.shape == (3, 20, 20)
    assert out[0, 10, [0, -1]].tolist() == pytest.approx([-0.48, 0.48], abs=0.02)
    assert out[1, [0, -1], 10].tolist() == pytest.approx([-0.97, 0.97], abs=0.02)
    tall = fit(picture.transpose(1, 2), (20, 20))
    assert torch.allclose(tall, out.transpose(1, 2), atol=1e-5)
    assert torch.equal(fit(picture, (40, 80)), picture)
    assert fit(picture, (96, 64)).shape == (3, 96, 64)   # larger than the video: scaled up


def test_fit_averages_instead_of_skipping_pixels():
    noise = torch.randint(0, 2, (3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert fit(noise, (8, 8)).std() < 0.25               # a mean of 64 coins has deviation 1/8; one coin, or four, 1 to 1/2


def test_pixels_that_are_not_square_are_shown_in_proportion():
    stored = torch.full((3, 40, 40), -1.0)
    stored[:, 10:30, 15:25] = 1                          # 20 high, 10 wide, pixels twice as wide as high: a square
    inside = fit(stored, (40, 40), pixel_aspect=2.0)[0] > 0
    assert inside.any(0).sum() == inside.any(1).sum() == 20


def test_a_picture_becomes_a_frame_of_the_video_the_right_way_up(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow, which diffusers brings").fromarray(
        np.concatenate([np.full((16, 16, 3), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)], axis=1))        # 16 x 32, the left half white
    image.save(tmp_path / "a.png")
    expected = torch.ones(3, 16, 32)
    expected[:, :, 16:] = -1
    assert torch.equal(encode.read_image(tmp_path / "a.png", (16, 32)), expected)
    assert torch.equal(encode.read_image(tmp_path / "a.png", (16, 8)), expected[:, :, 12:20])                   # covers, then the centre
    turned = image.getexif()
    turned[0x0112] = 6                                   # a telephone held upright: show it turned clockwise
    image.convert("L").save(tmp_path / "b.png", exif=turned)
    assert torch.equal(encode.read_image(tmp_path / "b.png", (32, 16)), expected.transpose(1, 2))               # what was left is above
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="c.png: not a picture that can be read"):
        encode.read_image(tmp_path / "c.png", (16, 32))


def test_pixel_aspect_and_rotation_are_read_from_the_file(tmp_path):
    path = grey_levels(tmp_path / "wide.mp4", [100] * 3, [0, 100, 200], aspect=Fraction(2))
    assert [aspect for _, aspect in encode.decode_frames(path)] == [2.0] * 3
    picture = torch.full((3, 4, 32, 48), -1.0)
    picture[:, :, :8, :8] = 1                            # top left as stored
    write_video(tmp_path / "a.mp4", picture, 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    place = content.index(b"tkhd") + 44                  # the display matrix of the track header: a quarter turn clockwise, as telephones write it
    assert struct.unpack(">9i", content[place:place + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    content[place:place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    shown, aspect = encode.upright(next(encode.decode_frames(tmp_path / "a.mp4"))[0], 2.0)
    assert shown.shape == (3, 48, 32) and aspect == 0.5
    assert shown[:, :7, -7:].mean() > 0.9 and shown[:, :7, :7].mean() < -0.9


# the command

def test_a_moving_square_goes_through_mp4_and_samples_and_back(tmp_path):
    video = moving_square(20)
    folder = folder_of(tmp_path, square=video)
    run("--videos", folder, "--out", tmp_path / "real", "--fps", 8, "--size", 32, 48, "--frames", 8)
    files = sorted((tmp_path / "real").iterdir())
    assert [file.name for file in files] == ["square_000000.safetensors", "square_000008.safetensors"]
    for start, file in zip((0, 8), files):
        sample = read_sample(file)
        assert sample["metadata"] == {"prompt": "a square", "source": "square.mp4", "start": str(start),
                                      "fps": "8", "frames": "8", "size": "32 48", "encoder": "pixel"}
        assert torch.equal(sample["context"], toy.encode_text("a square"))
        codec_alone = psnr(toy.decode_pixels(toy.encode_pixels(video[:, start:start + 8])), video[:, start:start + 8])
        back = toy.decode_pixels(sample["latents"])
        assert psnr(back, video[:, start:start + 8]) > codec_alone - 0.5                    # the mp4 costs next to nothing
        assert psnr(back, video[:, start + 1:start + 9]) < codec_alone - 3                  # one frame off would show

    run("--decode", tmp_path / "real", "--out", tmp_path / "look")
    assert sorted(file.name for file in (tmp_path / "look").iterdir()) == ["sheet.png", "square_000000.mp4", "square_000008.mp4"]
    times = frame_times(tmp_path / "look" / "square_000008.mp4")
    assert len(times) == 8 and times[1] - times[0] == Fraction(1, 8)                        # the rate it was cut at
    (_, shown), = read_clips(tmp_path / "look" / "square_000008.mp4", list(range(8)), [0], 8, (256, 384))   # 8 times as large
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
    assert all((out / name).stat().st_mtime_ns == changed for name, changed in first.items() if name != "a_000008.safetensors")


def test_samples_made_with_other_settings_are_not_taken_for_done(tmp_path):
    folder, out = folder_of(tmp_path, a=moving_square(16)), tmp_path / "real"
    run("--videos", folder, "--out", out, "--size", 16, 24)
    flags = ("--videos", folder, "--out", out, "--size", 16, 24)
    assert "a_000000.safetensors: exists and was made with fps 8, but this run has 4;" in refusal(run, *flags, "--fps", 4)
    (folder / "metadata.jsonl").write_text('{"video": "a.mp4", "prompt": "another caption"}')
    assert "a_000000.safetensors: exists and was made with prompt a a, but this run has another caption;" in refusal(run, *flags)


@pytest.mark.parametrize("columns", [("video", "prompt"), ("file_path", "text"), ("video_path", "caption"), ("path", "cap")])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_other_trainers_is_read(tmp_path, columns, kind):
    folder = folder_of(tmp_path, a=moving_square(2))
    (folder / "metadata.jsonl").unlink()
    rows = {"jsonl": json.dumps(dict(zip(columns, ("a.mp4", 'a "red" ball, rolling')))) + "\n",
            "csv": f'\ufeff{",".join(columns)},other\na.mp4,"a ""red"" ball, rolling",1\n'}
    (folder / f"metadata.{kind}").write_text(rows[kind], encoding="utf-8")
    (where, path, prompt), = encode.read_metadata(folder)
    assert where == f"{folder}/metadata.{kind}:{1 if kind == 'jsonl' else 2}" and path == folder / "a.mp4" and prompt == 'a "red" ball, rolling'


@pytest.mark.parametrize("row, says", [
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
    ('{"video": "short.mp4", "prompt": "x"}', "metadata.jsonl:2: {}/short.mp4 has 7 frames at 8 fps (7 in the file), but a clip has --frames 8;"),
    ('{"video": "sub/../a.mp4", "prompt": "x"}', "metadata.jsonl:2: sub/../a.mp4 stands in"),
    ('{"video": "a.avi", "prompt": "x"}', "metadata.jsonl:2: the samples of {}/a.avi and {}/a.mp4 would have one name, a;"),
    ("", "b.mp4: a video without a row in"),
])
def test_bad_rows_and_files_stop_the_run_before_anything_is_encoded(tmp_path, row, says):
    folder = folder_of(tmp_path, a=moving_square(8))
    write_video(tmp_path / "out.mp4", moving_square(8), 8)
    (folder / "sub").mkdir()
    if "text.mp4" in row:
        (folder / "text.mp4").write_text("not a video\n" * 100)
    elif "half.mp4" in row:
        whole = (folder / "a.mp4").read_bytes()
        (folder / "half.mp4").write_bytes(whole[:len(whole) // 2])
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
    assert says.replace("{}", str(folder)) in refusal(run, "--videos", folder, "--out", tmp_path / "real", "--size", 16, 24)
    assert not (tmp_path / "real").exists()


@pytest.mark.parametrize("content", ["some notes\n" * 50, "",
                                     "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile a.mp4\n"])
def test_a_file_that_is_no_video_is_named_and_no_playlist_is_followed(tmp_path, content):
    folder = folder_of(tmp_path, a=moving_square(8))
    (folder / "other.mp4").write_text(content)
    assert f"{folder}/other.mp4: not a video that can be read" in refusal(run, "--videos", folder, "--out", tmp_path / "real")
    (folder / "other.mp4").rename(folder / ".other.mp4")   # hidden files are left alone
    run("--videos", folder, "--out", tmp_path / "real")


def test_a_file_that_breaks_in_the_middle_is_named_and_finished_samples_stay(tmp_path):
    noise = torch.rand(3, 32, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder = folder_of(tmp_path, a=moving_square(8), b=noise)
    content = bytearray((folder / "b.mp4").read_bytes())
    start, end = content.index(b"mdat"), content.index(b"moov")
    middle = (start + end) // 2
    content[middle:end - 4] = bytes(end - 4 - middle)   # half of the pictures lost, the table of contents whole: seen on decoding only
    (folder / "b.mp4").write_bytes(content)
    says = refusal(run, "--videos", folder, "--out", tmp_path / "real", "--size", 16, 16)
    assert says.startswith(f"{folder}/b.mp4: decoding failed")
    assert sorted(file.name for file in (tmp_path / "real").iterdir()) == ["a_000000.safetensors", "b_000000.safetensors"]


def test_a_file_with_fewer_frames_than_it_says_is_named(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(16), 8)
    says = refusal(list, read_clips(tmp_path / "a.mp4", list(range(24)), [0, 8, 16], 8, (16, 16)))
    assert says == f"{tmp_path}/a.mp4: only 16 frames could be decoded, 24 are needed; the file is damaged"


@pytest.mark.parametrize("table, says", [
    (b"video,prompt\na.mp4\n", "metadata.csv:2: no prompt for a.mp4"),
    (b"video,prompt\n\na.mp4,\n", "metadata.csv:3: no prompt for a.mp4"),
    (b"clip,prompt\na.mp4,x\n", "metadata.csv:2: no video; expected a column `video` with a file name (also read: file_path, video_path, path); "
                                  "the row has ['clip', 'prompt']"),
    (b"video,prompt\na.mp4,gr\xfcn\n", "metadata.csv: not a CSV table in UTF-8 after line"),
    (b"video,prompt\na.mp4," + b"x" * 200_000, "metadata.csv: not a CSV table in UTF-8 after line 1 (field larger than field limit"),
])
def test_a_bad_csv_is_named_with_its_line(tmp_path, table, says):
    folder = folder_of(tmp_path, a=moving_square(8))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(table)
    assert says in refusal(run, "--videos", folder, "--out", tmp_path / "real")


def test_flags_that_cannot_be_are_named(tmp_path):
    folder = folder_of(tmp_path, a=moving_square(8))
    flags = ("--videos", folder, "--out", tmp_path / "real")
    assert "--size 30 32: encoder pixel takes heights and widths that are multiples of 8" in refusal(run, *flags, "--size", 30, 32)
    assert "--frames 0: expected a number above 0" in refusal(run, *flags, "--frames", 0)
    assert "--fps 0: expected a number above 0" in refusal(run, *flags, "--fps", 0)
    assert "--limit -1: expected 0 (no limit) or more" in refusal(run, *flags, "--limit", -1)
    assert f"--videos {tmp_path}/gone: no such folder" in refusal(run, "--videos", tmp_path / "gone", "--out", tmp_path / "real")
    assert f"--out {folder}/real: inside --videos" in refusal(run, "--videos", folder, "--out", folder / "real")
    (folder / "metadata.csv").write_text("video,prompt\n")
    assert f"--videos {folder}: both metadata.jsonl and metadata.csv in it; expected one of them" in refusal(run, *flags)
    (folder / "metadata.jsonl").unlink()
    assert "metadata.csv: no rows" in refusal(run, *flags)
    (folder / "metadata.csv").unlink()
    assert f"--videos {folder}: no metadata.jsonl or metadata.csv in it; expected one of them" in refusal(run, *flags)
    for wrong in (["--out", "x"], ["--out", "x", "--videos", "a", "--decode", "b"], ["--out", "x", "--vid", "a"]):
        with pytest.raises(SystemExit):
            parse_args(wrong)


def test_a_codec_that_needs_4n_plus_1_frames_says_which():
    for frames in (1, 5, 81):
        check_clip("wan", frames, (480, 832), step=4, multiple=16)
    assert refusal(check_clip, "wan", 80, (480, 832), 4, 16) == "--frames 80: encoder wan takes 4n+1 frames; use 77 or 81"
    assert refusal(check_clip, "wan", 0, (480, 832), 4, 16) == "--frames 0: encoder wan takes 4n+1 frames; use 1 or 5"
    assert "--size 480 830" in refusal(check_clip, "wan", 81, (480, 830), 4, 16)


def test_stems_are_safe_and_never_meet(tmp_path):
    names = ("plain-1.mp4", "sub/plain-1.mp4", "sub_plain-1.mp4", "grün.mp4", "gr n.mp4", "a.b.mp4", "x" * 200 + "1.mp4", "x" * 200 + "2.mp4")
    stems = [stem_of(tmp_path / name, tmp_path) for name in names]
    assert stems[0] == "plain-1" and stems[2] == "sub_plain-1" and len(set(stems)) == 8
    assert all(len(stem) < 100 and set(stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for stem in stems)


def test_decoding_refuses_what_no_encoder_here_wrote(tmp_path):
    write_sample(tmp_path / "a.safetensors", torch.zeros(4, 2, 4, 4), torch.zeros(1, 5), {})
    assert "a.safetensors: latents of 4 channels; 12 (pixel) can be decoded, and" in refusal(run, "--decode", tmp_path, "--out", tmp_path / "look")
    assert f"{tmp_path}/empty: no such folder" in refusal(run, "--decode", tmp_path / "empty", "--out", tmp_path / "look")


def test_an_mp4_needs_even_sides_and_leaves_no_half_file(tmp_path, monkeypatch):
    assert "frames of 15 x 16 pixels; an mp4 needs even sides" in refusal(write_video, tmp_path / "a.mp4", torch.zeros(3, 2, 15, 16), 8)
    write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 15, 17), 8, upscale=2)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))     # killed when all but the last step is done
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "b.mp4", torch.zeros(3, 2, 16, 16), 8)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_contact_sheet_shows_rows_of_evenly_spread_frames(tmp_path):
    levels = torch.linspace(-1, 0.9, 15)
    videos = [levels[None, :, None, None].expand(3, 15, 4, 6), torch.full((3, 15, 4, 6), -1.0), torch.full((3, 15, 4, 6), 0.1)]
    write_whole(tmp_path / "sheet.png", contact_sheet(videos, columns=3, upscale=2, group=2))
    with av.open(str(tmp_path / "sheet.png")) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape == ((8 + 2) + (8 + 8) + (8 + 2), 3 * (12 + 2), 3)           # the wider gap stands after the second row
    assert [image[4, x, 0] for x in (6, 20, 34)] == [0, 121, 242]                  # frames 0, 7 and 14 of the first video: 127.5 * (1 + [-1, -0.05, 0.9])
    assert (image[:8, 12:14] == 255).all() and (image[18:26] == 255).all()          # white lines between
    assert image[14, 6, 0] == 0 and image[30, 6, 0] == 140
    assert "takes videos of one shape" in refusal(contact_sheet, [torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 6)])
