"""
Wan weights on disk.
"""
import json
import os
import pickle
import re
import struct
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from model import CONFIGS, WanConfig, WanModel

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")    # stored_weights asks for just that

WEIGHTS = "diffusion_pytorch_model"
COMFYUI_PREFIX = "model.diffusion_model."
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

DIFFUSERS_NAMES = {                   # original -> diffusers; only names differ, never a shape or an order
    "patch_embedding": "patch_embedding", "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1", "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1", "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1", "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out", "head.modulation": "scale_shift_table", "blocks.*.modulation": "blocks.*.scale_shift_table",
    "blocks.*.norm3": "blocks.*.norm2",              # the only LayerNorm with weights: third in the original's list, second in the block
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj", "blocks.*.ffn.2": "blocks.*.ffn.net.2",
}
for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for layer, name in dict(q="to_q", k="to_k", v="to_v", o="to_out.0", norm_q="norm_q", norm_k="norm_k",
                            k_img="add_k_proj", v_img="add_v_proj", norm_k_img="norm_added_k").items():
        DIFFUSERS_NAMES[f"blocks.*.{ours}.{layer}"] = f"blocks.*.{theirs}.{name}"
ORIGINAL_NAMES = {theirs: ours for ours, theirs in DIFFUSERS_NAMES.items()}
DIFFUSERS_FIELDS = {                  # WanConfig -> diffusers' config.json
    "num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels", "image_pos_len": "pos_embed_seq_len",
    **{name: name for name in ("ffn_dim", "num_layers", "text_dim", "text_len", "freq_dim", "patch_size", "eps")}}


def rename(name, table):
    """blocks.3.ffn.0.weight -> what the table has for blocks.*.ffn.0; a name that is not in the table stays as it is."""
    block, stem, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name).groups("")
    new = table.get("blocks.*." + stem if block else stem)
    return name if new is None else new.replace("blocks.*.", block) + leaf


def expected_shapes(config):
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanModel(config).state_dict().items()}


def check_shapes(shapes, config, where):
    """shapes {our name: shape} must be exactly those of config; `where(name)` says which file a name is in."""
    expected = expected_shapes(config)
    if wrong := [name for name in expected | shapes if shapes.get(name) != expected.get(name)]:
        preset = next((preset for preset, known in CONFIGS.items() if known == config), config)
        raise ValueError(f"{where(wrong[0])}: tensor {wrong[0]} is {shapes.get(wrong[0], 'missing')}, expected "
                         f"{expected.get(wrong[0], 'no such tensor')} in {preset}; {len(wrong)} tensors of {len(expected)} differ")


