"""
Samples and pairs on disk, and in what order and with what noise a run uses them.

A sample is one .safetensors file:
    latents  (C, F, H, W)    as the model is trained on them (normalised), float
    context  (T, D)          text embeddings, unpadded rows, float; T = 0 is the empty caption
    others                   conditions of the variant (image condition, ...), kept by name
    header metadata          strings: prompt, seed, source, ...

Where train.py --data finds them:
    DIR/real/017.safetensors                          what is preferred
    DIR/negatives*/017.safetensors                    what is not, of the same stem; any number of such folders, each adds its pairs
    or a .jsonl, one pair a line                      {"win": "a/1.safetensors", "lose": "b/1.safetensors", "prompt": "..."}
    or, for a loss without pairs, DIR/*.safetensors   samples only
Names that start with a dot (unfinished files among them) are left alone.
"""

import hashlib
import json
import math
import os
import uuid
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
ITEM_KEYS = {"win", "lose", "name", "names", "metadata"}   # what items and batches hold beside tensors: no condition may be called so


# ------------------------------------------------------------------------------------------------------------------
# one sample file

def write_whole(path, content):
    """Writes the bytes so that `path` is either absent, as it was before, or complete: temporary name beside it, then one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")   # unique: two processes may make the same file
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())   # or a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sample(path, latents, context, metadata, **conditions):
    """latents (C, F, H, W), context (T, D), conditions by name; metadata values become strings. Never leaves half a file."""
    tensors = {"latents": latents, "context": context, **conditions}
    check_tensors(path, tensors)
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_whole(path, save(tensors, metadata={name: str(value) for name, value in metadata.items()}))


def read_header(path):
    """The sample as `read_sample` gives it, but with tensors on the meta device: shapes and dtypes checked, no tensor read (25 us a file)."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            metadata = file.metadata() or {}
            tensors = {}
            for name, part in slices.items():
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} is {part.get_dtype()} but samples hold {', '.join(DTYPES)}; write it again with one of these")
                if math.prod(max(1, size) for size in part.get_shape()) > 2 ** 40:   # possible beside a 0, and torch overflows
                    raise ValueError(f"{path}: {name} is {tuple(part.get_shape())}, which no sample is; delete the file")
                tensors[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    check_tensors(path, tensors)
    return {**tensors, "metadata": metadata}


def read_sample(path):
    """-> {"latents": (C, F, H, W), "context": (T, D), conditions by name, "metadata": {str: str}}, all numbers finite."""
    header = read_header(path)
    try:
        tensors = load(Path(path).read_bytes())            # load_file of safetensors 0.8 loses 100 bytes of memory at every call
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    check_tensors(path, tensors)
    return {**tensors, "metadata": header["metadata"]}


def unreadable(path, error):
    if not Path(path).exists():
        return ValueError(f"{path}: no such file; a sample (.safetensors) was expected here")
    return ValueError(f"{path}: not a whole safetensors file ({error}); a sample with latents and context was expected: "
                      "it was cut off or is another kind of file, so delete it and make it again")


def check_tensors(path, tensors):
    """Raises ValueError, naming the file, unless the tensors are a sample. Values are looked at only where they are there (not on meta)."""
    for name, axes in (("latents", "(C, F, H, W)"), ("context", "(T, D)")):
        if name not in tensors:
            raise ValueError(f"{path}: no `{name}` among its tensors ({', '.join(sorted(tensors)[:8]) or 'none'}); samples hold latents and context, "
                             "as encode.py and sample.py write them")
        tensor = tensors[name]
        if tensor.ndim != axes.count(",") + 1 or 0 in tensor.shape[name == "context":]:   # T, and only T, may be 0
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, expected {axes}")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected a float type; make the sample again")
    if ITEM_KEYS & tensors.keys():
        raise ValueError(f"{path}: a tensor is called {min(ITEM_KEYS & tensors.keys())}, which items use themselves; give the condition another name")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has {int((~tensor.isfinite()).sum())} of {tensor.numel()} values NaN or infinite; "
                             "delete the file and make it again")


# ------------------------------------------------------------------------------------------------------------------
# sets of samples and pairs

