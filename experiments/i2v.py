"""
Image-to-video in the embedded world: a base that is given the first frame, pairs for it, and exact marks.

    python experiments/i2v.py base                                       # makes experiments/i2v_base, once
    python experiments/i2v.py pairs data/i2v                             # 512 real clips with first frames, and losers
    python experiments/i2v.py judge experiments/i2v_base                 # prints the means, at guidance 1 and 2

The condition is Wan2.1's and Wan2.2's for image-to-video: y, joined to the noisy latents as further channels, is a mask
with 1 where a frame is given, then the latents of a clip of the first frame followed by grey. There is no CLIP branch,
as in Wan2.2-I2V-A14B. The mask has one channel, since this codec has one latent frame for every frame.

experiments/run.py trains on these pairs: experiment `i2v`.
"""
import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy
from export import export_weights
from judge import load_model, make_clips, make_row
from samples import seed_of, write_sample
from weights import load_wan, save_wan

BASE = ROOT / "experiments" / "i2v_base"
MARKS = ("direction", "shape", "drift", "background", "first_frame", "broken")    # kept for every caption
MASK_CHANNELS = 1
# toy_base with new input channels of zeros, so that it ignores the image at first, learns from real clips to use it
BASE_FLAGS = ["--loss", "sft", "--steps", "600", "--batch_size", "32", "--learning_rate", "1e-3",
              "--warmup_steps", "50", "--decay_steps", "300", "--ema_decay", "0.99", "--caption_dropout", "0.1",
              "--flow_shift", "5", "--min_timestep", "0", "--eval_clips", "0", "--probe_every", "0",
              "--save_every", "100"]


# ----------------------------------------------------------------------------------------------------------------------
# clips with their first frame

def condition(video):
    """The condition y of real clips: video (..., 3, F, 32, 32) in [-1, 1] -> (..., 13, F, 8, 8)."""
    given = torch.zeros_like(video)                        # grey, as in Wan; it does not become zero latents
    given[..., :1, :, :] = video[..., :1, :, :]
    latents = toy.encode_pixels(given)
    mask = torch.zeros_like(latents[..., :MASK_CHANNELS, :, :, :])
    mask[..., 0, :, :] = 1
    return torch.cat([mask, latents], dim=-4)


class FirstFrames:
    """Real clips of the embedded world with their first frames as a dataset (data.py), each made when it is read."""
    sources = ()

    def __init__(self, count, seed=0):
        self.seed = seed
        self.captions = [toy.TRAINED[i % len(toy.TRAINED)] for i in range(count)]

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        caption = self.captions[index]
        video = toy.make_clip(caption, seed_of("first frame", self.seed, index))
        return {"win": toy.encode_pixels(video), "y": condition(video), "context": toy.encode_text(caption),
                "name": f"{index} {caption}"}

    def fingerprint(self):
        return f"{seed_of(self.captions, self.seed):x}"


def widen(model):
    """A model that takes the condition y as well, with weights of 0 for it: at first it does not see the image."""
    new = model.config.out_dim + MASK_CHANNELS
    config = replace(model.config, in_dim=model.config.in_dim + new)
    state = model.state_dict()
    state["patch_embedding.weight"] = F.pad(state["patch_embedding.weight"], (0, 0, 0, 0, 0, 0, 0, new))
    return config, state


def make_base():
    """Make BASE: widen toy_base, train it on 20,000 real clips with their first frames, and store it in bfloat16."""
    import train                                           # pairs and marks need no trainer
    out = ROOT / "out" / "i2v_base"
    if (BASE / "config.json").exists():
        return
    if not (out / "widened" / "config.json").exists():
        config, state = widen(load_wan(ROOT / "toy_base"))
        save_wan(state, out / "widened", config=config)
    resume = ["--resume", "latest"] if (out / "run" / "latest").exists() else []
    flags = [*BASE_FLAGS, "--init", str(out / "widened"), "--out", str(out / "run"), *resume]
    train.main(train.parse_args(flags), FirstFrames(20_000))
    export_weights(out / "run" / "export", BASE, dtype=torch.bfloat16, base=out / "widened")


def make_pairs(folder, count=512, flags=()):
    """
    Write real clips with first frames into folder/real and the base's own clips of the same first frames and captions
    into folder/negatives. flags: more flags of sample.py.
    """
    captions, videos = toy.make_clips(count, seed=0)
    for i in tqdm(range(count), desc="real clips", unit="clip"):
        path = folder / "real" / f"{i:05d}.safetensors"
        if not path.exists():
            # not "embedded world": train.py would mark such a run with text alone
            metadata = {"prompt": captions[i], "source": "embedded world with first frames"}
            write_sample(path, toy.encode_pixels(videos[i]), toy.encode_text(captions[i]), metadata,
                         y=condition(videos[i]))
    command = [sys.executable, "sample.py", "--pairs", folder, "--init", BASE, *flags]
    subprocess.run(command, cwd=ROOT, check=True)


# ----------------------------------------------------------------------------------------------------------------------
# marks

