"""
Sets of samples and pairs, and the order and noise in which a run uses them.

Where train.py --data looks for samples (samples.py):
    DIR/real/017.safetensors         what is preferred
    DIR/negatives*/017.safetensors   what is not, of the same stem; any number of such folders, each adds its pairs
    or a .jsonl, one pair a line     {"win": "a/1.safetensors", "lose": "b/1.safetensors", "prompt": "..."}
    or DIR/*.safetensors             samples only, for a loss without pairs
Names that start with a dot, such as unfinished files, are ignored.

Scores of any scorer become such a .jsonl of pairs, {"sample": "a/1.safetensors", "score": 0.7} a line:
    python data.py --scores scores.jsonl --out pairs.jsonl --margin 0.2

A dataset is anything with a length, items, `sources` (names of the places that losers come from) and `fingerprint()`
(text that changes with its contents). train.main takes such an object in place of --data.
"""
import argparse
import hashlib
import json
import math
import sys
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch

from samples import fingerprint, read_again, read_empty_caption, read_header, read_sample, read_summaries
from samples import sample_files, summarise_sample, write_whole

# ------------------------------------------------------------------------------------------------------------------
# datasets

class SampleSet:
    """
    The samples of a folder, or of a list of files, for losses without pairs. Item: {"win": latents, "context",
    conditions, "name", "metadata"}.

    wins: {path: Summary}. skip: unreadable samples are replaced (read_item) and listed in bad, {index: reason}.
    """
    sources = ()

    def __init__(self, source, skip=False):
        self.files = list(source) if isinstance(source, (list, tuple)) else sample_files(source)
        self.skip = skip
        bad = {}
        self.wins = read_summaries(self.files, bad if skip else None)
        self.bad = {index: bad[path] for index, path in enumerate(self.files) if path in bad}
        self.reported = set()    # indices of bad items that were printed

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return read_item(self, index)

    def read(self, index):
        path = self.files[index]
        sample = read_again(path, self.wins[path])
        names = {"name": str(path), "metadata": sample["metadata"]}
        return {"win": sample["latents"].float(), **shared_tensors(sample), **names}

    def fingerprint(self):
        return fingerprint(self.files)


class PairSet:
    """
    Pairs of files, [(win, lose)]. The headers of all files are checked here; tensors are read with an item.
    Item: {"win", "lose": (C, F, H, W), "context": (T, D), conditions, "name", "source": the folder of the loser,
    "metadata"}; context, conditions and metadata are the win's and serve both.

    wins, losers: {path: Summary}. sources: names of the folders of losers. unpaired: stems of real samples without a
    negative. skip, bad: as in SampleSet.
    """

    def __init__(self, pairs, unpaired=(), skip=False):
        self.pairs, self.unpaired, self.skip = list(pairs), list(unpaired), skip
        files = dict.fromkeys(path for pair in self.pairs for path in pair)    # a win may have many negatives
        bad = {}
        summaries = read_summaries(files, bad if skip else None)
        self.bad, self.wins, self.losers = {}, {}, {}
        fingerprints = {}
        for index, (win, lose) in enumerate(self.pairs):
            if win in bad or lose in bad:
                self.bad[index] = bad.get(win) or bad[lose]
                continue
            check_pair(win, lose, summaries[win], summaries[lose])
            if summaries[win].real is None:                # of two generated ones neither is the real sample
                check_contents(win, lose, summaries[lose].real, fingerprints)
            self.wins[win], self.losers[lose] = summaries[win], summaries[lose]
        self.sources = sorted({path.parent.name for path in self.losers})
        self.reported = set()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return read_item(self, index)

    def read(self, index):
        win_path, lose_path = self.pairs[index]
        win = read_again(win_path, self.wins[win_path])
        lose = read_again(lose_path, self.losers[lose_path])
        names = {"name": f"win {win_path}, lose {lose_path}", "source": lose_path.parent.name}
        latents = {"win": win["latents"].float(), "lose": lose["latents"].float()}
        return {**latents, **shared_tensors(win), **names, "metadata": win["metadata"]}

    def fingerprint(self):
        return fingerprint(path for pair in self.pairs for path in pair)


def empty_caption(dataset, width):
    """
    The context (T, D = width) of the empty caption: the one that encode.py stored next to the wins, or no rows, as in
    the embedded world.
    """
    wins = getattr(dataset, "wins", {})
    stored = read_empty_caption(next(iter(wins)).parent) if wins else None
    return torch.zeros(0, width) if stored is None else stored[0]


