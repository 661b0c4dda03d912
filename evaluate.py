"""
The embedded world as the two trainers use it: its data, made on first use, and the evaluation on captions that were never trained on. For other data: previews.
"""
import argparse
import json
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import toy
from data import (
    PairSet,
    collate,
    open_data,
    randomness,
    read_header,
    read_sample,
    seed_of,
    weights_digest,
    write_sample,
    write_whole,
)
from fsdp_utils import spread
from pictures import contact_sheet
from sample import Sampler, generate, make_negatives, missing_negatives, negative_settings
from weights import load_wan

SHAPE = (toy.CHANNELS, toy.FRAMES, toy.SIDE // toy.BLOCK, toy.SIDE // toy.BLOCK)     # of a clip's latents


def sampler_of(args):
    """The Sampler that a trainer's flags describe."""
    return Sampler(steps=args.sample_steps, flow_shift=args.flow_shift, guidance=args.guidance)


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
        sampler = sampler_of(args)
        settings = negative_settings(weights_digest(args.init), sampler)
        missing = missing_negatives(folder, settings, rank=ranks.rank, world=ranks.world)
        if missing:
            model = load_wan(args.init, config).to(ranks.device).eval().requires_grad_(False)    # whole on every rank: each makes its own share
            make_negatives(model, missing, settings, sampler, progress=ranks.rank == 0)
        dist.barrier()
    return folder


def of_the_world(dataset):
    """Are these samples clips of the embedded world? Then a run on them is evaluated there, whoever made the negatives."""
    return read_header(next(iter(dataset.wins)))["metadata"].get("source") == "embedded world"


def sample_held_out(args, model, captions, ranks):
    """Latents (N, *SHAPE) of clips of these captions by Euler, the same seeds whatever the model, on the CPU of every rank."""
    make = lambda part: generate(model, [toy.encode_text(captions[i]) for i in part], [seed_of("held out", i) for i in part], SHAPE,
                                 sampler_of(args), device=ranks.device)
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
        write_whole(path.with_suffix(".png"), contact_sheet([clip[i] for i in range(8) for clip in clips], upscale=3, group=len(clips)))

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
                            sampler_of(args), device=ranks.device, **conditions)
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

# ------------------------------------------------------------------------------------------------------------------
# pairs that are never trained on

def hold_back(dataset, count):
    """
    Takes `count` wins with all their losers out of a PairSet. Which, hangs on the names of the files alone. Pairs that share a file with these go from
    training too. Returns what is left to train on and what is held back, both PairSets. Raises ValueError where nothing would be left.
    """
    good = [pair for i, pair in enumerate(dataset.pairs) if i not in dataset.bad]
    wins = sorted({win for win, _ in good}, key=lambda path: (zlib.crc32(path.stem.encode()), str(path)))
    held = [pair for pair in good if pair[0] in set(wins[:count])]
    files = {path for pair in held for path in pair}
    left = [pair for pair in dataset.pairs if not files & set(pair)]
    if count < 1 or not left:
        raise ValueError(f"--hold_back {count}: the data has {len(wins)} different wins in {len(dataset)} pairs; expected 1 or more, and pairs left to train on")
    return PairSet(left, dataset.unpaired, dataset.skip), PairSet(held)


def sigma_steps(min_timestep, max_timestep, count=4):
    """The middles of `count` equal parts of the range of sigmas that is trained on."""
    return [(min_timestep + (max_timestep - min_timestep) * (i + 0.5) / count) / 1000 for i in range(count)]


class Probe:
    """
    The errors of fixed pairs, with fixed noise, at fixed sigmas: the same whatever the run's loss, seed and ranks, so that runs can be compared and a step
    with the next. model: the policy before its first update, which is the reference; its errors are kept. errors(model, batch) -> (2, B), win and lose.
    A preference model's scores stand in the errors' place, and have no reference.
    """

    def __init__(self, dataset, errors, model, sigmas, ranks, at_once):
        self.dataset, self.errors, self.sigmas, self.ranks, self.at_once = dataset, errors, sigmas, ranks, at_once
        self.ref = 0 if model.config.scores else self.score(model)

    @torch.no_grad()
    def score(self, model):
        """-> (pairs, sigmas, 2), on every rank."""
        def make(part):
            items = [self.dataset[i] for i in part]
            noise = [torch.randn(item["win"].shape, generator=randomness(0, i, "probe")) for i, item in zip(part, items)]
            batch = {name: value.to(self.ranks.device) for name, value in collate(items).items() if torch.is_tensor(value)}
            batch["noise"] = torch.stack(noise).to(self.ranks.device)
            return torch.stack([self.errors(model, batch | {"sigma": torch.full((len(part),), sigma, device=self.ranks.device)}).T for sigma in self.sigmas], dim=1)

        return spread(make, len(self.dataset), self.ranks, self.at_once)

    def __call__(self, model, beta):
        """{name: list, one number for each of "sigma"}: means over the pairs. margin is beta times what the win gained on the lose, whatever the loss."""
        err = self.score(model)
        if model.config.scores:
            margin, found = err[..., 0] - err[..., 1], {}
        else:
            gap = err - self.ref
            margin = -beta * (gap[..., 0] - gap[..., 1])                      # (pairs, sigmas)
            found = {"err_win": err[..., 0], "err_lose": err[..., 1], "ref_err_win": self.ref[..., 0], "ref_err_lose": self.ref[..., 1],
                     "win_gap": gap[..., 0], "lose_gap": gap[..., 1]}
        found |= {"margin": margin, "accuracy": (1 + margin.sign()) / 2}      # a tie counts half
        return {"pairs": len(err), "sigma": self.sigmas} | {name: values.mean(0).tolist() for name, values in found.items()}


