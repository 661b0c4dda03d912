"""
What a person looks at.
"""
import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import torch
from einops import rearrange


def png(image):
    """image (H, W, 3) uint8, RGB -> the bytes of a PNG file."""
    image = np.ascontiguousarray(image)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    height, width, _ = image.shape
    rows = np.pad(image.reshape(height, width * 3), ((0, 0), (1, 0)))   # a zero before every row: "no filter"
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content


def to_rgb(video, upscale=1):
    """video (3, F, H, W) in [-1, 1] -> (F, H * upscale, W * upscale, 3) uint8, pixels repeated."""
    video = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(video, "c f h w -> f h w c").repeat_interleave(upscale, 1).repeat_interleave(upscale, 2).cpu().numpy()


def contact_sheet(videos, columns=8, upscale=1, group=0):
    """
    The bytes of a PNG of clips: one row per video (3, F, H, W) in [-1, 1], `columns` of its frames, evenly spread, left to right.
    group > 0 leaves a wider gap after every `group` rows (real, base, trained, real, base, trained: group 3).
    """
    if len({tuple(video.shape) for video in videos}) != 1:
        raise ValueError(f"a contact sheet takes videos of one shape; got {sorted({tuple(video.shape) for video in videos})}")
    frames = videos[0].shape[1]
    shown, rows = torch.linspace(0, frames - 1, min(columns, frames)).round().long(), []
    for number, video in enumerate(videos, start=1):
        gap = 8 if group and number % group == 0 and number < len(videos) else 2
        pictures = np.pad(to_rgb(video[:, shown.to(video.device)], upscale), ((0, 0), (0, gap), (0, 2), (0, 0)), constant_values=255)
        rows.append(rearrange(pictures, "f h w c -> h (f w) c"))
    return png(np.concatenate(rows))


def mp4(video, fps, upscale=1):
    """The bytes of an mp4 (H.264, yuv420p: plays everywhere) of video (3, F, H, W) in [-1, 1]. `upscale`: a whole number, pixels repeated; tiny clips need it."""
    import av
    pictures = to_rgb(video, upscale)
    if pictures.shape[1] % 2 or pictures.shape[2] % 2:
        raise ValueError(f"frames of {pictures.shape[1]} x {pictures.shape[2]} pixels; an mp4 needs even sides (upscale=2 makes them so)")
    rate, buffer = Fraction(fps).limit_denominator(1001), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=rate, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = pictures.shape[1], pictures.shape[2], "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())   # what the encoder still holds
    return buffer.getvalue()
