"""
Adapters on one card: the fastest flags with which a Reg-DPO step at a model's usual clip fits, for cards of 12 to 80
GB. Needs no GPU.

    python benchmarks/cards.py            # rewrites the table "cards" of docs/MEMORY.md; 15 minutes of one core

dry_run.py counts every figure on the real step: adapters of rank 32 in all layers, their average, one pair at a time.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import bench
from dry_run import extrapolate
from model import CONFIGS

PAGE = ROOT / "docs" / "MEMORY.md"
MODELS = {"1.3B": "wan2.1-t2v-1.3b", "TI2V-5B": "wan2.2-ti2v-5b", "14B or one A14B expert": "wan2.1-t2v-14b"}
assert CONFIGS["wan2.2-t2v-a14b"] == CONFIGS["wan2.1-t2v-14b"], "an expert needs rows of its own"
CARDS = (12, 16, 24, 32, 48, 80)
# GB of a card that are left free. One card needs no NCCL, and a card of 24 GB has 24 GiB, which are 25.8 of our GB.
MARGIN = 2
# GB of CPU memory of machines with 64 and 128 GB, less 4 for the process and the system
HOST_MEMORY = (60, 124)
DEFAULTS = ("--checkpointing off", "--backward joint")
COLUMNS = ("model and clip", "card", "the fastest flags that fit", "GB of the card", "CPU GB", "time / needed",
           "longest clip that fits so")


def guess_of(plan, args):
    """Estimate how many latent frames fit, from a plan for args.shape: activations and work grow with the frames."""
    grows = sum(plan.parts.get(name, 0) for name in ("activations", "working", "inputs"))
    return int(args.shape[1] * (args.budget - plan.peak + grows) / grows)


def row_of(name, preset, gpu_memory):
    """Return a row {column: text} of the table."""
    for host_memory in HOST_MEMORY:
        words = f"--plan --model {preset} --gpu_memory {gpu_memory} --margin {MARGIN} --host_memory {host_memory}"
        args, _ = bench.parse_args(words.split())

        def load(plan):
            return max(plan.peak / args.budget, plan.host / args.host_budget)
        choices = [("--lora_rank", "32", *flags) for flags in bench.lora_choices(ranks=1)]
        flags = bench.first_that_fits(choices, args.config, args.shape, 1, args.budget, args.host_budget)
        plan = extrapolate(flags, args.config, args.shape, 1)
        if load(plan) <= 1:
            break
    clip, _, _ = args.describe(args.shape).partition(" = ")
    shown = " ".join(flags)
    for default in DEFAULTS:
        shown = shown.replace(f" {default}", "")
    row = {"model and clip": f"{name}, {clip}", "card": f"{gpu_memory} GB"}
    size = {"GB of the card": f"{plan.peak / 1e9:.1f}", "CPU GB": f"{plan.host / 1e9:.0f}"}
    if load(plan) > 1:
        return row | size | {"the fastest flags that fit": f"none; the least has `{shown}`"}
    seconds, needed_seconds = bench.estimate(plan, flags, args.config, args.tokens, 1)
    most = bench.longest(lambda n: load(extrapolate(flags, args.config, args.at(n), 1)), guess_of(plan, args))
    frames, _, tokens = args.describe(args.at(most)).partition(" = ")
    return row | size | {
        "the fastest flags that fit": f"`{shown}`", "time / needed": f"{seconds / needed_seconds:.2f}",
        "longest clip that fits so": f"{frames.split(' of ')[0]}, {tokens.removesuffix(' a video')}"}


def write_table(page, name, text):
    """Put a table between its <!-- table: NAME --> and the <!-- end --> that follows, in the text of a page."""
    before, begin, after = page.partition(f"<!-- table: {name} -->\n")
    assert begin, f"docs/MEMORY.md has no place for the table {name}"
    return before + begin + text + "\n" + after[after.index("<!-- end -->"):]


def main():
    rows = []
    for name, preset in MODELS.items():
        for gpu_memory in CARDS:
            rows.append(row_of(name, preset, gpu_memory))
            print(bench.table_line(rows[-1], COLUMNS), flush=True)
    PAGE.write_text(write_table(PAGE.read_text(), "cards", bench.table(rows, COLUMNS)))


if __name__ == "__main__":
    main()