def path_distances(caption, centre, present, true_path):
    """
    Mean distance of a clip's flight from the true path, and from those that physics would continue from the same given
    place in the other directions, (8,): one per direction.

    In pixels, at most 8 per frame, and 8 for a frame without a shape. centre, true_path (F, 2), present (F,).
    """
    size, colour, shape, speed, own = toy.parse(caption)
    distances = []
    for direction in toy.DIRECTIONS:
        path = true_path
        if direction != own:
            path = toy.trajectory(true_path[0], f"{size} {colour} {shape} moving {speed} {direction}", len(centre))
        distance = (centre - path).norm(dim=-1).clamp(max=8)
        distances.append(torch.where(present, distance, torch.full_like(distance, 8)).mean())
    return torch.stack(distances)


def background(caption, rgb, centre, true_path):
    """
    Root mean square deviation from the plain background, away from the true path and from the shape, in 1/255; 255
    where the shape leaves no background. rgb (3, F, H, W), centre, true_path (F, 2).
    """
    size, _, shape, _, _ = toy.parse(caption)
    reach = toy.REACH[shape] * toy.SIZES[size] + 3
    grid = torch.arange(toy.SIDE, dtype=torch.float32) + 0.5
    places = torch.stack([true_path, centre])                                          # (2, F, 2)
    squared = (grid[:, None] - places[..., 1, None, None]) ** 2 + (grid - places[..., 0, None, None]) ** 2
    away = ~(squared < reach ** 2).any(dim=0)                                          # (F, H, W)
    if not away.any():
        return torch.tensor(255.0)
    return 255 * ((rgb[away.expand_as(rgb)] - toy.BACKGROUND) ** 2).mean().sqrt()


def marks_of(video, real, captions):
    """
    Marks of clips whose first frame was given, {name: (B,)}. They are those of toy.metrics, but drift, direction and
    background are marked against the path in the real clip, not against one that starts where the clip itself does:

        drift        mean distance in pixels, at most 8, from where the shape is in the real clip      real clips 0
        first_frame  root mean square error of frame 0, in 1/255                                       real clips 0

    video, real (B, 3, F, 32, 32) in [-1, 1], both as the codec shows them; real: the clips whose first frames are
    given.
    """
    marks = toy.metrics(video, captions)
    _, area, centre = toy._moments(video)
    _, _, true_paths = toy._moments(real)
    rgb = (video.clamp(-1, 1) + 1) / 2
    for i, caption in enumerate(captions):
        distances = path_distances(caption, centre[i], area[i] > 8, true_paths[i])
        own = list(toy.DIRECTIONS).index(toy.parse(caption)[4])
        marks["direction"][i] = float(distances.argmin() == own)
        marks["drift"][i] = distances[own]
        marks["background"][i] = background(caption, rgb[i], centre[i], true_paths[i])
    error = (video[:, :, 0].clamp(-1, 1) - real[:, :, 0].clamp(-1, 1)) / 2
    marks["first_frame"] = 255 * error.square().mean(dim=(1, 2, 3)).sqrt()
    is_broken = (marks["colour"] < 0.75) | (marks["shape"] < 0.75) | (marks["direction"] < 1)
    is_broken |= (marks["drift"] > 2) | (marks["size"] > 0.25)
    marks["broken"] = is_broken.float()
    return marks


def held_out(count):
    """Captions and clips that nothing trains on, as drawn and as the codec shows them, and the Fréchet yardstick."""
    captions, videos = toy.make_clips(count, seed=1, held_out=True)
    real = toy.decode_pixels(toy.encode_pixels(videos))
    yardstick = toy.decode_pixels(toy.encode_pixels(toy.make_clips(512, seed=2)[1]))
    return captions, videos, real, yardstick


def print_means(title, row):
    means = [f"{name} {sum(row[name]) / len(row[name]):.3f}" for name in MARKS]
    print(f"{title}: {', '.join(means)}, frechet {row['frechet']:.3f}", flush=True)


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("base", help="make the base, or resume that")
    pairing = commands.add_parser("pairs", help="write 512 pairs")
    pairing.add_argument("folder", type=Path)
    judging = commands.add_parser("judge", help="mark a model on held-out captions")
    judging.add_argument("model", type=Path, help="an export, a base, or a step folder")
    judging.add_argument("--which", choices=["ema", "policy"], default="ema", help="which weights of a step folder")
    judging.add_argument("--guidances", type=float, nargs="+", default=[1.0, 2.0])
    judging.add_argument("--clips", type=int, default=256, help="held-out captions")
    judging.add_argument("--real", action="store_true", help="mark the real clips as well")
    judging.add_argument("--out", type=Path, help="write all marks into this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)                                       # tiny tensors are slower with more
    if args.command == "base":
        make_base()
        return
    if args.command == "pairs":
        make_pairs(args.folder.resolve())
        return
    captions, videos, real, yardstick = held_out(args.clips)
    judged = {}
    if args.real:
        judged["real"] = make_row(marks_of(real, real, captions), MARKS, real, yardstick)
        print_means("real clips", judged["real"])
    model = load_model(args.model, args.which)
    for guidance in args.guidances:
        clips = make_clips(model, captions, guidance, y=condition(videos))
        judged[f"{guidance:g}"] = make_row(marks_of(clips, real, captions), MARKS, clips, yardstick)
        print_means(f"guidance {guidance:g}", judged[f"{guidance:g}"])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(judged))


if __name__ == "__main__":
    main(sys.argv[1:])
