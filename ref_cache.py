"""
The reference's errors, scored once before training and kept in out/ref_errors_KEY.safetensors, for --ref cached.

An error depends on its position, the weights, the data, and the numerical path in the last bits. Everything but the
position forms the key; errors with another key go to another file, so nothing scored is overwritten.
"""
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from samples import seed_of, write_whole
from fsdp_utils import matrix_dtype, positions_of

DECIDE_ERRORS = ("init", "init_lora", "data", "seed", "timestep_sampling", "flow_shift", "min_timestep", "max_timestep")


def numerical_path(args, memory, ranks):
    """{name: value} of everything that decides the last bits of an error."""
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
    return {"device": device, "torch": torch.__version__, "matrices": str(matrix_dtype(ranks.device.type)),
            "backward": args.backward, "pairs_per_forward": args.batch_size // (ranks.data_ranks * args.grad_accum),
            "cp_size": args.cp_size, "chunk_size": memory.chunk_size, "compile": args.compile}


class RefErrors:
    """
    The errors of the frozen reference at all positions of a run. fixed: run_folder.run_settings; memory: MemoryFlags.

    is_complete: nothing is left to score, so no reference has to be built.
    """

    def __init__(self, args, fixed, memory, ranks):
        self.args, self.ranks = args, ranks
        self.key = {name: fixed[name] for name in DECIDE_ERRORS} | numerical_path(args, memory, ranks)
        # of two experts a position's own, and with it the position's sigma, depends on this; of one model it is 0
        self.key["positions_per_turn"] = args.switch_every * args.batch_size
        self.path = errors_file(args.out, self.key)
        self.errors = open_errors(self.path, self.key, args.steps * args.batch_size)
        self.is_complete = not self.errors.isnan().any()

    def at(self, positions):
        """Errors (2, B) at a range of positions."""
        return self.errors[positions.start:positions.stop].T.to(self.ranks.device)

    def fill(self, errors_at, steps):
        """
        Score the positions of these steps that are missing. errors_at(range of positions) -> (2, B). All ranks call it.
        """
        score_reference(self.path, self.key, self.errors, steps, self.args.batch_size, errors_at,
                        lambda step: positions_of(self.args, self.ranks, step), self.ranks)


def errors_file(out, key):
    """The file under `out` for errors scored with this key."""
    return Path(out) / f"ref_errors_{seed_of(sorted(key.items())):016x}.safetensors"


def open_errors(path, key, positions):
    """
    The reference's errors scored so far: (positions or more, 2) float32, win and lose, NaN where a position is not
    scored yet. All ranks read the file. ValueError if the file was scored with another key, or holds something else.
    """
    errors = torch.full((positions, 2), float("nan"))
    if not Path(path).exists():
        return errors
    try:
        with safe_open(path, "pt") as file:
            stored_key, stored = json.loads(file.metadata()["key"]), file.get_tensor("errors")
        if stored.shape[1:] != (2,) or stored.dtype != torch.float32 or not isinstance(stored_key, dict):
            raise ValueError(f"errors {tuple(stored.shape)} {stored.dtype}")
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the errors of a reference, (positions, 2) float32 with their key ({error}); "
                         "delete it to score them again") from error
    for name, value in key.items():
        if stored_key.get(name) != value:
            raise ValueError(f"{path}: the reference's errors in it were scored with {name} = {stored_key.get(name)}, "
                             f"this run has {name} = {value}; use the same, another --out, or delete that file to "
                             "score them again")
    return torch.cat([stored, errors[len(stored):]])


@torch.no_grad()
def score_reference(path, key, errors, steps, batch_size, score, positions, ranks, every=30.0):
    """
    Score the missing positions of these steps and fill them into errors (of open_errors), on every rank alike.

    score(range of positions) -> (2, B). positions(step) -> the ranges of this rank, as in training, so that each
    error is bit for bit that of training. The file at path is written every `every` seconds and at the end, and a run
    that is killed continues from it.
    """
    def write():
        write_whole(path, save({"errors": errors}, metadata={"key": json.dumps(key)}))

    dist.barrier()                                         # everyone has read the file
    written = time.monotonic()
    ranks_a_pair = ranks.world // ranks.data_ranks         # they share their pairs: the first of them speaks
    speaks = ranks.rank % ranks_a_pair == 0
    missing = [step for step in steps if errors[step * batch_size:(step + 1) * batch_size].isnan().any()]
    if ranks.rank == 0:
        scored = len(errors) - int(errors.isnan().any(1).sum())
        print(f"reference errors: {scored} of {len(errors)} positions are in {path}; {len(missing) * batch_size} are "
              "scored now", flush=True)
    for step in tqdm(missing, desc="reference errors", unit="step", disable=ranks.rank != 0 or not missing):
        begin, end = step * batch_size, (step + 1) * batch_size
        of_step = torch.zeros(batch_size, 2)
        for part in positions(step):
            part_errors = score(part).T.cpu()
            of_step[part.start - begin:part.stop - begin] = part_errors if speaks else 0
        of_step = of_step.to(ranks.device)
        dist.all_reduce(of_step)                           # every position has one speaker: the sum is its number
        errors[begin:end] = of_step.cpu()
        if ranks.rank == 0 and time.monotonic() - written > every:
            write()
            written = time.monotonic()
    if missing and ranks.rank == 0:
        write()
    dist.barrier()
