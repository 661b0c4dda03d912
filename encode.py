"""
Real video to samples, and latents back to something to look at.

    python encode.py --videos DIR --out DATA/real --size 48 64 --frames 8 --fps 8
    python encode.py --decode DATA/real --out look
    python encode.py --videos DIR --out DATA/real --encoder wan --weights WAN --model wan2.1-i2v-14b \
        --size 480 832 --frames 81 --fps 16
    python encode.py --decode DATA/real --out look --weights WAN

DIR holds video files (mp4 and what PyAV reads) and a metadata.jsonl or metadata.csv with a row for each: video (its
path in DIR), prompt. Every video is resampled to --fps by the time stamps of its frames, scaled to cover --size,
cropped at the centre and cut into clips of --frames. Each clip is one sample file, named after its video and first
frame. What can be wrong with the input is said before anything is encoded; a stopped run resumes.

Encoders: `pixel`, the fixed codec of the embedded world (toy.py), which needs no pretrained weights; `wan`, those of
the public Wan models (UMT5-XXL, VAE, CLIP), from an original Wan folder or a diffusers folder. Nothing is downloaded.
"""
import argparse
import csv
import hashlib
import os
import re
import sys
from codecs import BOM_UTF8
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

import toy
import wan_encoders
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
from video import frame_times, nearest_frames, read_clips

VIDEO_COLUMNS = ("video", "file_path", "video_path", "path")          # what other trainers' metadata calls them
PROMPT_COLUMNS = ("prompt", "text", "caption", "cap")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"               # of Wan's encoders


# ---------------------------------------------------------------------------------------------------------------------
# text: prompts

def check_text(where, text):
    """ValueError unless the text, of an argument or a file's name, can be written as UTF-8."""
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {str(text)!r:.200} is not UTF-8 ({error.reason}), as all text in samples is; "
                         "write it in UTF-8, or rename the file") from error


def read_lines(path):
    """Yield (file:line, text) of a text file in UTF-8, with or without a byte order mark, split at line feeds only."""
    content = Path(path).read_bytes().removeprefix(BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            yield f"{path}:{number}", line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error}); save the file as UTF-8") from error


def looks_like_path(text):
    """Whether an argument is rather a path than a prompt: it exists, or is one word with a slash or a suffix."""
    one_word = text.isascii() and len(text.split()) == 1
    return os.path.exists(text) or one_word and ("/" in text or re.search(r"\w\.[A-Za-z]\w{1,4}$", text) is not None)


def read_prompts(arguments):
    """
    The prompts that --prompts gives: each argument is one, or a .txt file with a prompt a line; blank lines are none.

    ValueError for a file that is missing, empty or named twice, and for another path, which is not a prompt.
    """
    prompts, files = [], set()
    for argument in arguments:
        check_text("--prompts", argument)
        if not argument.lower().endswith(".txt"):
            if looks_like_path(argument):
                raise ValueError(f"--prompts {argument}: this looks like a path; expected prompts or .txt files (if it "
                                 "is a prompt, write it into a .txt file)")
            prompts.append(argument)
            continue
        if not os.path.isfile(argument):
            raise ValueError(f"--prompts {argument}: no such file; expected a .txt file with a prompt a line")
        if Path(argument).resolve() in files:
            raise ValueError(f"--prompts {argument}: named twice; name it once, or repeat its lines in the file")
        files.add(Path(argument).resolve())
        lines = [line.strip() for _, line in read_lines(argument) if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {argument}: the file has no line with a prompt")
        prompts += lines
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# metadata: which videos, which prompts

def read_metadata(folder):
    """
    List of (file:line, video file, prompt), one per video.

    Every row and every file of the folder is accounted for; ValueError names the one that is not.
    """
    folder = Path(folder)
    table = find_table(folder)
    rows = []
    row_of = {}                                                       # real path of a video: where its row is
    for where, row in read_jsonl(table) if table.suffix == ".jsonl" else read_csv(table):
        name, prompt = read_row(where, row)
        path = file_inside(folder, name, where)
        earlier = row_of.setdefault(path.resolve(), where)
        if earlier != where:
            raise ValueError(f"{where}: {name} stands in {earlier} already; expected one row per video")
        rows.append((where, path, prompt))
    if not rows:
        raise ValueError(f"{table}: no rows; expected one per video, with video and prompt")
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path != table and path.resolve() not in row_of:
            frame_times(path)                                         # says so if it is not a video
            raise ValueError(f"{path}: a video without a row in {table}; add one, or move the file out of --videos")
    return rows


def find_table(folder):
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: no such folder")
    tables = [path for path in (folder / "metadata.jsonl", folder / "metadata.csv") if path.is_file()]
    if len(tables) != 1:
        got = "both metadata.jsonl and" if tables else "no metadata.jsonl or"
        raise ValueError(f"--videos {folder}: {got} metadata.csv in it; "
                         "expected one of them, with columns video and prompt")
    return tables[0]


def first_of(row, columns):
    """The first of these columns that a row has, or None."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def read_row(where, row):
    """The video's file name and the prompt in a row of the table."""
    name = first_of(row, VIDEO_COLUMNS)
    prompt = first_of(row, PROMPT_COLUMNS)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: no video; expected a column `video` with a file name "
                         f"(also read: {', '.join(VIDEO_COLUMNS[1:])}); the row has {sorted(map(str, row))}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: no prompt for {name}; expected text in a column `prompt` "
                         f"(also read: {', '.join(PROMPT_COLUMNS[1:])})")
    return name, prompt


