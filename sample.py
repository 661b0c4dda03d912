"""
Samplers, and their command line: videos of prompts, and the losing half of GT-Pairs.

    python sample.py --prompts "small red circle moving fast left" --init toy_base --out samples
    torchrun --nproc_per_node=8 sample.py --pairs DATA --init MODEL        # DATA/real/*.safetensors -> DATA/negatives/*.safetensors
"""
import argparse
import hashlib
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import toy
from data import contact_sheet, read_header, read_sample, sample_files, write_sample
from losses import shift_sigma
from model import hold_first_frame, load_wan, open_wan


# ------------------------------------------------------------------------------------------------------------------
# solvers: velocity(x, i) is the model's answer at sigmas[i]; x from pure noise to clean latents

def sigma_grid(steps, flow_shift, solver="euler"):
    """
    The steps + 1 sigmas of a sampler, descending to 0. euler: 1 - i / steps, shifted. unipc: 0.999 (1 - i / steps), shifted, the official grid.
    (diffusers' own default, 1 - 0.999 i / steps, is another: it ends on other timesteps, 96 and not 92 for 50 steps at shift 5.)
    """
    if solver == "euler":
        return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), flow_shift).float().tolist()
    start = torch.tensor(0.999).item()       # the float32 number, a little above: with 0.999 itself, 888 can come out as 887.99 and be cut to 887
    return shift_sigma(start * torch.linspace(1, 0, steps + 1, dtype=torch.float64), flow_shift).tolist()


def euler(velocity, x, sigmas):
    """x <- x + (sigma_next - sigma) * v"""
    for i in range(len(sigmas) - 1):
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, i)
    return x


def unipc(velocity, x, sigmas):
    """
    UniPC (Zhao et al. 2023, arXiv 2302.04867) of order 2 with B(h) = e^-h - 1 ("bh2"), on predictions of the clean latents. With
    lam = log((1 - sigma) / sigma), and for the step from a to b: h = lam_b - lam_a, phi = e^-h - 1,

        clean = x - sigma * v
        x_b = sigma_b / sigma_a * x_a - (1 - sigma_b) * phi * (clean_a + bend)

    The predictor takes bend from the step before (0 on the first step and on the last, which is of order 1). Then v is asked for at b, and the
    corrector makes the same step again with a bend that knows clean_b; clean_b is not asked for again.
    """
    steps = len(sigmas) - 1
    lam = [math.log((1 - sigma) / sigma) if sigma > 0 else math.inf for sigma in sigmas]
    step = lambda x, bend, a, b: sigmas[b] / sigmas[a] * x - (1 - sigmas[b]) * math.expm1(lam[a] - lam[b]) * (clean[a] + bend)
    clean, order = {}, 0
    for i in range(steps):
        clean[i] = x - sigmas[i] * velocity(x, i)
        if i > 0:                                                             # correct the step from i - 1, which began at `start`
            h = lam[i] - lam[i - 1]
            phi = math.expm1(-h)
            if order == 1:
                bend = 0.5 * (clean[i] - clean[i - 1])
            else:                                                             # rho solves [[1, 1], [r, 1]] rho = [b1, b2]
                r = (lam[i - 2] - lam[i - 1]) / h
                k = phi / -h - 1
                b1, b2 = k / phi, 2 * (k / -h - 0.5) / phi
                rho = (b1 - b2) / (1 - r)
                bend = rho / r * (clean[i - 2] - clean[i - 1]) + (b1 - rho) * (clean[i] - clean[i - 1])
            x = step(start, bend, i - 1, i)
        order = min(2, i + 1, steps - i)
        bend = 0 if order == 1 else 0.5 * (clean[i - 1] - clean[i]) * (lam[i + 1] - lam[i]) / (lam[i - 1] - lam[i])
        start, x = x, step(x, bend, i, i + 1)
        clean.pop(i - 2, None)
    return x


SOLVERS = {"euler": euler, "unipc": unipc}


# ------------------------------------------------------------------------------------------------------------------
# generation