def sample_files(folder):
    """The sample files directly in `folder`, by name. ValueError where there is none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder; a folder of samples (*.safetensors) was expected")
    files = sorted(path for path in Path(folder).glob("*.safetensors") if not path.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: no samples (*.safetensors) in this folder; make them from videos with: python encode.py --videos DIR --out {folder}")
    return files


def summary(sample):
    """({name: shape} in the order of names, prompt or None): files come with their tensors in any."""
    return {name: tuple(sample[name].shape) for name in sorted(sample) if name != "metadata"}, sample["metadata"].get("prompt")


def read_summaries(files, bad=None):
    """
    {path: (shapes by name, prompt or None)}, from headers alone. One number of channels and one context width for all. bad: a dictionary for what is no
    sample, {path: why}; without one it is an error.
    """
    summaries, alike, first = {}, {}, None
    for path in files:
        try:
            header = read_header(path)
        except ValueError as error:
            if bad is None:
                raise
            bad[path] = str(error)
            continue
        widths = (header["latents"].shape[0], header["context"].shape[1])   # C, D
        first = first or (path, widths)
        if widths != first[1]:
            raise ValueError(f"{path}: {widths[0]} latent channels and context width {widths[1]}, but {first[0]} has {first[1][0]} and {first[1][1]}; "
                             "encode all samples with one encoder")
        found = summary(header)
        summaries[path] = alike.setdefault((*found[0].items(), found[1]), found)               # of two million files most look alike
    return summaries


def read_again(path, before):
    """read_sample, held against its summary from `before`: files can change under a run of days."""
    sample = read_sample(path)
    if summary(sample) != before:
        raise ValueError(f"{path}: it was {before} when it was opened and is {summary(sample)} now; put it back, or begin a new run")
    return sample


def stand_ins(dataset, index):
    """
    The indices to read in the place of this one. `dataset.skip`: from this on (behind the last the first) those that are not known to be `dataset.bad`.
    Which can be read hangs on the files alone, so a run that is resumed and looks at them anew takes the same.
    """
    if not dataset.skip:
        return [index]
    size = len(dataset)
    return (i % size for i in range(index, index + size) if i % size not in dataset.bad)


def read_item(dataset, index):
    """dataset.read(index) or, with dataset.skip, of the first of its stand-ins that can be read; the others join dataset.bad, {index: why}."""
    for i in stand_ins(dataset, index):
        try:
            return dataset.read(i)
        except ValueError as error:
            if not dataset.skip:
                raise
            dataset.bad[i] = str(error)
    raise ValueError(f"none of {len(dataset)} samples or pairs is good; the first: {next(iter(dataset.bad.values()))}")


def check_pair(win, lose, of_win, of_lose):
    """win, lose: files; of_win, of_lose: their summaries."""
    (of_win, prompt_win), (of_lose, prompt_lose) = of_win, of_lose
    if of_win["latents"] != of_lose["latents"]:
        raise ValueError(f"{lose}: win is {of_win['latents']} but lose is {of_lose['latents']}; encode both at one size (the win is {win})")
    if None not in (prompt_win, prompt_lose) and prompt_win != prompt_lose:
        raise ValueError(f'{lose}: made for the prompt "{prompt_lose}", but the win, {win}, has "{prompt_win}"; a pair shares one prompt')


def check_samples(summaries, config, together=1):
    """
    Holds samples against the model they are for (config: a WanConfig), by headers alone: ValueError names the file, what is in it and what the model
    takes. summaries: as read_summaries gives; of pairs those of the wins, whose conditions serve both. together: so many are stacked, and must be alike.
    """
    another = "encode it for this model (encode.py --model), or choose the model that it was encoded for (--init)"
    first = None
    for path, (shapes, _) in summaries.items():
        conditions = dict(shapes)
        latents, context = conditions.pop("latents"), conditions.pop("context")
        if latents[0] != config.out_dim:
            raise ValueError(f"{path}: latents are {latents}, of {latents[0]} channels; this {config.model_type} model has {config.out_dim}; {another}")
        if any(size % patch for size, patch in zip(latents[1:], config.patch_size)):
            raise ValueError(f"{path}: latents are {latents}; the model cuts F, H, W into patches of {config.patch_size}, so encode at a multiple of that size")
        if context[0] > config.text_len or context[1] != config.text_dim:
            raise ValueError(f"{path}: context is {context}; this {config.model_type} model takes at most {config.text_len} rows of width {config.text_dim}; {another}")
        expected = config.condition_shapes(latents)
        for name in sorted(conditions | expected):
            if conditions.get(name, "missing") != expected.get(name) and not (name == "first_latent" and name not in conditions):
                raise ValueError(f"{path}: the condition {name} is {conditions.get(name, 'missing')}; this {config.model_type} model with latents {latents} takes "
                                 f"{expected.get(name, 'no such condition')}; {another}")
        first = first or (path, latents, conditions)
        if together > 1 and (latents, conditions) != first[1:]:
            raise ValueError(f"{path}: latents {latents} and conditions {conditions}, but {first[0]} has {first[1]} and {first[2]}; {together} samples go "
                             "through the model together, so make all alike, or let it be one (--batch_size, --grad_accum)")


def item_tensors(sample):
    """Context and conditions of an item. Stored types save space on disk; what is trained on is float32. Masks and other integers stay."""
    return {name: value.float() if value.is_floating_point() else value for name, value in sample.items() if name not in ("latents", "metadata")}


class SampleSet:
    """
    The samples of a folder (or a list of files). Item: {"win": latents, "context", conditions, "name"}, so that sft and dpo share code.
    `wins`: what is preferred, as read_summaries gives it. `skip`, `bad`: as in read_item; `agreed`: in runs.read_items.
    """

    def __init__(self, source, skip=False):
        self.files, self.skip, bad = list(source) if isinstance(source, (list, tuple)) else sample_files(source), skip, {}
        self.wins = read_summaries(self.files, bad if skip else None)
        self.bad, self.agreed = {i: bad[path] for i, path in enumerate(self.files) if path in bad}, set()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return read_item(self, index)

    def read(self, index):
        sample = read_again(self.files[index], self.wins[self.files[index]])
        return {"win": sample["latents"].float(), **item_tensors(sample), "name": str(self.files[index])}


class PairSet:
    """
    pairs: list of (win file, lose file). The headers of all files are checked here, tensors when an item is read.
    Item: {"win", "lose": (C, F, H, W), "context": (T, D), conditions, "name"}; context and conditions are the win's and serve both.
    `unpaired`: stems of the real samples that no negative was found for. `wins`: as in SampleSet, `losers` likewise. `sources`: names of their folders.
    `skip`, `bad`, `agreed`: as in SampleSet.
    """

    def __init__(self, pairs, unpaired=(), skip=False):
        self.pairs, self.unpaired, self.skip, self.bad, self.agreed, bad = list(pairs), list(unpaired), skip, {}, set(), {}
        summaries = read_summaries(dict.fromkeys(path for pair in self.pairs for path in pair), bad if skip else None)   # a win may have many negatives: read it once
        for index, (win, lose) in enumerate(self.pairs):
            if win in bad or lose in bad:
                self.bad[index] = bad.get(win) or bad[lose]
            else:
                check_pair(win, lose, summaries[win], summaries[lose])
        self.wins, self.losers = ({pair[side]: summaries[pair[side]] for i, pair in enumerate(self.pairs) if i not in self.bad} for side in (0, 1))
        self.sources = {lose.parent.name for lose in self.losers}

    def __len__(self):
        return len(self.pairs)

    def source(self, index):
        """Name of the folder that the loser of a pair, or of what stands in for it, lies in."""
        return self.pairs[next(iter(stand_ins(self, index)))][1].parent.name

    def __getitem__(self, index):
        return read_item(self, index)

    def read(self, index):
        win_path, lose_path = self.pairs[index]
        win, lose = read_again(win_path, self.wins[win_path]), read_again(lose_path, self.losers[lose_path])
        return {"win": win["latents"].float(), "lose": lose["latents"].float(), **item_tensors(win), "name": f"win {win_path}, lose {lose_path}"}


def pairs_by_stem(real, negatives, skip=False):
    """real: a folder; negatives: folders. One pair for every file of every folder of negatives, with the real sample of the same stem."""
    wins = {path.stem: path for path in sample_files(real)}
    pairs = []
    for folder in negatives:
        losers = {path.stem: path for path in sample_files(folder)}
        orphans = [stem for stem in losers if stem not in wins]
        if orphans:
            raise ValueError(f"{folder}: {len(orphans)} of {len(losers)} negatives have no real sample of the same stem in {real}: "
                             f"{', '.join(orphans[:5])}{', ...' if len(orphans) > 5 else ''}; delete them, or put the real ones back")
        pairs += [(wins[stem], path) for stem, path in losers.items()]
    paired = {win for win, _ in pairs}
    return PairSet(pairs, [stem for stem, path in wins.items() if path not in paired], skip)


def read_jsonl(path):
    """Yields ("file:line", dict), one for every line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error}); every line is one object") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{number}: a {type(row).__name__}, expected one object a line")
                yield f"{path}:{number}", row


