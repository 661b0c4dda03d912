import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="real video needs PyAV: pip install -r requirements-video.txt")

import pictures
from conftest import write_video
from make_videos import (
    COLOURS,
    VIDEOS,
    X264,
    colour_bands,
    grey_levels,
    moving_square,
    numbered_video,
    numbers,
    psnr,
    read_all,
    read_bands,
    refusal,
    remux,
)
from video import DamagedVideo, Film, decode_all, decode_frames, fit, look_at, on_show, read_clips, read_image, upright


def film_of(stamps, end, tick=Fraction(1, 1000)):
    return Film(Path("a.mkv"), stamps, end, tick, skip=0, strict=True, by_order=False, notes=())


def damage(path):
    """The errors of look_at and decode_all for a broken file."""
    with pytest.raises(DamagedVideo) as caught:
        decode_all(look_at(path))
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# time is a span

def test_the_picture_at_a_time_is_the_one_on_show_then():
    # pictures begin at 0, 100, 500 ms and the last stays for 200; asked for at 0, 200, 400, 600
    assert on_show(film_of([0, 100, 500], 700), Fraction(5)) == [0, 100, 100, 500]
    # 30 a second as 8: 0, 3.75, 7.5 and 11.25 intervals; the film ends after 12
    third = film_of(list(range(12)), 12, Fraction(1, 30))
    assert on_show(third, Fraction(8)) == [0, 3, 7, 11]
    assert on_show(film_of([7], 8, Fraction(1, 8)), Fraction(8)) == [7]
    assert on_show(film_of([0], 40), Fraction(50)) == [0, 0]


CONSTANT = [
    ("exact", [Fraction(k, 30) for k in range(90)], Fraction(1, 30)),
    ("milliseconds, as .mkv and .webm keep them", [Fraction(k, 30) for k in range(90)], Fraction(1, 1000)),
    ("NTSC", [Fraction(1001 * k, 30000) for k in range(90)], Fraction(1, 90000)),
    ("NTSC in milliseconds from 0.7 ms on", [Fraction(1001 * k, 30000) + Fraction(7, 10000) for k in range(90)],
     Fraction(1, 1000)),
    ("a camera whose clock jitters by 3 ms", [Fraction(k, 30) + Fraction(k % 7 - 3, 1000) for k in range(90)],
     Fraction(1, 90000)),
]


def constant_film(name, times, tick):
    """A film at a constant rate, and the rate."""
    rate = Fraction(30000, 1001) if "NTSC" in name else Fraction(30)
    stamps = [round(time / tick) for time in times]
    return film_of(stamps, stamps[-1] + round(1 / rate / tick), tick), rate


@pytest.mark.parametrize("name, times, tick", CONSTANT)
def test_at_a_constant_rate_and_its_whole_parts_the_frames_are_those_nearest_in_time_as_ever(name, times, tick):
    film, rate = constant_film(name, times, tick)
    for every in (1, 2, 3, 5):
        assert on_show(film, rate / every) == film.stamps[::every], every


@pytest.mark.parametrize("name, times, tick", CONSTANT)
def test_at_a_multiple_of_a_constant_rate_every_frame_comes_as_often(name, times, tick):
    film, rate = constant_film(name, times, tick)
    for times_each in (2, 3):
        assert on_show(film, rate * times_each) == [stamp for stamp in film.stamps for _ in range(times_each)]


def test_resampling_by_time_stamps_in_a_real_file(tmp_path):
    levels = [16 + 20 * k for k in range(10)]
    stamps = [0, 40, 80, 120, 500, 540, 580, 620, 1000, 1040]                 # a camera that stalls twice
    path = grey_levels(tmp_path / "a.mp4", levels, stamps)
    film = look_at(path)
    assert [round(1000 * stamp * film.tick) for stamp in film.stamps] == stamps
    # on show at 0, 100, ... 1000 ms: those of 0, 80, 120, 120, 120, 500, 580, 620, 620, 620, 1000
    picks = on_show(film, Fraction(10))
    assert [film.stamps.index(stamp) for stamp in picks] == [0, 2, 3, 3, 3, 4, 6, 7, 7, 7, 8]
    video = read_all(path, 10, (8, 8))
    expected = torch.tensor([float(levels[film.stamps.index(stamp)]) for stamp in picks])
    assert torch.allclose((video.mean(dim=(0, 2, 3)) + 1) * 127.5, expected, atol=3)


