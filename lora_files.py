"""
LoRA files of any trainer of Wan adapters, in and out: names, scales, merging, what sampling attaches.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight       diffusion-pipe, ai-toolkit, SimpleTuner, ours: ComfyUI and
                                                             diffusers read it
    lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha  musubi (kohya); VideoX-Fun with lora_unet__
    transformer.blocks.0.attn1.to_q.lora_A.weight            diffusers; PEFT with base_model.model.
    blocks.0.self_attn.q.lora_A.default.weight               DiffSynth

scale = alpha / rank; of rank-stabilised LoRA (arXiv 2312.03732) alpha / sqrt(rank). A file with anything else than
adapters for layers of the model is refused by name: adapters that are read in part do silent harm.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lora import add_adapters
from model import WanModel
from samples import weights_digest, write_whole
from weights import DIFFUSERS_NAMES, expert_of, rename

# ----------------------------------------------------------------------------------------------------------------------
# names in public files

ALIASES = {}                          # every spelling of a layer, without prefix and number of the block -> ours
for ours, theirs in DIFFUSERS_NAMES.items():
    for spelling in (ours, theirs):
        flat = spelling.replace(".", "_").replace("blocks_*_", "blocks.*.")
        ALIASES[spelling] = ALIASES[flat] = ours

DOTTED = r"(?:(?:base_model|model|diffusion_model|transformer|pipe|dit)\.)*"                 # prefixes
FLAT = r"(?:lora_unet|lora_transformer|lycoris)__?"                                          # kohya's
KEY = re.compile(r"(?P<stem>.+)\.(?:lora_(?P<part>A|B|down|up)(?:\.[^.]+)?\.weight|alpha)")  # PEFT has .default before
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA", r"lokr_": "LoKr", r"hada_": "LoHa", r"oft_": "OFT",
    r"\.diff(_b|_m)?$": "differences of whole weights, biases or norms, not of adapters",
    r"lora_mid": "a middle matrix of LoCon", r"lora_[AB].*\.bias$": "biases of adapters"}


def layer_name(stem):
    """Return our name of the layer that a file calls `stem`, or None where it is not a layer of a Wan model."""
    name = re.sub(f"^{FLAT}|^{DOTTED}", "", stem)
    block = re.match(r"blocks[._](\d+)[._]", name)
    if block is None:
        return ALIASES.get(name)
    layer = ALIASES.get("blocks.*." + name[block.end():])
    return layer and layer.replace("*", block[1])


@dataclass(frozen=True)
class Adapter:
    """An adapter of one layer: A (rank, in) and B (out, rank), tensors or lazy slices, which A[:] reads."""
    A: object
    B: object
    alpha: float                      # scale * rank

    @property
    def shapes(self):
        """Return those of A and B."""
        return [tuple(x.shape if torch.is_tensor(x) else x.get_shape()) for x in (self.A, self.B)]

    @property
    def rank(self):
        return self.shapes[0][0]

    @property
    def scale(self):
        return self.alpha / self.rank


def open_lora(path):
    """
    Return {our name of a layer: Adapter} of a public LoRA file, without reading the matrices. Keys may be ComfyUI's,
    diffusers', PEFT's or kohya's. ValueError, naming a key, for what is not an adapter of a layer of a Wan model.
    """
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole .safetensors file ({error})") from error
    parts, alphas, stems = {}, {}, {}
    for key in file.keys():
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, key):
                raise ValueError(f"{path}: {key} belongs to {kind}; only plain LoRA is read, and leaving out such "
                                 "tensors would make another model; merge the file with the tool that wrote it")
        expert = re.match(r"(?:.*\.)?(transformer_[12])\.", key)
        if expert:
            raise ValueError(f"{path}: {key}: {expert[1]} is one of two experts; expected one expert's adapters in a "
                             "file, without this part of the names")
        match = KEY.fullmatch(key)
        layer = match and layer_name(match["stem"])
        if layer is None:
            raise ValueError(f"{path}: {key} fits no layer of a Wan model; is the file for another kind of model?")
        stems[layer] = match["stem"]
        name = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}[match["part"]]
        if (layer, name) in parts:
            raise ValueError(f"{path}: {key} is the second {name} of layer {layer}; which one counts is not clear")
        parts[layer, name] = file.get_slice(key)
        if name == "alpha":
            alphas[layer] = float(file.get_tensor(key))
    settings = read_settings(path, file.metadata() or {})
    adapters = {}
    for layer, stem in stems.items():
        A, B = parts.get((layer, "A")), parts.get((layer, "B"))
        if A is None or B is None:
            raise ValueError(f"{path}: {stem} lacks its {'lora_A' if A is None else 'lora_B'}; copy the file again")
        if layer not in alphas and re.match(FLAT, stem):
            raise ValueError(f"{path}: {stem} has no .alpha, as files of kohya's trainers do, so its scale is not "
                             "known; add one, equal to the rank for a scale of 1")
        alpha = alphas[layer] if layer in alphas else alpha_by(settings, stem, A.get_shape()[0])
        adapters[layer] = Adapter(A, B, alpha)
        shape_A, shape_B = adapters[layer].shapes
        if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] != shape_B[1] or shape_A[0] == 0:
            raise ValueError(f"{path}: {stem} has matrices {shape_A} and {shape_B}; expected (rank, in), (out, rank)")
        if not {A.get_dtype(), B.get_dtype()} <= {"F64", "F32", "F16", "BF16"}:
            raise ValueError(f"{path}: {stem} is {A.get_dtype()} and {B.get_dtype()}; expected 16 bits or more")
    if not adapters:
        raise ValueError(f"{path}: no tensors")
    return adapters


def read_settings(path, header):
    """
    Return {name of PEFT's LoraConfig: value} that the header of a file has, as diffusers or others write them, or else
    adapter_config.json next to it.
    """
    config = Path(path).with_name("adapter_config.json")
    settings = json.loads(config.read_text()) if config.is_file() else {}
    settings |= json.loads(header.get("lora_adapter_metadata", "{}"))
    for name in ("lora_alpha", "network_alpha", "use_rslora", "use_dora"):
        for key in (name, f"transformer.{name}"):
            if key in header:
                settings[key] = json.loads(header[key].lower())
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    if settings.get("use_dora"):
        raise ValueError(f"{path}: it belongs to DoRA (use_dora is true); only plain LoRA is read")
    return settings


def alpha_by(settings, stem, rank):
    """Return the alpha, for a scale of alpha / rank, that PEFT's settings give to a layer; without any, its rank."""
    alpha = settings.get("lora_alpha", settings.get("network_alpha", rank))
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", stem):
            alpha = value
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)


