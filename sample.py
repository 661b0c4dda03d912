"""
Samplers, and their command line: videos of prompts, and the losing half of GT-Pairs.

    python sample.py --prompts "small red circle moving fast left" --init toy_base --out samples
    python sample.py --prompts "a cat on a surfboard" --init Wan2.1-T2V-1.3B --out samples                 # an original or a diffusers folder
    python sample.py --prompts "the cat jumps" --image cat.png --init Wan2.2-I2V-A14B --out samples        # both experts are found
    torchrun --nproc_per_node=8 sample.py --pairs DATA --init MODEL        # DATA/real/*.safetensors -> DATA/negatives/*.safetensors

What is not given (0 or auto) is as the model's authors have it, by variant: DEFAULTS below.
"""
import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import toy
from data import (
    check_samples,
    fingerprint,
    read_header,
    read_sample,
    read_summaries,
    sample_files,
    seed_of,
    weights_digest,
    write_sample,
    write_whole,
)
from losses import add_noise, shift_sigma
from model import hold_first_frame
from pictures import contact_sheet, mp4
from weights import BOUNDARIES, find_experts, load_wan, locate_weights, open_wan

# As the official command lines do it, by model type; "a14b": two experts. guidance and low_guidance: high-noise and low-noise expert (the official
# pair is the other way round). 480p where there is a choice: it is what every one of them can do.
WAN = dict(solver="unipc", steps=50, flow_shift=5.0, guidance=5.0, low_guidance=0.0, boundary=0.0, batch_size=1, fps=16, frames=81, size=[480, 832])
DEFAULTS = {
    "t2v": WAN,
    "i2v": WAN | dict(steps=40, flow_shift=3.0),                               # 5.0 above 480p: settle()
    "flf2v": WAN | dict(flow_shift=16.0),
    "ti2v": WAN | dict(fps=24, frames=121, size=[704, 1280]),
    "t2v a14b": WAN | dict(steps=40, flow_shift=12.0, guidance=4.0, low_guidance=3.0, boundary=BOUNDARIES["wan2.2-t2v-a14b"] / 1000),
    "i2v a14b": WAN | dict(steps=40, guidance=3.5, low_guidance=3.5, boundary=BOUNDARIES["wan2.2-i2v-a14b"] / 1000),
    "embedded": WAN | dict(solver="euler", steps=20, flow_shift=3.0, guidance=1.0, batch_size=64, fps=8, frames=toy.FRAMES, size=[toy.SIDE, toy.SIDE]),
}
# Of Wan2.1's image models, before the sentence that all share: "shaking camera", "scene cut".
NEGATIVE_PREFIX = {"i2v": "镜头晃动，", "flf2v": "镜头切换，镜头晃动，"}
# In the metadata of negatives: what they are made with.
SETTINGS = ("model", "seed", "steps", "flow_shift", "guidance", "solver", "low_guidance", "boundary", "negative_prompt", "renoise")


# ------------------------------------------------------------------------------------------------------------------
# solvers: velocity(x, i) is the model's answer at sigmas[i]; x from pure noise to clean latents

def uniform_grid(steps, flow_shift):
    """The steps + 1 sigmas 1 - i / steps, shifted, descending from 1 to 0."""
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), flow_shift).float().tolist()


def official_grid(steps, flow_shift):
    """
    The steps + 1 sigmas 0.999 (1 - i / steps), shifted, descending to 0: the grid of Wan's generate.py with UniPC.
    diffusers' own default, 1 - 0.999 i / steps, is another: for 50 steps at shift 5 its last timestep is 96, here it is 92.
    """
    start = torch.tensor(0.999).item()   # float32's, slightly above: with 0.999 itself 888 can come out as 887.99, cut to 887
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


class Solver(NamedTuple):
    """A row of SOLVERS. Adding a solver is one row there; --solver, generation and the checks follow from it."""
    solve: Callable            # (velocity, x, sigmas) -> clean latents; velocity(x, i) is the model's answer at sigmas[i]
    grid: Callable             # (steps, flow_shift) -> steps + 1 sigmas, descending to 0
    round_timestep: Callable   # 1000 * sigma -> the timestep that the model is given


