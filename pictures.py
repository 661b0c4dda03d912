"""
What a person looks at: PNG pictures, contact sheets and mp4 files, each as the bytes of a file.

Videos are tensors (3, F, H, W) with values in [-1, 1], RGB; values outside are clamped.
"""
import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import torch
from einops import rearrange

# Numbers of colour matrices, as in the standard H.273, and of ranges, as in FFmpeg. BT.709's number is also that of
# its primaries, which are those of sRGB, and of its transfer.
BT709, BT601, LIMITED = 1, 6, 1


def png_chunk(kind, body):
    """One chunk of a PNG file: length, kind (4 bytes), body, checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(image):
    """image (H, W, 3) uint8, RGB -> the bytes of a PNG file."""
    image = np.ascontiguousarray(image)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)                  # 8 bits, RGB
    rows = np.pad(image.reshape(height, width * 3), ((0, 0), (1, 0)))              # a zero before each row: "no filter"
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows.tobytes())) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def to_rgb(video, upscale=1):
    """video (3, F, H, W) -> (F, H * upscale, W * upscale, 3) uint8, every pixel repeated `upscale` times each way."""
    video = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pictures = rearrange(video, "c f h w -> f h w c")
    return pictures.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2).cpu().numpy()


def contact_sheet(videos, columns=8, upscale=1, group=0):
    """
    The bytes of a PNG of clips: one row per video (3, F, H, W), `columns` of its frames, evenly spread, left to right.

    group > 0 leaves a wider gap after every `group` rows (real, base, trained, real, base, trained: group 3).
    Raises ValueError for videos of several shapes.
    """
    shapes = sorted({tuple(video.shape) for video in videos})
    if len(shapes) != 1:
        raise ValueError(f"a contact sheet takes videos of one shape; got {shapes}")
    frames = videos[0].shape[1]
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    rows = []
    for number, video in enumerate(videos, start=1):
        group_ends = group and number % group == 0 and number < len(videos)
        gap = 8 if group_ends else 2                                                # white pixels below the row
        pictures = to_rgb(video[:, shown.to(video.device)], upscale)
        pictures = np.pad(pictures, ((0, 0), (0, gap), (0, 2), (0, 0)), constant_values=255)
        rows.append(rearrange(pictures, "f h w c -> h (f w) c"))
    return png(np.concatenate(rows))


def mp4(video, fps, upscale=1):
    """
    The bytes of an mp4 (H.264, yuv420p: plays everywhere) of video (3, F, H, W) at `fps` frames a second.

    The file says how its colours are stored: as BT.709 from 720 lines on, as BT.601 below, as players assume.
    upscale: a whole number, pixels repeated; players blur tiny clips. Raises ValueError for sides still odd after it.
    """
    import av
    pictures = to_rgb(video, upscale)
    _, height, width, _ = pictures.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames of {height} x {width} pixels; an mp4 needs even sides (upscale=2 makes them so)")
    rate = Fraction(fps).limit_denominator(1001)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=rate, options={"crf": "12"})
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        matrix = BT709 if height >= 720 else BT601
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = LIMITED
        stream.codec_context.color_primaries = stream.codec_context.color_trc = BT709
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=LIMITED)
            frame.pts = number
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())                                              # what the encoder still holds
    return buffer.getvalue()