# ------------------------------------------------------------------------------------------------------------------
# what tells wins from losers

def statistics(x):
    """
    Simple numbers of videos x (B, C, F, H, W), of each channel and of all together: {name: (B,)}. Grain and flicker are mean squares of the differences
    of neighbours in space and in time; "in flat parts": what a fifth of the differences stay below, since a busy picture hides grain in the mean.
    """
    found = {"mean": x.mean(dim=(2, 3, 4)), "std": x.flatten(2).std(dim=2)}
    for name, axis in (("grain", 4), ("flicker", 2)):
        change = x.diff(dim=axis).abs().flatten(2)                            # (B, C, elements)
        if change.numel():                                                    # one frame does not flicker
            found[name] = change.square().mean(dim=2)
            found[f"{name} in flat parts"] = change.kthvalue(1 + change.shape[2] // 5, dim=2).values
    return {f"{name}, {part}": values for name, of_channels in found.items()
            for part, values in [(f"channel {c}", of_channels[:, c]) for c in range(x.shape[1])] + [("all channels", of_channels.mean(1))]}


def best_threshold(win, lose):
    """win, lose (N,) -> share of the 2N numbers on the right side of the best threshold, the threshold, and whether wins are above it."""
    values, places = torch.cat([win, lose]).sort()
    is_win = (places < len(win)).float()
    above = (len(win) - is_win.cumsum(0) + (1 - is_win).cumsum(0)) / len(values)            # right if all up to here are losers, all behind it wins
    above[:-1][values[1:] == values[:-1]] = 0.5                                             # no threshold fits between equal numbers
    i = torch.where(above > 0.5, above, 1 - above).argmax()
    return max(above[i], 1 - above[i]).item(), (values[i] + values[min(i + 1, len(values) - 1)]).item() / 2, bool(above[i] > 0.5)


def auc(win, lose):
    """Share of all (win, lose) whose win has the larger number; ties count half."""
    return ((1 + (win[:, None] - lose[None, :]).sign()) / 2).mean().item()


def audit(pairs, sigmas):
    """
    How far one simple number of the noisy video tells wins from losers. pairs: list of (win, lose), (C, F, H, W) each. The number and its threshold are
    picked on every other pair and tried on the rest. Returns one {"sigma", "accuracy", "statistic", "auc"} for each sigma.
    """
    win, lose = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
    noise = torch.stack([torch.randn(win.shape[1:], generator=randomness(0, i, "audit")) for i in range(len(pairs))])      # shared by the two, as in training
    rows = []
    for sigma in sigmas:
        of_win, of_lose = (statistics((1 - sigma) * side + sigma * noise) for side in (win, lose))
        fits = {name: best_threshold(of_win[name][::2], of_lose[name][::2]) for name in of_win}
        name = max(fits, key=lambda name: fits[name][0])
        _, threshold, above = fits[name]
        right = torch.cat([(of_win[name][1::2] > threshold) == above, (of_lose[name][1::2] > threshold) != above])
        rows.append({"sigma": sigma, "accuracy": right.float().mean().item(), "statistic": name, "auc": auc(of_win[name], of_lose[name])})
    return rows


def audit_report(dataset, lowest, most=128, elements=2 ** 26):
    """
    The audit of a PairSet in words, with a warning where training from sigma `lowest` up would learn a trivial difference. It looks at `most` pairs, fewer
    where videos are large.
    """
    shape = dataset[0]["win"].shape
    count = max(16, min(most, elements // shape.numel()))
    looked = [dataset[i * len(dataset) // count] for i in range(count)] if len(dataset) > count else [dataset[i] for i in range(len(dataset))]
    pairs = [(item["win"], item["lose"]) for item in looked if item["win"].shape == shape]
    lines = []
    same = sum(torch.equal(win, lose) for win, lose in pairs)
    if same:
        lines.append(f"WARNING: win and lose are the same in {same} of {len(pairs)} pairs, which teach nothing")
    if len(pairs) < 8:
        return "\n".join(lines + [f"no audit of {len(pairs)} pairs: 8 of one shape are needed"])
    rows = audit(pairs, sorted({0.0, lowest, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8}))
    lines.append(f"audit: how often the best of some simple numbers (brightness, grain, flicker, ...) tells win from lose in {len(pairs) // 2} pairs it was not picked on; chance is 0.5: "
                 + ", ".join(f"{'clean' if row['sigma'] == 0 else 'sigma {:g}'.format(row['sigma'])} {row['accuracy']:.2f}" for row in rows)
                 + f" (clean: {rows[0]['statistic']}, AUC {rows[0]['auc']:.2f})")
    found = next(row for row in rows if row["sigma"] == lowest)
    if found["accuracy"] > 0.9:
        hidden = next((row for row in rows if row["sigma"] > lowest and row["accuracy"] < 0.8), None)
        lines.append(f"WARNING: at the lowest noise trained on (sigma {lowest:g}) {found['statistic']} alone tells win from lose in {found['accuracy']:.0%}: accuracy will rise "
                     "without the samples getting better. Make wins and losers with the same encoder, at the same size and frame rate, the losers without guidance"
                     + (f"; or train above the noise that hides it, --min_timestep {1000 * hidden['sigma']:g} at least ({hidden['accuracy']:.0%} there; "
                        "a network sees more than one number)" if hidden else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("data", help="a folder with real/ and negatives*/, or a .jsonl of pairs")
    parser.add_argument("--sigma", type=float, default=0.0, help="the lowest that will be trained on: --min_timestep / 1000")
    given = parser.parse_args()
    try:
        print(audit_report(open_data(given.data, pairs=True), given.sigma))
    except ValueError as error:
        sys.exit(f"evaluate.py: {error}")
