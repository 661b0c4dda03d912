"""
Samples and pairs on disk, and the order and noise in which a run uses them.

A sample is one .safetensors file:
    latents  (C, F, H, W)    as the model is trained on them (normalised), float
    context  (T, D)          text embeddings, unpadded rows, float; T = 0 is the empty caption of the embedded world
    others                   conditions of the variant (image condition, ...), kept by name
    header metadata          strings: prompt, seed, source, ...

Where train.py --data looks for them:
    DIR/real/017.safetensors         what is preferred
    DIR/negatives*/017.safetensors   what is not, of the same stem; any number of such folders, each adds its pairs
    or a .jsonl, one pair a line     {"win": "a/1.safetensors", "lose": "b/1.safetensors", "prompt": "..."}
    or DIR/*.safetensors             samples only, for a loss without pairs
Names that start with a dot, such as unfinished files, are ignored. empty_caption.context holds what the text encoder
makes of "", as a safetensors file with the tensor context (T, D).

A dataset is anything with a length, items, `sources` (names of the places that losers come from) and `fingerprint()`
(text that changes with its contents). train.main takes such an object in place of --data.
"""
import hashlib
import json
import math
import os
import uuid
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}
# What items and batches hold in addition to tensors of the sample file: no condition may have one of these names.
ITEM_KEYS = {"win", "lose", "name", "names", "source", "metadata", "sigma", "noise"}
# What the text encoder makes of "", next to the samples. It is not a sample, so it does not end in .safetensors.
EMPTY_CAPTION = "empty_caption.context"


# ------------------------------------------------------------------------------------------------------------------
# fingerprints of files and strings

