"""
Turns real video into samples, and latents back into videos to look at.

    python encode.py --videos DIR --out DATA/real --size 48 64 --frames 8 --fps 8
    python encode.py --decode DATA/real --out look
    python encode.py --videos DIR --out DATA/real --encoder wan --weights WAN --model wan2.1-i2v-14b \
        --size 480 832 --frames 81 --fps 16
    python encode.py --decode DATA/real --out look --weights WAN

DIR holds video files (mp4 and what PyAV reads) and a metadata.jsonl or metadata.csv with a row for each: video (its
path in DIR), prompt. Every video is resampled to --fps (the frame at a time is the one on show then), scaled to cover
--size, cropped at the centre and cut into clips of --frames. Each clip is one sample file, named after its video and
first frame.

All input is looked at before anything is encoded, and all of a video is decoded before its first sample is written: a
damaged one is an error, or is left out with --skip_damaged. A stopped run resumes. A sample records its settings, its
video and the encoder's weights: samples of a replaced video are encoded again, those of other settings are refused, and
those that no row asks for are named, or deleted with --prune. OUT/empty_caption.context holds the text encoder's output
for "".

Encoders: `pixel`, the fixed codec of the embedded world (toy.py), which needs no pretrained weights; `wan`, those of
the public Wan models (UMT5-XXL, VAE, CLIP), from an original Wan folder or a diffusers folder. Nothing is downloaded.
"""
import argparse
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

import toy
import wan_encoders
from samples import EMPTY_CAPTION, fingerprint, read_empty_caption, read_header, read_sample, read_summaries
from samples import sample_files, sorted_header, write_sample, write_whole
from model import CONFIGS
from pictures import contact_sheet, mp4
from tables import read_metadata, stem_of
from video import DamagedVideo, Film, decode_all, look_at, on_show, read_clips

