"""
Exports: a run's step folder, a public checkpoint or a LoRA file, written in a public format. `python weights.py` is the
command line.
"""
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from lora_files import DIALECTS, Adapter, check_adapters, merge_into, open_lora, save_lora
from samples import weights_digest
from step_folder import read_meta, step_folder_of, stored_config, stored_weights
from weights import EXPERT_LORAS, EXPERTS, FORMATS, TORCH_DTYPES
from weights import expert_of, locate_weights, open_wan, read_json, save_wan, two_experts

# ----------------------------------------------------------------------------------------------------------------------
# sources

def is_step_folder(source):
    """Return whether a path is a step folder of a run, or one of the two experts in one."""
    return (source / "meta.json").exists() or (source / ".metadata").exists()


def holds_adapters(source):
    """Return whether a path is a step folder of a run that trained adapters, or a file of adapters of any kind."""
    if (step_folder_of(source) / "meta.json").exists():
        return bool(read_meta(source).get("lora_rank"))
    if source.suffix != ".safetensors" or not source.is_file():
        return False
    with safe_open(source, "pt") as file:
        return any(re.search(r"\.(lora_|lokr_|hada_|oft_|dora_|diff(_b|_m)?$)", key) for key in file.keys())


def open_adapters(source, which="auto"):
    """Return {layer: Adapter} of a step folder (which: see step_folder.stored_weights) or a LoRA file."""
    if source.is_file():
        return open_lora(source)
    alpha = read_meta(source)["lora_alpha"]
    tensors, read = stored_weights(source, which)
    layers = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {layer: Adapter(read(f"{layer}.lora_A.weight"), read(f"{layer}.lora_B.weight"), alpha) for layer in layers}


def open_weights(source, which="auto"):
    """
    Return config, {our name: meta tensor}, read(name) of a step folder (which: see step_folder.stored_weights) or a
    public checkpoint.
    """
    if (source / "log.jsonl").exists():
        raise ValueError(f"{source} is a run's folder; name one of its step folders, or {source / 'export'}")
    if is_step_folder(source):
        return stored_config(source), *stored_weights(source, which)
    if which != "auto":
        raise ValueError(f"--weights {which}: {source} is not a step folder and has one set of weights; leave it out")
    config, slices = open_wan(source)
    tensors = {name: torch.empty(tensor.get_shape(), dtype=TORCH_DTYPES[tensor.get_dtype()], device="meta")
               for name, tensor in slices.items()}
    return config, tensors, lambda name: slices[name][:]


def find_base(source):
    """
    Return the --init of the run that wrote a step folder or exported a file of adapters; "" where it is not known or
    has changed.
    """
    source = source.absolute()
    try:
        if source.is_dir():
            run, digest = step_folder_of(source).parent, read_meta(source)["init"]
        else:
            run, digest = source.parents[1], (safe_open(source, "pt").metadata() or {})["base"]
        path = locate_weights(read_json(run / "config.json")["init"])
    except (OSError, KeyError, ValueError):
        return ""
    if weights_digest(path) != digest:
        return ""
    if two_experts(path):
        high, low = two_experts(path)
        path = {"high": str(high), "low": str(low)}.get(expert_of(source), "")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# how much of the training is left

def add_share(read, base, dtype, sums):
    """
    Wrap read(name) so that `sums` adds up, tensor by tensor, how much of the training survives in dtype:

        share = <rounded - base, trained - base> / |trained - base|^2 = sums["kept"] / sums["changed"]

    the projection of the rounded update on the true one: 1 where rounding only adds noise, 0 where every weight falls
    back on the base's. base {name: lazy slice}.
    """
    def read_and_add(name):
        trained = read(name)
        if name in base:
            start = base[name][:].float()
            update, rounded_update = trained.float() - start, trained.to(dtype).float() - start
            sums["kept"] += (rounded_update * update).sum(dtype=torch.float64).item()
            sums["changed"] += update.square().sum(dtype=torch.float64).item()
        return trained
    return read_and_add


