"""
Reads video and picture files as pictures (3, H, W) in [-1, 1]: the right one at every time, upright, in the right
colours.

    film = look_at("a.mp4")                                  # when each picture is on show, by the file's packets
    picks = on_show(film, Fraction(16))                      # the picture on show at 0, 1/16, 2/16, ... s, by its stamp
    stamps = decode_all(film)                                # all of it decodes as the packets say, or DamagedVideo
    for start, video in read_clips(film, stamps, picks, [0, 81], 81, (480, 832)): ...

Time is a span: a picture is on show from its time stamp to that of the next one, the last for its own duration. Stamps
are whole ticks of the file's clock, so nothing is rounded on the way.

A faulty file raises ValueError, which names the fault: DamagedVideo where the file is broken. libav does not
notice every flipped bit: in H.264, MPEG-4 and AV1 most, in HEVC, VP8 and VP9 hardly any.
"""
import re
import struct
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

# Demuxers that may open a file. Without this list FFmpeg reads a text file as ANSI art, and playlists that send it to
# other files or to the network.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,gif,ogg,asf"
# Codecs in which every packet becomes one picture, but for hidden frames of VP8 and VP9. In others (MPEG-4, GIF, Theora
# and so on) a packet may say "nothing new", and the picture before it stays on show.
PICTURE_A_PACKET = ("h264", "hevc", "vvc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mjpeg", "prores", "dnxhd",
                    "ffv1", "png")
# Numbers of colour matrices, transfers and primaries, as in the standard H.273.
BT709, BT601 = 1, 5
UNTAGGED = (0, 2, 3)                                                  # 0 is RGB, which has no matrix
MATRICES = (BT709, 4, BT601, 6, 7, 9)                                 # those that swscale converts from
HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
WIDE = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
TO_SDR = ("zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
          "zscale=t=bt709:m=bt709:r=tv,format=yuv420p")
REPAIR = "repair it, move it out of --videos, or leave such videos out with --skip_damaged"


class DamagedVideo(ValueError):
    """A video file is broken: it cannot be opened, or does not decode as its packets say."""


@dataclass(frozen=True)
class Film:
    """
    The pictures of a video file, as its packets announce them.

    stamps: when each picture comes on show, ascending, in ticks; end: when the last one goes; tick: seconds per tick.
    skip: packets before the first that can be decoded, where a stream begins in the middle of a group of pictures.
    strict: every stamp must become a picture. by_order: stamps in the file may be on the wrong pictures, as in AVI.
    notes: what a user should know about the pictures, in words.
    """
    path: Path
    stamps: list
    end: int
    tick: Fraction
    skip: int
    strict: bool
    by_order: bool
    notes: tuple

    def at(self, stamp):
        """The time of a stamp, counted from the first picture, for messages."""
        return f"{float((stamp - self.stamps[0]) * self.tick):.2f} s"


# ---------------------------------------------------------------------------------------------------------------------
# looking at a file: all packets are read, one picture is decoded

def open_video(path):
    import av
    # after "file:" a name with a colon in it is a name, not a protocol
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    return av.open(f"file:{path}", options=options, metadata_errors="replace")            # titles in any encoding


def film_stream(container, path):
    """The stream of the film itself, not that of a cover picture. Raises ValueError where there is none."""
    from av.stream import Disposition
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    films = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not container.streams:
        raise DamagedVideo(f"{path}: not a video that can be read (nothing in it); {REPAIR}")
    if not films:
        contents = "only a cover picture" if container.streams.video else "no video"
        raise ValueError(f"{path}: {contents} in it (a {container.format.name} file)")
    best = container.streams.best("video")
    return best if best in films else films[0]


def demux(container, stream, path):
    """Yields the packets of a stream."""
    try:
        yield from container.demux(stream)
    except IndexError:                                                # PyAV: a stream that the file did not begin with
        raise DamagedVideo(f"{path}: a stream begins in the middle of it; {REPAIR}") from None


