"""
The embedded world as the two trainers use it: its data, made on first use, and the evaluation on captions that were never trained on. For other data: previews.
"""
import json
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import toy
from data import contact_sheet, open_data, read_header, read_sample, write_sample, write_whole
from fsdp_utils import spread
from model import load_wan
from sample import generate, make_negatives, seed_of, weights_digest

SHAPE = (toy.CHANNELS, toy.FRAMES, toy.SIDE // toy.BLOCK, toy.SIDE // toy.BLOCK)     # of a clip's latents


def make_real(folder, count, seed=0, held_out=False):
    """folder/real/00000.safetensors and so on: the same clips whoever asks."""
    paths = [folder / "real" / f"{i:05d}.safetensors" for i in range(count)]
    if not all(path.exists() for path in paths):                              # a run that was killed here does it again, to the same files
        for path, caption, video in zip(tqdm(paths, desc="real clips", unit="clip"), *toy.make_clips(count, seed, held_out)):
            write_sample(path, toy.encode_pixels(video), toy.encode_text(caption), {"prompt": caption, "source": "embedded world"})


def make_world(args, config, ranks):
    """The default --data. Returns its folder."""
    return make_set(args, config, ranks, f"toy_{args.toy_clips}", args.toy_clips, pairs=args.loss != "sft")


def held_out_pairs(args, config, ranks, count=16):
    """The PairSet of a probe: captions that are never trained on."""
    return open_data(make_set(args, config, ranks, f"toy_held_out_{count}", count, seed=3, held_out=True), pairs=True)


def make_set(args, config, ranks, name, count, seed=0, held_out=False, pairs=True):
    """
    Real clips of the embedded world and, for `pairs`, the base model's own clips of the same captions. Made once.

    Returns the folder. Real clips hang on their number only and negatives on the base's weights too, hence its name.
    """
    folder = Path("data") / (name + (f"_{weights_digest(args.init)}_{args.sample_steps}steps_guidance{args.guidance:g}_shift{args.flow_shift:g}" if pairs else ""))
    if ranks.rank == 0:
        make_real(folder, count, seed, held_out)
    dist.barrier()
    if pairs:
        model = load_wan(args.init, config).to(ranks.device).eval().requires_grad_(False)    # whole on every rank: each makes its own share
        make_negatives(model, weights_digest(args.init), folder, steps=args.sample_steps, flow_shift=args.flow_shift, guidance=args.guidance,
                       rank=ranks.rank, world=ranks.world)
        dist.barrier()
    return folder


def of_the_world(dataset):
    """Are these samples clips of the embedded world? Then a run on them is evaluated there, whoever made the negatives."""
    return read_header(next(iter(dataset.wins)))["metadata"].get("source") == "embedded world"


def sample_held_out(args, model, captions, ranks):
    """Latents (N, *SHAPE) of clips of these captions by Euler, the same seeds whatever the model, on the CPU of every rank."""
    make = lambda part: generate(model, [toy.encode_text(captions[i]) for i in part], [seed_of("held out", i) for i in part], SHAPE,
                                 args.sample_steps, args.flow_shift, args.guidance, device=ranks.device)
    return spread(make, len(captions), ranks)


class HeldOut:
    """Clips of held-out captions: the real ones, what models make of them in the course of a run, and the exact marks of each (toy.score)."""

    def __init__(self, count):
        self.captions, videos = toy.make_clips(count, seed=1, held_out=True)
        self.real = toy.decode_pixels(toy.encode_pixels(videos))              # real clips as the codec shows them
        self.yardstick = toy.decode_pixels(toy.encode_pixels(toy.make_clips(512, seed=2)[1]))
        self.marks = {}
        self.sheet = {"real": self.real[:8]}                                  # what a picture shows beside each other

    def sample(self, args, model, ranks):
        """Latents of clips of the captions, the same seeds whatever the model."""
        return sample_held_out(args, model, self.captions, ranks)

    def judge(self, title, latents, shown=False):
        """Rank 0 marks these latents (N, *SHAPE) under `title` and prints it; shown: in pictures too, from now on. Returns the clips."""
        videos = toy.decode_pixels(latents).clamp(-1, 1)
        if dist.get_rank() == 0:
            self.marks[title] = toy.score(videos, self.captions, self.yardstick)
            print(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in self.marks[title].items()), flush=True)
        if shown:
            self.sheet[title] = videos[:8]
        return videos

    def picture(self, path, **now):
        """path.png, eight captions: real, what was shown before, now {title: clips}."""
        clips = [*self.sheet.values(), *now.values()]
        contact_sheet(path.with_suffix(".png"), [clip[i] for i in range(8) for clip in clips], upscale=3, group=len(clips))

    def close(self, folder, **now):
        """The end of a run: marks.json, the picture and the table. By rank 0 alone."""
        write_whole(folder / "marks.json", json.dumps(self.marks, indent=1).encode())
        self.picture(folder / "after", **now)
        toy.print_table(self.marks | {"real clips": toy.score(self.real, self.captions, self.yardstick)})
        print(f"picture (per held-out caption: {', '.join([*self.sheet, *now])}) in {folder / 'after.png'}")


class Preview:
    """
    What becomes of a few captions of any data in the course of a run, the same noise each time, as HeldOut shows it for the embedded world. Latents only:
    real, before and now beside each other in one sample, which `encode.py --decode` turns into one mp4. So training holds no decoder.
    """

    def __init__(self, dataset, count=4):
        shapes = {path: {**shapes, "context": ()} for path, (shapes, _) in dataset.wins.items()}
        wins = [path for path in shapes if shapes[path] == next(iter(shapes.values()))]                # ranks gather them: of one shape
        self.samples = [read_sample(path) for path in wins[::-(-len(wins) // count)]]
        self.sheet = {"real": torch.stack([sample["latents"].float() for sample in self.samples])}

    def sample(self, args, model, ranks):
        """Latents (N, C, F, H, W) on the CPU of every rank; each rank makes its share, one at a time."""
        def make(part):
            samples = [self.samples[i] for i in part]
            conditions = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0] if name not in ("latents", "context", "metadata")}
            return generate(model, [sample["context"].float() for sample in samples], [seed_of("preview", i) for i in part], tuple(samples[0]["latents"].shape),
                            args.sample_steps, args.flow_shift, args.guidance, device=ranks.device, **conditions)
        return spread(make, len(self.samples), ranks, chunk=1)

    def judge(self, title, latents, shown=False):
        """shown: beside all that comes later. Returns the latents."""
        if shown:
            self.sheet[title] = latents
        return latents

    def picture(self, folder, **now):
        """folder/000.safetensors and so on: real, what was shown before, now {title: latents}."""
        for i, (sample, *clips) in enumerate(zip(self.samples, *self.sheet.values(), *now.values())):
            write_sample(folder / f"{i:03d}.safetensors", torch.cat(clips, dim=-1), sample["context"], sample["metadata"] | {"source": " | ".join([*self.sheet, *now])})

    def close(self, folder, **now):
        self.picture(folder / "after", **now)
        print(f"previews ({' | '.join([*self.sheet, *now])}) in {folder}: python encode.py --decode {folder / 'after'} --out look (Wan: with --weights DIR)")