def open_safetensors(file):
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from error


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def find_weights(path):
    """A file, or a folder (or its transformer/) with one file or with shards and their index -> {tensor name in the file: file}."""
    path = Path(path)
    if path.is_file():
        return dict.fromkeys(open_safetensors(path).keys(), path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    for high, low in (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")):
        if (path / low).is_dir():
            raise ValueError(f"{path} holds two experts: give {path / high} (high noise) or {path / low} (low noise)")
    if (path / "transformer").is_dir():
        path = path / "transformer"

    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not indices:
        return dict.fromkeys(open_safetensors(files[0]).keys(), files[0])
    if len(indices) != 1:
        raise ValueError(f"{path}: expected one .safetensors file, or shards with one .safetensors.index.json; found {len(files)} and "
                         f"{len(indices)} (pickled weights, .pth or .bin, are not read)")
    weight_map = read_json(indices[0]).get("weight_map")
    if not weight_map:
        raise ValueError(f"{indices[0]}: no weight_map, so not the index of a safetensors checkpoint")
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise ValueError(f"{indices[0]} names {shard}, which is not there: the copy or download is not complete")
        if absent := {name for name in weight_map if weight_map[name] == shard} - set(open_safetensors(path / shard).keys()):
            raise ValueError(f"{path / shard}: no tensor {min(absent)}, though {indices[0].name} says so")
    return {name: path / shard for name, shard in weight_map.items()}


def read_settings(file):
    """What config.json beside the weights, or the header of a single file by save_wan, says -> {field of WanConfig or model_type: value}, source."""
    header = open_safetensors(file).metadata() or {}
    source = file.parent / "config.json"
    if "wan_config" in header:
        found, source = json.loads(header["wan_config"]), file
    else:
        found = read_json(source) if source.is_file() else {}
        if found.get("_class_name") not in ("WanModel", "WanTransformer3DModel"):
            return {}, file                                              # single files lie among other models' files
    if "num_attention_heads" in found:                                   # diffusers' words
        found["dim"] = found["num_attention_heads"] * found["attention_head_dim"]
        found |= {ours: found[theirs] for ours, theirs in DIFFUSERS_FIELDS.items() if theirs in found}
    if "patch_size" in found:
        found["patch_size"] = tuple(found["patch_size"])
    return {name: found[name] for name in ("model_type", *WanConfig.__dataclass_fields__) if name in found}, source


def open_wan(path, config=None):
    """
    Find the weights at `path` without reading them: an original or diffusers folder (whole or sharded), the parent of a diffusers
    transformer/, or a single file with either names, with or without ComfyUI's prefix.
    Returns config, {our parameter name: lazy slice}; a slice has get_shape(), and [a:b] reads only these rows. The variant comes from
    config.json and the tensors; ValueError where they differ from each other or from `config`, and where a tensor is missing, left over or
    of another shape. A single file has no config.json: its variant is `config`, or else the preset that has exactly its tensors.
    """
    files = find_weights(path)
    handles = {file: open_safetensors(file) for file in set(files.values())}
    diffusers = any(name.startswith("condition_embedder.") for name in files)
    tensors, where = {}, {}                                              # by our names
    for name, file in files.items():
        tensor = handles[file].get_slice(name)
        if tensor.get_dtype() not in SAFETENSORS_DTYPES.values() or re.search("scale_weight|scale_input|weight_scale", name):
            raise ValueError(f"{file}: {name} is {tensor.get_dtype()}: 8-bit and scaled files are for inference, their scales are not "
                             "applied here and their steps are too coarse to train from; use the bf16, fp16 or fp32 file")
        ours = rename(name, ORIGINAL_NAMES) if diffusers else name.removeprefix(COMFYUI_PREFIX)
        if not ours.endswith("attn2.norm_added_q.weight"):               # in some old diffusers files; no code uses it
            tensors[ours], where[ours] = tensor, file
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}

    settings, source = read_settings(next(iter(handles)))
    model_type = settings.pop("model_type", None)
    if settings:
        image = {"image_dim": shapes.get("img_emb.proj.0.weight", (0,))[0], "image_pos_len": shapes.get("img_emb.emb_pos", (1, 0))[1]}
        for name, size in image.items():                                 # not in an original config.json: Wan2.1 and 2.2 i2v have the same one
            if (settings.get(name, size) or 0) != size:
                raise ValueError(f"{source}: {name} is {settings[name]}, but the tensors beside it have an image branch of {size}")
        settings |= image
        if unsaid := {"dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim"} - settings.keys():
            raise ValueError(f"{source}: no {', '.join(sorted(unsaid))}; not the config.json of a Wan video model")
        found = WanConfig(**settings)
    else:
        found = config or next((preset for preset in CONFIGS.values() if expected_shapes(preset) == shapes), None)
        if found is None:
            raise ValueError(f"{path}: no config.json of a Wan model, and the {len(shapes)} tensors ({', '.join(sorted(shapes)[:3])}, ...) are "
                             f"not those of {', '.join(CONFIGS)}")
    if config not in (None, found):
        field = next(field for field, value in vars(config).items() if value != getattr(found, field))
        raise ValueError(f"{source}: {field} is {getattr(found, field)}, expected {getattr(config, field)} in the model asked for")
    check_shapes(shapes, found, lambda name: where.get(name, path))
    if model_type not in (None, found.model_type):
        raise ValueError(f"{source}: model_type is {model_type}, but the tensors beside it are those of {found.model_type}")
    return found, tensors


def load_wan(path, config=None, dtype=torch.float32):
    """A WanModel with the weights at `path` (see open_wan), all of them as `dtype`, on the CPU."""
    config, tensors = open_wan(path, config)
    with torch.device("meta"):
        model = WanModel(config)
    model.load_state_dict({name: tensor[:].to(dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    return model


def public_config(config, format):
    """-> config.json as the official or the diffusers class reads it."""
    if format == "original":                                             # knows the image branch by model_type
        settings = {"_class_name": "WanModel", "model_type": config.model_type} | asdict(config)
        del settings["image_dim"], settings["image_pos_len"]
        return settings if config.scores else {name: value for name, value in settings.items() if name != "scores"}
    settings = {"_class_name": "WanTransformer3DModel"} | {theirs: getattr(config, ours) for ours, theirs in DIFFUSERS_FIELDS.items()}
    if config.text_len == 512:
        del settings["text_len"]                                         # diffusers does not know it and warns
    return settings | {
        "attention_head_dim": config.dim // config.num_heads, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024, "image_dim": config.image_dim or None, "added_kv_proj_dim": config.dim if config.image_dim else None,
        "pos_embed_seq_len": config.image_pos_len or None}


def write_tensors(file, tensors, read, rename, metadata):
    """A .safetensors file of tensors {our name: meta tensor}; read(name) gives the values, one tensor at a time, so that no more is held."""
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[rename(name)] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)                                  # the numbers start at a multiple of 8
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name, tensor in tensors.items():
            out.write(read(name).detach().to("cpu", tensor.dtype).contiguous().flatten().view(torch.uint8).numpy())


def save_wan(model, path, format="original", config=None, dtype=None, max_shard_bytes=10 * 2**30, read=None):
    """
    Write the weights of `model`, a WanModel or a state dict with its `config`, as the public formats have them:

        original, diffusers   folder `path` with config.json and one file, or shards of at most max_shard_bytes and their index
        comfyui               single file `path`

    dtype None keeps each tensor's. read: a function of a name that fetches a tensor; with it `model` may be on the meta device, and larger than
    memory. Weights that stand at `path` already are replaced, other files there are left alone. Everything is written under temporary names
    before the first file is replaced.
    """
    path, config, state = Path(path), config or model.config, model.state_dict() if isinstance(model, nn.Module) else model
    renamed = {"original": lambda name: name, "comfyui": lambda name: COMFYUI_PREFIX + name, "diffusers": lambda name: rename(name, DIFFUSERS_NAMES)}
    if format not in renamed or config.scores and format == "diffusers":
        raise ValueError(f"format is {format!r}, expected one of {', '.join(renamed)} (diffusers has no preference model)")
    if path.is_dir() if format == "comfyui" else path.is_file() or path.suffix == ".safetensors":
        raise ValueError(f"{path}: {format} weights are a {'single file, and this is a folder' if format == 'comfyui' else 'folder, and this is a file'}")
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, config, lambda name: f"{path} (nothing was written)")

    tensors = {name: torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta") for name, tensor in state.items()}
    shards = [[]]                                                        # of our names
    for name in tensors:
        if shards[-1] and sum(tensors[other].nbytes for other in (*shards[-1], name)) > max_shard_bytes and format != "comfyui":
            shards.append([])
        shards[-1].append(name)

    texts, header = {}, {"format": "pt"}
    if format == "comfyui":
        files, old = [path], []
        header["wan_config"] = json.dumps(asdict(config))
    else:
        files, old = [path / f"{WEIGHTS}.safetensors"], list(path.glob(f"{WEIGHTS}*"))
        texts[path / "config.json"] = public_config(config, format)
    if len(shards) > 1:
        files = [path / f"{WEIGHTS}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {renamed[format](name): file.name for file, shard in zip(files, shards) for name in shard}
        texts[path / f"{WEIGHTS}.safetensors.index.json"] = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}

    files[0].parent.mkdir(parents=True, exist_ok=True)
    temporary = {file: file.with_name(file.name + ".tmp") for file in (*files, *texts)}
    for file, shard in zip(files, shards):
        aligned = sorted(shard, key=lambda name: -tensors[name].itemsize)
        write_tensors(temporary[file], {name: tensors[name] for name in aligned}, read or state.get, renamed[format], header)
    for file, text in texts.items():
        temporary[file].write_text(json.dumps(text, indent=2))
    for file in set(old) - set(temporary.values()):                      # shards of another number, what a killed run left
        file.unlink()
    for file in temporary:
        os.replace(temporary[file], file)

# ------------------------------------------------------------------------------------------------------------------
# which variant or expert

HERE = Path(__file__).resolve().parent
BOUNDARIES = {"wan2.2-t2v-a14b": 875.0, "wan2.2-i2v-a14b": 900.0}    # the high-noise expert samples from this timestep up
EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))    # high, low: original, diffusers


def locate_weights(path, flag="--init"):
    """The path as it is given, or else inside this repository (toy_base, from any folder), as text. ValueError if neither exists."""
    for candidate in (Path(path), HERE / path):
        if candidate.exists():
            return str(candidate)
    raise ValueError(f"{flag} {path}: no such file or folder; give a Wan checkpoint, as a folder or a .safetensors file")


def expert_of(path):
    """Which expert a folder or file is by its name: "high", "low", or "" where the name does not say."""
    path = Path(path).absolute()
    of_diffusers = (path.parent / "transformer_2").is_dir()
    if "high_noise" in path.name or path.name == "transformer" and of_diffusers:
        return "high"
    if "low_noise" in path.name or path.name == "transformer_2":
        return "low"
    return ""


def find_model(path, name="auto"):
    """
    Tell which model the weights at `path` are, from names and shapes. "scratch": preset `name` (auto: tiny), to be drawn.

    Returns config, preset name, expert. A model without a preset has a description for a name. expert is "high" or "low" for
    one of the two experts of an A14B model, and "" for other models and where the path does not say. An expert of T2V-A14B has
    the tensors of Wan2.1-T2V-14B, so there the path decides. ValueError, naming --model and --init, where the files are
    damaged, do not fit together, or are not those of preset `name`.
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
        presets.sort(key=lambda preset: preset not in BOUNDARIES)                # stable: models of two experts come first
    preset = presets[0] if presets else f"{config.model_type} of width {config.dim}, {config.num_layers} blocks"
    if name not in ("auto", preset):
        if expert and preset in BOUNDARIES:
            raise ValueError(f"{flags}: by its name this is an expert of {preset}; leave out --model, or rename the folder")
        preset = name
    return config, preset, expert if preset in BOUNDARIES else ""


def check_timesteps(preset, expert, min_timestep, max_timestep, path):
    """
    An expert of A14B is trained at the timesteps (after the shift) at which it samples, and no others: the high-noise expert at
    the boundary and above, the low-noise expert below. Where `expert` is "", either side will do, but not both. ValueError
    names the flags. Models without experts may be trained anywhere.
    """
    if preset not in BOUNDARIES:
        return
    boundary = BOUNDARIES[preset]
    ranges = {"high": [(boundary, 1000)], "low": [(0, boundary)], "": [(boundary, 1000), (0, boundary)]}[expert]
    if not any(first <= min_timestep and max_timestep <= last for first, last in ranges):
        expected = " or ".join(f"{first:g} to {last:g}" for first, last in ranges)
        raise ValueError(f"--min_timestep {min_timestep:g} --max_timestep {max_timestep:g}: --init {path} is one of the two experts of "
                         f"{preset} and samples only at timesteps {expected}, after the shift; train it there")


def refuse_lone_expert(preset, path, flag="--init"):
    """ValueError if weights of this preset (see find_model) are one expert of two: what samples, or rolls out, needs both."""
    if preset in BOUNDARIES:
        raise ValueError(f"{flag}: one expert of {preset} cannot sample alone, and {path} is one; run sample.py on a folder that "
                         "holds both, as high_noise_model/ and low_noise_model/")


def find_experts(path):
    """
    Weights to sample with, from --init: (model, None), or (high-noise expert, low-noise expert) of a folder that holds both.
    ValueError for one expert alone.
    """
    path = Path(path)
    for high, low in EXPERTS:
        whole = path.absolute()
        if whole.name in (high, low) and (whole.parent / low).is_dir():
            raise ValueError(f"--init {path}: one of two experts, which sample together; give {whole.parent}")
        if (path / low).is_dir():
            return path / high, path / low
    refuse_lone_expert(find_model(path)[1], path)
    return path, None


# ------------------------------------------------------------------------------------------------------------------
# a step folder

class Index(pickle.Unpickler):
    """The index of a checkpoint, which torch writes as a pickle: it may be made of these classes, and nothing in it is called but they."""
    ALLOWED = {"torch.distributed.checkpoint.metadata": {"Metadata", "StorageMeta", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
                                                         "TensorProperties", "_MEM_FORMAT_ENCODING"},
               "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "torch.serialization": {"_get_layout"}, "torch": {"Size", "float32", "float64", "bfloat16"},
               "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"}, "collections": {"OrderedDict"}}

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index of a checkpoint needs")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint that may come from anyone: the index as above, and no file outside the folder. It is read once."""
    def __init__(self, folder):
        super().__init__(folder)
        try:
            with open(Path(folder) / ".metadata", "rb") as file:
                self.index = Index(file).load()
            files = {info.relative_path for info in self.index.storage_data.values()}
        except Exception as error:                         # a hostile or damaged pickle can end in any of them
            raise ValueError(f"{folder}/.metadata is no index of a checkpoint ({error}); name another step folder") from error
        if strange := [file for file in files if Path(file).name != file]:
            raise ValueError(f"{folder}/.metadata names {strange[0]!r}; a checkpoint has its files in its own folder")

    def read_metadata(self, *args, **kwargs):
        return self.index


class Planner(DefaultLoadPlanner):
    """Numbers beside the tensors (AdamW's flags) are pickles that torch would read with weights_only=False: only what passes with True gets there."""
    def load_bytes(self, read_item, value):
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def stored_weights(folder, which="auto"):
    """
    Open the weights in a step folder, written on any number of ranks, in one process without a process group.

    which: "policy", "ema" (the average; ValueError where the run kept none), or "auto", the average where there is one.
    Returns {name: meta tensor}, read(name) -> the whole tensor, assembled from the shards when it is asked for.
    """
    reader = Reader(folder)
    entries = reader.index.state_dict_metadata
    has_average = any(name.startswith("ema.") for name in entries)
    if which == "ema" and not has_average:
        raise ValueError(f"{folder}: the run kept no average (--ema_decay 0); export its policy")
    part = "ema." if has_average and which != "policy" else "model."
    stored = {name.removeprefix(part): tensor for name, tensor in entries.items() if name.startswith(part)}

    def read(name):
        state = {part + name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)}
        dcp.load(state, storage_reader=reader, planner=Planner(), no_dist=True)
        return state[part + name]

    return {name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta") for name, tensor in stored.items()}, read


def find_checkpoint(out, resume, flag="--resume"):
    """
    The folder that --resume (or another flag) names: `latest` (of the run's folder out) or a step folder. ValueError if there is none says where it looked.
    """
    if resume == "latest":
        pointer = Path(out) / "latest"
        if not pointer.exists():
            raise ValueError(f"--resume latest: {pointer} does not exist; {out} has no checkpoint. Leave out --resume to start anew, or name a step folder")
        folder = Path(out) / pointer.read_text().strip()
    else:
        folder = Path(resume)
    if not (folder / "meta.json").exists():
        raise ValueError(f"{flag} {resume}: {folder} holds no whole checkpoint (meta.json is missing); name a folder like {out}/step_000500")
    return folder


def export_weights(checkpoint, path, format="original", dtype=torch.float32, which="auto"):
    """Write the weights in a step folder (which: see stored_weights) as public weights at `path`, one tensor at a time."""
    config = json.loads((checkpoint / "meta.json").read_text())["config"]
    config = WanConfig(**config | {"patch_size": tuple(config["patch_size"])})
    weights, read = stored_weights(checkpoint, which)
    save_wan(weights, path, format, config, dtype, read=read)
    print(f"weights in {path}")
