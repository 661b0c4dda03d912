"""
Samplers and their command line: videos from prompts, and the losing half of GT-Pairs.

    python sample.py --prompts "small red circle moving fast left" --init toy_base --out samples
    python sample.py --prompts prompts.txt --init Wan2.1-T2V-1.3B --out samples       # original or diffusers folder
    python sample.py --prompts "the cat jumps" --image cat.png --init Wan2.2-I2V-A14B   # finds both experts
    torchrun --nproc_per_node=8 sample.py --pairs DATA --init MODEL   # DATA/real/*.safetensors -> DATA/negatives/
"""
import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import toy
from samples import check_samples, fingerprint, read_header, read_sample, read_summaries, sample_files, seed_of
from samples import weights_digest, write_sample
from losses import add_noise, shift_sigma
from lora_files import open_lora_files
from model import hold_first_frame
from streaming import load_models
from weights import find_experts, locate_weights, open_wan


# ----------------------------------------------------------------------------------------------------------------------
# grids and solvers

def uniform_grid(steps, flow_shift):
    """The steps + 1 sigmas 1 - i / steps, shifted, descending from 1 to 0."""
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), flow_shift).float().tolist()


def official_grid(steps, flow_shift):
    """
    The steps + 1 sigmas 0.999 (1 - i / steps), shifted, descending to 0: the grid of Wan's generate.py with UniPC.
    diffusers' default, 1 - 0.999 i / steps, is another: 50 steps at shift 5 end on timestep 96 there, on 92 here.
    """
    start = torch.tensor(0.999).item()   # float32's, slightly larger: with 0.999, 888 can become 887.99 and 887
    return shift_sigma(start * torch.linspace(1, 0, steps + 1, dtype=torch.float64), flow_shift).tolist()


def euler(velocity, x, sigmas):
    """Latents from noise x by Euler's method, x <- x + (sigma_next - sigma) * v."""
    for i in range(len(sigmas) - 1):
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, i)
    return x


def unipc(velocity, x, sigmas):
    """
    Latents from noise x by UniPC (Zhao et al. 2023, arXiv 2302.04867) of order 2 with B(h) = e^-h - 1 ("bh2"), on
    predictions of the clean latents. With lam = log((1 - sigma) / sigma), h = lam_b - lam_a and phi = e^-h - 1, the
    step from a to b is

        clean_a = x_a - sigma_a * v_a
        x_b = sigma_b / sigma_a * x_a - (1 - sigma_b) * phi * (clean_a + bend)

    The predictor takes bend from the previous step (0 on the first step and on the last, which is of order 1). Then v
    is evaluated at b, and the corrector repeats the step with a bend that knows clean_b, without another v.
    """
    steps = len(sigmas) - 1
    lam = [math.log((1 - sigma) / sigma) if sigma > 0 else math.inf for sigma in sigmas]
    clean = {}   # predictions at steps i, i - 1 and i - 2

    def step(x, bend, a, b):
        return sigmas[b] / sigmas[a] * x - (1 - sigmas[b]) * math.expm1(lam[a] - lam[b]) * (clean[a] + bend)

    for i in range(steps):
        clean[i] = x - sigmas[i] * velocity(x, i)
        if i > 0:   # correct the step from i - 1, which began at x_start
            h = lam[i] - lam[i - 1]
            phi = math.expm1(-h)
            if order == 1:
                bend = 0.5 * (clean[i] - clean[i - 1])
            else:   # rho solves [[1, 1], [r, 1]] rho = [b1, b2]
                r = (lam[i - 2] - lam[i - 1]) / h
                k = phi / -h - 1
                b1 = k / phi
                b2 = 2 * (k / -h - 0.5) / phi
                rho = (b1 - b2) / (1 - r)
                bend = rho / r * (clean[i - 2] - clean[i - 1]) + (b1 - rho) * (clean[i] - clean[i - 1])
            x = step(x_start, bend, i - 1, i)
        order = min(2, i + 1, steps - i)
        bend = 0
        if order == 2:
            bend = 0.5 * (clean[i - 1] - clean[i]) * (lam[i + 1] - lam[i]) / (lam[i - 1] - lam[i])
        x_start = x
        x = step(x_start, bend, i, i + 1)
        clean.pop(i - 2, None)
    return x