def check_adapters(adapters, config, path):
    """ValueError unless the adapters of the file at path fit layers of a model of this config."""
    with torch.device("meta"):
        weights = dict(WanModel(config).named_parameters())
    for layer, adapter in adapters.items():
        (_, width_in), (width_out, _) = adapter.shapes
        weight = weights.get(f"{layer}.weight")
        expected = "no such layer" if weight is None else tuple(weight.shape)
        if expected != (width_out, width_in):
            raise ValueError(f"{path} is for another model: its adapter of {layer} is for a matrix "
                             f"{width_out, width_in}, and this {config.model_type} model of width {config.dim} and "
                             f"{config.num_layers} blocks has {expected}")


# name: how it calls a layer, A, B and alpha ("": alpha is in the header)
DIALECTS = {
    "lora": (lambda layer: f"diffusion_model.{layer}", "lora_A.weight", "lora_B.weight", "alpha"),
    "lora_kohya": (lambda layer: "lora_unet_" + layer.replace(".", "_"), "lora_down.weight", "lora_up.weight", "alpha"),
    "lora_diffusers": (lambda layer: "transformer." + rename(layer, DIFFUSERS_NAMES),
                       "lora_A.weight", "lora_B.weight", "")}


def save_lora(path, adapters, dialect="lora", dtype=torch.float32, header=()):
    """
    Write adapters {layer: Adapter} to a file: "lora" with keys that ComfyUI and diffusers both read, "lora_kohya", or
    "lora_diffusers", as diffusers and PEFT write them. header: more {name: text} for its header.
    """
    call, name_A, name_B, name_alpha = DIALECTS[dialect]
    tensors, header = {}, {"format": "pt"} | dict(header)
    for layer, adapter in adapters.items():
        tensors[f"{call(layer)}.{name_A}"] = adapter.A[:].to(dtype).contiguous()
        tensors[f"{call(layer)}.{name_B}"] = adapter.B[:].to(dtype).contiguous()
        if name_alpha:
            tensors[f"{call(layer)}.{name_alpha}"] = torch.tensor(adapter.alpha)
    if not name_alpha:
        names = {call(layer).removeprefix("transformer."): adapter for layer, adapter in adapters.items()}
        first = next(iter(adapters.values()))
        settings = {
            "r": first.rank, "lora_alpha": first.alpha, "target_modules": sorted(names),
            "rank_pattern": {name: a.rank for name, a in names.items() if a.rank != first.rank},
            "alpha_pattern": {name: a.alpha for name, a in names.items() if a.alpha != first.alpha}}
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{name}": x for name, x in settings.items()})
    write_whole(path, save(tensors, header))


