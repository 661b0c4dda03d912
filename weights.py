"""
Wan weights on disk: public checkpoints in and out, which model a path holds, conversions and exports.

    python weights.py out/regdpo/step_000300 --format comfyui --dtype bfloat16 --out wan.safetensors
    python weights.py Wan2.1-T2V-1.3B --format diffusers --out mine/transformer

Three formats hold the same tensors in the same shapes, under different names:

    original    Wan-AI's repositories: a folder with config.json and one .safetensors file, or shards and their index
    diffusers   such a folder with other names, usually called transformer/
    comfyui     a single file: original names under a prefix, no config.json

Our parameters have the original names. Tensors are converted one at a time, so a model may be larger than memory.
"""
import argparse
import json
import os
import re
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from model import CONFIGS, WanConfig, WanModel

HERE = Path(__file__).resolve().parent
FORMATS = ("original", "diffusers", "comfyui")
LORA_FORMATS = ("lora", "lora_kohya", "lora_diffusers")                  # of adapters alone, see lora_files.py
COMFYUI_PREFIX = "model.diffusion_model."
WEIGHTS = "diffusion_pytorch_model"                                      # name of the files in folders
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_DTYPES = {word: dtype for dtype, word in SAFETENSORS_DTYPES.items()}
# A14B: folders of the high-noise and the low-noise expert (original, diffusers); the timestep from which high samples
EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
BOUNDARIES = {"wan2.2-t2v-a14b": 875.0, "wan2.2-i2v-a14b": 900.0}
EXPERT_LORAS = ("lora_high_noise.safetensors", "lora_low_noise.safetensors")     # what a run exports of both

# ------------------------------------------------------------------------------------------------------------------
# names

DIFFUSERS_NAMES = {                                                      # original -> diffusers
    "patch_embedding": "patch_embedding", "head.head": "proj_out",
    "head.modulation": "scale_shift_table", "blocks.*.modulation": "blocks.*.scale_shift_table",
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj", "blocks.*.ffn.2": "blocks.*.ffn.net.2",
    "blocks.*.norm3": "blocks.*.norm2"}                                  # norm1 and norm2 have no weights
for ours, theirs in {"text_embedding.0": "text_embedder.linear_1", "text_embedding.2": "text_embedder.linear_2",
                     "time_embedding.0": "time_embedder.linear_1", "time_embedding.2": "time_embedder.linear_2",
                     "img_emb.proj.0": "image_embedder.norm1", "img_emb.proj.4": "image_embedder.norm2",
                     "img_emb.proj.1": "image_embedder.ff.net.0.proj", "img_emb.proj.3": "image_embedder.ff.net.2",
                     "img_emb.emb_pos": "image_embedder.pos_embed", "time_projection.1": "time_proj"}.items():
    DIFFUSERS_NAMES[ours] = "condition_embedder." + theirs
for ours, theirs in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
                     "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}.items():
    DIFFUSERS_NAMES["blocks.*.self_attn." + ours] = "blocks.*.attn1." + theirs
    DIFFUSERS_NAMES["blocks.*.cross_attn." + ours] = "blocks.*.attn2." + theirs
ORIGINAL_NAMES = {theirs: ours for ours, theirs in DIFFUSERS_NAMES.items()}
DIFFUSERS_FIELDS = {                                                     # WanConfig -> diffusers' config.json
    "num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels",
    "image_pos_len": "pos_embed_seq_len",
    **{name: name for name in ("ffn_dim", "num_layers", "text_dim", "text_len", "freq_dim", "patch_size", "eps")}}


def rename(name, table):
    """Rename by a table: blocks.3.ffn.0.weight takes the table's entry for blocks.*.ffn.0; other names stay."""
    block, stem, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name).groups("")
    new = table.get("blocks.*." + stem if block else stem)
    return name if new is None else new.replace("blocks.*.", block) + leaf


def public_name(name, format):
    """The name in a file of this format of our parameter `name`."""
    if format == "diffusers":
        return rename(name, DIFFUSERS_NAMES)
    return COMFYUI_PREFIX + name if format == "comfyui" else name


def expected_shapes(config):
    """{our parameter name: shape} of a model with this config."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanModel(config).state_dict().items()}


def check_shapes(shapes, config, where):
    """ValueError unless shapes {our name: shape} are exactly those of config; where(name) is the file to blame."""
    expected = expected_shapes(config)
    wrong = [name for name in expected | shapes if shapes.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        model = next((preset for preset, preset_config in CONFIGS.items() if preset_config == config), config)
        raise ValueError(f"{where(name)}: tensor {name} is {shapes.get(name, 'missing')}, expected "
                         f"{expected.get(name, 'no such tensor')} in {model}; "
                         f"{len(wrong)} tensors of {len(expected)} differ")


# ------------------------------------------------------------------------------------------------------------------
# reading public checkpoints

def open_safetensors(file):
    """An open safetensors file. ValueError if it is not whole."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from error