def test_a_picture_that_holds_for_seconds_holds():
    # pictures 3 levels apart at 0, 100, 200, 300 ms, then at 4300, ... 5000, each for 100
    assert numbers(VIDEOS / "long_hold.mkv", fps=10, step=10) == [0, 1, 2] + [3] * 40 + list(range(4, 12))


@pytest.mark.parametrize("name, codec", [
    ("a.mp4", "h264"), ("a.mkv", "h264"), ("a.webm", "libvpx-vp9"), ("a.mov", "h264")])
def test_the_last_picture_stays_for_its_own_duration(tmp_path, name, codec):
    stamps = [0, 40, 80, 500, 520, 1000]
    durations = {0: 40, 40: 40, 80: 420, 500: 20, 520: 480, 1000: 600}
    path = numbered_video(tmp_path / name, 6, 25, codec, {}, stamps, Fraction(1, 1000), durations)
    assert numbers(path, fps=10) == [0, 2, 2, 2, 2, 3, 4, 4, 4, 4] + [5] * 6


# ---------------------------------------------------------------------------------------------------------------------
# packets are not pictures

@pytest.mark.parametrize("name, codec, options", [
    ("a.mkv", "h264", X264), ("a.mp4", "h264", X264), ("a.ts", "h264", X264), ("a.flv", "h264", X264),
    ("a.avi", "h264", X264),                                                   # its pts are in the order of decoding
    ("b.avi", "mpeg4", {"bf": "2", "b": "2M"}), ("a.mov", "mpeg4", {"b": "2M"}), ("b.ts", "mpeg2video", {"bf": "2"}),
    ("b.mkv", "libx265", {"x265-params": "bframes=4:log-level=none"}),
    ("b.webm", "libvpx-vp9", {"lag-in-frames": "16", "auto-alt-ref": "1", "b": "60k", "cpu-used": "8"}),
    ("c.mkv", "ffv1", {}),
])
def test_containers_and_codecs_give_every_frame_in_order(tmp_path, name, codec, options):
    path = numbered_video(tmp_path / name, 30, 25, codec, options)
    assert numbers(path, fps=25) == list(range(30))