# ----------------------------------------------------------------------------------------------------------------------
# merging, and adapters for sampling

def merge_into(read, files):
    """
    Return read(name) -> tensor with adapters merged into the weights: W + strength * scale * B A, in float32 or more.
    files: [({layer: Adapter}, strength)].
    """
    def read_merged(name):
        weight = read(name)
        for adapters, strength in files:
            adapter = adapters.get(name.removesuffix(".weight"))
            if adapter:
                weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
                product = adapter.B[:].to(weight.dtype) @ adapter.A[:].to(weight.dtype)
                weight = weight + strength * adapter.scale * product
        return weight
    return read_merged


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that sampling attaches."""
    path: str
    strength: float
    adapters: dict                    # {layer: Adapter}

    def __str__(self):
        return f"{self.path}:{self.strength:g}"

    def describe(self):
        """Return words on its size for a user."""
        ranks = sorted({adapter.rank for adapter in self.adapters.values()})
        return f"{len(self.adapters)} layers, rank {', '.join(map(str, ranks))}"

    @property
    def digest(self):
        """Return text that identifies the contents and the strength."""
        return f"{weights_digest(self.path)}:{self.strength:g}"


def split_scale(flag, text):
    """Return the path and the scale of FILE or FILE:SCALE; the path may have colons of its own."""
    if Path(text).is_file():
        return text, 1.0
    path, _, scale = text.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{flag} {text}: not a file; expected FILE or FILE:SCALE, such as a run's "
                         "export/lora.safetensors:0.8")
    try:
        strength = float(scale)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength) or strength == 0:
        raise ValueError(f"{flag} {text}: the scale is {scale!r}; expected a number that is not 0, such as 0.8")
    return path, strength


def open_lora_files(flag, texts, config, expert=""):
    """
    Return the LoraFiles that a flag lists as FILE or FILE:SCALE, for a model of config. expert: "high" or
    "low" where the model is one of two. ValueError for a file that is not for this model, or would change nothing.
    """
    other = {"high": "low", "low": "high", "": None}[expert]
    files = []
    for text in texts:
        path, strength = split_scale(flag, text)
        if other and expert_of(path) == other:
            raise ValueError(f"{flag} {text}: {flag} is for the {expert}-noise expert, and by its name this file is "
                             f"for the {other}-noise one; exchange the files, or rename it")
        adapters = open_lora(path)
        check_adapters(adapters, config, f"{flag} {path}")
        check_attachable(adapters, config, f"{flag} {path}")
        if not any(adapter.B[:].any() for adapter in adapters.values()):
            raise ValueError(f"{flag} {path} changes nothing: its lora_B is 0 in every layer, as before training")
        files.append(LoraFile(path, strength, adapters))
    return files


def check_attachable(adapters, config, path):
    """
    ValueError for an adapter of a layer that is not a plain linear layer: such an adapter can be merged but not
    attached.
    """
    with torch.device("meta"):
        model = WanModel(config)
    for layer in adapters:
        if type(model.get_submodule(layer)) is not nn.Linear:
            raise ValueError(f"{path}: its adapter of {layer} is for a layer that computes in float32; merge the file "
                             "into the weights with weights.py")


def attach(model, files):
    """
    Give a model the adapters of files, [({layer: Adapter}, strength)], next to its weights, in place: in bf16 a merged
    weight would lose the small ones. Several adapters on one layer become one, whose rank is the sum of theirs.
    """
    layers = {}
    for adapters, strength in files:
        for name, adapter in adapters.items():
            layers.setdefault(name, []).append((adapter, strength * adapter.scale))
    for name, parts in layers.items():
        base = model.get_submodule(name)
        assert type(base) is nn.Linear, f"{name}: check_attachable comes first"
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = torch.cat([adapter.A[:].to(dtype) for adapter, _ in parts])
        B = torch.cat([scale * adapter.B[:].to(dtype) for adapter, scale in parts], dim=1)
        add_adapters(model, [name], len(A))
        layer = model.get_submodule(name)
        layer.lora_A.weight.data.copy_(A)
        layer.lora_B.weight.data.copy_(B)