def read_json(file):
    """The content of a JSON file. ValueError if it is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def find_weights(path):
    """
    {tensor name: its file}, file by file, for one .safetensors file, or for a folder (or its transformer/) that holds
    one such file, or shards and their index. ValueError where files are missing, damaged or ambiguous.
    """
    path = Path(path)
    if path.is_file():
        return dict.fromkeys(open_safetensors(path).keys(), path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if two_experts(path):
        high, low = two_experts(path)
        raise ValueError(f"{path} holds two experts: give {high} (high noise) or {low} (low noise)")
    if (path / "transformer").is_dir():
        path = path / "transformer"

    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not indices:
        return dict.fromkeys(open_safetensors(files[0]).keys(), files[0])
    if len(indices) != 1:
        raise ValueError(f"{path}: expected one .safetensors file, or shards with one .safetensors.index.json; found "
                         f"{len(files)} and {len(indices)} (pickled weights, .pth or .bin, are not read)")
    weight_map = read_json(indices[0]).get("weight_map")
    if not weight_map:
        raise ValueError(f"{indices[0]}: no weight_map, so not the index of a safetensors checkpoint")
    files = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise ValueError(f"{indices[0]} names {shard}, which is not there: the copy or download is not complete")
        expected = {name for name in weight_map if weight_map[name] == shard}
        stored = set(open_safetensors(path / shard).keys())
        if expected - stored:
            raise ValueError(f"{path / shard}: no tensor {min(expected - stored)}, though {indices[0].name} says so")
        if stored - expected:
            raise ValueError(f"{path / shard}: tensor {min(stored - expected)} is in this shard, though "
                             f"{indices[0].name} does not say so; copy or download the checkpoint again")
        files |= dict.fromkeys(sorted(expected), path / shard)
    return files


def read_settings(file):
    """
    {field of WanConfig or "model_type": value} from config.json next to `file`, or from the header of a single file
    from save_wan ({} where neither has them); and the file that has them.
    """
    header, source = open_safetensors(file).metadata() or {}, file.parent / "config.json"
    if "wan_config" in header:
        settings, source = json.loads(header["wan_config"]), file
    else:
        settings = read_json(source) if source.is_file() else {}
        if settings.get("_class_name") not in ("WanModel", "WanTransformer3DModel"):
            return {}, file                                              # single files lie among other models' files
    if "num_attention_heads" in settings:                                # diffusers' words
        settings["dim"] = settings["num_attention_heads"] * settings["attention_head_dim"]
        settings |= {ours: settings[theirs] for ours, theirs in DIFFUSERS_FIELDS.items() if theirs in settings}
    if "patch_size" in settings:
        settings["patch_size"] = tuple(settings["patch_size"])
    fields = ("model_type", *WanConfig.__dataclass_fields__)
    return {name: settings[name] for name in fields if name in settings}, source


def open_tensors(path):
    """{our name: lazy slice}, {our name: its file} of a public checkpoint. Refuses 8-bit files and doubled tensors."""
    files = find_weights(path)
    handles = {file: open_safetensors(file) for file in set(files.values())}
    is_diffusers = any(name.startswith("condition_embedder.") for name in files)
    tensors, where, names = {}, {}, {}                                   # by our names
    for name, file in files.items():
        if re.search(r"\.lora_(A|B|down|up)\.", name):
            raise ValueError(f"{file} holds adapters, not a model; give it to sample.py --lora or to train.py "
                             "--init_lora, or merge it with python weights.py")
        tensor = handles[file].get_slice(name)
        if tensor.get_dtype() not in TORCH_DTYPES or re.search("scale_weight|scale_input|weight_scale", name):
            raise ValueError(f"{file}: {name} is {tensor.get_dtype()}: 8-bit and scaled files are for inference, their "
                             "scales are not applied here and their steps are too coarse to train from; "
                             "use the bf16, fp16 or fp32 file")
        ours = rename(name, ORIGINAL_NAMES) if is_diffusers else name.removeprefix(COMFYUI_PREFIX)
        if ours.endswith("attn2.norm_added_q.weight"):                   # in some old diffusers files; no code uses it
            continue
        if ours in tensors:
            raise ValueError(f"{file}: {name} and {names[ours]} (in {where[ours].name}) are two tensors for one "
                             "parameter; which one counts is not clear, keep one of them")
        tensors[ours], where[ours], names[ours] = tensor, file, name
    return tensors, where


def open_wan(path, config=None):
    """
    Find the weights at `path` without reading them: an original or diffusers folder (whole or sharded), the parent of a
    diffusers transformer/, or a single file with either names, with or without ComfyUI's prefix.

    Returns config, {our parameter name: lazy slice}; a slice has get_shape(), and [a:b] reads these rows only. The
    variant comes from config.json and the tensors. ValueError where they differ from each other or from `config`, and
    where a tensor is missing, left over or of another shape. A single file has no config.json: its variant is `config`,
    or else the preset that has exactly its tensors.
    """
    tensors, where = open_tensors(path)
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    settings, source = read_settings(next(iter(where.values())))
    model_type = settings.pop("model_type", None)
    if settings:
        image = {"image_dim": shapes.get("img_emb.proj.0.weight", (0,))[0],      # not in an original config.json
                 "image_pos_len": shapes.get("img_emb.emb_pos", (1, 0))[1]}
        for name, size in image.items():
            if (settings.get(name, size) or 0) != size:
                raise ValueError(f"{source}: {name} is {settings[name]}, but the tensors next to it have an image "
                                 f"branch of {size}")
        settings |= image
        missing = {"dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim"} - settings.keys()
        if missing:
            raise ValueError(f"{source}: no {', '.join(sorted(missing))}; not the config.json of a Wan video model")
        stored = WanConfig(**settings)
    else:
        stored = config or next((preset for preset in CONFIGS.values() if expected_shapes(preset) == shapes), None)
        if stored is None:
            raise ValueError(f"{path}: no config.json of a Wan model, and the {len(shapes)} tensors "
                             f"({', '.join(sorted(shapes)[:3])}, ...) are not those of {', '.join(CONFIGS)}")
    if config not in (None, stored):
        field = next(field for field, value in vars(config).items() if value != getattr(stored, field))
        raise ValueError(f"{source}: {field} is {getattr(stored, field)}, expected {getattr(config, field)} "
                         "in the model asked for")
    check_shapes(shapes, stored, lambda name: where.get(name, path))
    if model_type not in (None, stored.model_type):
        raise ValueError(f"{source}: model_type is {model_type}, but the tensors next to it are those of "
                         f"{stored.model_type}")
    return stored, tensors


def load_wan(path, config=None, dtype=torch.float32, device="cpu"):
    """A WanModel with the weights at `path` (see open_wan), which go to `device` one by one, as `dtype`."""
    config, tensors = open_wan(path, config)
    with torch.device("meta"):
        model = WanModel(config)
    state = {name: tensor[:].to(device, dtype) for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


# ------------------------------------------------------------------------------------------------------------------
# writing public checkpoints

def public_config(config, format):
    """The content of config.json for the official (format "original") or the diffusers class."""
    if format == "original":                                             # which knows the image branch by model_type
        settings = {"_class_name": "WanModel", "model_type": config.model_type} | asdict(config)
        hidden = ("image_dim", "image_pos_len") if config.scores else ("image_dim", "image_pos_len", "scores")
        return {name: value for name, value in settings.items() if name not in hidden}
    settings = {"_class_name": "WanTransformer3DModel"}
    settings |= {theirs: getattr(config, ours) for ours, theirs in DIFFUSERS_FIELDS.items()}
    if config.text_len == 512:
        del settings["text_len"]                                         # diffusers does not know it and warns
    return settings | {
        "attention_head_dim": config.dim // config.num_heads, "rope_max_seq_len": 1024,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": config.image_pos_len or None,
        "image_dim": config.image_dim or None, "added_kv_proj_dim": config.dim if config.image_dim else None}


def write_tensors(file, tensors, read, names, metadata):
    """Write tensors {our name: meta tensor} to a file under names {our name: name}; read(name) gives the values."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))    # so that each is aligned to its type
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[names[name]] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)                                  # the numbers start at a multiple of 8
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name, tensor in tensors.items():
            value = read(name).detach().to("cpu", tensor.dtype)
            out.write(value.contiguous().flatten().view(torch.uint8).numpy())