def file_inside(folder, name, where, may_miss=False):
    """The file `name` of a manifest's `folder`. A manifest may come from anyone: it reaches no file outside its own folder, links included."""
    try:
        root = Path(folder).resolve()
        inside = not Path(name).is_absolute() and (root / name).resolve().is_relative_to(root)
        found = inside and (Path(folder) / name).is_file()
    except (OSError, RuntimeError, ValueError) as error:   # name too long, ring of links, zero byte
        raise ValueError(f"{where}: {name!r:.200} is no file name ({error})") from error
    if not inside:
        raise ValueError(f"{where}: {name!r} leads out of {folder} (or is absolute, or a link that does); a manifest names files of its own folder")
    if not found and not may_miss:
        raise ValueError(f"{where}: no file {name!r} in {folder}")
    return Path(folder) / name


def pairs_from_jsonl(path, skip=False):
    """One pair a line: {"win": file, "lose": file, "prompt": text}, files relative to the folder of the .jsonl and inside it. Each file is looked at once."""
    pairs, files, asked = [], {}, {}
    for where, row in read_jsonl(path):
        for key in ("win", "lose", "prompt"):
            if not isinstance(row.get(key), str):
                raise ValueError(f"{where}: `{key}` is {row.get(key)!r:.80}, expected text; a pair is an object with win, lose and prompt")
        win, lose = (files.get(row[key]) or files.setdefault(row[key], file_inside(Path(path).parent, row[key], where, skip)) for key in ("win", "lose"))
        if win == lose:
            raise ValueError(f"{where}: win and lose are the same file, {row['win']!r}")
        asked.setdefault((win, row["prompt"]), where), asked.setdefault((lose, row["prompt"]), where)
        pairs.append((win, lose))
    if not pairs:
        raise ValueError(f"{path}: no pairs; expected one object with win, lose and prompt a line")
    found = PairSet(pairs, skip=skip)
    for (file, prompt), where in asked.items():
        _, made_for = found.wins.get(file) or found.losers.get(file, (None, None))                # a bad one is in neither
        if made_for not in (None, prompt):
            raise ValueError(f'{where}: the prompt is "{prompt}", but {file} was made for "{made_for}"')
    return found