def seed_of(*parts):
    """A seed made from anything printable, the same on every machine: 63 bits of its sha256."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def file_digest(path):
    """sha256 of a file's name, size, and 4 KiB at the start, the middle and the end."""
    size = os.stat(path).st_size
    digest = hashlib.sha256(f"{Path(path).name} {size}\n".encode())
    with open(path, "rb") as file:
        for begin in (0, size // 2, max(0, size - 4096)):
            file.seek(begin)
            digest.update(file.read(4096))
    return digest.digest()


def fingerprint(files):
    """Sixteen hexadecimal digits that name the contents of these files, in this order."""
    digest = hashlib.sha256()
    digests = {}    # a win may be in many pairs
    for path in files:
        if path not in digests:
            digests[path] = file_digest(path)
        digest.update(digests[path])
    return digest.hexdigest()[:16]


def weights_digest(path):
    """
    Twelve hexadecimal digits that name the weights at path, a file or a folder: sha256 of the sizes of its .safetensors
    files and of 16 MiB at the start and 1 MiB at the end of each.
    """
    digest = hashlib.sha256()
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            digest.update(str(size).encode() + handle.read(2 ** 24))
            handle.seek(max(0, size - 2 ** 20))
            digest.update(handle.read())
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------------
# one sample file

def write_whole(path, content):
    """Write bytes so that `path` is absent, as before, or complete: a temporary file next to it, then one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")   # unique: two processes may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())   # without it a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sample(path, latents, context, metadata, **conditions):
    """Write latents (C, F, H, W), context (T, D), conditions and metadata (values become strings), all or nothing."""
    tensors = {"latents": latents, "context": context, **conditions}
    check_tensors(path, tensors)
    layout = torch.contiguous_format
    tensors = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in tensors.items()}
    write_whole(path, sorted_header(save(tensors, metadata={name: str(value) for name, value in metadata.items()})))


def sorted_header(content):
    """The bytes of a .safetensors file with the metadata in order: safetensors has another order in every process."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size, "the header grew"
    return content[:8] + text.ljust(size) + content[8 + size:]


def read_empty_caption(folder):
    """The empty caption of a folder of samples: context (T, D) float32, metadata; None where it is missing."""
    path = Path(folder) / EMPTY_CAPTION
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            context, metadata = file.get_tensor("context"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not what encode.py writes ({error}); delete it and run encode.py again") from error
    return context.float(), metadata


def read_header(path):
    """The sample as read_sample returns it, with tensors on the meta device: no values are read (25 us)."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            metadata = file.metadata() or {}
            tensors = {}
            for name, tensor in slices.items():
                dtype, shape = tensor.get_dtype(), tensor.get_shape()
                if dtype not in DTYPES:
                    raise ValueError(f"{path}: {name} is {dtype} but samples hold {', '.join(DTYPES)}; write it again "
                                     "with one of these")
                if math.prod(max(1, size) for size in shape) > 2 ** 40:   # possible next to a 0, and torch overflows
                    raise ValueError(f"{path}: {name} is {tuple(shape)}, which no sample is; delete the file")
                tensors[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    check_tensors(path, tensors)
    return {**tensors, "metadata": metadata}


def read_sample(path):
    """-> {"latents": (C, F, H, W), "context": (T, D), conditions by name, "metadata": {str: str}}, all finite."""
    header = read_header(path)
    try:
        tensors = load(Path(path).read_bytes())            # safetensors 0.8's load_file loses 100 bytes at every call
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    check_tensors(path, tensors)
    return {**tensors, "metadata": header["metadata"]}


def unreadable(path, error):
    if not Path(path).exists():
        return ValueError(f"{path}: no such file; a sample (.safetensors) was expected here")
    return ValueError(f"{path}: not a whole safetensors file ({error}); a sample with latents and context was "
                      "expected: it was cut off or is another kind of file, so delete it and make it again")


def check_tensors(path, tensors):
    """Raise ValueError, naming the file, unless the tensors are a sample. On the meta device values are not checked."""
    for name, axes, least in (("latents", "(C, F, H, W)", (1, 1, 1, 1)), ("context", "(T, D)", (0, 1))):
        if name not in tensors:
            raise ValueError(f"{path}: no `{name}` among its tensors ({', '.join(sorted(tensors)[:8]) or 'none'}); "
                             "samples hold latents and context, as encode.py and sample.py write them")
        tensor = tensors[name]
        if tensor.ndim != len(least) or any(size < smallest for size, smallest in zip(tensor.shape, least)):
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, expected {axes}")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected a float type; make the sample again")
    reserved = ITEM_KEYS & tensors.keys()
    if reserved:
        raise ValueError(f"{path}: a tensor is called {min(reserved)}, which items use themselves; give the condition "
                         "another name")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"{path}: {name} has {bad} of {tensor.numel()} values NaN or infinite; delete the file "
                             "and make it again")


# ------------------------------------------------------------------------------------------------------------------
# headers of many samples

class Summary(NamedTuple):
    """What a sample's header says."""
    shapes: dict    # {tensor name: shape}
    prompt: str     # None where it is not recorded
    real: str       # of a negative: the fingerprint of the real sample it was made for; None where it is not recorded


def summarise_sample(sample):
    shapes = {name: tuple(sample[name].shape) for name in sorted(sample) if name != "metadata"}   # files: in any order
    return Summary(shapes, sample["metadata"].get("prompt"), sample["metadata"].get("real"))


def sample_files(folder):
    """The sample files directly in `folder`, by name. ValueError where there is none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder; a folder of samples (*.safetensors) was expected")
    files = sorted(path for path in Path(folder).glob("*.safetensors") if not path.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: no samples (*.safetensors) in this folder; make them from videos with: python "
                         f"encode.py --videos DIR --out {folder}")
    return files


def read_summaries(files, bad=None):
    """
    {path: Summary}, from headers alone. All files must have the same number of channels and the same context width.
    bad: a dictionary that receives unreadable files, {path: reason}; without it they raise ValueError.
    """
    summaries = {}
    shared = {}    # of two million files most look alike: equal summaries are one object
    first = None
    for path in files:
        try:
            header = read_header(path)
        except ValueError as error:
            if bad is None:
                raise
            bad[path] = str(error)
            continue
        channels, width = header["latents"].shape[0], header["context"].shape[1]
        first = first or (path, channels, width)
        if (channels, width) != first[1:]:
            raise ValueError(f"{path}: {channels} latent channels and context width {width}, but {first[0]} has "
                             f"{first[1]} and {first[2]}; encode all samples with one encoder")
        summary = summarise_sample(header)
        summaries[path] = shared.setdefault((*summary.shapes.items(), *summary[1:]), summary)
    return summaries


def read_again(path, before):
    """read_sample, checked against its summary from `before`: files can change during a run of days."""
    sample = read_sample(path)
    now = summarise_sample(sample)
    if now != before:
        raise ValueError(f"{path}: it was {tuple(before)} when it was opened and is {tuple(now)} now; put it back, or "
                         "begin a new run")
    return sample


def check_samples(summaries, config, together=1):
    """
    Check samples against the model they are for (config: a WanConfig), by headers alone. ValueError names the file,
    what is in it and what the model takes. summaries {path: Summary}; of pairs those of the wins, whose conditions
    serve both. together: this many samples are stacked in one forward, and must be alike.
    """
    another = "encode it for this model (encode.py --model), or choose the model that it was encoded for (--init)"
    kind = f"this {config.model_type} model"
    first = None
    for path, summary in summaries.items():
        conditions = dict(summary.shapes)
        latents, context = conditions.pop("latents"), conditions.pop("context")
        if latents[0] != config.out_dim:
            raise ValueError(f"{path}: latents are {latents}, of {latents[0]} channels; {kind} has {config.out_dim}; "
                             f"{another}")
        if any(size % patch for size, patch in zip(latents[1:], config.patch_size)):
            raise ValueError(f"{path}: latents are {latents}; the model cuts F, H, W into patches of "
                             f"{config.patch_size}, so encode at a multiple of that size")
        if context[0] > config.text_len or context[1] != config.text_dim:
            raise ValueError(f"{path}: context is {context}; {kind} takes at most {config.text_len} rows of width "
                             f"{config.text_dim}; {another}")
        expected = config.condition_shapes(latents)
        if "first_latent" not in conditions:
            expected.pop("first_latent", None)             # a TI2V model is trained without an image as well
        for name in sorted(conditions | expected):
            shape = conditions.get(name, "missing")
            if shape != expected.get(name):
                raise ValueError(f"{path}: the condition {name} is {shape}; {kind} with latents {latents} takes "
                                 f"{expected.get(name, 'no such condition')}; {another}")
        first = first or (path, latents, conditions)
        if together > 1 and (latents, conditions) != first[1:]:
            raise ValueError(f"{path}: latents {latents} and conditions {conditions}, but {first[0]} has {first[1]} "
                             f"and {first[2]}; {together} samples go through the model together, so make all alike, or "
                             "take one at a time (--batch_size, --grad_accum)")


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


def check_pair(win, lose, of_win, of_lose):
    """win, lose: files; of_win, of_lose: their summaries. ValueError where they cannot be a pair."""
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
        raise ValueError(f"{lose}: made for {win} as it was, {made_for}; it has changed, {fingerprints[win]}; delete the "
                         "negative and make it again (python sample.py --pairs ...), or put the real sample back")


def shared_tensors(sample):
    """Context and conditions of an item. Stored types save space on disk; training is in float32. Integers stay."""
    tensors = {name: value for name, value in sample.items() if name not in ("latents", "metadata")}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def read_item(dataset, index):
    """
    dataset.read(index). With dataset.skip an unreadable item joins dataset.bad, {index: reason}, and the next readable
    one, wrapping around, takes its place. That depends on the files alone, so a run that is resumed and reads them anew
    replaces the same.
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
    The file `name` of a manifest's `folder`. A manifest may come from anyone: it names no file outside its folder,
    links included.
    """
    try:
        root = Path(folder).resolve()
        inside = not Path(name).is_absolute() and (root / name).resolve().is_relative_to(root)
        exists = inside and (Path(folder) / name).is_file()
    except (OSError, RuntimeError, ValueError) as error:   # name too long, ring of links, zero byte
        raise ValueError(f"{where}: {name!r:.200} is no file name ({error})") from error
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
    What --data names: a PairSet if `pairs`, else a SampleSet of what is preferred. The head of this file has the
    layouts. skip: unreadable samples, now or later, are replaced (read_item). Samples of two encoders, and pairs of two
    sizes or prompts, stay errors.
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
    Which of n items is used at this position of the run. Every epoch is a fresh permutation, a function of (seed,
    epoch).
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
