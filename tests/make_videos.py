"""Small video files of known content, for test_video.py and test_encode.py."""
import json
import math
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from conftest import write_video


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
    rows = [json.dumps({"video": f"{name}.mp4", "prompt": f"a {name}"}) + "\n" for name in videos]
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def refusal(call, *args):
    """The message with which call(*args) is refused."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)