def look_at(path):
    """The Film in a file. All packets are read, only the first picture is decoded."""
    import av
    try:
        with open_video(path) as container:
            stream = film_stream(container, path)
            packets = read_packets(container, stream, path)
            if packets.first is None:
                raise DamagedVideo(f"{path}: a video without a picture that can be read; {REPAIR}")
            check_picture(path, packets.first)
            return plan_film(path, container, stream, packets)
    except av.FFmpegError as error:
        raise DamagedVideo(f"{path}: not a video that can be read ({error.strerror}); "
                           f"expected mp4, mov, mkv, webm, avi, ...: {REPAIR}") from error


class Packets(NamedTuple):
    """What the packets of a stream say."""
    first: object                                                     # the first picture, an av.VideoFrame, or None
    times: list                                                       # (stamp, duration) of each that is to become one
    skip: int                                                         # packets before the first key frame
    corrupt: int                                                      # stamp of the first damaged one, or None


def read_packets(container, stream, path):
    """Read all packets and decode the first picture. Raises DamagedVideo where time starts again."""
    if stream.codec_context is None:
        raise ValueError(f"{path}: its codec is not known to PyAV; convert it, or take it out of --videos")
    codec = stream.codec_context.codec.canonical_name
    first = skip = corrupt = None
    times = []
    newest = latest = None                                            # largest pts, last dts of the packets before
    for number, packet in enumerate(demux(container, stream, path)):
        if skip is None and packet.is_keyframe:
            skip = number
        if skip is not None and first is None:
            first = next(iter(packet.decode()), None)                 # the empty packet at the end gives what is left
        stamp = packet.dts if packet.pts is None else packet.pts      # some .avi files know decoding times only
        if stamp is None or packet.size == 0:
            continue
        if jumps_back(packet, stamp, newest, latest):
            raise DamagedVideo(f"{path}: time jumps back from {float(newest * stream.time_base):.2f} s to "
                               f"{float(stamp * stream.time_base):.2f} s, as in files joined end to end; "
                               f"give it one time line (ffmpeg -i {path} OUT.mp4), or leave such videos out "
                               "with --skip_damaged")
        newest = stamp if newest is None else max(newest, stamp)
        latest = latest if packet.dts is None else packet.dts
        if skip is None or packet.is_discard or hides_picture(codec, packet):
            continue
        if packet.is_corrupt and corrupt is None:
            corrupt = stamp
        times.append((stamp, packet.duration or 0))
    return Packets(first, times, skip, corrupt)


def jumps_back(packet, stamp, newest, latest):
    """
    Whether time starts again at this packet.

    newest: the largest stamp before it; a key frame is shown after all pictures that precede it in the file.
    latest: the decoding time before it, which never decreases; a second is granted, since some containers guess it.
    """
    late_key = packet.is_keyframe and newest is not None and stamp < newest
    step_back = packet.dts is not None and latest is not None and packet.dts + 1 / packet.time_base < latest
    return late_key or step_back


def hides_picture(codec, packet):
    """Whether a packet of VP8 or VP9 is only a frame that others are predicted from, never shown itself."""
    if codec not in ("vp8", "vp9"):
        return False
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] >> 4 & 1                                   # show_frame: RFC 6386, section 9.1
    if data[-1] >> 5 == 0b110:                                        # end of a superframe, which shows a frame
        return False
    place = 5 if data[0] >> 4 & 0b11 == 0b11 else 4                   # profile 3 has a reserved bit more
    shows_existing = data[0] >> (7 - place) & 1                       # VP9 bitstream specification, section 6.2
    shows = data[0] >> (5 - place) & 1
    return not shows_existing and not shows


