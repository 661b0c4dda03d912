"""
Pairs in which the model's own clips win, for the experiment `data` of run.py.

    python experiments/own_pairs.py best_worst data/best_worst      # best against worst of four own ones by drift
    python experiments/own_pairs.py better_model data/better_model  # a better model's clips against own

best_worst is what a reward model gives, where the reward is exact. The better model is the base itself at guidance 2,
whose drift is 1.14 instead of 1.60. Both take the captions of the 512 GT-Pairs, and write FOLDER/pairs.jsonl.
"""
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy
from evaluate import make_real
from samples import read_sample, sample_files


def run(*command):
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def score_by_drift(files, folder):
    """Write folder/scores.jsonl: minus the drift of each sample, as data.py takes it."""
    lines = []
    for begin in range(0, len(files), 256):
        some = files[begin:begin + 256]
        samples = [read_sample(file) for file in some]
        videos = toy.decode_pixels(torch.stack([sample["latents"] for sample in samples]))
        drifts = toy.metrics(videos, [sample["metadata"]["prompt"] for sample in samples])["drift"]
        for file, drift in zip(some, drifts.tolist()):
            lines.append(json.dumps({"sample": str(file.relative_to(folder)), "score": -drift}) + "\n")
    (folder / "scores.jsonl").write_text("".join(lines))


def make_best_worst(folder):
    """Of four own clips of each caption, the one that drifts least wins over the one that drifts most."""
    run("sample.py", "--pairs", folder, "--per_sample", "4")
    files = [file for negatives in sorted(folder.glob("negatives*")) for file in sample_files(negatives)]
    score_by_drift(files, folder)
    run("data.py", "--scores", folder / "scores.jsonl", "--out", folder / "pairs.jsonl")


def make_better_model(folder):
    """The base's clip at guidance 2 wins over its clip without guidance."""
    run("sample.py", "--pairs", folder)
    run("sample.py", "--pairs", folder, "--guidance", "2", "--name", "negatives_guided")
    lines = []
    for file in sample_files(folder / "negatives"):
        prompt = read_sample(file)["metadata"]["prompt"]
        row = {"win": f"negatives_guided/{file.name}", "lose": f"negatives/{file.name}", "prompt": prompt}
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))


MAKERS = {"best_worst": make_best_worst, "better_model": make_better_model}


def main(argv):
    if len(argv) != 2 or argv[0] not in MAKERS:
        sys.exit(f"own_pairs.py {' '.join(argv)}: expected one of {', '.join(MAKERS)} and a folder")
    torch.set_num_threads(1)
    folder = Path(argv[1]).resolve()
    if not (folder / "pairs.jsonl").exists():
        make_real(folder, 512)
        MAKERS[argv[0]](folder)


if __name__ == "__main__":
    main(sys.argv[1:])