def seed_of(*parts):
    """A seed from anything printable, the same on every machine: sha256, 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def generate(model, context, seeds, shape, steps, flow_shift, guidance, negative=None, device=None, solver="euler",
             low=None, low_guidance=0.0, boundary=0.0, first_latent=None, **conditions):
    """
    From noise to latents with classifier-free guidance, v = v_negative + guidance * (v_positive - v_negative).

    context: list of B tensors (T, D); negative: context (T, D) of the unconditional branch, by default no rows (zeros, as for an empty caption).
    seeds: B integers, one noise each, so a video does not depend on the batch it was made in. shape (C, F, H, W). guidance 1: one forward a step.
    solver: euler gives the model timestep 1000 * sigma; unipc cuts it to a whole number, as the official sampler (and diffusers) do.
    low: the low-noise expert of Wan2.2 A14B, with guidance low_guidance (0: the same), for timesteps below 1000 * boundary, shifted as the model
    gets them. If it lives on another device than the model (the CPU), the two change places there, and back at the end.
    conditions: what the variant needs beside the text, (B, ...) each, the same in both branches; first_latent (B, C, 1, H, W) is TI2V's frame 0.
    device: where it computes, if its parameters live elsewhere (offloaded).
    Returns latents (B, C, F, H, W) float32 on that device.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    if low is not None and not 0 < boundary < 1:
        raise ValueError(f"boundary {boundary}: two experts need a sigma between 0 and 1 to change at, such as 0.875 (t2v) or 0.9 (i2v)")
    device = device or next(model.parameters()).device
    low_guidance = low_guidance if low is not None and low_guidance else guidance
    branches = 1 if guidance == low_guidance == 1 else 2
    negative = torch.zeros(0, context[0].shape[1]) if negative is None else negative
    rows = list(context) + [negative] * len(context) * (branches - 1)
    padded = torch.zeros(len(rows), max(1, *(len(row) for row in rows)), rows[0].shape[1])         # (B or 2B, T, D)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = row
    padded = padded.to(device)
    conditions = {name: torch.cat([value] * branches).to(device) for name, value in conditions.items()}
    first_latent = None if first_latent is None else first_latent.to(device, torch.float32)

    sigmas = sigma_grid(steps, flow_shift, solver)
    timesteps = [1000 * sigma if solver == "euler" else int(1000 * sigma) for sigma in sigmas[:-1]]
    first_low = next((i for i, timestep in enumerate(timesteps) if low is not None and timestep < 1000 * boundary), steps)
    home = device if low is None else next(low.parameters()).device
    exchange = home != device and first_low < steps

    def velocity(x, i):
        if i == first_low and exchange:
            model.to(home), low.to(device)                                    # in this order: the two together may be too large
        timestep = torch.full((len(x),), timesteps[i], dtype=torch.float32, device=device)
        if first_latent is not None:
            x, timestep = hold_first_frame(x, timestep, first_latent, model.config.patch_size)
        v = (model if i < first_low else low)(torch.cat([x] * branches), torch.cat([timestep] * branches), padded, **conditions)
        if branches == 1:
            return v
        v_positive, v_negative = v.chunk(2)
        return v_negative + (guidance if i < first_low else low_guidance) * (v_positive - v_negative)

    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
    x = SOLVERS[solver](velocity, x, sigmas)
    if exchange:
        low.to(home), model.to(device)
    if first_latent is not None:                     # the solvers work on each element alone: once at the end is as good as after every step
        x[:, :, :1] = first_latent
    return x


def weights_digest(path):
    """Twelve hexadecimal digits that name the weights at path: sha256 of the sizes, headers and ends of its files (whole files where small)."""
    digest = hashlib.sha256()
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            digest.update(str(size).encode() + handle.read(2 ** 24))
            handle.seek(max(0, size - 2 ** 20))
            digest.update(handle.read())
    return digest.hexdigest()[:12]