def test_a_gif_gives_its_frames_in_order(tmp_path):
    with av.open(str(tmp_path / "a.gif"), "w") as container:
        stream = container.add_stream("gif", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgb8"
        for picture in pictures.to_rgb(moving_square(12)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clip = read_all(tmp_path / "a.gif", 25, (32, 48))
    middles = [int(clip[:, k].mean(dim=(0, 1)).topk(8).indices.float().mean().round()) for k in range(12)]
    assert middles == [2 * k + 4 for k in range(12)]                           # of columns 2k..2k+7


def test_hidden_frames_are_not_counted():
    assert numbers(VIDEOS / "vp8_hidden_frames.webm") == list(range(60))       # 64 packets


def test_hidden_frames_of_vp9_in_packets_of_their_own_are_not_counted(tmp_path):
    from av.bitstream import BitStreamFilterContext
    options = {"lag-in-frames": "25", "auto-alt-ref": "1", "deadline": "realtime", "cpu-used": "7", "b": "200k"}
    numbered_video(tmp_path / "whole.webm", 60, 8, "libvpx-vp9", options)
    with av.open(str(tmp_path / "whole.webm")) as reader, av.open(str(tmp_path / "split.mkv"), "w") as writer:
        stream = reader.streams.video[0]
        split = BitStreamFilterContext("vp9_superframe_split", stream)
        copy = writer.add_stream_from_template(stream)
        count = 0
        for packet in reader.demux(stream):
            for part in split.filter(packet if packet.size else None):
                part.stream = copy
                writer.mux(part)
                count += 1
    assert numbers(tmp_path / "whole.webm") == numbers(tmp_path / "split.mkv") == list(range(60)) and count > 60


@pytest.mark.parametrize("suffix, codec, options", [
    ("ts", "h264", X264 | {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3"}),
    ("mkv", "h264", {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:open-gop=1"}),
    ("mkv", "libx265", {"x265-params": "keyint=12:min-keyint=12:scenecut=0:open-gop=1:log-level=none"}),
    ("ts", "mpeg2video", {"g": "12", "bf": "2"}),
    ("mkv", "mpeg4", {"g": "12", "bf": "2", "b": "2M"}),
    ("mkv", "libvpx-vp9", {"g": "12", "lag-in-frames": "0", "cpu-used": "8"}),
])
def test_a_stream_cut_in_the_middle_of_a_group_begins_at_its_first_whole_picture(tmp_path, suffix, codec, options):
    numbered_video(tmp_path / f"whole.{suffix}", 40, 8, codec, options)
    path = remux(tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}", lambda number, packet: number >= 5)
    shown = numbers(path)
    assert shown == list(range(shown[0], 40)) and 5 <= shown[0] <= 16


def test_a_transport_stream_cut_at_any_byte_begins_at_its_first_whole_picture(tmp_path):
    path = numbered_video(tmp_path / "a.ts", 40, 8, "h264", {"x264-params": "keyint=8:min-keyint=8:scenecut=0"})
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 3:])
    shown = numbers(path)
    assert shown == list(range(shown[0], 40)) and 8 <= shown[0] <= 24


@pytest.mark.parametrize("suffix, codec", [
    ("ts", "h264"), ("mkv", "h264"), ("webm", "libvpx-vp9"), ("mpg", "mpeg2video")])
def test_files_joined_end_to_end_are_refused_by_name(tmp_path, suffix, codec):
    path = numbered_video(tmp_path / f"a.{suffix}", 50, 25, codec, X264 if codec == "h264" else {})
    path.write_bytes(path.read_bytes() * 2)
    says = damage(path)
    assert "time jumps back from" in says and f"ffmpeg -i {path} OUT.mp4" in says


def test_a_transport_stream_joined_with_a_later_one_is_refused_by_name(tmp_path):
    path = numbered_video(tmp_path / "a.ts", 50, 25)
    later = remux(path, tmp_path / "b.ts", shift=Fraction(900))
    path.write_bytes(path.read_bytes() + later.read_bytes())
    assert "time jumps ahead by 898 s" in damage(path)


@pytest.mark.parametrize("codec, frames", [("h264", 2), ("h264", 5), ("libx265", 3), ("libvpx-vp9", 3)])
def test_what_an_edit_list_cuts_off_is_not_shown(tmp_path, codec, frames):
    options = {"libx265": {"x265-params": "bframes=3:log-level=none"}}.get(codec, X264 if codec == "h264" else {})
    numbered_video(tmp_path / "whole.mp4", 30, 8, codec, options)
    path = remux(tmp_path / "whole.mp4", tmp_path / "cut.mp4", shift=Fraction(-frames, 8),
                 options={"use_editlist": "1", "avoid_negative_ts": "disabled"})
    assert numbers(path) == list(range(frames, 30))


def test_a_cover_picture_is_not_the_film(tmp_path):
    from av.stream import Disposition
    film = numbered_video(tmp_path / "film.mp4", 16)
    cover = av.VideoFrame.from_ndarray(np.full((256, 256, 3), 255, np.uint8), format="rgb24")
    cover.pts, cover.time_base = 0, Fraction(1)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
    sound.sample_rate, sound.pts = 16000, 0
    for name, with_film in (("a.mp4", True), ("a.mkv", True), ("song.mp4", False)):
        with av.open(str(film)) as reader, av.open(str(tmp_path / name), "w", format=None) as writer:
            audio = writer.add_stream("aac", rate=16000, layout="mono")        # the sound comes first
            art = writer.add_stream("mjpeg", rate=1)
            art.width = art.height = 256
            art.pix_fmt, art.disposition = "yuvj420p", Disposition.attached_pic
            stream = reader.streams.video[0]
            copy = writer.add_stream_from_template(stream) if with_film else None
            for packet in art.encode(cover) + art.encode() + audio.encode(sound) + audio.encode():
                writer.mux(packet)
            for packet in reader.demux(stream):
                if packet.size and with_film:
                    packet.stream = copy
                    writer.mux(packet)
    assert numbers(tmp_path / "a.mp4") == numbers(tmp_path / "a.mkv") == list(range(16))
    assert "song.mp4: only a cover picture in it" in refusal(look_at, tmp_path / "song.mp4")


def test_interlaced_material_is_noted(tmp_path):
    path = numbered_video(tmp_path / "a.ts", 10, 8, "h264", {"x264-params": "interlaced=1"})
    assert look_at(path).notes == ("interlaced",) and numbers(path) == list(range(10))
    assert look_at(numbered_video(tmp_path / "b.ts", 3)).notes == ()


def test_clips_that_overlap_are_read_in_one_pass(tmp_path):
    video = moving_square(16)
    write_video(tmp_path / "a.mp4", video, 8)
    film = look_at(tmp_path / "a.mp4")
    clips = dict(read_clips(film, decode_all(film), on_show(film, Fraction(8)), [0, 3, 8], 8, (32, 48)))
    assert list(clips) == [0, 3, 8]
    for start, clip in clips.items():
        other = (start + 1) % 9
        assert psnr(clip, video[:, start:start + 8]) > 30 > psnr(clip, video[:, other:other + 8])


@pytest.mark.parametrize("name", ["12:30.mp4", "concat:a.mp4", "http:a.mp4", "a%03d.mp4"])
def test_a_colon_in_a_file_name_is_a_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    numbered_video("plain.mp4", 4)
    Path("plain.mp4").rename(name)
    assert numbers(name) == numbers(tmp_path / name) == [0, 1, 2, 3]


def test_a_title_in_another_encoding_does_not_matter(tmp_path):
    path = numbered_video(tmp_path / "a.mkv", 4, setup=lambda stream: stream.metadata.update(title="a film"))
    path.write_bytes(path.read_bytes().replace(b"a film", b"a f\xfclm"))
    assert numbers(path) == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# damage

def test_flipped_bits_are_refused_by_name():
    assert len(look_at(VIDEOS / "flipped_bits.mkv").stamps) == 64              # looking decodes the first picture only
    assert "is damaged; repair it, move it out of --videos" in damage(VIDEOS / "flipped_bits.mkv")


@pytest.mark.parametrize("codec, options", [("h264", X264), ("h264", {"x264-params": "cabac=0"}), ("mpeg4", {})])
def test_bits_flipped_in_one_picture_are_refused_by_name(tmp_path, codec, options):
    path = numbered_video(tmp_path / "a.mkv", 20, 8, codec, options)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    place, size = max(places[1:], key=lambda entry: entry[1])
    middle = place + size // 2
    content[middle:middle + 40] = bytes(255 - byte for byte in content[middle:middle + 40])
    path.write_bytes(content)
    damage(path)


@pytest.mark.parametrize("name, codec, options", [
    ("a.mp4", "h264", {"movflags": "faststart"}), ("b.mp4", "h264", {"movflags": "frag_keyframe+empty_moov"}),
    ("a.mkv", "h264", {}), ("a.ts", "libx265", {}), ("a.ts", "h264", {}), ("a.webm", "libvpx-vp9", {}),
    ("a.flv", "h264", {}), ("a.avi", "mpeg4", {}), ("c.mp4", "h264", {})])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path, name, codec, options):
    x265 = {"x265-params": "log-level=none"} if codec == "libx265" else None
    path = numbered_video(tmp_path / name, 30, 8, codec, x265, container_options=options)
    content = path.read_bytes()
    for share in (0.55, 0.71, 0.93):
        path.write_bytes(content[:int(len(content) * share) | 1])              # not at the end of a TS packet
        damage(path)


def test_an_flv_file_that_is_cut_off_between_two_pictures_is_refused_by_name(tmp_path):
    path = numbered_video(tmp_path / "a.flv", 20)
    assert len(look_at(path).stamps) == 20
    content = path.read_bytes()
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    for further in (1, 3, 8):                                                  # bytes of the header of a tag
        path.write_bytes(content[:places[12] + further])
        assert "the file is cut off, it ends before it says" in damage(path)


def test_a_picture_that_is_missing_is_refused_by_name(tmp_path):
    path = numbered_video(tmp_path / "a.mp4", 16)
    film = look_at(path)
    film.stamps.insert(5, film.stamps[4] + 1)                                  # a packet that no picture comes of
    says = refusal(decode_all, film)
    assert "16 pictures could be decoded, 17 are expected; the first that is missing is the one at 0.50 s" in says


# ---------------------------------------------------------------------------------------------------------------------
# orientation

# What a player shows of the picture "12 / 34": rows top to bottom, for each matrix (a, b, c, d).
SHOWN = {(1, 0, 0, 1): "12/34", (-1, 0, 0, 1): "21/43", (1, 0, 0, -1): "34/12", (-1, 0, 0, -1): "43/21",
         (0, 1, -1, 0): "31/42", (0, -1, 1, 0): "24/13", (0, 1, 1, 0): "13/24", (0, -1, -1, 0): "42/31"}


def set_display_matrix(path, a, b, c, d):
    """Write the matrix into the track header of an mp4 file."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[place:place + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    content[place:place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("matrix", SHOWN)
def test_all_eight_orientations_are_shown_as_a_player_shows_them(tmp_path, matrix):
    video = torch.zeros(3, 2, 32, 64)
    levels = {"1": -0.8, "2": -0.2, "3": 0.3, "4": 0.8}
    for name, row, column in (("1", 0, 0), ("2", 0, 32), ("3", 16, 0), ("4", 16, 32)):
        video[:, :, row:row + 16, column:column + 32] = levels[name]
    write_video(tmp_path / "a.mp4", video, 8)
    set_display_matrix(tmp_path / "a.mp4", *(value << 16 for value in matrix))
    frame, _ = next(decode_frames(look_at(tmp_path / "a.mp4")))
    picture, aspect = upright(frame, 2.0)
    turned = matrix[0] == 0
    assert picture.shape == ((3, 64, 32) if turned else (3, 32, 64)) and aspect == (0.5 if turned else 2.0)
    height, width = picture.shape[1:]
    rows = []
    for y in (height // 4, 3 * height // 4):
        row = [picture[0, y, x].item() for x in (width // 4, 3 * width // 4)]
        rows.append("".join(min(levels, key=lambda name: abs(levels[name] - value)) for value in row))
    assert "/".join(rows) == SHOWN[matrix]


def test_a_turn_by_another_angle_is_refused_by_name(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(2), 8)
    set_display_matrix(tmp_path / "a.mp4", 46341, 46341, -46341, 46341)        # 45 degrees
    assert "a.mp4: its display matrix is (46341, 46341, -46341, 46341) / 65536" in refusal(look_at, tmp_path / "a.mp4")


def test_pixel_aspect_is_read_from_the_file(tmp_path):
    path = grey_levels(tmp_path / "wide.mp4", [100] * 3, [0, 100, 200], aspect=Fraction(2))
    assert [aspect for _, aspect in decode_frames(look_at(path))] == [2.0] * 3


# ---------------------------------------------------------------------------------------------------------------------
# colours

@pytest.mark.parametrize("matrix, lines, tags, full, bits", [
    ("bt601", 480, (2, 2, 2), False, 8), ("bt709", 720, (2, 2, 2), False, 8), ("bt709", 1080, (2, 2, 2), False, 8),
    ("bt709", 480, (1, 1, 1), False, 8), ("bt601", 720, (6, 6, 6), False, 8), ("bt601", 480, (5, 6, 5), False, 8),
    ("bt709", 480, (1, 1, 1), True, 8), ("bt601", 480, (2, 2, 2), True, 8), ("bt709", 720, (1, 1, 1), True, 8),
    ("bt709", 480, (1, 1, 1), False, 10), ("bt2020", 480, (9, 14, 9), False, 10), ("bt709", 720, (2, 2, 2), False, 10),
])
def test_colours_are_read_by_their_tags_and_untagged_ones_by_their_lines(tmp_path, matrix, lines, tags, full, bits):
    path = colour_bands(tmp_path / "a.mp4", matrix, lines, full, bits, tags, range_tag=2 if full else None)
    assert (read_bands(path) - torch.tensor(COLOURS)).abs().max() <= 3.5


@pytest.mark.parametrize("transfer, name", [(16, "PQ (SMPTE ST 2084)"), (18, "HLG (ARIB STD-B67)")])
def test_high_dynamic_range_is_refused_with_the_command_that_makes_an_sdr_file(tmp_path, transfer, name):
    path = colour_bands(tmp_path / "a.mp4", "bt2020", 64, bits=10, tags=(9, transfer, 9))
    says = refusal(look_at, path)
    assert says.startswith(f"{path}: high dynamic range, its transfer is {name}") and f"ffmpeg -i {path} -vf" in says
    assert "its transfer is PQ" in refusal(look_at, VIDEOS / "hdr_pq.mp4")


def test_a_matrix_that_cannot_be_converted_is_refused_and_wide_colours_are_noted(tmp_path):
    path = colour_bands(tmp_path / "a.mp4", "bt709", 64, tags=(8, 1, 1))       # YCgCo
    assert "its colour matrix is number 8 of H.273" in refusal(look_at, path)
    assert look_at(colour_bands(tmp_path / "b.mp4", "bt709", 64, tags=(1, 1, 12))).notes == ("in wide colours",)


@pytest.mark.parametrize("lines, matrix", [(480, 6), (718, 6), (720, 1), (736, 1)])
def test_written_mp4_files_are_tagged_and_their_colours_come_back(tmp_path, lines, matrix):
    bands = torch.tensor(COLOURS, dtype=torch.float32).repeat_interleave(16, 0).T / 127.5 - 1     # (3, 112)
    write_video(tmp_path / "a.mp4", bands[:, None, None].expand(-1, 2, lines, -1), 8)
    frame, _ = next(decode_frames(look_at(tmp_path / "a.mp4")))
    assert (frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries) == (matrix, 1, 1, 1)
    assert (read_bands(tmp_path / "a.mp4") - torch.tensor(COLOURS)).abs().max() <= 4


# ---------------------------------------------------------------------------------------------------------------------
# pictures

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


@pytest.fixture
def save_and_read(tmp_path):
    """Save an array or a PIL image as a file, read it as --image does: (h, w, 3) in 0..255."""
    Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow, which diffusers brings")

    def save_and_read(name, image, **options):
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(tmp_path / name, **options)
        picture = read_image(tmp_path / name, (image.height, image.width))
        return (picture.permute(1, 2, 0) + 1) * 127.5
    save_and_read.image = Image
    return save_and_read


GREYS = np.tile(np.linspace(0, 1, 16), (16, 1))                                # (16, 16), black to white


@pytest.mark.parametrize("name, pixels, white", [
    ("a.png", (GREYS * 65535).round().astype(np.uint16), 65535),
    ("dark.png", (GREYS * 200).round().astype(np.uint16), 65535),
    ("a.tiff", (GREYS * 65535).round().astype(np.uint16), 65535),
    ("unit.tiff", GREYS.astype(np.float32), 1),
    ("bytes.tiff", (GREYS * 255).astype(np.float32), 255),
    ("words.tiff", (GREYS * 65535).astype(np.float32), 65535),
])
def test_pictures_of_16_bits_and_floats_are_scaled(save_and_read, name, pixels, white):
    picture = save_and_read(name, pixels)
    expected = torch.from_numpy(pixels.astype(np.float32) * (255 / white))[..., None].expand(-1, -1, 3)
    assert (picture - expected).abs().max() < 1


@pytest.mark.parametrize("pixels, says", [
    (GREYS.astype(np.float32) * 3, "mode F with values up to 3; expected 16 bits, or floats with white at 1, 255"),
    (GREYS.astype(np.float32) - 0.5, "with negative or infinite values or NaN"),
    (GREYS.astype(np.float32) * np.nan, "with negative or infinite values or NaN"),
    ((GREYS * 2 ** 24).astype(np.int32), "mode I with values up to"),
])
def test_a_picture_whose_white_is_not_known_is_refused_by_name(save_and_read, pixels, says):
    message = refusal(save_and_read, "a.tiff", pixels)
    assert "a.tiff: not a picture that can be read" in message and says in message


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_behind_what_is_transparent_is_white(save_and_read, mode):
    rgba = np.zeros((8, 16, 4), np.uint8)
    rgba[:, :8] = (200, 200, 200, 0)                                           # hidden
    rgba[:, 8:] = (40, 40, 40, 255)
    image = save_and_read.image.fromarray(rgba)
    if mode == "P":
        palette = save_and_read.image.fromarray(np.repeat(np.uint8([[0] * 8 + [1] * 8]), 8, 0)).convert("P")
        palette.putpalette([200, 200, 200, 40, 40, 40])
        picture = save_and_read("a.png", palette, transparency=0)
    else:
        picture = save_and_read("a.tiff" if mode == "PA" else "a.png", image.convert("LA" if mode == "PA" else mode))
    assert (picture[:, :8] - 255).abs().max() < 0.01 and (picture[:, 8:] - 40).abs().max() < 0.01


def test_half_opaque_pixels_are_mixed_with_white(save_and_read):
    picture = save_and_read("a.png", np.full((8, 8, 4), (100, 0, 200, 51), np.uint8))      # a fifth
    assert torch.allclose(picture[0, 0], torch.tensor([224.0, 204.0, 244.0]), atol=0.01)
