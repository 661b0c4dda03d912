"""
Real video to samples, and latents back to something to look at.

    python encode.py --videos DIR --out DATA/real --size 48 64 --frames 8 --fps 8
    python encode.py --decode DATA/real --out look
    python encode.py --videos DIR --out DATA/real --encoder wan --weights WAN --model wan2.1-i2v-14b --size 480 832 --frames 81 --fps 16
    python encode.py --decode DATA/real --out look --weights WAN

DIR holds video files (mp4 and what PyAV reads) and a metadata.jsonl or metadata.csv with a row for each: video (its path in DIR), prompt.
Every video is resampled to --fps by the time stamps of its frames, scaled to cover --size, cropped at the centre and cut into clips of --frames, each one
sample file, named after its video and first frame. What can be wrong with the input is said before anything is encoded; a stopped run goes on.

Encoders: `pixel`, the fixed codec of the embedded world (toy.py), which needs no pretrained weights; `wan`, those of the public Wan models (UMT5-XXL,
VAE, CLIP), from an original Wan folder or a diffusers folder. Nothing is ever downloaded.
"""
import argparse
import csv
import hashlib
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import toy
from data import (
    file_inside,
    read_header,
    read_jsonl,
    read_sample,
    read_summaries,
    sample_files,
    write_sample,
    write_whole,
)
from model import CONFIGS
from pictures import contact_sheet, mp4
from wan_encoders import LATENTS, open_encoders

# Demuxers that may open a file. Without this list FFmpeg reads a text file as ANSI art, and playlists that send it to other files or to the network.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,gif,ogg,asf"
VIDEO_COLUMNS = ("video", "file_path", "video_path", "path")   # what other trainers' metadata calls them
PROMPT_COLUMNS = ("prompt", "text", "caption", "cap")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"        # of Wan's encoders


# ------------------------------------------------------------------------------------------------------------------
# metadata: which videos, which prompts

def read_metadata(folder):
    """-> list of (where, video file, prompt), one per video. Every row and every file of the folder is accounted for, or ValueError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: no such folder")
    tables = [path for path in (folder / "metadata.jsonl", folder / "metadata.csv") if path.is_file()]
    if len(tables) != 1:
        raise ValueError(f"--videos {folder}: {'both metadata.jsonl and' if tables else 'no metadata.jsonl or'} metadata.csv in it; "
                         "expected one of them, with columns video and prompt")
    rows, seen = [], {}
    for where, row in read_jsonl(tables[0]) if tables[0].suffix == ".jsonl" else read_csv(tables[0]):
        name, prompt = (next((row[key] for key in keys if row.get(key) is not None), None) for keys in (VIDEO_COLUMNS, PROMPT_COLUMNS))
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: no video; expected a column `video` with a file name (also read: {', '.join(VIDEO_COLUMNS[1:])}); "
                             f"the row has {sorted(map(str, row))}")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: no prompt for {name}; expected text in a column `prompt` (also read: {', '.join(PROMPT_COLUMNS[1:])})")
        path = file_inside(folder, name, where)
        if path.resolve() in seen:
            raise ValueError(f"{where}: {name} stands in {seen[path.resolve()]} already; expected one row per video")
        seen[path.resolve()] = where
        rows.append((where, path, prompt))
    if not rows:
        raise ValueError(f"{tables[0]}: no rows; expected one per video, with video and prompt")
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path not in tables and path.resolve() not in seen:
            frame_times(path)   # says so if it is no video
            raise ValueError(f"{path}: a video without a row in {tables[0]}; add one, or move the file out of --videos")
    return rows


def read_csv(path):
    """-> list of ("file:line", dict), like data.read_jsonl."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            return [(f"{path}:{reader.line_num}", row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV table in UTF-8 after line {reader.line_num} ({error})") from error


def stem_of(path, folder):
    """A file name for the samples of a video, safe anywhere: letters, digits, _ and -; a hash where that changed the name, so that no two meet."""
    name = path.relative_to(folder).with_suffix("").as_posix()
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------------------------
# video files

def open_video(path):
    import av
    return av.open(str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})


