import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""   # float32 on CPUs: four ranks on one GPU cannot be, and "bit for bit" is a promise of CPUs only
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)   # tiny tensors are far slower with more threads