def plan_film(path, container, stream, packets):
    """The Film of a stream. Raises DamagedVideo for a file that is cut off, damaged packets, and time that jumps."""
    first, times, skip, corrupt = packets
    if is_cut_off(path, container.format.name):
        raise DamagedVideo(f"{path}: the file is cut off, it ends before it says; {REPAIR}")
    if first.pts is not None:                                         # pictures before it cannot be decoded
        times = [time for time in times if time[0] >= first.pts]
    if not times:
        raise DamagedVideo(f"{path}: a video without time stamps; {REPAIR}")
    times.sort()
    stamps = [stamp for stamp, _ in times]
    gap = max((after - before for before, after in zip(stamps, stamps[1:])), default=0) * stream.time_base
    if container.format.name in ("mpegts", "mpeg") and gap > 10:      # ffmpeg's own limit, for broadcasts
        raise DamagedVideo(f"{path}: time jumps ahead by {float(gap):.0f} s, as in files joined end to end; "
                           f"give it one time line (ffmpeg -i {path} OUT.mp4), or leave such videos out "
                           "with --skip_damaged")
    if corrupt is not None:
        raise DamagedVideo(f"{path}: the packet at {float(corrupt * stream.time_base):.2f} s is damaged or cut off; "
                           f"{REPAIR}")
    interval = (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1)
    duration = times[-1][1] or first.duration or round(interval) or 1
    end = stamps[-1] + duration
    header_end = matroska_end(container, stream)
    if header_end > end + duration / 2:                               # where the hold of the last picture is kept
        end = header_end
    notes = []
    if first.interlaced_frame:
        notes.append("interlaced")
    if first.color_primaries in WIDE:
        notes.append("in wide colours")
    codec = stream.codec_context.codec.canonical_name
    strict = codec in PICTURE_A_PACKET and not first.interlaced_frame                 # a field may be a packet
    return Film(path, stamps, end, stream.time_base, skip, strict, container.format.name == "avi", tuple(notes))


def matroska_end(container, stream):
    """
    The end of a stream by the header of a Matroska file, in ticks; 0 for other files and where the header does not say.
    """
    if not container.format.name.startswith("matroska"):
        return 0
    ends = [Fraction(container.duration or 0, 10 ** 6)]               # of all streams together
    clock = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if clock:
        hours, minutes, seconds = clock.groups()
        ends.append(int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds))
    elif len(container.streams) > 1:
        return 0
    return int(min(ends) / stream.time_base)