SOLVERS = {
    "euler": Solver(euler, uniform_grid, float),
    "unipc": Solver(unipc, official_grid, int),   # cut to a whole number, as the official sampler and diffusers do
}


@dataclass(frozen=True)
class Sampler:
    """How a model is sampled."""
    solver: str = "euler"         # a name in SOLVERS
    steps: int = 20
    flow_shift: float = 3.0       # of the solver's grid
    guidance: float = 1.0         # v = v_negative + guidance * (v_positive - v_negative); 1: one forward a step
    low_guidance: float = 0.0     # guidance of the low-noise expert; 0: the same
    boundary: float = 0.0         # sigma below which the low-noise expert takes over; 0: one model
    renoise: float = 1.0          # sigma to start from; below 1 the noise is added to a real clip

    @property
    def guided(self):
        return not self.guidance == (self.low_guidance or self.guidance) == 1


# ------------------------------------------------------------------------------------------------------------------
# stochastic steps, whose densities SPO compares

KERNELS = {"ddim": 1.0, "flow_grpo": 0.7, "dance": 0.3}                       # and the amount of noise, eta, that each was published with


def step_coefficients(sigma, sigma_next, kernel, eta):
    """
    One stochastic step of a rectified flow is a Gaussian whose mean is linear in the velocity, x_next ~ N(a * x + b * v, std^2). With t = sigma and
    s = sigma_next < t:

        ddim       std = eta * s * sqrt(t^2 - ((1-t) s / (1-s))^2) / t,   q = sqrt(s^2 - std^2),   a = 1 - s + q,   b = q (1-t) - (1-s) t
        flow_grpo  the SDE dx = [v + g^2 / (2t) (x + (1-t) v)] dt + g dw in one Euler step, g = eta * sqrt(t / (1-t)); at t = 1, where that is infinite,
                   the root takes s for the t under the line, as its authors do (Flow-GRPO, arXiv 2505.05470)
        dance      the same SDE with g = eta (DanceGRPO, arXiv 2505.07818)

    ddim with eta 1 draws from the posterior q(x_next | x, latents = x - t v), with eta 0 it is the Euler step; where all latents are one point it keeps
    the variance s^2 at any step size. The Euler steps of the SDEs do not: 20 steps, shift 3, the last but one leaves 1.53 (flow_grpo) or 1.27 (dance) of it.
    Floats in, floats out. ValueError: not 0 <= s < t <= 1, eta < 0, or above 1 with ddim.
    """
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"a step from sigma {sigma} to {sigma_next}: expected 0 <= sigma_next < sigma <= 1")
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: expected one of {', '.join(KERNELS)}")
    if not 0 <= eta or (kernel == "ddim" and eta > 1):
        raise ValueError(f"eta is {eta}: expected 0 or more, and at most 1 with ddim (the posterior has no more noise to give)")
    t, s = sigma, sigma_next
    if kernel == "ddim":
        alpha = (1 - t) / (1 - s)
        std = eta * s / t * math.sqrt((t - s) / (1 - s) * (t + alpha * s))        # (t - s) / (1 - s) is t - alpha s without the cancellation
        q = math.sqrt(max(s * s - std * std, 0.0))
        return 1 - s + q, q * (1 - t) - (1 - s) * t, std
    g2 = eta ** 2 * (t / (1 - (s if t == 1 else t)) if kernel == "flow_grpo" else 1)
    return 1 - g2 / (2 * t) * (t - s), -(1 + g2 * (1 - t) / (2 * t)) * (t - s), math.sqrt(g2 * (t - s))


def step_distribution(x, v, sigma, sigma_next, kernel, eta):
    """Where a stochastic step from x (B, ...) with velocity v (B, ...) leads: mean (B, ...) and std, a float (0 for ddim at sigma_next 0)."""
    a, b, std = step_coefficients(sigma, sigma_next, kernel, eta)
    return a * x + b * v, std