def frame_times(path):
    """Display times of all frames, ascending, exact, in seconds. Reads the file's packets and decodes the first frame only."""
    import av
    try:
        with open_video(path) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: no video in it (a {container.format.name} file)")
            stream = container.streams.video[0]
            stamps = [packet.dts if packet.pts is None else packet.pts   # some .avi files know decoding times only
                      for packet in container.demux(stream) if not packet.is_discard]
            times = sorted(stamp * stream.time_base for stamp in stamps if stamp is not None)   # the last packet is an empty one
    except av.FFmpegError as error:
        raise ValueError(f"{path}: not a video that can be read ({error.strerror}); expected mp4, mov, mkv, webm, avi, ...: "
                         "repair it, or move it out of --videos") from error
    if not times or next(decode_frames(path), None) is None:
        raise ValueError(f"{path}: a video without a frame that can be read; repair it, or move it out of --videos")
    return times


def decode_frames(path):
    """Yields (av.VideoFrame, width / height of a pixel as stored) in display order."""
    import av
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield frame, float(stream.sample_aspect_ratio or 1)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: decoding failed ({error.strerror}); the file is damaged: repair it, or move it out of --videos") from error


def nearest_frames(times, fps):
    """
    Resampling by time stamps. times: list of n ascending times in seconds -> for every frame of a video at a constant rate `fps`,
    the index of the frame nearest in time (the earlier of two equally near). Exact with Fractions: no frame slips by rounding.
    """
    interval = (times[-1] - times[0]) / max(1, len(times) - 1)
    picks, index = [], 0
    for k in range(int((times[-1] + interval / 2 - times[0]) * fps) + 1):   # the last frame is on show for about one interval
        target = times[0] + k / fps
        while index + 1 < len(times) and times[index + 1] - target < target - times[index]:
            index += 1
        picks.append(index)
    return picks


def clip_starts(count, frames, stride, clips):
    """First frames of the clips of a video of `count` frames: every `stride` (0: end to end); `clips` of them, spread evenly (0: all)."""
    starts = list(range(0, count - frames + 1, stride or frames))
    return [starts[i * len(starts) // clips] for i in range(clips)] if 0 < clips < len(starts) else starts


def upright(frame, pixel_aspect):
    """av.VideoFrame -> picture (3, h, w) in [-1, 1] as a player would show it, and its pixel aspect: telephones film sideways and say so."""
    turns = round(frame.rotation / 90)                                                                           # counter-clockwise
    rgb = torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"), turns).copy())                       # (h, w, 3)
    return rearrange(rgb, "h w c -> c h w") / 127.5 - 1, 1 / pixel_aspect if turns % 2 else pixel_aspect


def fit(picture, size, pixel_aspect=1.0):
    """picture (3, h, w) -> (3, H, W) = size, square pixels: scaled, proportions kept, until it just covers the size, then cropped at the centre."""
    (height, width), (h, w) = size, picture.shape[1:]
    w = w * pixel_aspect
    scale = max(height / h, width / w)
    h, w = max(height, round(h * scale)), max(width, round(w * scale))
    picture = F.interpolate(picture[None], (h, w), mode="bicubic", antialias=True)[0].clamp(-1, 1)         # bicubic overshoots at edges
    top, left = (h - height) // 2, (w - width) // 2
    return picture[:, top:top + height, left:left + width]


def read_image(path, size):
    """A picture file -> (3, H, W) in [-1, 1], upright, scaled to cover size = (H, W) and cropped at the centre."""
    from PIL import Image, ImageOps  # diffusers brings it
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))                               # (h, w, 3)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that can be read ({error}); expected png, jpg, webp, ...") from error
    return fit(rearrange(torch.from_numpy(pixels), "h w c -> c h w") / 127.5 - 1, size)


def read_clips(path, picks, starts, frames, size):
    """
    Yields (start, video (3, F, H, W) in [-1, 1]) for every start, ascending, in one pass over the file; holds only the clips under way.
    picks: source index of every frame of the resampled video (nearest_frames).
    """
    waiting, clips, k, index = list(starts), {}, 0, -1
    for index, (frame, pixel_aspect) in enumerate(decode_frames(path)):
        picture = None
        while k < len(picks) and picks[k] == index:
            if waiting and waiting[0] == k:
                clips[waiting.pop(0)] = []
            for start in list(clips):
                if picture is None:
                    picture, pixel_aspect = upright(frame, pixel_aspect)
                    picture = fit(picture, size, pixel_aspect)
                clips[start].append(picture)
                if len(clips[start]) == frames:
                    yield start, torch.stack(clips.pop(start), dim=1)
            k += 1
        if not waiting and not clips:
            return
    raise ValueError(f"{path}: only {index + 1} frames could be decoded, {picks[starts[-1] + frames - 1] + 1} are needed; the file is damaged")