def split_shards(tensors, max_bytes):
    """Names of tensors {name: meta tensor} in lists, in order, each of at most max_bytes or of one tensor."""
    shards, nbytes = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and nbytes + tensor.nbytes > max_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(name)
        nbytes += tensor.nbytes
    return shards


def save_wan(model, path, format="original", config=None, dtype=None, max_shard_bytes=10 * 2**30, read=None):
    """
    Write the weights of `model`, a WanModel or a state dict with its `config`, in a public format:

        original, diffusers   folder `path`: config.json and one file, or shards of at most max_shard_bytes and an index
        comfyui               single file `path`

    dtype None keeps each tensor's. read: a function of a name that fetches a tensor; with it `model` may be on the meta
    device, and larger than memory. Weights that are at `path` already are replaced, other files there stay. Everything
    is written under temporary names before the first file is replaced.
    """
    path, config = Path(path), config or model.config
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if format not in FORMATS or config.scores and format == "diffusers":
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)} "
                         "(diffusers has no preference model)")
    if format == "comfyui" and path.is_dir():
        raise ValueError(f"{path}: comfyui weights are a single file, and this is a folder")
    if format != "comfyui" and (path.is_file() or path.suffix == ".safetensors"):
        raise ValueError(f"{path}: {format} weights are a folder, and this is a file")
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, config,
                 lambda name: f"{path} (nothing was written)")

    tensors = {name: state[name].detach().to("meta", dtype or state[name].dtype) for name in expected_shapes(config)}
    names = {name: public_name(name, format) for name in tensors}
    header, jsons, old = {"format": "pt"}, {}, []
    if format == "comfyui":
        header["wan_config"] = json.dumps(asdict(config))
        shards, files = [list(tensors)], [path]
    else:
        shards, files = split_shards(tensors, max_shard_bytes), [path / f"{WEIGHTS}.safetensors"]
        jsons[path / "config.json"] = public_config(config, format)
        old = list(path.glob(f"{WEIGHTS}*"))
    if len(shards) > 1:
        files = [path / f"{WEIGHTS}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {names[name]: file.name for file, shard in zip(files, shards) for name in shard}
        sizes = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        jsons[path / f"{WEIGHTS}.safetensors.index.json"] = {"metadata": sizes, "weight_map": weight_map}

    files[0].parent.mkdir(parents=True, exist_ok=True)
    temporary = {file: file.with_name(file.name + ".tmp") for file in (*files, *jsons)}
    for file, shard in zip(files, shards):
        write_tensors(temporary[file], {name: tensors[name] for name in shard}, read or state.get, names, header)
    for file, content in jsons.items():
        temporary[file].write_text(json.dumps(content, indent=2), encoding="utf-8")
    for file in set(old) - set(temporary.values()):                      # shards of another number, or a killed run's
        file.unlink()
    for file in temporary:
        os.replace(temporary[file], file)


# ------------------------------------------------------------------------------------------------------------------
# which model, and which expert

def locate_weights(path, flag="--init"):
    """The path as given, or inside this repository (toy_base, from any folder), as text. ValueError if nowhere."""
    for candidate in (Path(path), HERE / path):
        if candidate.exists():
            return str(candidate)
    raise ValueError(f"{flag} {path}: no such file or folder; give a Wan checkpoint, a folder or a .safetensors file")


def two_experts(path):
    """The folders (high-noise, low-noise) of the two experts in the folder at path; () where it does not hold two."""
    for high, low in EXPERTS:
        if (Path(path) / low).is_dir():
            return Path(path) / high, Path(path) / low
    return ()


def expert_of(path):
    """The expert that a folder or file is by its name: "high", "low", or "" where the name does not say."""
    path = Path(path).absolute()
    has_twin = (path.parent / "transformer_2").is_dir()
    if "high_noise" in path.name or path.name == "transformer" and has_twin:
        return "high"
    return "low" if "low_noise" in path.name or path.name == "transformer_2" else ""


def find_model(path, name="auto"):
    """
    Tell which model the weights at `path` are, without reading them. "scratch": preset `name` (auto: tiny).

    Returns config, preset name, expert. A model without a preset has a description for a name. expert is "high" or
    "low" for one of the two experts of an A14B model, and "" for other models and where the path does not say. An
    expert of T2V-A14B has the tensors of Wan2.1-T2V-14B, so there the path decides. ValueError, naming --model and
    --init, where the files are damaged, do not fit together, or are not those of preset `name`.
    """
    if path == "scratch":
        name = "tiny" if name == "auto" else name
        return CONFIGS[name], name, ""
    flags = f"--init {path}" if name == "auto" else f"--model {name} --init {path}"
    try:
        config, _ = open_wan(path, None if name == "auto" else CONFIGS[name])
    except ValueError as error:
        raise ValueError(f"{flags}: {error}") from error
    expert = expert_of(path)
    presets = [preset for preset, preset_config in CONFIGS.items() if preset_config == config]
    if expert:
        presets.sort(key=lambda preset: preset not in BOUNDARIES)        # stable: models of two experts come first
    preset = presets[0] if presets else f"{config.model_type} of width {config.dim}, {config.num_layers} blocks"
    if name not in ("auto", preset):
        if expert and preset in BOUNDARIES:
            raise ValueError(f"{flags}: by its name this is an expert of {preset}; leave out --model, or rename it")
        preset = name
    return config, preset, expert if preset in BOUNDARIES else ""


def check_timesteps(preset, expert, min_timestep, max_timestep, path):
    """
    ValueError unless the expert at path trains at the timesteps (after the shift) at which it samples: "high" from
    the boundary up, "low" below it, "" on either side, but not both. Models without experts are trained anywhere.
    """
    if preset not in BOUNDARIES:
        return
    above, below = (BOUNDARIES[preset], 1000), (0, BOUNDARIES[preset])
    ranges = {"high": [above], "low": [below], "": [above, below]}[expert]
    if not any(first <= min_timestep and max_timestep <= last for first, last in ranges):
        expected = " or ".join(f"{first:g} to {last:g}" for first, last in ranges)
        raise ValueError(f"--min_timestep {min_timestep:g} --max_timestep {max_timestep:g}: --init {path} is one of "
                         f"the two experts of {preset} and samples only at timesteps {expected}, after the shift; "
                         "train it there")


def refuse_lone_expert(preset, path, flag="--init"):
    """ValueError if a model of this preset (see find_model) is one expert of two: sampling and roll-outs need both."""
    if preset in BOUNDARIES:
        raise ValueError(f"{flag}: one expert of {preset} cannot sample alone, and {path} is one; "
                         "run sample.py on a folder that holds both, as high_noise_model/ and low_noise_model/")


def find_experts(path):
    """
    The paths that --init samples with: (model, None), or (high-noise expert, low-noise expert). ValueError for one
    expert alone.
    """
    path = Path(path)
    name, parent = path.absolute().name, path.absolute().parent
    for high, low in EXPERTS:
        if name in (high, low) and (parent / low).is_dir():
            raise ValueError(f"--init {path}: one of two experts, which sample together; give {parent}")
    if two_experts(path):
        return two_experts(path)
    _, preset, _ = find_model(path)
    refuse_lone_expert(preset, path)
    return path, None


# ------------------------------------------------------------------------------------------------------------------
# the command line, which does what export.py does

def check_out(source, out, format):
    """ValueError if writing to out would overwrite anything, or would add files to the source or to a run's folder."""
    if format in ("comfyui", *LORA_FORMATS) and out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: {format} is a single file; give it a name that ends in .safetensors")
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} exists, and nothing is overwritten; name a new file or folder")
    for folder in out.resolve().parents:
        if folder == source.resolve():
            raise ValueError(f"--out {out} is inside the source, {source}; name a file or folder outside of it")
        if (folder / "log.jsonl").exists() and (folder / "config.json").exists():
            raise ValueError(f"--out {out} is inside {folder}, a run's own folder; name a file or folder outside of it")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the description as it stands, and the default of each flag."""


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    p.add_argument("source", metavar="SOURCE", help="step folder of a run, export, any public checkpoint, or LoRA file")
    p.add_argument("--out", required=True, default=argparse.SUPPRESS,
                   help="a new folder, or for comfyui and lora* a new .safetensors file")
    p.add_argument("--format", default="original", choices=[*FORMATS, *LORA_FORMATS],
                   help="names and files that are written; adapters: lora* or, merged, any of the others")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="number type of every tensor")
    p.add_argument("--base", default="", help="weights that SOURCE was trained from: adapters are merged into them, "
                   "and they tell how much of the training bfloat16 keeps; if empty, the --init of the run")
    p.add_argument("--weights", default="auto", choices=["auto", "ema", "policy"],
                   help="which weights of a step folder: the average (ema) or the policy; auto: the average, if kept")
    return p.parse_args(argv)


def main(args):
    from export import export_weights, holds_adapters
    source, out = Path(locate_weights(args.source, "SOURCE")), Path(args.out)
    check_out(source, out, args.format)
    if args.base and args.dtype == "float32" and not holds_adapters(source):
        raise ValueError(f"--base {args.base} is for what --dtype bfloat16 loses; float32 loses nothing")
    base = locate_weights(args.base, "--base") if args.base else ""
    export_weights(source, out, args.format, getattr(torch, args.dtype), args.weights, base)


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"weights.py: {error}")
