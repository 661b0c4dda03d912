"""
Everything that judges a run: the embedded world's data sets and held-out clips, previews of other data, the probe of
pairs that are never trained on, and the audit of pairs before training.

    python evaluate.py data/wan --sigma 0.6     # the audit of pairs: a folder with real/ and negatives*/, or a .jsonl
"""
import argparse
import json
import math
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import toy
from data import PairSet, collate, empty_caption, open_data, randomness
from samples import check_samples, seed_of, weights_digest, write_sample, write_whole
from fsdp_utils import spread
from pictures import contact_sheet, false_colours, page
from sample import Sampler, generate, make_negatives, missing_negatives, negative_settings
from weights import load_wan

# of a clip's latents in the embedded world
SHAPE = (toy.CHANNELS, toy.FRAMES, toy.SIDE // toy.BLOCK, toy.SIDE // toy.BLOCK)


def sampler_of(args):
    """The Sampler of a trainer's negatives and evaluations."""
    return Sampler("euler", args.sample_steps, args.flow_shift, args.guidance)


# ------------------------------------------------------------------------------------------------------------------
# data sets of the embedded world

def make_real(folder, count, seed=0, held_out=False):
    """Write folder/real/00000.safetensors and so on, the same clips for every caller."""
    paths = [folder / "real" / f"{i:05d}.safetensors" for i in range(count)]
    if all(path.exists() for path in paths):
        return
    # a run that was killed here writes the same files again
    captions, videos = toy.make_clips(count, seed, held_out)
    for path, caption, video in zip(tqdm(paths, desc="real clips", unit="clip"), captions, videos):
        metadata = {"prompt": caption, "source": "embedded world"}
        write_sample(path, toy.encode_pixels(video), toy.encode_text(caption), metadata)


def make_toy_data(init, config, ranks, sampler, count, seed=0, held_out=False, pairs=True):
    """
    Make a data set of the embedded world once: `count` real clips and, with `pairs`, clips of the same captions by the
    base model at `init` and this sampler. All ranks call it. Returns its folder, whose name says what it depends on.
    """
    name = f"toy_held_out_{count}" if held_out else f"toy_{count}"
    if pairs:
        digest = weights_digest(init)
        name += f"_{digest}_{sampler.steps}steps_guidance{sampler.guidance:g}_shift{sampler.flow_shift:g}"
    folder = Path("data") / name
    if ranks.rank == 0:
        make_real(folder, count, seed, held_out)
    dist.barrier()
    if pairs:
        settings = negative_settings(digest, sampler)
        missing = missing_negatives(folder, settings, rank=ranks.rank, world=ranks.world)
        if missing:                                        # each rank holds the whole model and makes its own share
            model = load_wan(init, config).to(ranks.device).eval().requires_grad_(False)
            make_negatives(model, missing, settings, sampler, negative=toy.encode_text(""), progress=ranks.rank == 0)
        dist.barrier()
    return folder


def held_out_pairs(args, config, ranks, count=16):
    """A PairSet of `count` captions that are never trained on, for a probe."""
    folder = make_toy_data(args.init, config, ranks, sampler_of(args), count, seed=3, held_out=True)
    return open_data(folder, pairs=True)


def is_toy_data(dataset):
    """
    Are these clips of the embedded world? A run on this folder is evaluated in the embedded world, whoever made the
    negatives.
    """
    return dataset[0].get("metadata", {}).get("source") == "embedded world"


def open_dataset(args, config, ranks, pairs):
    """The dataset that --data names, checked against the model; with `pairs` a PairSet, else a SampleSet."""
    path = args.data
    if path == "toy":
        check_toy_model(f"--model {args.model}", config)
        path = make_toy_data(args.init, config, ranks, sampler_of(args), args.toy_clips, pairs=pairs)
    dataset = open_data(path, pairs, args.bad_samples == "skip")
    check_samples(dataset.wins, config, together=args.batch_size // (ranks.data_ranks * args.grad_accum))
    return dataset


def open_captions(args, config, ranks):
    """
    The data set that --data of train_spo.py names: captions with conditions and a size, checked against the model.
    """
    if args.data == "toy":
        check_toy_model(f"--init {args.init}", config)
        return Captions(toy.TRAINED)
    samples = open_data(args.data, pairs=False)
    check_samples(samples.wins, config, together=args.batch_size // (ranks.data_ranks * args.grad_accum))
    return samples


def check_empty_caption(args, dataset, config):
    """ValueError where the empty caption of a Wan model is needed, for dropout or guidance, and not stored."""
    is_needed = args.caption_dropout > 0 or (args.guidance != 1 and args.sample_every > 0)
    if is_needed and config.vae != "embedded" and len(empty_caption(dataset, config.text_dim)) == 0:
        raise ValueError(f"--data {args.data}: no empty_caption.context next to the real samples, which "
                         "--caption_dropout and --guidance need; run the same encode.py command again, which adds it")


def check_toy_model(flag, config):
    if config.vae != "embedded" or config.model_type != "t2v" or config.text_dim != toy.TEXT_DIM:
        raise ValueError(f"{flag} with --data toy: the embedded world is for the tiny model; name a folder of encoded "
                         "samples with --data")


class Captions:
    """Captions of the embedded world as a dataset without clips: `win` is on the meta device and tells its shape."""
    sources = ()

    def __init__(self, captions):
        self.captions = list(captions)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        caption = self.captions[index]
        return {"win": torch.empty(SHAPE, device="meta"), "context": toy.encode_text(caption), "name": caption}

    def fingerprint(self):
        return f"{seed_of(self.captions):x}"


# ------------------------------------------------------------------------------------------------------------------
# clips in the course of a run

def open_held_out(args, dataset, held_back):
    """The samples made before, during and after a run: HeldOut in the embedded world, else a Preview, or None."""
    if args.eval_clips and is_toy_data(dataset):
        return HeldOut(args.eval_clips, sampler_of(args))
    return Preview(held_back or dataset, sampler_of(args)) if args.sample_every else None


def sample_held_out(model, sampler, captions, ranks):
    """Latents (N, *SHAPE) of clips of these captions, the same seeds for every model, on the CPU of every rank."""
    def make(indices):
        context = [toy.encode_text(captions[i]) for i in indices]
        seeds = [seed_of("held out", i) for i in indices]
        return generate(model, context, seeds, SHAPE, sampler, toy.encode_text(""), device=ranks.device)
    return spread(make, len(captions), ranks)


class HeldOut:
    """
    Clips of held-out captions: the real ones, those that models make in the course of a run, and exact marks
    (toy.score).
    """

    def __init__(self, count, sampler):
        self.sampler = sampler
        self.captions, videos = toy.make_clips(count, seed=1, held_out=True)
        self.real = toy.decode_pixels(toy.encode_pixels(videos))              # real clips as the codec shows them
        self.yardstick = toy.decode_pixels(toy.encode_pixels(toy.make_clips(512, seed=2)[1]))
        self.marks = {}
        self.rows = {"real": self.real[:8]}                                   # what a picture shows of each caption

    def judge(self, title, model, ranks, keep=False):
        """
        Sample clips of the captions, always with the same seeds, and mark them. All ranks call it. Returns the clips.
        """
        latents = sample_held_out(model, self.sampler, self.captions, ranks)
        return self.mark(title, latents, keep)

    def mark(self, title, latents, keep=False):
        """
        Rank 0 marks latents (N, *SHAPE) of the captions under `title` and prints the marks. Returns the clips.
        keep: all later pictures show them.
        """
        videos = toy.decode_pixels(latents).clamp(-1, 1)
        if dist.get_rank() == 0:
            self.marks[title] = toy.score(videos, self.captions, self.yardstick)
            print(
                f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in self.marks[title].items()), flush=True
            )
        if keep:
            self.rows[title] = videos[:8]
        return videos

    def picture(self, path, now):
        """
        Rank 0 writes path.png: for eight captions the real clip, the clips kept, and now {title: clips}. Returns the
        file.
        """
        path = path.with_suffix(".png")
        if dist.get_rank() == 0:
            rows = [*self.rows.values(), *now.values()]
            clips = [clips[i] for i in range(8) for clips in rows]
            write_whole(path, contact_sheet(clips, upscale=3, group=len(rows)))
        return path

    def close(self, folder, now):
        """Rank 0 writes marks.json, the last picture and its HTML page, and prints the table. Returns the picture."""
        path = self.picture(folder / "after", now)
        if dist.get_rank() == 0:
            write_whole(folder / "marks.json", json.dumps(self.marks, indent=1).encode())
            table = self.marks | {"real clips": toy.score(self.real, self.captions, self.yardstick)}
            toy.print_table(table)
            table["better is"] = {name: toy.better(name) for name in table["real clips"]}
            note = f"Eight of {len(self.captions)} held-out captions; the marks are over all of them."
            write_whole(folder / "after.html", page(f"{folder.parent.name}: held-out captions", self.captions[:8],
                                                    self.rows | now, table, fps=8, note=note))
            print(f"picture (per held-out caption: {', '.join([*self.rows, *now])}) in {path}; the clips move in "
                  f"{folder / 'after.html'}")
        return path


class Preview:
    """
    Samples of a few captions of any data in the course of a run, with the same noise each time, as HeldOut has them for
    the embedded world. It writes latents, so that training needs no decoder: one sample has real, before and now next
    to each other, and `encode.py --decode` turns it into an mp4. Pictures show them in false colours.
    """

    def __init__(self, dataset, sampler, count=4):
        self.sampler = sampler
        self.negative = empty_caption(dataset, dataset[0]["context"].shape[1])
        items = [dataset[i] for i in range(0, len(dataset), math.ceil(len(dataset) / count))]
        # ranks gather them
        self.items = [item for item in items if item["win"].shape == items[0]["win"].shape][:count]
        self.columns = {"real": torch.stack([item["win"] for item in self.items])}

    def judge(self, title, model, ranks, keep=False):
        """
        Latents (N, C, F, H, W) that the model makes, on the CPU of every rank; each rank makes its share, one at a
        time. keep: all later previews show them.
        """
        def make(indices):
            item = self.items[indices[0]]
            conditions = {name: value[None] for name, value in item.items() if name not in NOT_CONDITIONS}
            seed = seed_of("preview", indices[0])
            shape = tuple(item["win"].shape)
            return generate(model, [item["context"]], [seed], shape, self.sampler, self.negative, device=ranks.device,
                            **conditions)
        latents = spread(make, len(self.items), ranks, chunk=1)
        if keep:
            self.columns[title] = latents
        return latents

    def picture(self, folder, now):
        """
        Rank 0 writes folder/000.safetensors and so on: the real latents, those kept, and now {title: latents}; and
        folder.png, the same in false colours, which it returns.
        """
        columns = self.columns | now
        path = folder.with_suffix(".png")
        for i, item in enumerate(self.items if dist.get_rank() == 0 else ()):
            latents = torch.cat([latents[i] for latents in columns.values()], dim=-1)
            metadata = item.get("metadata", {}) | {"source": " | ".join(columns)}
            write_sample(folder / f"{i:03d}.safetensors", latents, item["context"], metadata)
        if dist.get_rank() == 0:
            rows = self.in_false_colours(columns)
            clips = [clips[i] for i in range(len(self.items)) for clips in rows.values()]
            write_whole(path, contact_sheet(clips, group=len(rows)))
        return path

    def in_false_colours(self, columns):
        """{title: latents} -> {title: videos (N, 3, F, H, W)}, in the same colours at every step."""
        return {title: false_colours(latents, self.columns["real"]) for title, latents in columns.items()}

    def close(self, folder, now):
        path = self.picture(folder / "after", now)
        if dist.get_rank() == 0:
            columns = self.columns | now
            command = f"python encode.py --decode {folder / 'after'} --out look (Wan: with --weights DIR)"
            note = f"Latents in false colours, a latent frame as a picture. The videos themselves: {command}"
            captions = [item.get("metadata", {}).get("prompt", item["name"]) for item in self.items]
            write_whole(folder / "after.html", page(f"{folder.parent.name}: previews", captions,
                                                    self.in_false_colours(columns), {}, fps=4, note=note))
            print(f"previews ({' | '.join(columns)}) in {folder}, in false colours in after.html; decode them with "
                  f"{command}")
        return path


NOT_CONDITIONS = ("win", "lose", "context", "name", "source", "metadata")


# ------------------------------------------------------------------------------------------------------------------
# pairs that are never trained on

def hold_back(dataset, count):
    """
    Take `count` wins with all their losers out of a PairSet; the choice depends on the file names alone. Pairs
    that share a file with these are not trained on either. Returns the PairSet to train on and the one held back.
    ValueError where nothing is left.
    """
    good = [pair for index, pair in enumerate(dataset.pairs) if index not in dataset.bad]
    wins = sorted({win for win, _ in good}, key=lambda path: (zlib.crc32(path.stem.encode()), str(path)))
    held_wins = set(wins[:count])
    held = [pair for pair in good if pair[0] in held_wins]
    held_files = {path for pair in held for path in pair}
    left = [pair for pair in dataset.pairs if not held_files & set(pair)]
    if count < 1 or not left:
        raise ValueError(f"--hold_back {count}: the data has {len(wins)} different wins in {len(dataset)} pairs; "
                         "expected 1 or more, and pairs left to train on")
    return PairSet(left, dataset.unpaired, dataset.skip), PairSet(held)


def sigma_steps(min_timestep, max_timestep, count=4):
    """The middles of `count` equal parts of the range of sigmas that is trained on."""
    return [(min_timestep + (max_timestep - min_timestep) * (i + 0.5) / count) / 1000 for i in range(count)]


def open_probe(args, config, dataset, held_back, errors, policy, ranks):
    """The Probe of pairs held back or, in the embedded world, of held-out captions; None where there are none."""
    if not args.probe_every:
        return None
    if not held_back:
        if args.init == "scratch" or not is_toy_data(dataset):
            return None
        held_back = held_out_pairs(args, config, ranks)
    sigmas = sigma_steps(args.min_timestep, args.max_timestep)
    batch_size = args.batch_size // (ranks.data_ranks * args.grad_accum)
    return Probe(held_back, errors, policy, sigmas, ranks, batch_size)


class Probe:
    """
    The errors of fixed pairs, with fixed noise, at fixed sigmas: the same for every loss, seed and number of ranks, so
    that runs can be compared, and a step with the next. model: the policy before its first update, which is the
    reference; its errors are kept. errors(model, batch) -> (2, B), win and lose. A preference model has scores in place
    of errors, and no reference.
    """

    def __init__(self, dataset, errors, model, sigmas, ranks, batch_size):
        self.dataset, self.errors, self.sigmas, self.ranks, self.batch_size = dataset, errors, sigmas, ranks, batch_size
        self.ref = 0 if model.config.scores else self.score(model)

    @torch.no_grad()
    def score(self, model):
        """-> (pairs, sigmas, 2), on every rank."""
        device = self.ranks.device

        def make(indices):
            items = [self.dataset[i] for i in indices]
            noise = [
                torch.randn(item["win"].shape, generator=randomness(0, i, "probe")) for i, item in zip(indices, items)
            ]
            batch = {name: value.to(device) for name, value in collate(items).items() if torch.is_tensor(value)}
            batch["noise"] = torch.stack(noise).to(device)
            rows = []
            for sigma in self.sigmas:
                batch["sigma"] = torch.full((len(indices),), sigma, device=device)
                rows.append(self.errors(model, batch).T)
            return torch.stack(rows, dim=1)

        return spread(make, len(self.dataset), self.ranks, self.batch_size)

    def __call__(self, model, beta):
        """
        {name: list, one number for each of "sigma"}: means over the pairs. margin is beta * (lose_gap - win_gap), or
        the difference of two scores.
        """
        err = self.score(model)
        if model.config.scores:
            margin, columns = err[..., 0] - err[..., 1], {}
        else:
            gap = err - self.ref
            margin = -beta * (gap[..., 0] - gap[..., 1])                      # (pairs, sigmas)
            columns = {"err_win": err[..., 0], "err_lose": err[..., 1], "ref_err_win": self.ref[..., 0],
                       "ref_err_lose": self.ref[..., 1], "win_gap": gap[..., 0], "lose_gap": gap[..., 1]}
        columns |= {"margin": margin, "accuracy": (1 + margin.sign()) / 2}    # a tie counts half
        means = {name: values.mean(0).tolist() for name, values in columns.items()}
        return {"pairs": len(err), "sigma": self.sigmas} | means


def mark_scores(args, config, ranks, errors, model):
    """Print and write how often a preference model is right about held-out pairs of the embedded world, by sigma."""
    sigmas = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
    probe = Probe(held_out_pairs(args, config, ranks, args.eval_clips), errors, model, sigmas, ranks, batch_size=64)
    accuracy = {f"sigma {sigma:g}": share for sigma, share in zip(sigmas, probe(model, beta=1.0)["accuracy"])}
    if ranks.rank == 0:
        print("held-out accuracy: " + ", ".join(f"{name} {share:.3f}" for name, share in accuracy.items()))
        write_whole(args.out / "samples" / "marks.json", json.dumps(accuracy, indent=1).encode())


# ------------------------------------------------------------------------------------------------------------------
# the audit: how easily wins and losers are told apart

def statistics(x):
    """
    Simple numbers of videos x (B, C, F, H, W), of each channel and of all together: {name: (B,)}. Grain and flicker are
    mean squares of the differences of neighbours in space and in time; "in flat parts" is their 20th percentile, since
    a busy picture hides grain in the mean.
    """
    by_channel = {"mean": x.mean(dim=(2, 3, 4)), "std": x.flatten(2).std(dim=2)}               # (B, C) each
    for name, axis in (("grain", 4), ("flicker", 2)):
        change = x.diff(dim=axis).abs().flatten(2)                            # (B, C, elements)
        if change.numel():                                                    # one frame does not flicker
            by_channel[name] = change.square().mean(dim=2)
            by_channel[f"{name} in flat parts"] = change.kthvalue(1 + change.shape[2] // 5, dim=2).values
    numbers = {}
    for name, values in by_channel.items():
        for channel in range(x.shape[1]):
            numbers[f"{name}, channel {channel}"] = values[:, channel]
        numbers[f"{name}, all channels"] = values.mean(1)
    return numbers


def best_threshold(win, lose):
    """
    win, lose (N,) -> the share of the 2N numbers on the right side of the best threshold, the threshold, whether wins
    are above it.
    """
    values, places = torch.cat([win, lose]).sort()
    is_win = (places < len(win)).float()
    # how many are right if all numbers up to here are losers and all after it wins
    right = (len(win) - is_win.cumsum(0) + (1 - is_win).cumsum(0)) / len(values)
    right[:-1][values[1:] == values[:-1]] = 0.5                               # no threshold fits between equal numbers
    i = torch.where(right > 0.5, right, 1 - right).argmax()
    following = values[min(i + 1, len(values) - 1)]
    return max(right[i], 1 - right[i]).item(), (values[i] + following).item() / 2, bool(right[i] > 0.5)


def auc(win, lose):
    """The share of all (win, lose) whose win has the larger number; ties count half."""
    return ((1 + (win[:, None] - lose[None, :]).sign()) / 2).mean().item()


def audit(pairs, sigmas):
    """
    The accuracy with which one simple number of the noisy video tells wins from losers. pairs: list of (win, lose), (C,
    F, H, W) each. The number and its threshold are picked on every other pair and tried on the rest. Returns one
    {"sigma", "accuracy", "statistic", "auc"} for each sigma.
    """
    win = torch.stack([win for win, _ in pairs])
    lose = torch.stack([lose for _, lose in pairs])
    noise = [torch.randn(win.shape[1:], generator=randomness(0, i, "audit")) for i in range(len(pairs))]
    noise = torch.stack(noise)                                                # shared by the two, as in training
    rows = []
    for sigma in sigmas:
        of_win, of_lose = statistics((1 - sigma) * win + sigma * noise), statistics((1 - sigma) * lose + sigma * noise)
        fits = {name: best_threshold(of_win[name][::2], of_lose[name][::2]) for name in of_win}
        name = max(fits, key=lambda name: fits[name][0])
        _, threshold, above = fits[name]
        win_is_right = (of_win[name][1::2] > threshold) == above
        lose_is_right = (of_lose[name][1::2] > threshold) != above
        accuracy = torch.cat([win_is_right, lose_is_right]).float().mean().item()
        rows.append({"sigma": sigma, "accuracy": accuracy, "statistic": name, "auc": auc(of_win[name], of_lose[name])})
    return rows


def audit_report(dataset, lowest, most=128, elements=2 ** 26):
    """
    The audit of pairs in words, with a warning where training from sigma `lowest` up would learn a trivial difference.
    It reads `most` pairs, fewer where videos are large.
    """
    shape = dataset[0]["win"].shape
    count = min(len(dataset), max(16, min(most, elements // shape.numel())))
    items = [dataset[i * len(dataset) // count] for i in range(count)]
    pairs = [(item["win"], item["lose"]) for item in items if item["win"].shape == shape]
    lines = []
    same = sum(torch.equal(win, lose) for win, lose in pairs)
    if same:
        lines.append(f"WARNING: win and lose are the same in {same} of {len(pairs)} pairs, which teach nothing")
    if len(pairs) < 8:
        return "\n".join(lines + [f"no audit of {len(pairs)} pairs: 8 of one shape are needed"])
    rows = audit(pairs, sorted({0.0, lowest, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8}))
    accuracies = []
    for row in rows:
        level = "clean" if row["sigma"] == 0 else f"sigma {row['sigma']:g}"
        accuracies.append(f"{level} {row['accuracy']:.2f}")
    lines.append("audit: how often the best of some simple numbers (brightness, grain, flicker, ...) tells win from "
                 f"lose in {len(pairs) // 2} pairs it was not picked on; chance is 0.5: {', '.join(accuracies)} "
                 f"(clean: {rows[0]['statistic']}, AUC {rows[0]['auc']:.2f})")
    at_lowest = next(row for row in rows if row["sigma"] == lowest)
    if at_lowest["accuracy"] > 0.9:
        lines.append(warn_of_trivial_pairs(rows, at_lowest))
    return "\n".join(lines)


def warn_of_trivial_pairs(rows, at_lowest):
    """
    The warning of audit_report where a simple number tells win from lose at the lowest noise that is trained on. In the
    embedded world DPO then spends its margin on grain and ruins the picture, and Reg-DPO's SFT term holds it
    (docs/RESULTS.md).
    """
    hidden = [row for row in rows if row["sigma"] > at_lowest["sigma"] and row["accuracy"] < 0.8]
    above = ""
    if hidden:
        above = (f", or train above the noise that hides it, --min_timestep {1000 * hidden[0]['sigma']:g} at least "
                 f"({hidden[0]['accuracy']:.0%} there; a network sees more than one number)")
    return (f"NOTE: at the lowest noise trained on (sigma {at_lowest['sigma']:g}) {at_lowest['statistic']} alone tells "
            f"win from lose in {at_lowest['accuracy']:.0%}: accuracy rises there without the samples getting better, "
            "and plain DPO spoils the picture for it. Make wins and losers with the same encoder, at the same size and "
            f"frame rate, the losers without guidance. What is left then: hold the picture with --loss regdpo{above}")


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("data", help="a folder with real/ and negatives*/, or a .jsonl of pairs")
    parser.add_argument("--sigma", type=float, default=0.0, help="the lowest sigma that will be trained on: "
                                                                 "--min_timestep / 1000 (default: 0)")
    args = parser.parse_args(argv)
    print(audit_report(open_data(args.data, pairs=True), args.sigma))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"evaluate.py: {error}")
