import struct
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")

import pictures
import video as videos
from conftest import write_video
from make_videos import grey_levels, moving_square, psnr, refusal
from video import decode_frames, fit, frame_times, nearest_frames, read_clips, read_image, upright


def test_resampling_takes_the_frame_nearest_in_time():
    third = [Fraction(k, 30) for k in range(12)]
    assert nearest_frames(third, Fraction(30)) == list(range(12))  # same rate: every frame once
    assert nearest_frames(third, Fraction(10)) == [0, 3, 6, 9]
    # 8 fps: 0, 3.75, 7.5, 11.25 in frames of 1/30 s; 7.5 lies as near to 7 as to 8, and the earlier is taken
    assert nearest_frames(third, Fraction(8)) == [0, 4, 7, 11]
    assert nearest_frames(third[:3], Fraction(60)) == [0, 0, 1, 1, 2, 2]  # 3 frames are on show for 0.1 s
    # variable rate: frames at 0, 0.1, 0.5 s, asked for at 0, 0.2, 0.4, 0.6 s
    assert nearest_frames([Fraction(0), Fraction(1, 10), Fraction(1, 2)], Fraction(5)) == [0, 1, 2, 2]
    assert nearest_frames([Fraction(7)], Fraction(8)) == [0]


def test_rounded_time_stamps_lose_no_frame():
    milliseconds = [Fraction(round(1000 * k / 16), 1000) for k in range(160)]  # as .mkv and .webm store 16 fps
    assert nearest_frames(milliseconds, Fraction(16)) == list(range(160))
    ntsc = [Fraction(1001 * k, 30000) for k in range(300)]
    assert nearest_frames(ntsc, Fraction(30000, 1001)) == list(range(300))


def test_resampling_by_time_stamps_in_a_real_file(tmp_path):
    # a camera that stalls twice
    levels, stamps = (
        [16 + 20 * k for k in range(10)],
        [0, 40, 80, 120, 500, 540, 580, 620, 1000, 1040],
    )
    path = grey_levels(tmp_path / "a.mp4", levels, stamps)
    assert [round(1000 * time) for time in frame_times(path)] == stamps
    picks = nearest_frames(frame_times(path), Fraction(10))
    # asked for at 0, 100, ... 1000 ms; 100 lies as near to 80 as to 120, 300 and 400 nearest to 120 and 500
    assert picks == [0, 2, 3, 3, 4, 4, 6, 7, 7, 8, 8]
    ((_, clip),) = read_clips(path, picks, [0], len(picks), (8, 8))
    assert torch.allclose(
        (clip.mean(dim=(0, 2, 3)) + 1) * 127.5, torch.tensor([float(levels[k]) for k in picks]), atol=3
    )


@pytest.mark.parametrize(
    "name, codec",
    [("a.mkv", "h264"), ("a.mov", "mpeg4"), ("a.avi", "mpeg4"), ("b.avi", "h264"), ("a.ts", "h264"), ("a.gif", "gif")],
)
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
    ((_, clip),) = read_clips(path, picks, [0], 12, (32, 48))
    # middle of 2k..2k+7
    assert [int(clip[:, k].mean(dim=(0, 1)).topk(8).indices.float().mean().round()) for k in range(12)] == [
        2 * k + 4 for k in range(12)
    ]


def test_packets_without_a_display_time_are_counted_by_their_decoding_time(monkeypatch):
    packets = [
        SimpleNamespace(pts=pts, dts=dts, size=size, is_discard=discard)
        for pts, dts, size, discard in (
            (None, 0, 9, False),
            (3, 1, 9, False),
            (2, 2, 9, False),
            (4, 3, 9, True),
            (None, None, 0, False),
        )
    ]
    stream = SimpleNamespace(time_base=Fraction(1, 10))
    container = SimpleNamespace(streams=SimpleNamespace(video=[stream]), demux=lambda stream: iter(packets))
    monkeypatch.setattr(videos, "open_video", lambda path: nullcontext(container))
    monkeypatch.setattr(videos, "decode_frames", lambda path: iter(["a frame"]))
    # ascending; neither the frame to be discarded nor the empty last packet
    assert frame_times("a.avi") == [
        0,
        Fraction(2, 10),
        Fraction(3, 10),
    ]