NOTES = {
    "interlaced": "interlaced material is encoded as it is stored, with combs where things move "
                  "(ffmpeg -i IN -vf bwdif OUT makes it progressive)",
    "in wide colours": "BT.2020 and P3 colours are taken for BT.709, so they come out pale",
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"               # of Wan's encoders


# ---------------------------------------------------------------------------------------------------------------------
# codecs

def open_codecs(config, weights, device=DEVICE, offload=False):
    """
    The codecs that turn prompts, pictures and videos into a model's numbers and back. weights: folder of Wan's
    encoders; offload: the blocks of the text encoder stay in CPU memory.
    """
    if config.vae == "embedded":
        return toy.PixelCodec()
    return wan_encoders.open_encoders(weights, config, device, offload)


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
# looking at the videos

@dataclass(frozen=True)
class Clip:
    start: int                                                        # its first frame in the resampled video
    file: Path                                                        # of its sample
    metadata: dict


@dataclass(frozen=True)
class Job:
    """A video and the clips to encode from it."""
    film: Film
    prompt: str
    picks: list                                                       # the picture of each resampled frame: on_show
    clips: list


@dataclass
class Plan:
    """What a look at all input finds."""
    jobs: list = field(default_factory=list)
    done: int = 0                                                     # samples that exist and fit
    changed: int = 0                                                  # samples whose video is another one now
    clips_of: dict = field(default_factory=dict)                      # video: file names of all its samples
    damaged: dict = field(default_factory=dict)                       # video: why it is left out
    notes: dict = field(default_factory=dict)                         # words on pictures: videos
    named: set = field(default_factory=set)                           # samples that no row asks for, already told

    def asked(self):
        """Names of the sample files that this run asks for."""
        return {name for video, names in self.clips_of.items() if video not in self.damaged for name in names}


def clip_starts(count, frames, stride, clips):
    """
    First frames of the clips of a video of `count` frames.

    One every `stride` frames (0: end to end); at most `clips` of them, spread evenly (0: all).
    """
    starts = list(range(0, count - frames + 1, stride or frames))
    if not 0 < clips < len(starts):
        return starts
    return [starts[i * len(starts) // clips] for i in range(clips)]


def resample(where, path, args):
    """The Film in a file and its picks at --fps. Raises ValueError, naming the row, for a video that gives no clip."""
    try:
        film = look_at(path)
        picks = on_show(film, args.fps)
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from None
    if len(picks) < args.frames:
        raise ValueError(f"{where}: {path} has {len(picks)} frames at {float(args.fps):g} fps "
                         f"({len(film.stamps)} in the file), but a clip has --frames {args.frames}; "
                         "lower --frames, raise --fps, or take the video out")
    return film, picks


def sample_settings(args, codecs):
    """The metadata that all samples of a run share: how they were made."""
    settings = {"fps": f"{float(args.fps):g}", "frames": str(args.frames), "size": f"{args.size[0]} {args.size[1]}",
                "stride_frames": str(args.stride_frames or args.frames), "encoder": args.encoder}
    if args.encoder == "wan":
        settings |= {"model": args.model, "text_only": str(args.text_only),
                     "weights_fingerprint": fingerprint(codecs.files())}
    return settings


def find_clips(film, picks, stem, args, metadata):
    """All clips of a video. metadata: what their samples have in common."""
    metadata = metadata | {"video_fingerprint": fingerprint([film.path])}
    clips = []
    for start in clip_starts(len(picks), args.frames, args.stride_frames, args.clips_per_video):
        file = Path(args.out) / f"{stem}_{start:06d}.safetensors"
        clips.append(Clip(start, file, metadata | {"start": str(start)}))
    return clips


def state_of(clip):
    """
    "missing", "done", or "changed" where the sample was made from another video of the same name.

    Raises ValueError where the sample was made with other settings or encoders, or does not record them.
    """
    if not clip.file.exists():
        return "missing"
    made = read_header(clip.file)["metadata"]
    for key, value in clip.metadata.items():
        if made.get(key) != value and (key != "video_fingerprint" or key not in made):
            raise ValueError(f"{clip.file}: exists and was made with {key} {made.get(key, 'unknown')}, "
                             f"but this run has {value}; delete it, or choose another --out")
    return "done" if made["video_fingerprint"] == clip.metadata["video_fingerprint"] else "changed"


def make_plan(args, codecs):
    """Look at all input: the Plan. Reads the packets of every video and decodes its first picture."""
    folder = Path(args.videos)
    if Path(args.out).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {args.out}: inside --videos {folder}, where samples would count as videos; "
                         "choose a folder elsewhere")
    settings = sample_settings(args, codecs)
    plan = Plan()
    video_of = {}                                                     # stem: video
    total = 0
    for where, path, prompt in tqdm(read_metadata(folder, args.skip_damaged), desc="looking at videos", disable=None):
        stem = stem_of(path, folder)
        if stem in video_of:
            raise ValueError(f"{where}: the samples of {path} and {video_of[stem]} would have one name, {stem}; "
                             "rename one of the videos")
        video_of[stem] = path
        try:
            film, picks = resample(where, path, args)
        except DamagedVideo as error:
            if not args.skip_damaged:
                raise
            plan.damaged[path] = str(error)
            continue
        for note in film.notes:
            plan.notes.setdefault(note, []).append(path)
        metadata = {"prompt": prompt, "source": path.relative_to(folder).as_posix(), **settings}
        clips = find_clips(film, picks, stem, args, metadata)
        plan.clips_of[path] = [clip.file.name for clip in clips]
        if args.limit:
            clips = clips[:args.limit - total]
        total += len(clips)
        states = [state_of(clip) for clip in clips]
        plan.done += states.count("done")
        plan.changed += states.count("changed")
        clips = [clip for clip, state in zip(clips, states) if state != "done"]
        if clips:
            plan.jobs.append(Job(film, prompt, picks, clips))
    return plan


def first_names(paths, most=10):
    names = [Path(path).name for path in paths]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def tell(plan):
    """Print what a user should know about the input before it is encoded."""
    for note, paths in plan.notes.items():
        print(f"{NOTES[note]}: {len(paths)} videos, {first_names(paths)}")
    if plan.changed:
        print(f"{plan.changed} samples were made from other videos of the same names and are encoded again; "
              "delete the negatives that were made from them")


def unasked_samples(plan, out, prune):
    """Name the samples in --out that no row asks for, or delete them."""
    if not Path(out).is_dir():
        return
    asked = plan.asked() | plan.named
    unasked = [path for path in sorted(Path(out).glob("[!.]*.safetensors")) if path.name not in asked]
    plan.named.update(path.name for path in unasked)
    if unasked and prune:
        for path in unasked:
            path.unlink()
        print(f"{out}: {len(unasked)} samples that no row asks for are deleted: {first_names(unasked)}")
    elif unasked:
        print(f"{out}: {len(unasked)} samples that no row asks for: {first_names(unasked)}; they are trained on "
              "unless you delete them (--prune does)")


# ---------------------------------------------------------------------------------------------------------------------
# video to samples

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


def store_empty_caption(args, codecs):
    """
    Write the text encoder's output for "" next to the samples, for caption dropout and guidance.

    Raises ValueError where the folder holds that of another encoder.
    """
    metadata = {"encoder": args.encoder}
    if args.encoder == "wan":
        metadata["weights_fingerprint"] = fingerprint(codecs.files())
    stored = read_empty_caption(args.out)
    if stored is None:
        context = codecs.encode_text("").contiguous()                                           # (T, D)
        content = sorted_header(save({"context": context}, metadata=metadata))
        write_whole(Path(args.out) / EMPTY_CAPTION, content)
    elif stored[1] != metadata:
        raise ValueError(f"{Path(args.out) / EMPTY_CAPTION}: exists and is that of another encoder ({stored[1]}, "
                         f"but this run has {metadata}); delete it, or choose another --out")


def encode_job(job, codecs, config, args, progress):
    """Write the samples of a video: none before all of it has decoded. Raises DamagedVideo."""
    stamps = decode_all(job.film)
    context = codecs.encode_text(job.prompt)                                                    # (T, D)
    clip_at = {clip.start: clip for clip in job.clips}
    for start, video in read_clips(job.film, stamps, job.picks, list(clip_at), args.frames, args.size):
        clip = clip_at[start]
        conditions = clip_conditions(codecs, config, video, args.text_only)
        write_sample(clip.file, codecs.encode_video(video), context, clip.metadata, **conditions)
        progress.update()


def encode_folder(args):
    check_flags(args)
    config = CONFIGS["tiny" if args.encoder == "pixel" else args.model]
    codecs = open_codecs(config, args.weights, offload=args.offload_params)
    check_clip(codecs, args.frames, args.size)
    if args.text_only and config.model_type != "ti2v":
        raise ValueError(f"--text_only: {args.model} is a {config.model_type} model; "
                         "only a ti2v model does with and without an image")
    plan = make_plan(args, codecs)
    tell(plan)
    unasked_samples(plan, args.out, args.prune)
    if plan.jobs:
        for part in codecs.parts:
            codecs.part(part)                                         # says what is wrong before anything is encoded
    if plan.jobs or plan.done:
        store_empty_caption(args, codecs)
    written = 0
    with tqdm(total=sum(len(job.clips) for job in plan.jobs), desc="encoding", unit="clip", disable=None) as progress:
        for job in plan.jobs:
            try:
                encode_job(job, codecs, config, args, progress)
                written += len(job.clips)
            except DamagedVideo as error:
                if not args.skip_damaged:
                    raise
                plan.damaged[job.film.path] = str(error)
    print(f"{args.out}: {written} samples written, {plan.done} were there already")
    unasked_samples(plan, args.out, args.prune)                       # now also those of damaged videos
    if plan.damaged:
        print(f"{len(plan.damaged)} damaged videos are left out:")
        for reason in plan.damaged.values():
            print(f"    {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# latents to something to look at

def codecs_of(shapes, file, weights):
    """The codecs that made a sample, by the number of its channels: no two encoders have the same."""
    channels = shapes["latents"][0]
    config = next((config for config in CONFIGS.values() if config.out_dim == channels), None)
    if config is None or config.vae != "embedded" and not weights:
        raise ValueError(f"{file}: latents of {channels} channels; {toy.CHANNELS} (pixel) can be decoded, "
                         "and with --weights DIR 16 and 48 (Wan's VAEs)")
    return open_codecs(config, weights)


def decode_samples(codecs, files, out, fps, sheet, progress=True):
    """
    Write the video of each sample file to out/STEM.mp4, and a contact sheet of the first 16 of one size to the file
    `sheet`.

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
        write_whole(sheet, contact_sheet(shown, upscale=upscale))
    return len(shown)


def decode_folder(args):
    """Every sample of a folder to an mp4 of its stem, and a contact sheet of the first 16."""
    files = sample_files(args.decode)
    first = read_summaries(files)[files[0]]                           # all have the same number of channels
    codecs = codecs_of(first.shapes, files[0], args.weights)
    shown = decode_samples(codecs, files, args.out, args.fps, Path(args.out) / "sheet.png")
    print(f"{args.out}: {len(files)} videos, and sheet.png with {shown} of them, first file on top")


# ---------------------------------------------------------------------------------------------------------------------
# command line

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the description as it stands, and the default of each flag."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--videos", type=str, default="",
        help="folder of video files with metadata.jsonl or metadata.csv (columns video, prompt)")
    add("--decode", type=str, default="",
        help="instead of --videos: folder of samples to turn into mp4 files and a contact sheet")
    add("--out", required=True, default=argparse.SUPPRESS,
        help="folder to write to; existing samples are kept if their settings fit")
    add("--skip_damaged", action="store_true",
        help="leave out and list damaged videos; without this flag, one is an error")
    add("--prune", action="store_true",
        help="delete samples in --out that no row asks for; without this flag, they are only named")
    # what turns video and prompts into latents and context
    add("--encoder", type=str, default="pixel", choices=["pixel", "wan"], help="the embedded world's codec, or Wan's")
    add("--weights", type=str, default="", help="wan: an original Wan folder or a diffusers folder, with all encoders")
    add("--offload_params", action="store_true",
        help="wan, on a small GPU: the text encoder's blocks stay in CPU memory, and each is copied to the GPU when "
             "its turn comes")
    add("--model", type=str, default="",
        help=f"wan: the model the samples are for, which says which VAE and conditions: {', '.join(CONFIGS)}")
    add("--text_only", action="store_true", help="wan2.2-ti2v-5b: make samples for text-to-video, without first_latent")
    # clips
    add("--fps", type=Fraction, default=Fraction(8), help="frames per second of the samples; also 30000/1001")
    add("--size", type=int, nargs=2, default=[32, 32], metavar=("H", "W"),
        help="pixels; videos are scaled to cover it, then cropped")
    add("--frames", type=int, default=8, help="frames of a sample")
    add("--stride_frames", type=int, default=0,
        help="frames from the start of a clip to the start of the next; 0: --frames, so that clips are end to end")
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
    except ModuleNotFoundError as error:
        sys.exit(f"encode.py: {error}; real video needs it: pip install -r requirements-video.txt")