def open_data(path, pairs, skip=False):
    """
    What --data names: a PairSet if `pairs`, else a SampleSet of what is preferred. The layouts stand at the top of this file. skip: files that are no whole
    samples, now or later, are no error; another good one stands in (read_item). Samples of another encoder, and pairs of two sizes or prompts, stay errors.
    """
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file():
        found = pairs_from_jsonl(path, skip)
        return found if pairs else SampleSet(list(dict.fromkeys(win for win, _ in found.pairs)), skip)
    if not path.is_dir():
        raise ValueError(f"--data {path}: no such folder (with real/ and negatives*/) or .jsonl file")
    real = path / "real"
    if not pairs:
        return SampleSet(real if real.is_dir() else path, skip)
    if not real.is_dir():
        raise ValueError(f"--data {path}: no folder real/ in it; a loss on pairs needs real/*.safetensors (python encode.py --videos DIR --out {real}) "
                         f"and negatives (python sample.py --pairs {path} ...)")
    negatives = sorted(folder for folder in path.glob("negatives*") if any(folder.glob("[!.]*.safetensors")))   # one just begun may be empty
    if not negatives:
        raise ValueError(f"--data {path}: {real} has {len(sample_files(real))} samples, but there is no negatives*/ folder with any; "
                         f"make negatives with: python sample.py --pairs {path} ...")
    return pairs_by_stem(real, negatives, skip)