def check_pair(win, lose, of_win, of_lose):
    """win, lose: the files; of_win, of_lose: their summaries. ValueError where they cannot be a pair."""
    if of_win.shapes["latents"] != of_lose.shapes["latents"]:
        raise ValueError(f"{lose}: win is {of_win.shapes['latents']} but lose is {of_lose.shapes['latents']}; encode "
                         f"both at one size (the win is {win})")
    if None not in (of_win.prompt, of_lose.prompt) and of_win.prompt != of_lose.prompt:
        raise ValueError(f'{lose}: made for the prompt "{of_lose.prompt}", but the win, {win}, has "{of_win.prompt}"; '
                         "a pair shares one prompt")


def check_contents(win, lose, made_for, fingerprints):
    """
    ValueError if the negative `lose` was made for other contents of the real sample `win`: made_for, a fingerprint, or
    None where it is not recorded. fingerprints {win: fingerprint} receives what is read.
    """
    if made_for is None:
        return
    if win not in fingerprints:
        fingerprints[win] = fingerprint([win])
    if fingerprints[win] != made_for:
        raise ValueError(f"{lose}: made for {win} as it was, {made_for}; it has changed, {fingerprints[win]}; delete "
                         "the negative and make it again (python sample.py --pairs ...), or put the real sample back")


def shared_tensors(sample):
    """Context and conditions of an item. Stored types save space on disk; training is in float32. Integers stay."""
    tensors = {name: value for name, value in sample.items() if name not in ("latents", "metadata")}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def read_item(dataset, index):
    """
    dataset.read(index). With dataset.skip an unreadable item joins dataset.bad, {index: reason}, and the next readable
    one, wrapping around, takes its place. The choice depends on the files alone, so a resumed run makes the same
    replacements.
    """
    if not dataset.skip:
        return dataset.read(index)
    size = len(dataset)
    for offset in range(size):
        candidate = (index + offset) % size
        if candidate in dataset.bad:
            continue
        try:
            return dataset.read(candidate)
        except ValueError as error:
            dataset.bad[candidate] = str(error)
    reason = next(iter(dataset.bad.values()))
    raise ValueError(f"none of {size} samples or pairs is good; the first: {reason}")


def pairs_by_stem(real, negatives, skip=False):
    """A PairSet of every file in the folders `negatives` with the sample of the same stem in the folder `real`."""
    wins = {path.stem: path for path in sample_files(real)}
    pairs = []
    for folder in negatives:
        losers = {path.stem: path for path in sample_files(folder)}
        orphans = [stem for stem in losers if stem not in wins]
        if orphans:
            raise ValueError(f"{folder}: {len(orphans)} of {len(losers)} negatives have no real sample of the same "
                             f"stem in {real}: {', '.join(orphans[:5])}{', ...' if len(orphans) > 5 else ''}; delete "
                             "them, or put the real ones back")
        pairs += [(wins[stem], path) for stem, path in losers.items()]
    paired = {win for win, _ in pairs}
    unpaired = [stem for stem, path in wins.items() if path not in paired]
    return PairSet(pairs, unpaired, skip)