def make_negatives(model, model_name, folder, name="negatives", per_sample=1, seed=0, steps=20, flow_shift=3.0, guidance=1.0, batch_size=64,
                   rank=0, world=1):
    """
    The losing half of GT-Pairs: for every folder/real/STEM.safetensors the model's own clip of the same caption, as folder/NAME/STEM.safetensors
    (NAME_1, NAME_2 ... for more per sample). Each file's noise depends on (seed, stem, k) only, so any number of ranks makes the same files.

    Files that are there are kept: a killed run goes on where it stopped, and files appear whole. Returns how many this rank made.
    Raises ValueError if a file that is there was made with other settings.
    """
    settings = {"model": model_name, "seed": str(seed), "steps": str(steps), "flow_shift": str(flow_shift), "guidance": str(guidance)}
    every = [(path, k) for path in sample_files(Path(folder) / "real") for k in range(per_sample)]
    mine = []
    for path, k in every[rank::world]:                                        # by place, not by what is missing: ranks look at different moments
        target = Path(folder) / (name if k == 0 else f"{name}_{k}") / path.name
        if not target.exists():
            mine.append((path, target, k))
            continue
        found = {key: read_header(target)["metadata"].get(key) for key in settings}
        if found != settings:
            raise ValueError(f"{target} was made with {found}, but now {settings} is asked for; give these negatives another --name, or delete that folder")
    bar = tqdm(total=len(mine), desc=f"negatives ({world} ranks)" if world > 1 else "negatives", unit="clip", disable=rank != 0 or not mine)
    for start in range(0, len(mine), batch_size):
        part = mine[start:start + batch_size]
        reals = [read_sample(path) for path, _, _ in part]
        shape = reals[0]["latents"].shape
        for (path, _, _), real in zip(part, reals):
            if real["latents"].shape != shape:
                raise ValueError(f"{path}: latents are {tuple(real['latents'].shape)}, those of {part[0][0]} are {tuple(shape)}; "
                                 f"use --batch_size 1 for clips of several sizes")
        conditions = {key: torch.stack([real[key] for real in reals]) for key in reals[0] if key not in ("latents", "context", "metadata")}
        seeds = [seed_of(seed, path.stem, k) for path, _, k in part]
        latents = generate(model, [real["context"].float() for real in reals], seeds, shape, steps, flow_shift, guidance, **conditions).cpu()
        for (path, target, k), real, value, noise_seed in zip(part, reals, latents, seeds):
            kept = {key: real["metadata"][key] for key in ("prompt", "encoder", "fps") if key in real["metadata"]}
            metadata = settings | kept | {"source": f"generated for {path.name}", "noise_seed": str(noise_seed)}
            write_sample(target, value.to(real["latents"].dtype), real["context"], metadata)
        bar.update(len(part))
    bar.close()
    return len(mine)


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--init", default="toy_base", help="weights: an original or diffusers folder, or a single file")
    # what to make
    p.add_argument("--prompts", nargs="+", default=[], help="prompts, or one .txt file with a prompt a line")
    p.add_argument("--pairs", default="", help="folder with real/*.safetensors: make a negative for each")
    # prompts
    p.add_argument("--out", default="samples", help="folder for the videos of --prompts")
    p.add_argument("--size", type=int, nargs=4, default=[toy.CHANNELS, toy.FRAMES, toy.SIDE // toy.BLOCK, toy.SIDE // toy.BLOCK],
                   metavar=("C", "F", "H", "W"), help="latents of --prompts")
    p.add_argument("--fps", type=int, default=8, help="of the mp4 files")
    # pairs
    p.add_argument("--name", default="negatives", help="folder of the negatives; must start with 'negatives'")
    p.add_argument("--per_sample", type=int, default=1, help="negatives for every real sample")
    # sampler
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--flow_shift", type=float, default=3.0)
    p.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none: the model's own distribution, which a loser should be from")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=64)
    return p.parse_args(argv)


def read_prompts(prompts):
    """The prompts themselves, or the lines of the one .txt file that is named. Raises ValueError where there are none."""
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        if not Path(prompts[0]).exists():
            raise ValueError(f"--prompts {prompts[0]}: no such file")
        prompts = [line.strip() for line in Path(prompts[0]).read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError("--prompts: the file has no line with a prompt")
    return prompts


def main(args):
    if bool(args.prompts) == bool(args.pairs):
        raise ValueError("give either --prompts or --pairs")
    if not args.name.startswith("negatives") or "/" in args.name:
        raise ValueError(f"--name {args.name}: expected a folder name that starts with 'negatives', where training looks for losers")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))              # ranks work alone here: no process group
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if not Path(args.init).exists() and (Path(__file__).parent / args.init).exists():
        args.init = str(Path(__file__).parent / args.init)                    # toy_base, from any folder
    config, _ = open_wan(args.init)
    if config.text_dim != toy.TEXT_DIM and args.guidance != 1:
        raise ValueError(f"--guidance {args.guidance}: {args.init} was trained with an encoded negative prompt as its unconditional text, which cannot be "
                         f"made here yet; zeros in its place would spoil the clips. Use --guidance 1")
    model = load_wan(args.init, dtype=torch.bfloat16 if cuda else torch.float32).to(device).eval().requires_grad_(False)

    if args.pairs:
        made = make_negatives(model, weights_digest(args.init), args.pairs, args.name, args.per_sample, args.seed, args.steps, args.flow_shift,
                              args.guidance, args.batch_size, rank, world)
        print(f"rank {rank}: {made} negatives made in {args.pairs}", flush=True)
        return

    if config.text_dim != toy.TEXT_DIM:
        raise ValueError(f"--prompts knows the embedded world's text codec (width {toy.TEXT_DIM}) only, and {args.init} takes text of width "
                         f"{config.text_dim}; encode prompts to samples first and use --pairs")
    from encode import write_video
    prompts = read_prompts(args.prompts)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    mine = list(range(len(prompts)))[rank::world]                             # only these are looked at: another rank may be writing its own already
    if any((out / f"{i:05d}.safetensors").exists() for i in mine):
        raise ValueError(f"--out {out} holds samples already; choose another folder")
    videos = []
    for start in tqdm(range(0, len(mine), args.batch_size), desc="videos", disable=rank != 0):
        part = [(i, prompts[i]) for i in mine[start:start + args.batch_size]]
        seeds = [seed_of(args.seed, i) for i, _ in part]
        context = [toy.encode_text(prompt) for _, prompt in part]
        latents = generate(model, context, seeds, tuple(args.size), args.steps, args.flow_shift, args.guidance).cpu()
        for (i, prompt), value, row, seed in zip(part, latents, context, seeds):
            write_sample(out / f"{i:05d}.safetensors", value, row, {"prompt": prompt, "noise_seed": str(seed), "source": f"generated by {args.init}"})
            video = toy.decode_pixels(value).clamp(-1, 1)
            write_video(out / f"{i:05d}.mp4", video, args.fps, upscale=max(1, 256 // min(video.shape[2:])))   # players blur tiny clips
            videos.append(video)
    if videos:
        contact_sheet(out / f"contact_sheet{f'_{rank}' if world > 1 else ''}.png", videos[:32], upscale=max(1, 128 // min(videos[0].shape[2:])))
    print(f"rank {rank}: {len(videos)} of {len(prompts)} videos and a contact sheet in {out}", flush=True)


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