def read_csv(path):
    """List of ("file:line", dict), like data.read_jsonl."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            return [(f"{path}:{reader.line_num}", row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV table in UTF-8 after line {reader.line_num} ({error})") from error


def stem_of(path, folder):
    """
    A file name for the samples of a video, safe anywhere: letters, digits, _ and -.

    Where that changed the name, a hash of it is added, so that no two videos share one.
    """
    name = path.relative_to(folder).with_suffix("").as_posix()
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80]
    if safe == name:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------------------------------------
# codecs

class PixelCodec:
    """The embedded world's codec (toy.py) under the names of wan_encoders.Encoders; nothing is loaded or freed."""
    name = "pixel"
    frame_step = 1                                                    # any number of frames
    multiple = 2 * toy.BLOCK                                          # blocks of 4 x 4 pixels in patches of 2 x 2
    parts = ()
    encode_text = staticmethod(toy.encode_text)
    encode_video = staticmethod(toy.encode_pixels)

    def part(self, name):
        return None

    def free(self, name):
        return None

    def decode_video(self, latents):
        return toy.decode_pixels(latents).clamp(-1, 1)

    def conditions(self, first, last, frames):
        return {}


def open_codecs(config, weights, device=DEVICE):
    """What turns prompts, pictures and videos of a model into numbers and back. weights: folder of Wan's encoders."""
    if config.vae == "embedded":
        return PixelCodec()
    return wan_encoders.open_encoders(weights, config, device)


def check_clip(codecs, frames, size):
    """
    ValueError, naming the flag, for a clip that the codecs do not take.

    They take frame_step * n + 1 frames, of sides that are multiples of codecs.multiple.
    """
    step = codecs.frame_step
    if frames < 1 or (frames - 1) % step:
        below = max(0, frames - 1) // step * step + 1
        raise ValueError(f"--frames {frames}: encoder {codecs.name} takes {step}n+1 frames; "
                         f"use {below} or {below + step}")
    if min(size) < 1 or size[0] % codecs.multiple or size[1] % codecs.multiple:
        raise ValueError(f"--size {size[0]} {size[1]}: encoder {codecs.name} takes heights and widths that are "
                         f"multiples of {codecs.multiple}")


# ---------------------------------------------------------------------------------------------------------------------
# video to samples

@dataclass(frozen=True)
class Clip:
    start: int                                                        # its first frame in the resampled video
    file: Path                                                        # of its sample
    metadata: dict


@dataclass(frozen=True)
class Job:
    """The clips of one video that are still to be encoded."""
    video: Path
    prompt: str
    picks: list                                                       # index in the file of each resampled frame
    clips: list