def log_density(x_next, mean, std):
    """
    log N(x_next; mean, std^2) of every video, *mean* over its elements: (B, ...), (B, ...), float -> (B,). In float64, since what is used is the
    difference between two models', 1e-5 or less. A sum over a video's millions of elements would let no ratio of two densities be between 0.9 and 1.1.
    ValueError where std is 0: a deterministic step has no density.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: a deterministic step (eta 0, or ddim's last one, to sigma 0) has no density")
    z = (x_next.double() - mean.double()) / std
    return -0.5 * z.square().flatten(1).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)


# ------------------------------------------------------------------------------------------------------------------
# generation


@torch.no_grad()
def generate(model, context, seeds, shape, sampler, negative=None, low=None, device=None, real=None, **conditions):
    """
    Videos of captions: latents (B, C, F, H, W), float32, on `device`.

    context: list of B tensors (T, D). seeds: B integers, one noise each, so a video does not depend on its batch. shape: (C, F, H, W).
    negative: context (T, D) of the unconditional branch; by default no rows.
    low: a function that returns the low-noise expert of Wan2.2 A14B, for timesteps below 1000 * sampler.boundary. It is called when the expert's
    turn comes, after the model has moved to the CPU: one expert at a time is on a GPU, and the model is back there in the end.
    device: where to compute, for a model whose parameters live elsewhere (offloaded).
    real: (B, C, F, H, W), the clips that noise is added to with sampler.renoise below 1; only the steps of the grid below it are taken.
    conditions: the variant's other inputs, (B, ...) each, the same in both branches; first_latent (B, C, 1, H, W) is TI2V's frame 0.
    """
    if sampler.solver not in SOLVERS:
        raise ValueError(f"solver {sampler.solver!r}: expected one of {', '.join(SOLVERS)}")
    if low is not None and not 0 < sampler.boundary < 1:
        raise ValueError(f"boundary {sampler.boundary}: two experts need a sigma between 0 and 1 to change at, such as 0.875 (t2v) or 0.9 (i2v)")
    device = device or next(model.parameters()).device
    solver = SOLVERS[sampler.solver]
    sigmas = solver.grid(sampler.steps, sampler.flow_shift)
    if sampler.renoise < 1:
        sigmas = [sampler.renoise] + [sigma for sigma in sigmas if sigma < sampler.renoise]
    timesteps = [solver.round_timestep(1000 * sigma) for sigma in sigmas[:-1]]
    first_low = len(timesteps)                                                # the first step of the low-noise expert
    if low is not None:
        first_low = sum(timestep >= 1000 * sampler.boundary for timestep in timesteps)

    branches = 2 if sampler.guided else 1
    rows = list(context)
    if sampler.guided:
        negative = torch.zeros(0, context[0].shape[1]) if negative is None else negative
        rows += [negative] * len(context)
    padded = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(1, context[0].shape[1])], batch_first=True)[:-1].to(device)   # (B or 2B, T, D)
    first_latent = conditions.pop("first_latent", None)
    conditions = {name: torch.cat([value] * branches).to(device) for name, value in conditions.items()}
    first_latent = None if first_latent is None else first_latent.to(device, torch.float32)
    expert, guidance = model, sampler.guidance

    def velocity(x, i):
        nonlocal expert, guidance
        if i >= first_low and expert is model:
            model.to("cpu")                                                   # first, for the two together may be too large
            expert, guidance = low().to(device), sampler.low_guidance or guidance
        timestep = torch.full((len(x),), timesteps[i], dtype=torch.float32, device=device)
        if first_latent is not None:
            x, timestep = hold_first_frame(x, timestep, first_latent, model.config.patch_size)
        v = expert(torch.cat([x] * branches), torch.cat([timestep] * branches), padded, **conditions)
        if branches == 1:
            return v
        v_positive, v_negative = v.chunk(2)
        return v_negative + guidance * (v_positive - v_negative)

    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
    if sampler.renoise < 1:
        x = add_noise(real.to(device, torch.float32), x, torch.tensor([sampler.renoise], device=device))
    x = solver.solve(velocity, x, sigmas)
    if expert is not model:
        expert.to("cpu")
        model.to(device)
    if first_latent is not None:                     # the solvers work on each element alone: once at the end is as good as after every step
        x[:, :, :1] = first_latent
    return x


# ------------------------------------------------------------------------------------------------------------------
# negatives: the losing half of GT-Pairs

class Negative(NamedTuple):
    """A negative that is to be made."""
    real: Path
    target: Path
    noise_seed: int


def describe(sampler):
    """The settings that a sample from noise alone is made with: {name: value}."""
    names = ["solver", "steps", "flow_shift", "guidance"]
    if sampler.boundary:
        names += ["low_guidance", "boundary"]
    return {name: getattr(sampler, name) for name in names}


def negative_settings(model_name, sampler, seed=0, negative_prompt=""):
    """
    What a negative is made with, as strings for its metadata: names in SETTINGS. Defaults are left out, so that older files stay good.
    model_name: names the weights; negative_prompt: the text of the unconditional branch.
    """
    settings = {"model": model_name, "seed": seed, "steps": sampler.steps, "flow_shift": float(sampler.flow_shift), "guidance": float(sampler.guidance)}
    if sampler.solver != "euler":
        settings["solver"] = sampler.solver
    if sampler.boundary:
        settings |= {"low_guidance": float(sampler.low_guidance or sampler.guidance), "boundary": sampler.boundary}
    if negative_prompt:
        settings["negative_prompt"] = negative_prompt
    if sampler.renoise < 1:
        settings["renoise"] = sampler.renoise
    return {key: str(value) for key, value in settings.items()}


def missing_negatives(folder, settings, name="negatives", per_sample=1, rank=0, world=1):
    """
    The negatives of folder/real/*.safetensors that this rank has to make: list of Negative.

    Their files are folder/NAME/STEM.safetensors (NAME_1, NAME_2 ... for more per sample). The noise of each depends on (seed, stem, k) only, so
    any number of ranks makes the same files. Raises ValueError for a file that was made with other settings, or for a real sample that has changed since.
    """
    every = [(path, k) for path in sample_files(Path(folder) / "real") for k in range(per_sample)]
    missing = []
    for path, k in every[rank::world]:                                        # by place, not by what is missing: ranks look at different moments
        target = Path(folder) / (name if k == 0 else f"{name}_{k}") / path.name
        if not target.exists():
            missing.append(Negative(path, target, seed_of(int(settings["seed"]), path.stem, k)))
            continue
        metadata = read_header(target)["metadata"]
        stored = {key: value for key, value in metadata.items() if key in SETTINGS}
        if stored != settings:
            raise ValueError(f"{target} was made with {stored}, but now {settings} is asked for; give these negatives another --name, or delete that folder")
        contents = fingerprint([path])
        if metadata.get("real", contents) != contents:                        # older files do not tell
            raise ValueError(f"{target} was made for {path} as it was with fingerprint {metadata['real']}, but that has changed ({contents}); "
                             "delete the negative to make it again")
    return missing


def make_negatives(model, missing, settings, sampler, batch_size=64, negative=None, low=None, progress=True):
    """
    Writes the missing negatives: for every real sample the model's own clip of the same caption and conditions. Conditions are not written again:
    training takes the real sample's for both. With sampler.renoise below 1 the real clip is noised to that sigma and made anew from there, so that
    the two differ in less. Files appear whole: a killed run resumes where it stopped.

    missing: as missing_negatives gives it; settings: as negative_settings; negative, low: as in generate.
    """
    bar = tqdm(total=len(missing), desc="negatives", unit="clip", disable=not progress or not missing)
    for start in range(0, len(missing), batch_size):
        batch = missing[start:start + batch_size]
        prints = [fingerprint([job.real]) for job in batch]
        reals = [read_sample(job.real) for job in batch]
        shapes = [{key: tuple(real[key].shape) for key in real if key not in ("context", "metadata")} for real in reals]
        for job, shape in zip(batch, shapes):
            if shape != shapes[0]:
                raise ValueError(f"{job.real} has {shape}, but {batch[0].real} has {shapes[0]}; use --batch_size 1 for samples that differ")
        stacked = {key: torch.stack([real[key] for real in reals]) for key in shapes[0]}
        clips = stacked.pop("latents")
        contexts = [real["context"].float() for real in reals]
        seeds = [job.noise_seed for job in batch]
        latents = generate(model, contexts, seeds, clips.shape[1:], sampler, negative, low, real=clips, **stacked).cpu()
        for job, contents, real, value in zip(batch, prints, reals, latents):
            kept = {key: real["metadata"][key] for key in ("prompt", "encoder", "fps") if key in real["metadata"]}
            made_for = {"source": f"generated for {job.real.name}", "noise_seed": job.noise_seed, "real": contents}
            write_sample(job.target, value.to(real["latents"].dtype), real["context"], settings | kept | made_for)
        bar.update(len(batch))
    bar.close()


# ------------------------------------------------------------------------------------------------------------------
# command line

def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--init", default="toy_base", help="weights: an original or diffusers folder, or a single file; for A14B the folder with both experts")
    p.add_argument("--weights", default="", help="folder with Wan's text encoder, tokenizer, VAE (and CLIP); by default that of --init")
    # what to make
    p.add_argument("--prompts", nargs="+", default=[], help="prompts, or one .txt file with a prompt a line")
    p.add_argument("--pairs", default="", help="folder with real/*.safetensors: make a negative for each")
    # prompts
    p.add_argument("--image", nargs="+", default=[], help="first frame: a picture for all prompts, or one for each (i2v, flf2v, ti2v)")
    p.add_argument("--last_image", nargs="+", default=[], help="last frame, likewise (flf2v)")
    p.add_argument("--out", default="samples", help="folder for the videos of --prompts")
    p.add_argument("--frames", type=int, default=0)
    p.add_argument("--size", type=int, nargs=2, default=[0, 0], metavar=("H", "W"), help="pixels; pictures are scaled to cover it, then cropped")
    p.add_argument("--fps", type=int, default=0, help="of the mp4 files")
    # pairs
    p.add_argument("--name", default="negatives", help="folder of the negatives; must start with 'negatives'")
    p.add_argument("--renoise", type=float, default=1.0, help="sigma to which the real clip is noised and then made anew; 1: from noise alone")
    p.add_argument("--per_sample", type=int, default=1, help="negatives for every real sample")
    # sampler; 0 and auto: as the model's authors do
    p.add_argument("--solver", default="auto", help="euler, unipc")
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--flow_shift", type=float, default=0.0)
    p.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance; 1 is none, and the default of --pairs: the model's own "
                                                               "distribution, which a loser should be from")
    p.add_argument("--low_guidance", type=float, default=0.0, help="of the low-noise expert; where --guidance is given: the same")
    p.add_argument("--boundary", type=float, default=0.0, help="sigma at which the low-noise expert takes over")
    p.add_argument("--negative_prompt", default="official", help="text of the unconditional branch")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=0)
    return p.parse_args(argv)


def settle(args, config, two_experts):
    """Fills what was not given with DEFAULTS of the variant, in args. Raises ValueError for what this model cannot do."""
    embedded = config.vae == "embedded"
    variant = "embedded" if embedded else config.model_type + (" a14b" if two_experts else "")
    if variant not in DEFAULTS:
        raise ValueError(f"--init {args.init}: two experts of type {config.model_type}; expected t2v or i2v")
    if not two_experts and (args.boundary or args.low_guidance):
        raise ValueError(f"--boundary and --low_guidance are for two experts, and {args.init} is one model")
    args.guidance = args.guidance or (1.0 if args.pairs else 0.0)
    args.low_guidance = args.low_guidance or args.guidance
    if variant == "i2v" and args.size[0] * args.size[1] > 480 * 832:
        args.flow_shift = args.flow_shift or 5.0
    for name, value in DEFAULTS[variant].items():
        if getattr(args, name) in (0, "auto", [0, 0]):
            setattr(args, name, value)
    args.low_guidance = args.low_guidance or args.guidance
    if args.solver not in SOLVERS:
        raise ValueError(f"--solver {args.solver}: expected {' or '.join(SOLVERS)}")
    for name in ("steps", "flow_shift", "fps", "batch_size", "per_sample"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number above 0")
    if not 0 < args.renoise <= 1 or args.renoise < 1 and args.prompts:
        raise ValueError(f"--renoise {args.renoise}: expected a sigma above 0, at most 1, and --pairs, whose real clips are noised")
    if two_experts and not 0 < args.boundary < 1:
        raise ValueError(f"--boundary {args.boundary}: expected a sigma between 0 and 1; 0.875 for Wan2.2-T2V-A14B, 0.9 for Wan2.2-I2V-A14B")
    if args.negative_prompt == "official":
        args.negative_prompt = ""                                             # of the embedded world
        if not embedded:
            from wan_encoders import NEGATIVE_PROMPT
            args.negative_prompt = NEGATIVE_PREFIX.get(variant, "") + NEGATIVE_PROMPT


def read_prompts(prompts):
    """The prompts themselves, or the lines of the one .txt file that is named. Raises ValueError where there are none."""
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        if not Path(prompts[0]).exists():
            raise ValueError(f"--prompts {prompts[0]}: no such file")
        prompts = [line.strip() for line in Path(prompts[0]).read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError("--prompts: the file has no line with a prompt")
    return prompts


def image_files(args, config, count):
    """--image and --last_image -> [(first, last)] for each of the prompts, "" where there is none. Raises ValueError where they do not fit the model."""
    kind = config.model_type
    if kind == "t2v" and args.image:
        raise ValueError(f"--image: {args.init} is a text-to-video model and takes no picture")
    if kind in ("i2v", "flf2v") and not args.image:
        raise ValueError(f"--image is missing: {args.init} is an {kind} model and needs the first frame of every video")
    if kind == "flf2v" and not args.last_image:
        raise ValueError(f"--last_image is missing: {args.init} is an flf2v model and needs the first and the last frame of every video")
    if kind != "flf2v" and args.last_image:
        raise ValueError(f"--last_image: {args.init} is a {kind} model; only flf2v models take a last frame")
    columns = []
    for flag, files in (("--image", args.image or [""]), ("--last_image", args.last_image or [""])):
        if len(files) not in (1, count):
            raise ValueError(f"{flag}: {len(files)} pictures for {count} prompts; expected one, or one for each")
        for file in files:
            if file and not Path(file).is_file():
                raise ValueError(f"{flag} {file}: no such file")
        columns.append(files * (count // len(files)))
    return list(zip(*columns))


def encoders_folder(args):
    """Where the encoders of --init are: --weights, or the folder that --init is or lies in."""
    return args.weights or (args.init if Path(args.init).is_dir() else Path(args.init).parent)


def encode_texts(args, codecs, prompts):
    """-> contexts (T, D) of the prompts, that of the unconditional branch (None without guidance). The text encoder is not in memory afterwards."""
    guided = not args.guidance == args.low_guidance == 1
    contexts = [codecs.encode_text(text) for text in prompts]
    negative = codecs.encode_text(args.negative_prompt) if guided else None
    codecs.free("text")
    return contexts, negative


def make_videos(args, config, load_model, load_low, sampler, device, rank, world):
    """--prompts to samples, mp4 files and a contact sheet. One large thing at a time is in memory: image encoders, text encoder, model, decoder."""
    from encode import check_clip, open_codecs
    from video import read_image
    codecs = open_codecs(config, encoders_folder(args), device)
    check_clip(codecs, args.frames, args.size)
    rows, columns = (side // (codecs.multiple // config.patch_size[1]) for side in args.size)
    shape = (config.out_dim, (args.frames - 1) // codecs.frame_step + 1, rows, columns)
    prompts, out = read_prompts(args.prompts), Path(args.out)
    images = image_files(args, config, len(prompts))
    mine = list(range(len(prompts)))[rank::world]                             # only these are looked at: another rank may be writing its own already
    if any((out / f"{i:05d}.safetensors").exists() for i in mine):
        raise ValueError(f"--out {out} holds samples already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)

    codecs.part("vae")                                                        # what is wrong with the decoder is said before hours of sampling
    conditions = {}                                                           # by files: one picture may serve many prompts
    for first, last in dict.fromkeys(images[i] for i in mine if images[i][0]):
        conditions[first, last] = codecs.conditions(read_image(first, args.size), read_image(last, args.size) if last else None, args.frames)
    codecs.free("clip"), codecs.free("vae")
    contexts, negative = encode_texts(args, codecs, [prompts[i] for i in mine])

    model = load_model()
    kept = {"source": f"generated by {args.init}", "encoder": codecs.name, "fps": args.fps, **describe(sampler)}
    for start in tqdm(range(0, len(mine), args.batch_size), desc="videos", disable=rank != 0):
        part = mine[start:start + args.batch_size]
        seeds = [seed_of(args.seed, i) for i in part]
        given = [conditions.get(images[i], {}) for i in part]
        latents = generate(model, contexts[start:start + args.batch_size], seeds, shape, sampler, negative, load_low,
                           **{name: torch.stack([of[name] for of in given]) for name in given[0]}).cpu()
        for i, value, context, noise_seed in zip(part, latents, contexts[start:], seeds):
            write_sample(out / f"{i:05d}.safetensors", value, context, {"prompt": prompts[i], "noise_seed": noise_seed, **kept})
    del model, load_low

    shown = []
    for i in tqdm(mine, desc="decoding", disable=rank != 0):
        video = codecs.decode_video(read_sample(out / f"{i:05d}.safetensors")["latents"])          # (3, F, H, W)
        side = min(video.shape[2:])
        write_whole(out / f"{i:05d}.mp4", mp4(video, args.fps, upscale=max(1, 256 // side)))                 # players blur tiny clips
        shown.append(video[:, :, ::max(1, side // 128), ::max(1, side // 128)])
        shown = shown[:32]
    if shown:
        sheet = contact_sheet(shown, upscale=max(1, 128 // min(shown[0].shape[2:])))
        write_whole(out / f"contact_sheet{f'_{rank}' if world > 1 else ''}.png", sheet)
    print(f"rank {rank}: {len(mine)} of {len(prompts)} videos and a contact sheet in {out}", flush=True)


def main(args):
    if bool(args.prompts) == bool(args.pairs):
        raise ValueError("give either --prompts or --pairs")
    if not args.name.startswith("negatives") or "/" in args.name:
        raise ValueError(f"--name {args.name}: expected a folder name that starts with 'negatives', where training looks for losers")
    if args.pairs and (args.image or args.last_image or args.frames or any(args.size)):
        raise ValueError("--image, --last_image, --frames and --size are for --prompts; with --pairs all that stands in the samples of real/")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))              # ranks work alone here: no process group
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    args.init = locate_weights(args.init)
    high, low = find_experts(args.init)
    config, _ = open_wan(high)
    if low:
        open_wan(low, config)
    if args.pairs:
        files = sample_files(Path(args.pairs) / "real")
        check_samples(read_summaries(files), config)
        args.size = [8 * side for side in read_header(files[0])["latents"].shape[2:]]              # settle() looks at it
    settle(args, config, low is not None)
    sampler = Sampler(args.solver, args.steps, args.flow_shift, args.guidance, args.low_guidance, args.boundary, args.renoise)
    if rank == 0:
        print(f"{args.init}: {config.model_type}, {', '.join(f'{name} {value}' for name, value in describe(sampler).items())}", flush=True)

    def load(path):
        return load_wan(path, dtype=torch.bfloat16 if cuda else torch.float32).eval().requires_grad_(False).to(device)

    load_low = cache(lambda: load(low)) if low else None
    if args.prompts:
        make_videos(args, config, lambda: load(high), load_low, sampler, device, rank, world)
        return
    model_name = "+".join(weights_digest(path) for path in (high, low) if path)
    settings = negative_settings(model_name, sampler, args.seed, args.negative_prompt if sampler.guided else "")
    missing = missing_negatives(args.pairs, settings, args.name, args.per_sample, rank, world)
    if missing:
        negative = None
        if sampler.guided:
            from encode import open_codecs
            _, negative = encode_texts(args, open_codecs(config, encoders_folder(args), device), [])
        make_negatives(load(high), missing, settings, sampler, args.batch_size, negative, load_low, progress=rank == 0)
    print(f"rank {rank}: {len(missing)} negatives made in {args.pairs}", flush=True)


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
