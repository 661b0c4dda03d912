"""
What a person looks at: PNG pictures, contact sheets, HTML pages and mp4 files, each as the bytes of a file.

Videos are tensors (3, F, H, W) with values in [-1, 1], RGB; values outside are clamped.
"""
import io
import struct
import zlib
from base64 import b64encode
from fractions import Fraction
from html import escape

import numpy as np
import torch
from einops import rearrange

# Numbers of colour matrices, as in the standard H.273, and of ranges, as in FFmpeg. BT.709's number is also that of
# its primaries, which are those of sRGB, and of its transfer.
BT709, BT601, LIMITED = 1, 6, 1


def png_chunk(kind, body):
    """One chunk of a PNG file: length, kind (4 bytes), body, checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(height, width):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))    # RGB


def png_pixels(image):
    """image (H, W, 3) uint8, RGB, as the body of a chunk."""
    image = np.ascontiguousarray(image)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    height, width, _ = image.shape
    rows = np.pad(image.reshape(height, width * 3), ((0, 0), (1, 0)))              # a zero before each row: "no filter"
    return zlib.compress(rows.tobytes())


def png(image):
    """image (H, W, 3) uint8, RGB -> the bytes of a PNG file."""
    height, width, _ = image.shape
    return png_header(height, width) + png_chunk(b"IDAT", png_pixels(image)) + png_chunk(b"IEND", b"")


def animated_png(pictures, fps):
    """
    pictures (F, H, W, 3) uint8, RGB -> the bytes of a PNG file that plays them in a loop, `fps` a second, in every
    browser. Viewers that do not know animated PNG show the first picture.
    """
    frames, height, width, _ = pictures.shape
    delay = Fraction(1 / fps).limit_denominator(1000)                               # seconds a picture
    content = png_header(height, width) + png_chunk(b"acTL", struct.pack(">II", frames, 0))     # 0: without end
    number = 0                                                                      # of the next chunk of the animation
    for picture in pictures:
        size_and_place = struct.pack(">IIIII", number, width, height, 0, 0)
        timing = struct.pack(">HHBB", delay.numerator, delay.denominator, 0, 0)
        content += png_chunk(b"fcTL", size_and_place + timing)
        number += 1
        if number == 1:
            content += png_chunk(b"IDAT", png_pixels(picture))
        else:
            content += png_chunk(b"fdAT", struct.pack(">I", number) + png_pixels(picture))
            number += 1
    return content + png_chunk(b"IEND", b"")


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


STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 0.5rem; }
th { font-weight: normal; padding-right: 1rem; text-align: left; }
td { padding: 2px 6px; text-align: right; }
img { display: block; height: 6rem; image-rendering: pixelated; }
"""


def page(title, captions, rows, marks, fps, note=""):
    """
    The bytes of an HTML page that needs no other file and runs no script: the marks, then for every caption one row per
    label with the playing clip and some of its frames.

    captions: list of N. rows: {label: videos, N of (3, F, H, W)}. marks: {label: {name: number or text}}, or empty.
    note: a sentence below the title.
    """
    lines = ["<!DOCTYPE html>", '<html lang="en">', '<meta charset="utf-8">', f"<title>{escape(title)}</title>",
             f"<style>{STYLE}</style>", f"<h1>{escape(title)}</h1>", f"<p>{escape(note)}</p>"]
    if marks:
        names = list(next(iter(marks.values())))
        lines.append("<table>")
        lines.append(f"<tr><th></th>{''.join(f'<td>{escape(name)}</td>' for name in names)}</tr>")
        for label, row in marks.items():
            cells = [value if isinstance(value, str) else f"{value:.3f}" for value in row.values()]
            lines.append(f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        lines.append("</table>")
    height = next(iter(rows.values()))[0].shape[2]
    upscale = max(1, 96 // height)                                                  # lines between frames stay thin
    for number, caption in enumerate(captions):
        lines.append(f"<h2>{escape(caption)}</h2>\n<table>")
        for label, videos in rows.items():
            text = escape(f"{label}: {caption}")
            cells = [f"<th>{escape(label)}</th>"]
            video = videos[number]
            for content in (animated_png(to_rgb(video), fps), contact_sheet([video], upscale=upscale)):
                cells.append(f'<td><img alt="{text}" src="data:image/png;base64,{b64encode(content).decode()}"></td>')
            lines.append(f"<tr>{''.join(cells)}</tr>")
        lines.append("</table>")
    return "\n".join(lines + ["</html>\n"]).encode()


def false_colours(latents, like):
    """
    Latents (N, C, F, H, W), C of at least 3, as RGB videos (N, 3, F, H, W) in [-1, 1]: red, green and blue are the
    three directions in which the latents `like`, of as many channels, vary most. Two standard deviations on either
    side of their mean fill the range.
    """
    pixels = rearrange(like.float(), "n c f h w -> (n f h w) c")
    variances, directions = torch.linalg.eigh(torch.cov(pixels.T))                  # ascending
    spread = variances[-3:].clamp(min=1e-12).sqrt()
    centred = latents.float() - pixels.mean(0).view(-1, 1, 1, 1)
    along = torch.einsum("n c f h w, c k -> n k f h w", centred, directions[:, -3:] / (2 * spread))
    return along.flip(1).clamp(-1, 1)


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