# name: solver; its grid, (steps, flow_shift) -> sigmas; how it rounds 1000 * sigma for the model. A new solver is a new
# row and nothing else: flags, checks and generation read this table.
SOLVERS = {
    "euler": (euler, uniform_grid, float),
    "unipc": (unipc, official_grid, int),   # cut to a whole number, as in the official sampler and diffusers
}


# ----------------------------------------------------------------------------------------------------------------------
# stochastic steps, whose densities SPO compares

KERNELS = {"ddim": 1.0, "flow_grpo": 0.7, "dance": 0.3}   # the amount of noise, eta, that each was published with


def step_coefficients(sigma, sigma_next, kernel, eta):
    """
    a, b and std (floats) of a stochastic step of a rectified flow: x_next ~ N(a * x + b * v, std^2), a Gaussian whose
    mean is linear in the velocity. With t = sigma and s = sigma_next < t:

        ddim       std = eta * s * sqrt(t^2 - ((1-t) s / (1-s))^2) / t
                   q = sqrt(s^2 - std^2),   a = 1 - s + q,   b = q (1-t) - (1-s) t
        flow_grpo  one Euler step of the SDE dx = [v + g^2 / (2t) (x + (1-t) v)] dt + g dw, g = eta * sqrt(t / (1-t));
                   at t = 1 that is infinite, and 1 - s replaces 1 - t, as the authors do (arXiv 2505.05470)
        dance      the same SDE with g = eta (DanceGRPO, arXiv 2505.07818)

    ddim with eta 1 draws from the posterior q(x_next | x, latents = x - t v); with eta 0 it is the Euler step. Where
    all latents are a single point, it keeps the variance s^2 at any step size. The SDEs' Euler steps do not: with 20
    steps at shift 3, the second to last leaves 1.53 (flow_grpo) or 1.27 (dance) times s^2.
    ValueError: not 0 <= s < t <= 1, eta < 0, or eta > 1 with ddim.
    """
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"a step from sigma {sigma} to {sigma_next}: expected 0 <= sigma_next < sigma <= 1")
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: expected one of {', '.join(KERNELS)}")
    if not 0 <= eta or (kernel == "ddim" and eta > 1):
        raise ValueError(f"eta is {eta}: expected 0 or more, and at most 1 with ddim (the posterior has no more noise)")
    t, s = sigma, sigma_next
    if kernel == "ddim":
        alpha = (1 - t) / (1 - s)
        std = eta * s / t * math.sqrt((t - s) / (1 - s) * (t + alpha * s))   # (t-s)/(1-s): t - alpha s, exact
        q = math.sqrt(max(s * s - std * std, 0.0))
        return 1 - s + q, q * (1 - t) - (1 - s) * t, std
    g_squared = eta**2
    if kernel == "flow_grpo":
        g_squared = eta**2 * (t / (1 - (s if t == 1 else t)))
    a = 1 - g_squared / (2 * t) * (t - s)
    b = -(1 + g_squared * (1 - t) / (2 * t)) * (t - s)
    return a, b, math.sqrt(g_squared * (t - s))


def step_distribution(x, v, sigma, sigma_next, kernel, eta):
    """Mean (B, ...) and std (a float) of a stochastic step from x (B, ...) with velocity v (B, ...)."""
    a, b, std = step_coefficients(sigma, sigma_next, kernel, eta)
    return a * x + b * v, std


def log_density(x_next, mean, std):
    """
    log N(x_next; mean, std^2) of each video, the *mean* over its elements: (B, ...), (B, ...), float -> (B,) float64.

    float64, since two models' densities differ by 1e-5 or less. A mean, since with the sum over millions of elements no
    ratio of two densities is between 0.9 and 1.1. ValueError where std is 0: a deterministic step has no density.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: a deterministic step (eta 0, or ddim's last, to sigma 0) has no density")
    z = (x_next.double() - mean.double()) / std
    return -0.5 * z.square().flatten(1).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)


# ----------------------------------------------------------------------------------------------------------------------
# generation

@dataclass(frozen=True)
class Sampler:
    """How a model is sampled."""
    solver: str = "euler"       # a name in SOLVERS
    steps: int = 20
    flow_shift: float = 3.0     # of the solver's grid
    guidance: float = 1.0       # v = v_negative + guidance * (v_positive - v_negative); 1: no negative branch
    low_guidance: float = 0.0   # guidance of the low-noise expert; 0: the same
    boundary: float = 0.0       # the low-noise expert takes over below this sigma; 0: one model
    renoise: float = 1.0        # sigma to start from; below 1, noise is added to a real clip

    @property
    def guided(self):
        """Does any step have a negative branch?"""
        return self.guidance != 1 or self.low_guidance not in (0, 1)


def plan_steps(sampler):
    """The solver's function, the n + 1 sigmas that it visits, descending to 0, and the n timesteps for the model."""
    if sampler.solver not in SOLVERS:
        raise ValueError(f"solver {sampler.solver!r}: expected one of {', '.join(SOLVERS)}")
    solve, grid, round_timestep = SOLVERS[sampler.solver]
    sigmas = grid(sampler.steps, sampler.flow_shift)
    if sampler.renoise < 1:
        sigmas = [sampler.renoise] + [sigma for sigma in sigmas if sigma < sampler.renoise]
    return solve, sigmas, [round_timestep(1000 * sigma) for sigma in sigmas[:-1]]


