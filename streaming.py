"""
Models for sampling: with adapters, and where a GPU is too small for one, with blocks that stay in CPU memory.
"""
from functools import cache, partial

import torch

from lora_files import attach
from weights import load_wan


def load_models(high, low, args):
    """
    Return the model (or high-noise expert) at path `high` on args.device, and the function, or None, that loads the
    other expert there. Each has the adapters of its LoraFiles, args.lora and args.low_lora.
    """
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32

    def load(path, files):
        model = load_wan(path, dtype=dtype, device=args.device)
        attach(model, [(file.adapters, file.strength) for file in files])
        return model.eval().requires_grad_(False)
    return load(high, args.lora), cache(partial(load, low, args.low_lora)) if low else None