def test_clips_that_overlap_are_read_in_one_pass(tmp_path):
    video = moving_square(16)
    write_video(tmp_path / "a.mp4", video, 8)
    clips = dict(read_clips(tmp_path / "a.mp4", list(range(16)), [0, 3, 8], 8, (32, 48)))
    assert list(clips) == [0, 3, 8]
    for start, clip in clips.items():
        assert (
            psnr(clip, video[:, start : start + 8]) > 30 > psnr(clip, video[:, (start + 1) % 9 : (start + 1) % 9 + 8])
        )


def test_fit_scales_to_cover_and_crops_at_the_centre():
    picture = torch.zeros(3, 40, 80)
    picture[0] = torch.linspace(-1, 1, 80)[None, :]  # red tells where from the left, green where from the top
    picture[1] = torch.linspace(-1, 1, 40)[:, None]
    out = fit(picture, (20, 20))  # halved to 20 x 40, then columns 10..29: -0.5 .. 0.5 of the width, the whole height
    assert out.shape == (3, 20, 20)
    assert out[0, 10, [0, -1]].tolist() == pytest.approx([-0.48, 0.48], abs=0.02)
    assert out[1, [0, -1], 10].tolist() == pytest.approx([-0.97, 0.97], abs=0.02)
    tall = fit(picture.transpose(1, 2), (20, 20))
    assert torch.allclose(tall, out.transpose(1, 2), atol=1e-5)
    assert torch.equal(fit(picture, (40, 80)), picture)
    assert fit(picture, (96, 64)).shape == (3, 96, 64)  # larger than the video: scaled up


def test_fit_averages_instead_of_skipping_pixels():
    noise = torch.randint(0, 2, (3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert fit(noise, (8, 8)).std() < 0.25  # a mean of 64 coins has deviation 1/8; one coin, or four, 1 to 1/2


def test_pixels_that_are_not_square_are_shown_in_proportion():
    stored = torch.full((3, 40, 40), -1.0)
    stored[:, 10:30, 15:25] = 1  # 20 high, 10 wide, pixels twice as wide as high: a square
    inside = fit(stored, (40, 40), pixel_aspect=2.0)[0] > 0
    assert inside.any(0).sum() == inside.any(1).sum() == 20


def test_a_picture_becomes_a_frame_of_the_video_the_right_way_up(tmp_path):
    # 16 x 32, the left half white
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow, which diffusers brings").fromarray(
        np.concatenate([np.full((16, 16, 3), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)], axis=1)
    )
    image.save(tmp_path / "a.png")
    expected = torch.ones(3, 16, 32)
    expected[:, :, 16:] = -1
    assert torch.equal(read_image(tmp_path / "a.png", (16, 32)), expected)
    assert torch.equal(read_image(tmp_path / "a.png", (16, 8)), expected[:, :, 12:20])  # covers, then the centre
    turned = image.getexif()
    turned[0x0112] = 6  # a telephone held upright: show it turned clockwise
    image.convert("L").save(tmp_path / "b.png", exif=turned)
    # what was left is above
    assert torch.equal(
        read_image(tmp_path / "b.png", (32, 16)), expected.transpose(1, 2)
    )
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="c.png: not a picture that can be read"):
        read_image(tmp_path / "c.png", (16, 32))


def test_pixel_aspect_and_rotation_are_read_from_the_file(tmp_path):
    path = grey_levels(tmp_path / "wide.mp4", [100] * 3, [0, 100, 200], aspect=Fraction(2))
    assert [aspect for _, aspect in decode_frames(path)] == [2.0] * 3
    picture = torch.full((3, 4, 32, 48), -1.0)
    picture[:, :, :8, :8] = 1  # top left as stored
    write_video(tmp_path / "a.mp4", picture, 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    # the display matrix of the track header: a quarter turn clockwise, as telephones write it
    place = (
        content.index(b"tkhd") + 44
    )
    assert struct.unpack(">9i", content[place : place + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    content[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    shown, aspect = upright(next(decode_frames(tmp_path / "a.mp4"))[0], 2.0)
    assert shown.shape == (3, 48, 32) and aspect == 0.5
    assert shown[:, :7, -7:].mean() > 0.9 and shown[:, :7, :7].mean() < -0.9