def call_model(model, x, timestep, context, first_latent=None, **conditions):
    """
    The model's answer for x (B, C, F, H, W) at timestep (B,) with context (B, T, D) and conditions (B, ...). Frame 0 is
    first_latent (B, C, 1, H, W) where it is given, clean and at timestep 0; its velocity is meaningless.
    """
    if first_latent is not None:
        x, timestep = hold_first_frame(x, timestep, first_latent, model.config.patch_size)
    return model(x, timestep, context, **conditions)


@torch.no_grad()
def generate(model, context, seeds, shape, sampler, negative=None, low=None, device=None, real=None, **conditions):
    """
    Generate one video for each caption: latents (B, C, F, H, W), float32, on `device`.

    context     list of B tensors (T, D)
    seeds       B integers; each draws its own noise, so a video does not depend on its batch
    shape       (C, F, H, W) of a video's latents
    negative    context (T, D) of the negative branch, which guidance needs: the encoding of a text, or of ""
    low         function that returns the low-noise expert, which answers below timestep 1000 * sampler.boundary. It is
                called when it is needed and the model has moved to the CPU: a GPU never holds both
    device      where to compute, if not where the model's parameters are (offloaded)
    real        (B, C, F, H, W): the clips that noise is added to with sampler.renoise below 1
    conditions  the variant's other inputs (B, ...), the same in both branches; first_latent is TI2V's frame 0
    """
    if low is not None and not 0 < sampler.boundary < 1:
        raise ValueError(f"boundary {sampler.boundary}: two experts need a sigma between 0 and 1, as 0.875 or 0.9")
    solve, sigmas, timesteps = plan_steps(sampler)
    high_steps = sum(low is None or timestep >= 1000 * sampler.boundary for timestep in timesteps)
    device = device or next(model.parameters()).device

    rows = list(context)
    if sampler.guided:
        if negative is None:
            raise ValueError("guidance without `negative`: give the text encoder's context of a negative prompt or ''")
        rows += [negative] * len(context)
    one_row = torch.zeros(1, context[0].shape[1])   # attention needs one, if all captions are empty
    padded = torch.nn.utils.rnn.pad_sequence([*rows, one_row], batch_first=True)[:-1].to(device)   # (B or 2B, T, D)
    branches = 2 if sampler.guided else 1
    conditions = {name: torch.cat([value] * branches).to(device) for name, value in conditions.items()}
    expert = model
    guidance = sampler.guidance

    def velocity(x, i):
        nonlocal expert, guidance
        if i >= high_steps and expert is model:
            model.to("cpu")   # before the other is there: the two may be too large together
            expert = low().to(device)
            guidance = sampler.low_guidance or guidance
        timestep = torch.full((branches * len(x),), timesteps[i], dtype=torch.float32, device=device)
        v = call_model(expert, torch.cat([x] * branches), timestep, padded, **conditions)
        if not sampler.guided:
            return v
        v_positive, v_negative = v.chunk(2)
        return v_negative + guidance * (v_positive - v_negative)

    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x = torch.stack(noise).to(device)
    if sampler.renoise < 1:
        x = add_noise(real.to(device, torch.float32), x, torch.tensor([sampler.renoise], device=device))
    x = solve(velocity, x, sigmas)
    if expert is not model:
        expert.to("cpu")
        model.to(device)
    if "first_latent" in conditions:   # once is enough: solvers work on each element alone
        x[:, :, :1] = conditions["first_latent"][:len(x)]
    return x