def read_jsonl(path):
    """Yields ("file:line", dict), one for every line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); every line is one object") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a {type(row).__name__}, expected one object a line")
            yield f"{path}:{number}", row


def file_inside(folder, name, where, may_miss=False):
    """
    The file `name` of a manifest's `folder`. A manifest may come from anyone, so it may not name a file outside its
    folder, not even through a link.
    """
    try:
        root = Path(folder).resolve()
        inside = not Path(name).is_absolute() and (root / name).resolve().is_relative_to(root)
        exists = inside and (Path(folder) / name).is_file()
    except (OSError, RuntimeError, ValueError) as error:   # name too long, ring of links, zero byte
        raise ValueError(f"{where}: {name!r:.200} is not a file name ({error})") from error
    if not inside:
        raise ValueError(f"{where}: {name!r} leads out of {folder} (or is absolute, or a link that does); a manifest "
                         "names files of its own folder")
    if not exists and not may_miss:
        raise ValueError(f"{where}: no file {name!r} in {folder}")
    return Path(folder) / name


def pairs_from_jsonl(path, skip=False):
    """
    A PairSet of {"win": file, "lose": file, "prompt": text} a line, files relative to the folder of the .jsonl and
    inside it.
    """
    folder = Path(path).parent
    pairs = []
    files = {}      # {name: path}: each name is looked up once
    asked = {}      # {(path, prompt): where}
    for where, row in read_jsonl(path):
        for key in ("win", "lose", "prompt"):
            if not isinstance(row.get(key), str):
                raise ValueError(f"{where}: `{key}` is {row.get(key)!r:.80}, expected text; a pair is an object with "
                                 "win, lose and prompt")
        for name in (row["win"], row["lose"]):
            if name not in files:
                files[name] = file_inside(folder, name, where, may_miss=skip)
            asked.setdefault((files[name], row["prompt"]), where)
        if files[row["win"]] == files[row["lose"]]:
            raise ValueError(f"{where}: win and lose are the same file, {row['win']!r}")
        pairs.append((files[row["win"]], files[row["lose"]]))
    if not pairs:
        raise ValueError(f"{path}: no pairs; expected one object with win, lose and prompt a line")
    dataset = PairSet(pairs, skip=skip)
    summaries = dataset.losers | dataset.wins
    for (file, prompt), where in asked.items():
        made_for = summaries[file].prompt if file in summaries else None       # an unreadable file is in neither
        if made_for not in (None, prompt):
            raise ValueError(f'{where}: the prompt is "{prompt}", but {file} was made for "{made_for}"')
    return dataset


def open_data(path, pairs, skip=False):
    """
    The dataset that --data names: a PairSet if `pairs`, else a SampleSet of the preferred samples. The head of this
    file has the layouts. skip: unreadable samples, now or later, are replaced (read_item). Samples of two encoders, and
    pairs of two sizes or prompts, are errors even then.
    """
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file():
        dataset = pairs_from_jsonl(path, skip)
        return dataset if pairs else SampleSet(list(dict.fromkeys(win for win, _ in dataset.pairs)), skip)
    if not path.is_dir():
        raise ValueError(f"--data {path}: no such folder (with real/ and negatives*/) or .jsonl file")
    real = path / "real"
    if not pairs:
        return SampleSet(real if real.is_dir() else path, skip)
    if not real.is_dir():
        raise ValueError(f"--data {path}: no folder real/ in it; a loss on pairs needs real/*.safetensors (python "
                         f"encode.py --videos DIR --out {real}) and negatives (python sample.py --pairs {path} ...)")
    negatives = sorted(folder for folder in path.glob("negatives*") if any(folder.glob("[!.]*.safetensors")))
    if not negatives:
        raise ValueError(f"--data {path}: {real} has {len(sample_files(real))} samples, but there is no negatives*/ "
                         f"folder with any; make negatives with: python sample.py --pairs {path} ...")
    return pairs_by_stem(real, negatives, skip)


# ------------------------------------------------------------------------------------------------------------------
# order, noise, batches

def randomness(seed, position, stream="noise"):
    """
    A torch.Generator that depends on (seed, position, stream) only: not on the rank, the number of ranks or what was
    drawn before.

    torch's CPU generator keeps 32 bits of its seed; with hashes of 32 bits, two of 100,000 positions would more likely
    than not share their noise. Hence a permutation of the 32-bit numbers (four Feistel rounds keyed by seed and
    stream): no two positions of a run share a generator.
    """
    assert 0 <= position < 2 ** 32, position
    left, right = divmod(position, 2 ** 16)
    for turn in range(4):
        digest = hashlib.sha256(f"{seed} {stream} {turn} {right}".encode()).digest()
        left, right = right, left ^ int.from_bytes(digest[:2], "big")
    return torch.Generator().manual_seed(left * 2 ** 16 + right)


@lru_cache(maxsize=4)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=randomness(seed, epoch, "order"))


def order(seed, position, n):
    """
    The index, out of n items, used at this position of the run. Every epoch is a fresh permutation, a function of
    (seed, epoch).
    """
    return int(epoch_order(seed, position // n, n)[position % n])


def draw(seed, position, shape, flow_shift, min_timestep, max_timestep, sampling="uniform"):
    """
    sigma (float) and noise (`shape`, float32) of a position; win and lose, policy and reference all use the same.

        sigma = flow_shift u / (1 + (flow_shift - 1) u),   u such that min_timestep < 1000 sigma <= max_timestep

    The limits hold after the shift, as the expert boundaries of Wan2.2 do. u is uniform there, or logit_normal:
    sigmoid(N(0, 1)) cut to the interval; the shift moves that bell by log(flow_shift) in logits, so it needs no mean of
    its own.
    """
    if not flow_shift > 0:
        raise ValueError(f"--flow_shift {flow_shift}: expected a number above 0 (1 does nothing)")
    if not 0 <= min_timestep < max_timestep <= 1000:
        raise ValueError(f"--min_timestep {min_timestep} --max_timestep {max_timestep}: expected 0 <= min < max <= "
                         "1000")
    normal, generator = NormalDist(), randomness(seed, position)
    lowest, highest = min_timestep / 1000, max_timestep / 1000
    low = lowest / (flow_shift - (flow_shift - 1) * lowest)        # the shift, inverted
    high = highest / (flow_shift - (flow_shift - 1) * highest)
    if sampling == "logit_normal":                         # here low, high and u are shares of the bell
        low, high = bell_share(low), bell_share(high)
    # (low, high]: never sigma 0
    u = high - (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
    if sampling == "logit_normal":
        inside = min(max(u, 2 ** -60), 1 - 2 ** -53)       # the bell reaches 0 and 1 at infinity
        u = 1 / (1 + math.exp(-normal.inv_cdf(inside)))
    sigma = flow_shift * u / (1 + (flow_shift - 1) * u)
    sigma = min(max(sigma, lowest), highest)               # rounding must not cross a boundary
    return sigma, torch.randn(shape, generator=generator)


def bell_share(u):
    """The share of sigmoid(N(0, 1)) that lies below u."""
    return NormalDist().cdf(math.log(u / (1 - u))) if 0 < u < 1 else u


def collate(items):
    """
    Items -> {"win", "lose" (B, C, F, H, W), "context" (B, T, D) zero-padded to the longest, conditions (B, ...),
    "names": list of B}.
    """
    first = items[0]
    keys = [key for key in first if key not in ("name", "source", "metadata", "context")]
    for item in items:
        if item.keys() != first.keys():
            raise ValueError(f"{item['name']} has {sorted(item)} but {first['name']} has {sorted(first)}; the items of "
                             "a batch need the same tensors")
        for key in keys:
            if item[key].shape != first[key].shape:
                raise ValueError(f"{item['name']}: {key} is {tuple(item[key].shape)} but {tuple(first[key].shape)} in "
                                 f"{first['name']}, of the same batch; encode at one size, or use --batch_size 1")
    batch = {key: torch.stack([item[key] for item in items]) for key in keys}
    # the model adds zeros too
    batch["context"] = torch.nn.utils.rnn.pad_sequence([item["context"] for item in items], batch_first=True)
    batch["names"] = [item["name"] for item in items]
    return batch


def branch(batch, *names):
    """
    The model's inputs of one branch ("win" or "lose"), or of several one after the other in one batch, with the same
    sigma, noise, context and conditions for each.
    """
    shared = {name: value for name, value in batch.items() if torch.is_tensor(value) and name not in ("win", "lose")}
    inputs = {name: torch.cat([value] * len(names)) for name, value in shared.items()}
    inputs["latents"] = torch.cat([batch[name] for name in names])
    return inputs


# ------------------------------------------------------------------------------------------------------------------
# pairs from scores

class Scored(NamedTuple):
    where: str         # file:line
    path: Path
    score: float
    prompt: str
    conditions: str    # a digest, "" for none: samples of two pictures are not compared
    shape: tuple       # of the latents


def conditions_digest(path, summary):
    """Text that names the conditions of a sample, such as its first frame; "" where it has none."""
    names = [name for name in summary.shapes if name not in ("latents", "context")]
    if not names:
        return ""
    sample, digest = read_sample(path), hashlib.sha256()
    for name in names:
        digest.update(name.encode() + sample[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_scores(path):
    """
    A list of Scored from {"sample": file, "score": number} a line, higher is better; files relative to the folder of
    the .jsonl and inside it. ValueError, with file and line, for anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"--scores {path}: no such file; expected a .jsonl with sample and score a line")
    scored, lines = [], {}    # lines {real path: where}
    for where, row in read_jsonl(path):
        if row.keys() != {"sample", "score"}:
            raise ValueError(f"{where}: the keys are {', '.join(sorted(row)) or 'none'}; expected sample and score")
        name, score = row["sample"], row["score"]
        if not isinstance(name, str):
            raise ValueError(f"{where}: `sample` is {name!r:.80}, expected the name of a sample file")
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not is_number or not abs(score) <= sys.float_info.max:              # false for NaN as well
            raise ValueError(f"{where}: `score` is {score!r:.80}, expected a finite number")
        file = file_inside(Path(path).parent, name, where)
        earlier = lines.setdefault(file.resolve(), where)
        if earlier != where:
            raise ValueError(f"{where}: {name} has a score in {earlier} already; expected one of each sample")
        try:
            summary = summarise_sample(read_header(file))
            conditions = conditions_digest(file, summary)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if summary.prompt is None:
            raise ValueError(f"{where}: {file} has no prompt in its header, and pairs are of samples of one prompt; "
                             "make it with encode.py or sample.py")
        scored.append(Scored(where, file, float(score), summary.prompt, conditions, summary.shapes["latents"]))
    if not scored:
        raise ValueError(f"{path}: no rows; expected sample and score a line")
    return scored


