"""Small video files of known content, for test_video.py and test_encode.py; tests/videos/ holds some made elsewhere."""
import json
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from conftest import write_video
from video import decode_all, look_at, on_show, read_clips

VIDEOS = Path(__file__).parent / "videos"
STEP = 3                                             # grey levels between two numbered frames
X264 = {"x264-params": "keyint=12:bframes=3:scenecut=0"}


def moving_square(frames=16, height=32, width=48):
    """A white 8 x 8 square on a dark ground, 2 pixels a frame to the right. (3, F, H, W) in [-1, 1]"""
    video = torch.full((3, frames, height, width), -0.8)
    for k in range(frames):
        video[:, k, 12:20, 2 * k:2 * k + 8] = 0.9
    return video


def numbered_frame(number, size=(64, 64)):
    """A grey picture of mean level 16 + STEP * number, with a texture, so that codecs have work to do."""
    texture = np.random.RandomState(number % 5).randint(-12, 13, size)
    level = np.clip(16 + STEP * number + texture - texture.mean(), 0, 255).round().astype(np.uint8)
    return av.VideoFrame.from_ndarray(np.repeat(level[..., None], 3, axis=2), format="rgb24")


def numbered_video(path, count=30, fps=8, codec="h264", options=None, stamps=None, time_base=None, durations=None,
                   pix_fmt="yuv420p", size=(64, 64), container_options=None, setup=None):
    """
    A file of `count` numbered frames at `fps`, or at `stamps` in units of time_base.

    durations: {stamp: duration} for the container; setup(stream) is called before encoding.
    """
    if options is None:
        options = X264 if codec == "h264" else {}
    if codec in ("h264", "libx265"):
        options = {"crf": "10"} | options            # levels must come back
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1         # several write other bytes each time
        if time_base:
            stream.time_base = stream.codec_context.time_base = time_base
        if setup:
            setup(stream)
        packets = []
        for number in range(count):
            frame = numbered_frame(number, size)
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = time_base or Fraction(1, fps)
            packets += stream.encode(frame)
        for packet in packets + stream.encode():
            if durations:
                packet.duration = durations.get(packet.pts, packet.duration or 0)
            container.mux(packet)
    return path


def remux(source, target, keep=lambda number, packet: True, shift=0, options=None):
    """Copy the packets of a video that keep(number, packet) to another file, `shift` seconds (a Fraction) later."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options or {}) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        number = 0
        for packet in reader.demux(stream):
            if packet.size == 0:
                continue
            if keep(number, packet):
                packet.pts += int(shift / stream.time_base)
                packet.dts += int(shift / stream.time_base)
                packet.stream = copy
                writer.mux(packet)
            number += 1
    return target


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


def read_all(path, fps, size=(32, 32)):
    """The whole video, resampled: (3, F, H, W) in [-1, 1]."""
    film = look_at(path)
    picks = on_show(film, Fraction(fps))
    ((_, video),) = read_clips(film, decode_all(film), picks, [0], len(picks), size)
    return video


def numbers(path, fps=8, step=STEP):
    """The numbers of the frames of the whole video, resampled."""
    level = (read_all(path, fps).mean(dim=(0, 2, 3)) + 1) * 127.5
    return ((level - 16) / step).round().int().tolist()


def psnr(a, b):
    return 10 * math.log10(4 / ((a - b) ** 2).mean().item())   # peak to peak 2


def folder_of(tmp_path, **videos):
    """A folder videos/ with one mp4 at 8 fps for every keyword, and metadata.jsonl."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, video in videos.items():
        write_video(folder / f"{name}.mp4", video, 8)
    rows = [json.dumps({"video": f"{name}.mp4", "prompt": f"a {name}"}) + "\n" for name in videos]
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def refusal(call, *args):
    """The message with which call(*args) is refused."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# colours

COLOURS = [(235, 30, 30), (30, 200, 60), (40, 60, 220), (220, 210, 40), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}   # of red and of blue


def to_yuv(rgb, matrix, full=False, bits=8):
    """The Y, Cb and Cr of a colour in 0..255, as H.273 defines them."""
    red_weight, blue_weight = WEIGHTS[matrix]
    red, green, blue = (value / 255 for value in rgb)
    luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    cb = (blue - luma) / 2 / (1 - blue_weight)
    cr = (red - luma) / 2 / (1 - red_weight)
    unit, top = 2 ** (bits - 8), 2 ** bits - 1
    if full:
        values = luma * top, cb * top + 128 * unit, cr * top + 128 * unit
    else:
        values = (16 + 219 * luma) * unit, (128 + 224 * cb) * unit, (128 + 224 * cr) * unit
    return [min(top, round(value)) for value in values]


def colour_bands(path, matrix, lines, full=False, bits=8, tags=(2, 2, 2), range_tag=None):
    """
    A lossless film of one frame, `lines` high, with the COLOURS as vertical bands of 16 pixels.

    tags: numbers of H.273 for matrix, transfer, primaries; 2 is untagged.
    """
    pix_fmt = "yuv420p" if bits == 8 else "yuv420p10le"
    frame = av.VideoFrame(16 * len(COLOURS), lines, pix_fmt)
    bands = np.array([to_yuv(colour, matrix, full, bits) for colour in COLOURS], "u1" if bits == 8 else "<u2")
    for plane, values in zip(frame.planes, bands.T):
        row = np.zeros(plane.line_size // values.itemsize, values.dtype)
        row[:plane.width] = np.repeat(values, plane.width // len(COLOURS))
        plane.update(np.tile(row, plane.height).tobytes())
    frame.pts, frame.time_base = 0, Fraction(1, 8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=8, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries = tags
        if range_tag:
            context.color_range = range_tag
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_bands(path):
    """The colours of colour_bands(path) as they are read, (7, 3) in 0..255."""
    film = look_at(path)
    height, width = film_size(path)
    ((_, video),) = read_clips(film, decode_all(film), on_show(film, Fraction(8)), [0], 1, (height, width))
    picture = (video[:, 0] + 1) * 127.5
    return picture[:, height // 2, 8::16].T


def film_size(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width