def fingerprint(files):
    """Sixteen digits that name the contents of these files, in this order: sha256 of name, size, and 4 KiB at the start, the middle and the end of each."""
    @lru_cache(maxsize=None)
    def of_one(path):
        size = Path(path).stat().st_size
        digest = hashlib.sha256(f"{Path(path).name} {size}\n".encode())
        with open(path, "rb") as file:
            for begin in (0, size // 2, max(0, size - 4096)):
                file.seek(begin)
                digest.update(file.read(4096))
        return digest.digest()
    digest = hashlib.sha256()
    for path in files:
        digest.update(of_one(path))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------
# order, noise, batches

def randomness(seed, position, stream="noise"):
    """
    A torch.Generator that depends on (seed, position, stream) only: not on the rank, the number of ranks or the past.

    torch's CPU generator keeps 32 bits of its seed; hashed into them, two of 100,000 positions would more likely than not share their noise.
    Hence a permutation of the 32-bit numbers (four Feistel rounds keyed by seed and stream): no two positions of a run share a generator.
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
    """Which of n items stands at this position of the run. Every epoch is a fresh permutation, a function of (seed, epoch)."""
    return int(epoch_order(seed, position // n, n)[position % n])


def draw(seed, position, shape, flow_shift, min_timestep, max_timestep, sampling="uniform"):
    """
    sigma (float) and noise (`shape`, float32) of a position; win and lose, policy and reference all use the same.

    sigma = flow_shift u / (1 + (flow_shift - 1) u), u on the interval for which sigma is in (min_timestep, max_timestep] / 1000:
    the limits hold after the shift, as the expert boundaries of Wan2.2 do. u is uniform there, or logit_normal, sigmoid(N(0, 1)) cut to it;
    the shift moves that bell by log(flow_shift) in logits, so it needs no mean of its own.
    """
    if not flow_shift > 0:
        raise ValueError(f"--flow_shift {flow_shift}: expected a number above 0 (1 does nothing)")
    if not 0 <= min_timestep < max_timestep <= 1000:
        raise ValueError(f"--min_timestep {min_timestep} --max_timestep {max_timestep}: expected 0 <= min < max <= 1000")
    lowest, highest = min_timestep / 1000, max_timestep / 1000
    low, high = (sigma / (flow_shift - (flow_shift - 1) * sigma) for sigma in (lowest, highest))   # the shift, inverted
    normal, generator = NormalDist(), randomness(seed, position)
    if sampling == "logit_normal":                                                                 # from here to the inverse: u as a share of the bell
        low, high = (normal.cdf(math.log(u / (1 - u))) if 0 < u < 1 else u for u in (low, high))
    u = high - (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()      # (low, high]: never sigma 0
    if sampling == "logit_normal":
        u = 1 / (1 + math.exp(-normal.inv_cdf(min(max(u, 2 ** -60), 1 - 2 ** -53))))               # 0 and 1 are infinitely far out
    sigma = flow_shift * u / (1 + (flow_shift - 1) * u)
    return min(max(sigma, lowest), highest), torch.randn(shape, generator=generator)               # rounding must not cross a boundary


def collate(items):
    """Items -> {"win", "lose" (B, C, F, H, W), "context" (B, T, D) zero-padded to the longest, conditions (B, ...), "names": list of B}."""
    first, batch = items[0], {"names": [item["name"] for item in items]}
    for item in items:
        if item.keys() != first.keys():
            raise ValueError(f"{item['name']} has {sorted(item)} but {first['name']} has {sorted(first)}; the items of a batch need the same tensors")
        for key in item.keys() - {"name", "context"}:
            if item[key].shape != first[key].shape:
                raise ValueError(f"{item['name']}: {key} is {tuple(item[key].shape)} but {tuple(first[key].shape)} in {first['name']}, of the same batch; "
                                 "encode at one size, or use --batch_size 1")
    for key in first.keys() - {"name", "context"}:
        batch[key] = torch.stack([item[key] for item in items])
    batch["context"] = torch.nn.utils.rnn.pad_sequence([item["context"] for item in items], batch_first=True)   # the model pads on with zeros as well
    return batch


def seed_of(*parts):
    """A seed from anything printable, the same on every machine: sha256, 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


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