# ----------------------------------------------------------------------------------------------------------------------
# negatives: the losing half of GT-Pairs

# in metadata: what made a negative
SETTINGS = {"model", "seed", "negative_prompt", "lora", "low_lora", *Sampler.__dataclass_fields__}


def negative_settings(model_name, sampler, seed=0, negative_prompt="", lora="", low_lora=""):
    """
    The settings that negatives are made with, {name: text}, for their metadata. model_name names the weights, lora and
    low_lora the adapters. Settings that the first negatives did not name are left out at their defaults, so that those
    stay valid.
    """
    always = ("model", "seed", "steps", "flow_shift", "guidance")
    others = {"negative_prompt": negative_prompt, "lora": lora, "low_lora": low_lora}
    defaults = vars(Sampler()) | dict.fromkeys(others, "")
    settings = {"model": model_name, "seed": seed, **vars(sampler), **others}
    return {name: str(value) for name, value in settings.items() if name in always or value != defaults[name]}


def missing_negatives(folder, settings, name="negatives", per_sample=1, rank=0, world=1):
    """
    List this rank's share of the negatives to make, each as (real sample's file, negative's file, noise seed).

    The files are folder/NAME/STEM.safetensors, and NAME_1, NAME_2 ... for more per sample. Noise depends on (seed,
    stem, number) only, so any number of ranks makes the same files. ValueError for a file that was made with other
    settings, or for a real sample whose contents have changed since.
    """
    jobs = [(real, number) for real in sample_files(Path(folder) / "real") for number in range(per_sample)]
    missing = []
    for real, number in jobs[rank::world]:   # a share of all, not of the missing: ranks look at different moments
        target = Path(folder) / (f"{name}_{number}" if number else name) / real.name
        if not target.exists():
            missing.append((real, target, seed_of(int(settings["seed"]), real.stem, number)))
            continue
        metadata = read_header(target)["metadata"]
        stored = {name: value for name, value in metadata.items() if name in SETTINGS}
        if stored != settings:
            raise ValueError(f"{target} was made with {stored}, but now {settings} is asked for; give these negatives "
                             "another --name, or delete that folder")
        contents = fingerprint([real])
        if metadata.get("real", contents) != contents:   # files of the first versions do not say
            raise ValueError(f"{target} was made for {real} as it was with fingerprint {metadata['real']}, but that "
                             f"has changed ({contents}); delete the negative to make it again")
    return missing


def make_negatives(model, missing, settings, sampler, batch_size=64, negative=None, low=None, progress=True):
    """
    Write the missing negatives (of missing_negatives, made with negative_settings): the model's own clips of the real
    samples' captions and conditions; with sampler.renoise below 1 from the noised real clip, so that pairs differ less.
    Conditions are left out: training takes the real sample's for both videos. Killed runs resume.
    """
    bar = tqdm(total=len(missing), desc="negatives", unit="clip", disable=not progress or not missing)
    for start in range(0, len(missing), batch_size):
        batch = missing[start:start + batch_size]
        contents = [fingerprint([real]) for real, _, _ in batch]
        samples = [read_sample(real) for real, _, _ in batch]
        shapes = [{name: tuple(sample[name].shape) for name in sample.keys() - {"context", "metadata"}}
                  for sample in samples]
        for (real, _, _), shape in zip(batch, shapes):
            if shape != shapes[0]:
                raise ValueError(f"{real} has {shape}, but {batch[0][0]} has {shapes[0]}; use --batch_size 1 for "
                                 "samples that differ")
        conditions = {name: torch.stack([sample[name] for sample in samples]) for name in shapes[0]}
        clips = conditions.pop("latents")
        seeds = [noise_seed for _, _, noise_seed in batch]
        latents = generate(model, [sample["context"].float() for sample in samples], seeds, clips.shape[1:], sampler,
                           negative, low, real=clips, **conditions)
        for i, (real, target, noise_seed) in enumerate(batch):
            metadata = samples[i]["metadata"]
            metadata = {name: metadata[name] for name in ("prompt", "encoder", "fps") if name in metadata}
            metadata |= {"source": f"generated for {real.name}", "noise_seed": noise_seed, "real": contents[i]}
            write_sample(target, latents[i].to(clips.dtype), samples[i]["context"], settings | metadata)
        bar.update(len(batch))
    bar.close()


# ----------------------------------------------------------------------------------------------------------------------
# command line

