"""
Models for sampling: with adapters, and where a GPU is too small for one, with blocks that stay in CPU memory.
"""
from functools import cache, partial

import torch
from torch.func import functional_call

from lora_files import attach
from memory import pin
from weights import load_wan

ALIGNMENT = 256    # bytes between weights in a buffer: matrix products choose a kernel by it


class Stream:
    """
    Keeps frozen blocks, which run one after another, in CPU memory and computes them on `device`. A block's weights are
    copied there in one piece before it runs, on GPUs while the block before it computes, and forgotten after it.
    Nothing is ever copied back. The device holds the weights of two blocks at most.
    """
    def __init__(self, blocks, device):
        self.blocks = list(blocks)
        self.device = torch.device(device)
        self.copies = torch.cuda.Stream(device) if self.device.type == "cuda" else None
        self.buffers = [self.pack(block) for block in blocks]
        self.fetched = {}                                  # number of a block: {name: weight on the device}

    def pack(self, block):
        """Move a block's weights into one buffer of CPU memory, page-locked for GPUs. Returns the buffer."""
        sizes = [-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in block.parameters()]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        if self.copies is not None:
            pin(buffer)
        for p, part in zip(block.parameters(), buffer.split(sizes)):
            p.data = part[:p.nbytes].view(p.dtype).view(p.shape).copy_(p)
        return buffer

    def fetch(self, number):
        """Begin to copy a block's weights to the device, after all work queued there so far: {name: weight}."""
        buffer = self.buffers[number]
        on_device = torch.empty_like(buffer, device=self.device)
        if self.copies is None:
            on_device.copy_(buffer)
        else:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copies):
                on_device.copy_(buffer, non_blocking=True)
        weights = {}
        for name, p in self.blocks[number].named_parameters():
            start = p.data_ptr() - buffer.data_ptr()
            weights[name] = on_device[start:start + p.nbytes].view(p.dtype).view(p.shape)
        return weights

    def run(self, number, *inputs, **options):
        """The output of block `number` for these inputs, which are on the device."""
        weights = self.fetched.pop(number, None) or self.fetch(number)
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        if number + 1 < len(self.blocks):
            self.fetched[number + 1] = self.fetch(number + 1)
        return functional_call(self.blocks[number], weights, inputs, options)


def stream_blocks(model, name, device):
    """
    Compute a frozen model on `device` with a Stream of the blocks in its list model.NAME, in place. From here on the
    list holds functions, so that model.to(device) moves everything but the blocks.
    """
    stream = Stream(getattr(model, name), device)
    delattr(model, name)
    setattr(model, name, [partial(stream.run, number) for number in range(len(stream.blocks))])
    model.to(device)


def load_models(high, low, args):
    """
    Return the model (or high-noise expert) at path `high` on args.device, and the function, or None, that loads the
    other expert there. Each has the adapters of its LoraFiles, args.lora and args.low_lora. With args.offload_params
    their blocks stay in CPU memory: see Stream.
    """
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32

    def load(path, files):
        model = load_wan(path, dtype=dtype, device="cpu" if args.offload_params else args.device)
        attach(model, [(file.adapters, file.strength) for file in files])
        model.eval().requires_grad_(False)
        if args.offload_params:
            stream_blocks(model, "blocks", args.device)
        return model
    return load(high, args.lora), cache(partial(load, low, args.low_lora)) if low else None
