"""
Opens a run's step folder, which need not be trusted, on many ranks or in one process. A checkpoint may come from
anyone, and torch keeps its index, and whatever in it is not a tensor, as pickles: Reader and Planner refuse what could
call code.
"""
import json
import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from model import WanConfig

# stored_weights reads without a process group on purpose
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Index(pickle.Unpickler):
    """The index of a checkpoint, which torch writes as a pickle: it may be made of these classes and nothing else."""
    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "StorageMeta", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata",
            "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64", "bfloat16"}, "collections": {"OrderedDict"},
        "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"}}

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index of a checkpoint needs")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint that may come from anyone: an index of the classes above, and no file outside the folder."""
    def __init__(self, folder):
        super().__init__(folder)
        try:
            with open(Path(folder) / ".metadata", "rb") as file:
                self.index = Index(file).load()
            files = {info.relative_path for info in self.index.storage_data.values()}
        except Exception as error:                                       # a hostile or damaged pickle can end in any
            raise ValueError(f"{folder}/.metadata is not the index of a checkpoint ({error}); "
                             "name another step folder") from error
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise ValueError(f"{folder}/.metadata names {outside[0]!r}; a checkpoint has its files in its own folder")

    def read_metadata(self, *args, **kwargs):
        return self.index


class Planner(DefaultLoadPlanner):
    """Refuses pickled values (AdamW's flags) that weights_only=True does not read; torch reads them without that."""
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
        raise ValueError(f"{folder}: the run kept no average (--ema_decay 0); take its policy")
    part = "ema." if has_average and which != "policy" else "model."
    stored = {name.removeprefix(part): tensor for name, tensor in entries.items() if name.startswith(part)}
    tensors = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
               for name, tensor in stored.items()}

    def read(name):
        state = {part + name: torch.empty_like(tensors[name], device="cpu")}
        dcp.load(state, storage_reader=reader, planner=Planner(), no_dist=True)
        return state[part + name]

    return tensors, read


def step_folder_of(folder):
    """
    The step folder of a path, which may also be a folder in it that holds one of two experts, such as high_noise_model.
    """
    folder = Path(folder).absolute()
    is_expert = not (folder / "meta.json").exists() and (folder.parent / "meta.json").exists()
    return folder.parent if is_expert else folder


def read_meta(folder):
    """The settings that a run recorded in a step folder (see step_folder_of): {name: value}."""
    return json.loads((step_folder_of(folder) / "meta.json").read_text(encoding="utf-8"))


def stored_config(folder):
    """The WanConfig of the model in a step folder. ValueError if the folder is not whole, or from another version."""
    file = step_folder_of(folder) / "meta.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no whole checkpoint (meta.json is missing); name another step folder")
    try:
        settings = read_meta(folder)["config"]
        return WanConfig(**settings | {"patch_size": tuple(settings["patch_size"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: its config is not that of a model here ({error}); "
                         "export it with the version of this code that trained it") from error