def report_share(base, sums, dtype):
    """Print the share that add_share added up, and a warning where it is below 0.9."""
    word = str(dtype).removeprefix("torch.")
    if not base:
        print(f"how much of the training {word} keeps is not known; name the weights it started from with --base")
        return
    share = sums["kept"] / sums["changed"] if sums["changed"] else 1.0
    print(f"{word} keeps {share:.1%} of what training changed in {base}")
    if share < 0.9:
        print(f"warning: the rest is too small for {word} and is lost; write --dtype float32, or train adapters, whose "
              "weights are small numbers of their own")


# ----------------------------------------------------------------------------------------------------------------------
# exports

def export_weights(source, path, format="original", dtype=torch.float32, which="auto", base=""):
    """
    Write the weights in a step folder or a public checkpoint as public weights at `path`, one tensor at a time. Where
    that rounds them, print the share of the training that survives. Adapters are written merged into the weights that
    they were trained on or, in a format of lora_files.DIALECTS, alone. base: the weights that training started from
    ("": those of the run's --init). Both of two experts, in a step folder or a public one, are written.
    """
    source, path = Path(source), Path(path)
    if two_experts(source):
        export_two(source, path, format, dtype, which, base)
        return
    if format in DIALECTS:
        export_adapters(source, path, format, dtype, which)
        return
    if holds_adapters(source):
        base = base or find_base(source)
        if not base:
            raise ValueError(f"{source} holds adapters, and the weights that they were trained on are not known, or "
                             "have changed; name them with --base")
        adapters = open_adapters(source, which)
        config, tensors, read = open_weights(Path(base))
        check_adapters(adapters, config, source)
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        read = merge_into(read, [(adapters, 1.0)])
    else:
        config, tensors, read = open_weights(source, which)
    is_rounded = any(tensor.dtype.itemsize > dtype.itemsize for tensor in tensors.values())
    sums = {"kept": 0.0, "changed": 0.0}
    if is_rounded and not base:
        base = find_base(source)
    if is_rounded and base:
        base_config, slices = open_wan(base)
        if replace(base_config, scores=config.scores) != config:
            raise ValueError(f"--base {base} is another model than {source}; give the weights that it was trained from")
        read = add_share(read, {name: slices[name] for name in slices if name in tensors}, dtype, sums)
    save_wan(tensors, path, format, config, dtype, read=read)
    print(f"weights in {path}")
    if is_rounded:
        report_share(base, sums, dtype)


def export_two(source, path, format, dtype, which, base):
    """Write both experts of a folder to two folders at `path`, under the names that public folders have."""
    if format not in ("original", "diffusers"):
        high, low = two_experts(source)
        raise ValueError(f"{source} holds two experts, and --format {format} is a file for one; give {high} or {low}")
    bases = two_experts(base) if base else ("", "")
    if not bases:
        raise ValueError(f"--base {base} is one model, and {source} holds two experts; give the folder with both")
    names = EXPERTS[1] if format == "diffusers" else EXPERTS[0]
    for expert, name, base_of_expert in zip(two_experts(source), names, bases):
        export_weights(expert, path / name, format, dtype, which, base_of_expert)


def export_adapters(source, path, dialect, dtype=torch.float32, which="auto"):
    """Write the adapters in a step folder or a LoRA file to a file of this dialect."""
    if not holds_adapters(source):
        raise ValueError(f"--format {dialect}: {source} has no adapters; expected one of {', '.join(FORMATS)}")
    header = {"base": read_meta(source)["init"]} if is_step_folder(source) else {}
    save_lora(path, open_adapters(source, which), dialect, dtype, header)
    print(f"adapters in {path}")


def export_run(checkpoint, folder):
    """
    Write what the run of a step folder trained to `folder`: lora.safetensors, or whole weights, original names. Two
    experts give two files of adapters or two folders.
    """
    if two_experts(checkpoint) and holds_adapters(checkpoint):
        for expert, name in zip(two_experts(checkpoint), EXPERT_LORAS):
            export_adapters(expert, folder / name, "lora")
    elif holds_adapters(checkpoint):
        export_adapters(checkpoint, folder / "lora.safetensors", "lora")
    else:
        export_weights(checkpoint, folder)