# The authors' command lines by model type, a14b with two experts (guidance and low_guidance: the official pair is the
# other way round; boundary: weights.BOUNDARIES). 480p where there is a choice: all models can do it.
WAN = dict(solver="unipc", steps=50, flow_shift=5.0, guidance=5.0, low_guidance=0.0, boundary=0.0, batch_size=1, fps=16,
           frames=81, size=[480, 832])
DEFAULTS = {
    "t2v": WAN,
    "i2v": WAN | dict(steps=40, flow_shift=3.0),   # flow_shift 5.0 above 480p: fill_defaults
    "flf2v": WAN | dict(flow_shift=16.0),
    "ti2v": WAN | dict(fps=24, frames=121, size=[704, 1280]),
    "t2v a14b": WAN | dict(steps=40, flow_shift=12.0, guidance=4.0, low_guidance=3.0, boundary=0.875),
    "i2v a14b": WAN | dict(steps=40, guidance=3.5, low_guidance=3.5, boundary=0.9),
    "embedded": WAN | dict(solver="euler", steps=20, flow_shift=3.0, guidance=1.0, batch_size=64, fps=8,
                           frames=toy.FRAMES, size=[toy.SIDE, toy.SIDE]),
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the description as it stands, and the default of each flag."""


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("what to make").add_argument
    add("--prompts", nargs="+", default=[], help="make videos: prompts, or .txt files with a prompt a line")
    add("--pairs", default="", help="make negatives: folder with real/*.safetensors")
    add("--init", default="toy_base", help="weights: a file, an original or diffusers folder; A14B: with both experts")
    add("--lora", nargs="+", default=[], metavar="FILE[:SCALE]", help="adapters; of two experts the high-noise one's")
    add("--low_lora", nargs="+", default=[], metavar="FILE[:SCALE]", help="adapters of the low-noise expert")
    add("--offload_params", action="store_true", help="on a small GPU: the model's and the text encoder's blocks stay "
        "in CPU memory, and each is copied to the GPU when its turn comes")
    add("--weights", default="", help="folder with Wan's text encoder, tokenizer, VAE and CLIP; if empty, --init")
    add("--seed", type=int, default=0, help="seed of all noise")
    add("--batch_size", type=int, default=0, help="videos made together; 0: 1 for Wan, 64 for the embedded world")
    add = parser.add_argument_group("with --prompts (0: the value of the model's authors)").add_argument
    add("--image", nargs="+", default=[], help="first frame (i2v, flf2v, ti2v): a picture for all prompts or for each; "
        "transparent parts are put on white")
    add("--last_image", nargs="+", default=[], help="last frame (flf2v): a picture for all prompts or for each")
    add("--per_prompt", type=int, default=1, help="number of samples of each prompt")
    add("--name_by", default="number", choices=["number", "prompt", "prompt180"], help="names of the "
        "files: 00000, PROMPT-0 (as in VBench), or the prompt cut to 180 characters (as in VBench-2.0)")
    add("--out", default="samples", help="folder to write samples, mp4 files and a contact sheet to")
    add("--frames", type=int, default=0, help="frames of a video")
    add("--size", type=int, nargs=2, default=[0, 0], metavar=("H", "W"), help="pixels; pictures are cropped to this")
    add("--fps", type=int, default=0, help="frames per second of the mp4 files")
    add = parser.add_argument_group("with --pairs").add_argument
    add("--name", default="negatives", help="folder of the negatives; must start with 'negatives'")
    add("--per_sample", type=int, default=1, help="number of negatives for each real sample")
    add("--renoise", type=float, default=1.0, help="noise real clips to this sigma, then denoise; 1: noise alone")
    add = parser.add_argument_group("sampler (0, auto: the value of the model's authors)").add_argument
    add("--solver", default="auto", help=" or ".join(SOLVERS))
    add("--steps", type=int, default=0, help="steps of the solver")
    add("--flow_shift", type=float, default=0.0, help="shift of the sigmas towards noise")
    add("--guidance", type=float, default=0.0, help="classifier-free guidance, 1: none; 0 with --pairs: none")
    add("--low_guidance", type=float, default=0.0, help="guidance of the low-noise expert; 0: --guidance, if given")
    add("--boundary", type=float, default=0.0, help="sigma below which the low-noise expert takes over")
    add("--negative_prompt", default="official", help="text of the negative branch of guidance")
    return parser.parse_args(argv)


def fill_defaults(args, config, two_experts):
    """Fill the arguments that were not given with the variant's DEFAULTS. ValueError for what this model cannot do."""
    variant = "embedded" if config.vae == "embedded" else config.model_type + (" a14b" if two_experts else "")
    if variant not in DEFAULTS:
        raise ValueError(f"--init {args.init}: two experts of type {config.model_type}; expected t2v or i2v")
    if not two_experts and (args.boundary or args.low_guidance or args.low_lora):
        raise ValueError(f"--boundary, --low_guidance and --low_lora are for two experts, and {args.init} is one model")
    if args.pairs:
        args.guidance = args.guidance or 1.0
    if two_experts:
        args.low_guidance = args.low_guidance or args.guidance
    if variant == "i2v" and args.size[0] * args.size[1] > 480 * 832:
        args.flow_shift = args.flow_shift or 5.0
    for name, value in DEFAULTS[variant].items():
        if getattr(args, name) in (0, "auto", [0, 0]):
            setattr(args, name, value)
    if args.negative_prompt == "official" and variant == "embedded":
        args.negative_prompt = ""
    elif args.negative_prompt == "official":
        from wan_encoders import NEGATIVE_PREFIX, NEGATIVE_PROMPT
        args.negative_prompt = NEGATIVE_PREFIX.get(variant, "") + NEGATIVE_PROMPT

    for name in ("steps", "flow_shift", "fps", "batch_size", "per_sample", "per_prompt"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number above 0")
    if args.solver not in SOLVERS:
        raise ValueError(f"--solver {args.solver}: expected {' or '.join(SOLVERS)}")
    if not 0 < args.renoise <= 1 or (args.renoise < 1 and args.prompts):
        raise ValueError(f"--renoise {args.renoise}: expected a sigma above 0, at most 1; below 1 with --pairs only")
    if two_experts and not 0 < args.boundary < 1:
        raise ValueError(f"--boundary {args.boundary}: expected a sigma between 0 and 1, as 0.875 (t2v) or 0.9 (i2v)")


def make_videos(args, config, sampler, high, low):
    """Turn --prompts into samples, mp4 files and a contact sheet, with one large network in memory at a time."""
    from encode import check_clip, decode_samples, open_codecs
    from tables import image_files, name_samples, read_prompts
    from video import read_image
    codecs = open_codecs(config, args.weights, args.device, args.offload_params)
    check_clip(codecs, args.frames, args.size)
    rows, columns = (side // (codecs.multiple // config.patch_size[1]) for side in args.size)
    shape = (config.out_dim, (args.frames - 1) // codecs.frame_step + 1, rows, columns)
    prompts = read_prompts(args.prompts)
    images = image_files(args, config, len(prompts))
    out = Path(args.out)
    named = name_samples(prompts, args.per_prompt, args.name_by)
    jobs = named[args.rank::args.world]   # other ranks may be writing theirs
    targets = [out / f"{stem}.safetensors" for stem, _, _ in jobs]
    if any(target.exists() for target in targets):
        raise ValueError(f"--out {out} holds samples already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)

    codecs.part("vae")   # what is wrong with the decoder is said before hours of sampling
    conditions = {}      # by files: one picture may serve many prompts
    for first, last in dict.fromkeys(images[number] for _, number, _ in jobs if images[number][0]):
        last_image = read_image(last, args.size) if last else None
        conditions[first, last] = codecs.conditions(read_image(first, args.size), last_image, args.frames)
    codecs.free("clip")
    codecs.free("vae")
    contexts = {number: codecs.encode_text(prompts[number]) for number in dict.fromkeys(job[1] for job in jobs)}
    negative = codecs.encode_text(args.negative_prompt) if sampler.guided else None
    codecs.free("text")

    model, load_low = load_models(high, low, args)
    source = " + ".join([f"generated by {args.init}", *map(str, args.lora + args.low_lora)])
    metadata = {"source": source, "encoder": codecs.name, "fps": args.fps, **vars(sampler)}
    for start in tqdm(range(0, len(jobs), args.batch_size), desc="videos", disable=args.rank != 0):
        batch = jobs[start:start + args.batch_size]
        # the first of a prompt has the noise that it has as the only one
        seeds = [seed_of(args.seed, number, i) if i else seed_of(args.seed, number) for _, number, i in batch]
        tensors = [conditions.get(images[number], {}) for _, number, _ in batch]   # one {name: tensor} a video
        stacked = {name: torch.stack([video[name] for video in tensors]) for name in tensors[0]}
        context = [contexts[number] for _, number, _ in batch]
        latents = generate(model, context, seeds, shape, sampler, negative, load_low, **stacked)
        for i, (_, number, _) in enumerate(batch):
            kept = metadata | {"prompt": prompts[number], "noise_seed": seeds[i]}
            write_sample(targets[start + i], latents[i], contexts[number], kept, **tensors[i])
    del model, load_low
    sheet = out / ("contact_sheet.png" if args.world == 1 else f"contact_sheet_{args.rank}.png")
    videos = out if args.name_by == "number" else out / "videos"   # VBench takes a folder of nothing but videos
    decode_samples(codecs, targets, videos, args.fps, sheet, progress=args.rank == 0)
    print(f"rank {args.rank}: {len(jobs)} of {len(named)} videos in {videos} and a contact sheet in {out}", flush=True)


def add_negatives(args, config, sampler, high, low):
    """Make the negatives that --pairs lacks. Nothing is loaded where none is missing."""
    from encode import open_codecs
    model_name = "+".join(weights_digest(path) for path in (high, low) if path)
    adapters = [" ".join(file.digest for file in files) for files in (args.lora, args.low_lora)]
    negative_prompt = args.negative_prompt if sampler.guided else ""
    settings = negative_settings(model_name, sampler, args.seed, negative_prompt, *adapters)
    missing = missing_negatives(args.pairs, settings, args.name, args.per_sample, args.rank, args.world)
    if missing:
        negative = None
        if sampler.guided:
            codecs = open_codecs(config, args.weights, args.device, args.offload_params)
            negative = codecs.encode_text(args.negative_prompt)
            codecs.free("text")
        model, load_low = load_models(high, low, args)
        make_negatives(model, missing, settings, sampler, args.batch_size, negative, load_low, args.rank == 0)
    print(f"rank {args.rank}: {len(missing)} negatives made in {args.pairs}", flush=True)


def main(args):
    from tables import check_text
    if bool(args.prompts) == bool(args.pairs):
        raise ValueError("give either --prompts or --pairs")
    if not args.name.startswith("negatives") or "/" in args.name:
        raise ValueError(f"--name {args.name}: expected a name that starts with 'negatives', as training expects")
    if args.pairs and (args.image or args.last_image or args.frames or any(args.size)):
        raise ValueError("--image, --last_image, --frames and --size are for --prompts; with --pairs real/ says them")
    if args.pairs and (args.per_prompt != 1 or args.name_by != "number"):
        raise ValueError("--per_prompt and --name_by are for --prompts; with --pairs there is --per_sample")
    check_text("--init", args.init)
    check_text("--negative_prompt", args.negative_prompt)
    args.rank = int(os.environ.get("RANK", 0))   # ranks work alone, without a process group
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.device = torch.device("cpu")
    if torch.cuda.is_available():
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)   # before anything allocates: each rank would take memory of GPU 0 too

    args.init = locate_weights(args.init)
    args.weights = args.weights or (args.init if Path(args.init).is_dir() else Path(args.init).parent)
    high, low = find_experts(args.init)
    config, _ = open_wan(high)
    if low:
        open_wan(low, config)
    args.lora = open_lora_files("--lora", args.lora, config, "high" if low else "")
    args.low_lora = open_lora_files("--low_lora", args.low_lora, config, "low")
    if args.pairs:
        files = sample_files(Path(args.pairs) / "real")
        for file in files:
            check_text(f"--pairs {args.pairs}", file.name)
        check_samples(read_summaries(files), config)
        args.size = [8 * side for side in read_header(files[0])["latents"].shape[2:]]   # for the flow_shift of i2v
    fill_defaults(args, config, low is not None)
    sampler = Sampler(args.solver, args.steps, args.flow_shift, args.guidance, args.low_guidance, args.boundary,
                      args.renoise)
    if args.rank == 0:
        print(f"{args.init}: {config.model_type}, {sampler}", flush=True)
        for flag, files in (("--lora", args.lora), ("--low_lora", args.low_lora)):
            for file in files:
                print(f"{flag} {file}: {file.describe()}", flush=True)
    work = make_videos if args.prompts else add_negatives
    work(args, config, sampler, high, low)


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"sample.py: {error}; real video needs it: pip install -r requirements-video.txt")
