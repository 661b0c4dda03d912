import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""   # float32 on CPUs: four ranks on one GPU cannot be, and "bit for bit" is a promise of CPUs only
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
torch.set_num_threads(1)   # tiny tensors are far slower with more threads


def write_video(path, video, fps, upscale=1):
    """An mp4 file of video (3, F, H, W) in [-1, 1]."""
    from data import write_whole
    from pictures import mp4
    write_whole(path, mp4(video, fps, upscale))


def write_png(path, image):
    """A PNG file of image (H, W, 3) uint8."""
    from data import write_whole
    from pictures import png
    write_whole(path, png(image))