def is_cut_off(path, kind):
    """Whether a file is cut off: its Matroska segment, its RIFF chunk, its last FLV tag or TS packet is not whole."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(4096)
    segment = head.find(b"\x18\x53\x80\x67")
    if kind.startswith("matroska") and 0 <= segment < 4000:
        width = 9 - head[segment + 4].bit_length()                    # bytes of the number that follows, as EBML has it
        unknown = 2 ** (7 * width) - 1
        length = int.from_bytes(head[segment + 4:segment + 4 + width]) & unknown
        return length != unknown and segment + 4 + width + length > size
    if kind == "avi" and head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") > size
    if kind == "flv":
        place = int.from_bytes(head[5:9]) + 4                         # of the first tag
        with open(path, "rb") as file:
            while place < size:
                file.seek(place + 1)
                place += 11 + int.from_bytes(file.read(3)) + 4        # a tag's header, its data, its size again
        return place > size + 4
    if kind == "mpegts":
        for unit, before in ((188, 0), (192, 4), (204, 0)):           # bytes of a packet, and of those before its sync
            for place in range(unit):
                if head[place:place + 2 * unit + 1:unit] == b"GGG":
                    return (size - place + before) % unit != 0
    return False


# ---------------------------------------------------------------------------------------------------------------------
# time

def stamp_slack(film):
    """
    How much later than the start of its picture a stamp may be, in ticks: stamps are rounded, and cameras' clocks
    jitter.

    At a constant rate, where all stamps lie near an even grid, it is a little more than their distance from it, and at
    most a quarter of an interval; otherwise it is half a tick, but 0.05 ms where ticks are finer and 0.5 ms at most.
    """
    stamps = np.array(film.stamps, dtype=np.float64)
    if len(stamps) > 2:
        grid = np.linspace(stamps[0], stamps[-1], len(stamps))
        interval = grid[1] - grid[0]
        deviation = np.abs(stamps - grid).max()
        if deviation == 0:
            return Fraction(0)
        if deviation <= interval / 4:
            return Fraction(min(1.5 * deviation + 1, interval / 4))   # the ends of the grid are rounded themselves
    seconds = min(max(film.tick / 2, Fraction(50, 10 ** 6)), Fraction(500, 10 ** 6))
    return seconds / film.tick


def on_show(film, fps):
    """
    The stamp of the picture on show at 0, 1 / fps, 2 / fps, ... seconds from the first picture to the end of the film.

    fps: a Fraction, the rate to resample to. Raises DamagedVideo for a thousand times more frames than pictures.
    """
    slack = stamp_slack(film)
    step = 1 / (fps * film.tick)                                      # in ticks
    first = film.stamps[0]
    count = max(1, ceil((film.end - first - slack) / step))
    if count > 1000 * len(film.stamps):
        raise DamagedVideo(f"{film.path} has {len(film.stamps)} frames in {film.at(film.end)}; "
                           "its time stamps are broken")
    picks = []
    index = 0
    for k in range(count):
        time = first + k * step + slack
        while index + 1 < len(film.stamps) and film.stamps[index + 1] <= time:
            index += 1
        picks.append(film.stamps[index])
    return picks


# ---------------------------------------------------------------------------------------------------------------------
# decoding

def decode_frames(film, threads="AUTO"):
    """
    Yields (av.VideoFrame, width / height of a pixel as stored) in the order of display.

    threads: AUTO decodes several frames at once; SLICE reports each error where it is. DamagedVideo where libav
    complains.
    """
    import av
    try:
        with open_video(film.path) as container:
            stream = film_stream(container, film.path)
            stream.thread_type = threads
            for number, packet in enumerate(demux(container, stream, film.path)):
                if number < film.skip:
                    continue
                for frame in packet.decode():
                    if frame.is_corrupt:
                        time = "" if frame.pts is None else f" at {film.at(frame.pts)}"
                        raise DamagedVideo(f"{film.path}: the picture{time} is damaged; {REPAIR}")
                    yield frame, float(stream.sample_aspect_ratio or 1)
    except av.FFmpegError as error:
        raise DamagedVideo(f"{film.path}: decoding failed ({error.strerror}); {REPAIR}") from error


def decode_all(film):
    """The stamp of every picture, in order, once the whole file has decoded as its packets say. DamagedVideo if not."""
    own = [frame.pts for frame, _ in decode_frames(film, threads="SLICE")]
    in_order = None not in own and own == sorted(own)
    lost = sorted(set(film.stamps) - set(own))
    if in_order and set(own) <= set(film.stamps) and not (film.strict and lost):
        return own
    if film.by_order and len(own) == len(film.stamps):
        return film.stamps
    if lost:
        raise DamagedVideo(f"{film.path}: {len(own)} pictures could be decoded, {len(film.stamps)} are expected; "
                           f"the first that is missing is the one at {film.at(lost[0])}; {REPAIR}")
    raise DamagedVideo(f"{film.path}: its pictures have other times than its packets, or are not in order; {REPAIR}")


def read_clips(film, stamps, picks, starts, frames, size):
    """
    Yields (start, video (3, F, H, W) in [-1, 1]) for every start, ascending, in one pass; holds the clips under way.

    stamps: of the pictures, as decode_all gives them; picks: of the resampled video, as on_show gives them;
    starts: first frames of the clips in it. DamagedVideo where the file has changed in the meantime.
    """
    waiting = list(starts)
    clips = {}                                                        # start: its pictures up to now
    k = 0                                                             # frame of the resampled video
    for number, (frame, pixel_aspect) in enumerate(decode_frames(film)):
        is_last = number + 1 >= len(stamps)
        picture = None
        while k < len(picks) and (is_last or picks[k] < stamps[number + 1]):
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
    raise DamagedVideo(f"{film.path}: it decoded to {len(stamps)} pictures before and does not any more; {REPAIR}")


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def check_picture(path, frame):
    """Raises ValueError for a picture whose colours or orientation cannot be brought to what a player shows."""
    if frame.is_corrupt:
        raise DamagedVideo(f"{path}: its first picture is damaged; {REPAIR}")
    if frame.color_trc in HDR:
        raise ValueError(f"{path}: high dynamic range, its transfer is {HDR[frame.color_trc]}, and samples are SDR; "
                         f'make an SDR file with: ffmpeg -i {path} -vf "{TO_SDR}" OUT.mp4')
    if not frame.format.is_rgb and frame.colorspace not in UNTAGGED + MATRICES:
        raise ValueError(f"{path}: its colour matrix is number {frame.colorspace} of H.273, which cannot be converted; "
                         "expected BT.601, BT.709 or BT.2020; "
                         f"convert it with: ffmpeg -i {path} -vf scale=out_color_matrix=bt709 OUT.mp4")
    try:
        orientation(frame)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def orientation(frame):
    """
    How to turn a picture: whether to transpose it, then to mirror it left to right, then top to bottom.

    The display matrix (a b u, c d v, x y w) moves the point (x, y) to (a x + c y, b x + d y). ValueError for a matrix
    that is not one of the eight of quarter turns and mirrors; its scale is left out.
    """
    from av.sidedata.sidedata import Type
    side_data = frame.side_data.get(Type.DISPLAYMATRIX)
    if side_data is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data))
    small = max(abs(a), abs(b), abs(c), abs(d)) / 100
    if min(abs(a), abs(d)) > small and max(abs(b), abs(c)) <= small:
        return False, a < 0, d < 0
    if min(abs(b), abs(c)) > small and max(abs(a), abs(d)) <= small:
        return True, c < 0, b < 0
    raise ValueError(f"its display matrix is ({a}, {b}, {c}, {d}) / 65536; expected quarter turns and mirrors")


def rgb_of(frame):
    """av.VideoFrame -> (h, w, 3) uint8 as stored. Untagged pictures from 720 lines or 1280 columns on are BT.709."""
    matrix = None                                                     # the frame's own
    if frame.colorspace in UNTAGGED:
        matrix = BT709 if frame.height >= 720 or frame.width >= 1280 else BT601
    return frame.to_ndarray(format="rgb24", src_colorspace=matrix)


def upright(frame, pixel_aspect):
    """av.VideoFrame -> picture (3, h, w) in [-1, 1] as a player shows it, and its pixel aspect."""
    rgb = rgb_of(frame)
    transpose, mirror, flip = orientation(frame)
    if transpose:
        rgb = rgb.swapaxes(0, 1)
        pixel_aspect = 1 / pixel_aspect
    if mirror:
        rgb = rgb[:, ::-1]
    if flip:
        rgb = rgb[::-1]
    picture = torch.from_numpy(np.ascontiguousarray(rgb))
    return rearrange(picture, "h w c -> c h w") / 127.5 - 1, pixel_aspect


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
    """
    A picture file -> (3, H, W) in [-1, 1], upright, scaled to cover size = (H, W) and cropped at the centre.

    16-bit and float pictures are scaled to this range; transparent parts are put on white.
    """
    from PIL import Image, ImageOps                                   # diffusers brings it
    try:
        with Image.open(path) as image:
            pixels = image_pixels(ImageOps.exif_transpose(image))     # (h, w, 3)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that can be read ({error}); expected png, jpg, webp, ...") from error
    return fit(rearrange(torch.from_numpy(pixels), "h w c -> c h w") / 127.5 - 1, size)


def image_pixels(image):
    """PIL image -> (h, w, 3) float32 in [0, 255]. Raises ValueError for numbers whose white is not known."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64)
        if not np.isfinite(grey).all() or grey.min() < 0:
            raise ValueError(f"a picture in mode {image.mode} with negative or infinite values or NaN")
        white = grey_white(image.mode, grey.max())
        return np.repeat(grey[..., None] * (255 / white), 3, axis=2).astype(np.float32)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")).astype(np.float32)
        opacity = rgba[..., 3:] / 255
        return rgba[..., :3] * opacity + 255 * (1 - opacity)
    return np.asarray(image.convert("RGB")).astype(np.float32)


def grey_white(mode, largest):
    """The value of white in a grey picture of 16-bit integers (modes I and I;16) or floats (F: 1, 255 or 65535)."""
    if mode != "F" and largest <= 65535:
        return 65535
    if mode == "F" and largest <= 1:
        return 1
    if mode == "F" and 16 <= largest <= 65535:
        return 255 if largest <= 255 else 65535
    raise ValueError(f"mode {mode} with values up to {largest:g}; "
                     "expected 16 bits, or floats with white at 1, 255 or 65535")
