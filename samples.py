"""
One sample on disk, and the fingerprints of files and strings.

A sample is one .safetensors file:
    latents  (C, F, H, W)    as the model is trained on them (normalised), float
    context  (T, D)          text embeddings, unpadded rows, float; T = 0 is the empty caption of the embedded world
    others                   conditions of the variant (image condition, ...), kept by name
    header metadata          strings: prompt, seed, source, ...

empty_caption.context, next to samples, holds the text encoder's output for "": a safetensors file with context (T, D).
"""
import hashlib
import json
import math
import os
import uuid
from pathlib import Path
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
# The text encoder's output for "", next to the samples. It is not a sample, so it does not end in .safetensors.
EMPTY_CAPTION = "empty_caption.context"


# ------------------------------------------------------------------------------------------------------------------
# fingerprints of files and strings

def seed_of(*parts):
    """A seed from any printable value, the same on every machine: 63 bits of its sha256."""
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
    """Sixteen hexadecimal digits that identify the contents of these files, in this order."""
    digest = hashlib.sha256()
    digests = {}    # a win may be in many pairs
    for path in files:
        if path not in digests:
            digests[path] = file_digest(path)
        digest.update(digests[path])
    return digest.hexdigest()[:16]


def weights_digest(path):
    """
    Twelve hexadecimal digits that identify the weights at path, a file or a folder: sha256 of the sizes of its
    .safetensors files and of 16 MiB at the start and 1 MiB at the end of each.
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
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")   # unique: two processes may write the same file
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
    bad: a dictionary that collects unreadable files, {path: reason}; without it they raise ValueError.
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
    """read_sample, checked against its summary from `before`, since files can change during a run of days."""
    sample = read_sample(path)
    now = summarise_sample(sample)
    if now != before:
        raise ValueError(f"{path}: it was {tuple(before)} when it was opened and is {tuple(now)} now; put it back, or "
                         "begin a new run")
    return sample


def check_samples(summaries, config, together=1):
    """
    Check samples against the model they are for (config: a WanConfig), by headers alone. ValueError names the file,
    what is in it and what the model takes. summaries {path: Summary}; for pairs, those of the wins, whose conditions
    serve both videos. together: this many samples are stacked in one forward, and must be alike.
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