# ------------------------------------------------------------------------------------------------------------------
# video to samples

def check_clip(encoder, frames, size, step, multiple):
    """An encoder takes step * n + 1 frames, of sides that are multiples of `multiple`. ValueError, naming the flag, for anything else."""
    if frames < 1 or (frames - 1) % step:
        below = max(0, frames - 1) // step * step + 1
        raise ValueError(f"--frames {frames}: encoder {encoder} takes {step}n+1 frames; use {below} or {below + step}")
    if min(size) < 1 or size[0] % multiple or size[1] % multiple:
        raise ValueError(f"--size {size[0]} {size[1]}: encoder {encoder} takes heights and widths that are multiples of {multiple}")


def plan(args):
    """Looks at all input. -> list of (video file, prompt, picks, [(start, sample file, metadata)]) still to be done, and how many are done."""
    folder, out = Path(args.videos), Path(args.out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out}: inside --videos {folder}, where samples would count as broken videos; choose a folder elsewhere")
    model = {"model": args.model, "text_only": str(args.text_only)} if args.encoder == "wan" else {}
    jobs, stems, total, done = [], {}, 0, 0
    for where, path, prompt in tqdm(read_metadata(folder), desc="looking at videos", disable=None):
        stem = stem_of(path, folder)
        if stem in stems:
            raise ValueError(f"{where}: the samples of {path} and {stems[stem]} would have one name, {stem}; rename one of the videos")
        stems[stem] = path
        try:
            times = frame_times(path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if (times[-1] - times[0]) * args.fps > 1000 * len(times):
            raise ValueError(f"{where}: {path} has {len(times)} frames in {float(times[-1] - times[0]):.0f} s; its time stamps are broken")
        picks = nearest_frames(times, args.fps)
        if len(picks) < args.frames:
            raise ValueError(f"{where}: {path} has {len(picks)} frames at {float(args.fps):g} fps ({len(times)} in the file), "
                             f"but a clip has --frames {args.frames}; lower --frames, raise --fps, or take the video out")
        clips = []
        for start in clip_starts(len(picks), args.frames, args.stride_frames, args.clips_per_video):
            if args.limit and total == args.limit:
                break
            total += 1
            file = out / f"{stem}_{start:06d}.safetensors"
            metadata = {"prompt": prompt, "source": path.relative_to(folder).as_posix(), "start": str(start), "fps": f"{float(args.fps):g}",
                        "frames": str(args.frames), "size": "{} {}".format(*args.size), "encoder": args.encoder} | model
            if file.exists():
                there = read_header(file)["metadata"]
                for key, value in metadata.items():
                    if there.get(key) != value:
                        raise ValueError(f"{file}: exists and was made with {key} {there.get(key, 'unknown')}, but this run has {value}; "
                                         "delete it, or choose another --out")
                done += 1
            else:
                clips.append((start, file, metadata))
        jobs.append((path, prompt, picks, clips))
    return [job for job in jobs if job[3]], done


def encode_folder(args):
    for name in ("fps", "frames", "clips_per_video", "stride_frames", "limit"):
        value, positive = getattr(args, name), name in ("fps", "frames")
        if value < 0 or positive and value == 0:
            raise ValueError(f"--{name} {value}: expected {'a number above 0' if positive else '0 (no limit) or more'}")
    if args.encoder == "pixel":   # any number of frames; blocks of 4x4 pixels in the model's patches of 2x2
        check_clip(args.encoder, args.frames, args.size, step=1, multiple=2 * toy.BLOCK)
        parts, encode_video, encode_text, conditions = (), toy.encode_pixels, toy.encode_text, lambda video: {}
    else:
        if args.model not in CONFIGS or not args.weights:
            raise ValueError(f"--weights {args.weights!r} --model {args.model!r}: encoder wan needs the folder of a Wan model and one of {', '.join(CONFIGS)}")
        encoders = open_encoders(args.weights, CONFIGS[args.model], DEVICE)
        check_clip(args.encoder, args.frames, args.size, step=4, multiple=encoders.multiple)
        kind = encoders.config.model_type
        if args.text_only and kind != "ti2v":
            raise ValueError(f"--text_only: {args.model} is a {kind} model; only a ti2v model does with and without an image")
        parts, encode_video, encode_text = encoders.parts, encoders.encode_video, encoders.encode_text
        conditions = lambda video: encoders.conditions(None if kind == "t2v" or args.text_only else video[:, 0],
                                                       video[:, -1] if kind == "flf2v" else None, args.frames)

    jobs, done = plan(args)
    for part in parts if jobs else ():
        encoders.part(part)   # what is wrong with it is said before anything is encoded
    with tqdm(total=sum(len(job[3]) for job in jobs), desc="encoding", unit="clip", disable=None) as progress:
        for path, prompt, picks, clips in jobs:
            context = encode_text(prompt)                                                      # (T, D)
            files = {start: (file, metadata) for start, file, metadata in clips}
            for start, video in read_clips(path, picks, list(files), args.frames, args.size):  # (3, F, H, W)
                file, metadata = files[start]
                write_sample(file, encode_video(video), context, metadata, **conditions(video))
                progress.update()
    print(f"{args.out}: {progress.total} samples written, {done} were there already")


# ------------------------------------------------------------------------------------------------------------------
# latents to something to look at


def decode_folder(args):
    """Every sample of a folder to an mp4 of its stem, and a contact sheet of the first 16."""
    files, shown = sample_files(args.decode), []
    channels = next(iter(read_summaries(files).values()))[0]["latents"][0]   # the same in all of them, and no two encoders have the same
    if channels == toy.CHANNELS:
        decode = toy.decode_pixels
    elif channels in LATENTS and args.weights:
        decode = open_encoders(args.weights, CONFIGS["wan2.2-ti2v-5b" if channels == 48 else "wan2.1-t2v-1.3b"], DEVICE).decode_video
    else:
        raise ValueError(f"{files[0]}: latents of {channels} channels; {toy.CHANNELS} (pixel) can be decoded, and with --weights DIR 16 and 48 (Wan's VAEs)")
    for path in tqdm(files, desc="decoding", disable=None):
        sample = read_sample(path)
        video = decode(sample["latents"].float())                                # (3, F, H, W)
        upscale = max(1, 256 // min(video.shape[2:]))                            # players blur tiny clips
        write_whole(Path(args.out) / f"{path.stem}.mp4", mp4(video, float(sample["metadata"].get("fps", args.fps)), upscale))
        if len(shown) < 16 and video.shape == (shown or [video])[0].shape:
            shown.append(video)
    write_whole(Path(args.out) / "sheet.png", contact_sheet(shown, upscale=max(1, 128 // min(shown[0].shape[2:]))))
    print(f"{args.out}: {len(files)} videos, and sheet.png with {len(shown)} of them, first file on top")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Video files and prompts to samples; samples to video files.", allow_abbrev=False)
    parser.add_argument("--videos", type=str, default="", help="folder of video files with metadata.jsonl or metadata.csv (video, prompt)")
    parser.add_argument("--decode", type=str, default="", help="instead of --videos: folder of samples, to be turned into mp4 files and a contact sheet")
    parser.add_argument("--out", type=str, required=True, help="folder to write to; samples that are there already are kept")
    parser.add_argument("--encoder", type=str, default="pixel", choices=["pixel", "wan"], help="what turns video and prompts into latents and context")
    parser.add_argument("--weights", type=str, default="", help="wan: an original Wan folder or a diffusers folder, with text encoder, tokenizer and VAE")
    parser.add_argument("--model", type=str, default="", help=f"wan: the model the samples are for, {', '.join(CONFIGS)}; says which VAE and conditions")
    parser.add_argument("--text_only", action="store_true", help="wan2.2-ti2v-5b: no first_latent, so samples for text-to-video")
    parser.add_argument("--fps", type=Fraction, default=Fraction(8), help="frames a second of the samples (29.97 or 30000/1001 will do)")
    parser.add_argument("--size", type=int, nargs=2, default=[32, 32], metavar=("H", "W"), help="pixels; videos are scaled to cover it, then cropped")
    parser.add_argument("--frames", type=int, default=8, help="frames of a sample")
    parser.add_argument("--stride_frames", type=int, default=0, help="frames from the start of one clip of a video to the next; 0: clips stand end to end")
    parser.add_argument("--clips_per_video", type=int, default=0, help="at most so many clips of a video, spread evenly; 0: all")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many samples, those already there included; 0: no limit")
    args = parser.parse_args(argv)
    if bool(args.videos) == bool(args.decode):
        parser.error("give one of --videos and --decode")
    return args


def main(args):
    decode_folder(args) if args.decode else encode_folder(args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"encode.py: {error}")