def pairs_from_scores(scored, margin, all_pairs=False):
    """
    [(win, lose)], two Scored each, of one prompt and condition, whose scores differ by more than margin, so never a
    tie. A prompt gives its best over its worst or, with all_pairs, every such pair. Returns the pairs, the number of
    prompts, and the number of prompts with a single sample.
    """
    groups = {}
    for row in scored:
        group = groups.setdefault((row.prompt, row.conditions), [])
        if group and group[0].shape != row.shape:
            raise ValueError(f"{row.where}: latents of {row.path} are {row.shape}, but {group[0].shape} in "
                             f"{group[0].path}, of the same prompt; score samples of one size")
        group.append(row)
    pairs = []
    for group in groups.values():
        ranked = sorted(group, key=lambda row: -row.score)
        candidates = [(ranked[0], ranked[-1])]
        if all_pairs:
            candidates = [(win, lose) for i, win in enumerate(ranked) for lose in ranked[i + 1:]]
        pairs += [(win, lose) for win, lose in candidates if win.score - lose.score > margin]
    return pairs, len(groups), sum(len(group) == 1 for group in groups.values())


def write_pairs(path, pairs):
    """Write pairs of Scored as the .jsonl that --data takes; all samples must be inside the folder of the .jsonl."""
    folder, lines = Path(path).parent.resolve(), []
    for pair in pairs:
        names = []
        for row in pair:
            if not row.path.resolve().is_relative_to(folder):
                raise ValueError(f"--out {path}: {row.path} is not in the folder {folder}, and a .jsonl of pairs names "
                                 "files of its own folder; choose an --out next to or above the samples")
            names.append(row.path.resolve().relative_to(folder).as_posix())
        lines.append(json.dumps({"win": names[0], "lose": names[1], "prompt": pair[0].prompt}))
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--scores", required=True, help="a .jsonl: a sample and its score a line; higher is better")
    parser.add_argument("--out", required=True, help="the .jsonl of pairs to write, for --data")
    parser.add_argument("--margin", type=float, default=0.0, help="keep pairs whose scores differ by more (default: 0)")
    parser.add_argument("--all", action="store_true", help="keep all such pairs of a prompt, not just one")
    args = parser.parse_args(argv)
    if not 0 <= args.margin < math.inf:
        raise ValueError(f"--margin {args.margin}: expected a number of 0 or more")
    if Path(args.out).suffix != ".jsonl" or Path(args.out).exists():
        raise ValueError(f"--out {args.out}: expected the name of a new file that ends in .jsonl")
    scored = read_scores(args.scores)
    pairs, prompts, alone = pairs_from_scores(scored, args.margin, args.all)
    if not pairs:
        raise ValueError(f"--scores {args.scores}: no two of {len(scored)} samples have one prompt and scores that "
                         f"differ by more than --margin {args.margin:g} ({alone} of {prompts} prompts have one sample)")
    write_pairs(args.out, pairs)
    used = len({(win.prompt, win.conditions) for win, _ in pairs})
    print(f"{len(scored)} samples of {prompts} prompts: {len(pairs)} pairs in {args.out}, of {used} prompts; left out: "
          f"{alone} prompts with one sample, {prompts - alone - used} whose scores differ by {args.margin:g} or less")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"data.py: {error}")
