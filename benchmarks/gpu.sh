#!/usr/bin/env bash
# What to measure when a GPU of 80 GB is at hand, in this order: benchmarks/gpu.sh, or one part of it: benchmarks/gpu.sh pairs
# The tables go to benchmarks/gpu_PART.md, with command, commit, versions and hardware in their first lines.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
full="--checkpointing full --backward sequential"

block() {       # one forward and backward of 1.3B at 7,800 and 32,760 tokens, beside diffusers and DiffSynth where they are installed
    $python benchmarks/block.py
}
pairs() {       # a Reg-DPO step of 1.3B, 81 frames of 480 x 832: seconds, memory beside the plan's, TFLOP/s, MFU against the measured bf16 matrix peak
    $python bench.py --model wan2.1-t2v-1.3b --checkpointing selective + --checkpointing full + --checkpointing selective --backward sequential + $full \
        + $full --compile + $full --ref offload + $full --ref cached + $full --ref cached --chunk_tokens 8192 + $full --ref cached --offload_activations \
        + $full --ref cached --chunk_tokens 8192 --offload_activations + $full --ref cached --chunk_tokens 8192 --offload_activations --offload_params
}
capacity() {    # the longest videos of benchmarks/ladder.md for one GPU, and 2 % more: the first must run and hold what the plan says
    grep -A 20 '1 GPU' benchmarks/ladder.md | tr -d , | while IFS='|' read -r _ name tokens _ _ _ _ _ _ _ _ flags _; do
        if [[ $flags == *--* ]]; then
            echo "##$name"
            for tokens in $tokens $((tokens + tokens / 50)); do $python bench.py --model wan2.1-t2v-1.3b --tokens "$tokens" $flags; done
        fi
    done
}
world() {       # the main job: the same first losses on the CPU and on the GPU
    CUDA_VISIBLE_DEVICES= $python train.py --steps 3 --eval_clips 0 --log_every 1 --out out/first_cpu
    $python train.py --steps 3 --eval_clips 0 --log_every 1 --out out/first_gpu
}
for part in "${@:-block pairs capacity world}"; do
    for name in $part; do
        "$name" | tee "benchmarks/gpu_$name.md"
    done
done
