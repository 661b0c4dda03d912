"""
Video and picture files to pictures (3, H, W) in [-1, 1]: which frame when, upright, scaled and cropped.

PyAV and PIL are imported when they are first needed.
"""
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

# Demuxers that may open a file. Without this list FFmpeg reads a text file as ANSI art, and playlists that send it to
# other files or to the network.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,gif,ogg,asf"


# ---------------------------------------------------------------------------------------------------------------------
# video files

def open_video(path):
    import av
    return av.open(str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})


def frame_times(path):
    """
    Display times of all frames, ascending, exact, in seconds. Reads the packets and decodes the first frame only.

    Raises ValueError for what is not a video, or has no frame that can be decoded.
    """
    import av
    try:
        with open_video(path) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: no video in it (a {container.format.name} file)")
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if not packet.is_discard]
            stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]    # some .avi: dts only
            # the last packet is an empty one, without a stamp
            times = sorted(stamp * stream.time_base for stamp in stamps if stamp is not None)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: not a video that can be read ({error.strerror}); "
                         "expected mp4, mov, mkv, webm, avi, ...: repair it, or move it out of --videos") from error
    if not times or next(decode_frames(path), None) is None:
        raise ValueError(f"{path}: a video without a frame that can be read; repair it, or move it out of --videos")
    return times


def decode_frames(path):
    """Yields (av.VideoFrame, width / height of a pixel as stored) in display order. ValueError where decoding fails."""
    import av
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield frame, float(stream.sample_aspect_ratio or 1)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: decoding failed ({error.strerror}); "
                         "the file is damaged: repair it, or move it out of --videos") from error


def nearest_frames(times, fps):
    """
    The index of the frame nearest in time (the earlier of two equally near), for every frame of a constant rate `fps`.

    times: list of n ascending times in seconds. Exact with Fractions: no frame slips by rounding.
    """
    interval = (times[-1] - times[0]) / max(1, len(times) - 1)
    end = times[-1] + interval / 2                                    # the last frame is on show for about one interval
    picks = []
    index = 0
    for k in range(int((end - times[0]) * fps) + 1):
        target = times[0] + k / fps
        while index + 1 < len(times) and times[index + 1] - target < target - times[index]:
            index += 1
        picks.append(index)
    return picks


def read_clips(path, picks, starts, frames, size):
    """
    Yields (start, video (3, F, H, W) in [-1, 1]) for every start, ascending, in one pass; holds the clips under way.

    picks: source index of every frame of the resampled video (nearest_frames); starts: first frames of the clips in it.
    Raises ValueError where the file holds fewer frames than are needed.
    """
    waiting = list(starts)
    clips = {}                                                        # start: its pictures up to now
    k = 0                                                             # frame of the resampled video
    index = -1                                                        # frame of the file
    for index, (frame, pixel_aspect) in enumerate(decode_frames(path)):
        picture = None
        while k < len(picks) and picks[k] == index:
            if waiting and waiting[0] == k:
                clips[waiting.pop(0)] = []
            if clips and picture is None:
                picture, pixel_aspect = upright(frame, pixel_aspect)
                picture = fit(picture, size, pixel_aspect)
            for start in list(clips):
                clips[start].append(picture)
                if len(clips[start]) == frames:
                    yield start, torch.stack(clips.pop(start), dim=1)
            k += 1
        if not waiting and not clips:
            return
    needed = picks[starts[-1] + frames - 1] + 1
    raise ValueError(f"{path}: only {index + 1} frames could be decoded, {needed} are needed; the file is damaged")


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def upright(frame, pixel_aspect):
    """av.VideoFrame -> picture (3, h, w) in [-1, 1] as a player shows it, and its pixel aspect."""
    turns = round(frame.rotation / 90)                                # counter-clockwise
    rgb = np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()    # (h, w, 3)
    if turns % 2:
        pixel_aspect = 1 / pixel_aspect
    return rearrange(torch.from_numpy(rgb), "h w c -> c h w") / 127.5 - 1, pixel_aspect


def fit(picture, size, pixel_aspect=1.0):
    """
    picture (3, h, w) -> (3, H, W) = size, with square pixels.

    It is scaled, proportions kept, until it just covers the size, then cropped at the centre.
    """
    height, width = size
    h, w = picture.shape[1:]
    w = w * pixel_aspect
    scale = max(height / h, width / w)
    h = max(height, round(h * scale))
    w = max(width, round(w * scale))
    picture = F.interpolate(picture[None], (h, w), mode="bicubic", antialias=True)[0]
    top = (h - height) // 2
    left = (w - width) // 2
    return picture.clamp(-1, 1)[:, top:top + height, left:left + width]         # bicubic overshoots at edges


def read_image(path, size):
    """A picture file -> (3, H, W) in [-1, 1], upright, scaled to cover size = (H, W) and cropped at the centre."""
    from PIL import Image, ImageOps                                   # diffusers brings it
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))    # (h, w, 3)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that can be read ({error}); expected png, jpg, webp, ...") from error
    picture = rearrange(torch.from_numpy(pixels), "h w c -> c h w") / 127.5 - 1
    return fit(picture, size)