def clip_starts(count, frames, stride, clips):
    """
    First frames of the clips of a video of `count` frames.

    One every `stride` frames (0: end to end); at most `clips` of them, spread evenly (0: all).
    """
    starts = list(range(0, count - frames + 1, stride or frames))
    if not 0 < clips < len(starts):
        return starts
    return [starts[i * len(starts) // clips] for i in range(clips)]


def look_at(where, path, args):
    """The index in the file of each frame of the resampled video. Raises ValueError for a video that gives no clip."""
    try:
        times = frame_times(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    seconds = times[-1] - times[0]
    if seconds * args.fps > 1000 * len(times):
        raise ValueError(f"{where}: {path} has {len(times)} frames in {float(seconds):.0f} s; "
                         "its time stamps are broken")
    picks = nearest_frames(times, args.fps)
    if len(picks) < args.frames:
        raise ValueError(f"{where}: {path} has {len(picks)} frames at {float(args.fps):g} fps "
                         f"({len(times)} in the file), but a clip has --frames {args.frames}; "
                         "lower --frames, raise --fps, or take the video out")
    return picks


def is_done(clip):
    """Whether the sample exists. Raises ValueError where it was made with other settings."""
    if not clip.file.exists():
        return False
    metadata = read_header(clip.file)["metadata"]
    for key, value in clip.metadata.items():
        if metadata.get(key) != value:
            raise ValueError(f"{clip.file}: exists and was made with {key} {metadata.get(key, 'unknown')}, "
                             f"but this run has {value}; delete it, or choose another --out")
    return True


def plan(args):
    """Look at all input. -> list of Jobs, number of samples that exist already."""
    folder, out = Path(args.videos), Path(args.out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out}: inside --videos {folder}, where samples would count as broken videos; "
                         "choose a folder elsewhere")
    settings = {"fps": f"{float(args.fps):g}", "frames": str(args.frames), "size": f"{args.size[0]} {args.size[1]}",
                "encoder": args.encoder}
    if args.encoder == "wan":
        settings |= {"model": args.model, "text_only": str(args.text_only)}
    jobs = []
    video_of = {}                                                     # stem: video
    total = done = 0
    for where, path, prompt in tqdm(read_metadata(folder), desc="looking at videos", disable=None):
        stem = stem_of(path, folder)
        if stem in video_of:
            raise ValueError(f"{where}: the samples of {path} and {video_of[stem]} would have one name, {stem}; "
                             "rename one of the videos")
        video_of[stem] = path
        picks = look_at(where, path, args)
        job = Job(path, prompt, picks, [])
        for start in clip_starts(len(picks), args.frames, args.stride_frames, args.clips_per_video):
            if args.limit and total == args.limit:
                break
            total += 1
            source = path.relative_to(folder).as_posix()
            metadata = {"prompt": prompt, "source": source, "start": str(start), **settings}
            clip = Clip(start, out / f"{stem}_{start:06d}.safetensors", metadata)
            if is_done(clip):
                done += 1
            else:
                job.clips.append(clip)
        if job.clips:
            jobs.append(job)
    return jobs, done


def check_flags(args):
    for name in ("fps", "frames"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number above 0")
    for name in ("clips_per_video", "stride_frames", "limit"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 0 (no limit) or more")
    if args.encoder == "wan" and (args.model not in CONFIGS or not args.weights):
        raise ValueError(f"--weights {args.weights!r} --model {args.model!r}: encoder wan needs "
                         f"the folder of a Wan model and one of {', '.join(CONFIGS)}")


def clip_conditions(codecs, config, video, text_only):
    """The conditions of a clip (3, F, H, W) by name, made of its own first and last frame if the model takes them."""
    kind = config.model_type
    first = None if kind == "t2v" or text_only else video[:, 0]
    last = video[:, -1] if kind == "flf2v" else None
    return codecs.conditions(first, last, video.shape[1])


def encode_folder(args):
    check_flags(args)
    config = CONFIGS["tiny" if args.encoder == "pixel" else args.model]
    codecs = open_codecs(config, args.weights)
    check_clip(codecs, args.frames, args.size)
    if args.text_only and config.model_type != "ti2v":
        raise ValueError(f"--text_only: {args.model} is a {config.model_type} model; "
                         "only a ti2v model does with and without an image")
    jobs, done = plan(args)
    if jobs:
        for part in codecs.parts:
            codecs.part(part)                                         # says what is wrong before anything is encoded
    total = sum(len(job.clips) for job in jobs)
    with tqdm(total=total, desc="encoding", unit="clip", disable=None) as progress:
        for job in jobs:
            context = codecs.encode_text(job.prompt)                                            # (T, D)
            clip_at = {clip.start: clip for clip in job.clips}
            for start, video in read_clips(job.video, job.picks, list(clip_at), args.frames, args.size):
                clip = clip_at[start]
                conditions = clip_conditions(codecs, config, video, args.text_only)
                write_sample(clip.file, codecs.encode_video(video), context, clip.metadata, **conditions)
                progress.update()
    print(f"{args.out}: {total} samples written, {done} were there already")


# ---------------------------------------------------------------------------------------------------------------------
# latents to something to look at

def codecs_of(sample, file, weights):
    """The codecs that made a sample, by the number of its channels: no two encoders have the same."""
    channels = sample["latents"][0]
    config = next((config for config in CONFIGS.values() if config.out_dim == channels), None)
    if config is None or config.vae != "embedded" and not weights:
        raise ValueError(f"{file}: latents of {channels} channels; {toy.CHANNELS} (pixel) can be decoded, "
                         "and with --weights DIR 16 and 48 (Wan's VAEs)")
    return open_codecs(config, weights)


def decode_samples(codecs, files, out, fps, sheet="sheet.png", progress=True):
    """
    Write the video of each sample file to out/STEM.mp4, and a contact sheet of the first 16 of one size.

    fps: frames a second where a sample does not say. Returns the number of videos in the sheet.
    """
    shown = []
    for path in tqdm(files, desc="decoding", disable=None if progress else True):
        sample = read_sample(path)
        video = codecs.decode_video(sample["latents"].float())        # (3, F, H, W)
        side = min(video.shape[2:])
        rate = float(sample["metadata"].get("fps", fps))
        upscale = max(1, 256 // side)                                 # players blur tiny clips
        write_whole(Path(out) / f"{path.stem}.mp4", mp4(video, rate, upscale))
        every = max(1, side // 128)                                   # pixels of large videos are left out
        small = video[:, :, ::every, ::every]
        if len(shown) < 16 and (not shown or small.shape == shown[0].shape):
            shown.append(small)
    if shown:
        upscale = max(1, 128 // min(shown[0].shape[2:]))
        write_whole(Path(out) / sheet, contact_sheet(shown, upscale=upscale))
    return len(shown)


def decode_folder(args):
    """Every sample of a folder to an mp4 of its stem, and a contact sheet of the first 16."""
    files = sample_files(args.decode)
    shapes, _ = read_summaries(files)[files[0]]                       # all have the same number of channels
    codecs = codecs_of(shapes, files[0], args.weights)
    shown = decode_samples(codecs, files, args.out, args.fps)
    print(f"{args.out}: {len(files)} videos, and sheet.png with {shown} of them, first file on top")


# ---------------------------------------------------------------------------------------------------------------------
# command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Video files and prompts to samples; samples to video files.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--videos", type=str, default="",
        help="folder of video files with metadata.jsonl or metadata.csv (columns video, prompt)")
    add("--decode", type=str, default="",
        help="instead of --videos: folder of samples to turn into mp4 files and a contact sheet")
    add("--out", type=str, required=True, help="folder to write to; samples that exist already are kept")
    # what turns video and prompts into latents and context
    add("--encoder", type=str, default="pixel", choices=["pixel", "wan"], help="the embedded world's codec, or Wan's")
    add("--weights", type=str, default="", help="wan: an original Wan folder or a diffusers folder, with all encoders")
    add("--model", type=str, default="",
        help=f"wan: the model the samples are for, which says which VAE and conditions: {', '.join(CONFIGS)}")
    add("--text_only", action="store_true", help="wan2.2-ti2v-5b: no first_latent, so samples for text-to-video")
    # clips
    add("--fps", type=Fraction, default=Fraction(8), help="frames a second of the samples; 29.97 or 30000/1001 will do")
    add("--size", type=int, nargs=2, default=[32, 32], metavar=("H", "W"),
        help="pixels; videos are scaled to cover it, then cropped")
    add("--frames", type=int, default=8, help="frames of a sample")
    add("--stride_frames", type=int, default=0,
        help="frames from the start of one clip of a video to the next; 0: as many as --frames, end to end")
    add("--clips_per_video", type=int, default=0, help="at most this many clips of a video, spread evenly; 0: all")
    add("--limit", type=int, default=0, help="stop after this many samples, existing ones included; 0: no limit")
    args = parser.parse_args(argv)
    if bool(args.videos) == bool(args.decode):
        parser.error("give one of --videos and --decode")
    return args


def main(args):
    if args.decode:
        decode_folder(args)
    else:
        encode_folder(args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"encode.py: {error}")
