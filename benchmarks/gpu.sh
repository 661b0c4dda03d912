#!/usr/bin/env bash
# Does it run on a GPU, how fast, how much fits: benchmarks/gpu.sh OUT. Sized for one H200 and nine minutes.
#
#   benchmarks/gpu.sh OUT            all stages, what is worth most first; OUT/STAGE.md has the rows of each
#   benchmarks/gpu.sh OUT c d        these stages
#   benchmarks/gpu.sh --dry OUT      the same end to end on a CPU, with tiny shapes
#
# Every stage has a limit of its own and ends when the total is reached; rows are written as soon as they are known, so
# that a kill loses one stage. Needs the tree and python with requirements.txt; if there is a folder wheels/ with
# diffusers, it is used (pip install --no-deps --target). PYTHON names the python, TOTAL the seconds of all stages.
set -uo pipefail
dry=""
if [[ ${1:-} == --dry ]]; then
    dry=yes
    shift
fi
if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,10p' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} TOTAL=${TOTAL:-540} PYTHONUNBUFFERED=1
if [[ -n $dry ]]; then
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    model=tiny frames=8 size="16 16" clip="--frames 8 --size 16 16"
    adapted=tiny short=$clip
    timed="--warm_up 0 --timed 1 --with_plan" sampling_steps=2 toy="--toy_clips 16 --batch_size 4 --sample_steps 2"
    steps=2
else
    model=wan2.1-t2v-1.3b frames=81 size="480 832" clip="--frames 81 --size 480 832"
    adapted=wan2.1-t2v-14b short="--frames 33 --size 480 832"
    timed="--warm_up 1 --timed 2" sampling_steps=10 toy=""
    steps=20
fi
inputs=$out/inputs bench="$PYTHON benchmarks/bench.py" gpu="$PYTHON benchmarks/gpu.py"
if compgen -G "wheels/*.whl" > /dev/null; then
    $PYTHON -m pip install -q --no-deps --no-index --target "$out/packages" wheels/*.whl
    export PYTHONPATH=$out/packages${PYTHONPATH:+:$PYTHONPATH}
fi

has_lora() {    # helper of (d) and (f): does this tree have adapters?
    $PYTHON train.py --help | grep -q -- --lora_rank
}

a() {   # versions, card, what a matrix product, a copy and attention reach
    $gpu ceilings
}
b() {   # train.py on the GPU next to the same run on CPUs, then the margin of step 0 by attention kernel
    local run="$PYTHON train.py --loss regdpo --steps $steps --eval_clips 0 --probe_every 0 --log_every 1 $toy"
    CUDA_VISIBLE_DEVICES="" $run --out "$out/cpu" > "$out/cpu.txt" 2>&1 &
    local cpu=$!
    $gpu margins tiny
    if [[ -z $dry ]]; then $gpu margins $model; fi
    wait $cpu || tail -n 3 "$out/cpu.txt"                  # its clips are what the run on the GPU reads
    $run --out "$out/gpu" > "$out/gpu.txt" 2>&1 || tail -n 3 "$out/gpu.txt"
    echo
    $gpu rows "$out/cpu/log.jsonl" "$out/gpu/log.jsonl"
}
c() {   # forward and backward of 1.3B: ms, GiB, TFLOP/s and MFU by mode, compiled or not, next to diffusers
    $gpu blocks $((limit - 5))
}
d() {   # a Reg-DPO step of 1.3B: seconds, GiB next to the plan's, TFLOP/s, MFU
    local sequential="--backward sequential" selective="--checkpointing selective" full="--checkpointing full"
    local runs="$selective + $selective $sequential"
    if [[ -z $dry ]]; then
        runs+=" + $selective $sequential --ref cached + $full $sequential --ref offload"
        runs+=" + $full $sequential --offload_activations + --checkpointing chunked + $selective --compile"
    fi
    if has_lora; then runs+=" + $selective --lora_rank 16"; fi
    $bench --model $model $clip --weights "$inputs/weights" $timed $runs
}
e() {   # the longest clip of two rungs of ladder.md on a card of 80 GB: it must run and take what the plan says
    local rungs=("--checkpointing selective" "--checkpointing full --chunk_tokens 0") flags tokens
    if [[ -n $dry ]]; then rungs=("--checkpointing selective"); fi
    for flags in "${rungs[@]}"; do
        tokens=64
        if [[ -z $dry ]]; then
            tokens=$($bench --plan --model $model --tokens 32768 --ema_decay 0 $flags | grep "fits so" |
                     grep -o "[0-9,]* tokens" | tr -dc 0-9)
        fi
        $bench --model $model --tokens "$tokens" --within 80 --weights "$inputs/weights" $timed --warm_up 0 --timed 1 \
            $flags
    done
}
f() {   # adapters on 14B with the base in CPU memory: one step within 24 GB
    if ! has_lora; then
        echo "train.py has no --lora_rank"
        return
    fi
    $PYTHON -c "import sys; sys.path.insert(0, 'benchmarks'); import bench
bench.write_weights(bench.Path('$out/inputs_14b'), bench.CONFIGS['$adapted'])"
    $bench --model $adapted $short --within 24 --weights "$out/inputs_14b" $timed --warm_up 0 --timed 1 \
        --lora_rank 16 --offload_params --checkpointing full --backward sequential
}
g() {   # negatives of 1.3B: clips a minute
    $PYTHON sample.py --pairs "$inputs/data" --init "$inputs/weights" --name negatives_timed --steps $sampling_steps \
        > "$out/sample.txt" 2>&1 || tail -n 3 "$out/sample.txt"
    echo "$sampling_steps steps, no guidance:"
    $gpu clips "$inputs/data/negatives_timed"
}
h() {   # tests that need a GPU; conftest.py hides GPUs from all others
    $PYTHON -m pytest -q --noconftest -p no:cacheprovider tests/test_cuda.py -rs
}

if [[ -n ${STAGE:-} ]]; then                               # this script runs itself, so that timeout can end a stage
    limit=$LIMIT
    $STAGE
    exit
fi

declare -A limits=([a]=30 [b]=100 [c]=140 [d]=200 [e]=70 [f]=110 [g]=60 [h]=70)
if [[ -n $dry ]]; then                                     # a busy machine of two cores
    TOTAL=1800
    for stage in a b c d e f g h; do limits[$stage]=600; done
fi
stages=("$@")
if [[ ${#stages[@]} -eq 0 ]]; then stages=(a b c d e f g h); fi
failed=0
for stage in "${stages[@]}"; do
    left=$((TOTAL - SECONDS))
    limit=$((limits[$stage] < left ? limits[$stage] : left))
    if ((limit < 10)); then
        echo "($stage: no time left)" | tee "$out/$stage.md"
        continue
    fi
    if [[ $stage =~ [degf] && ! -d $inputs ]]; then $gpu inputs "$inputs" $model $frames $size; fi
    began=$SECONDS
    STAGE=$stage LIMIT=$limit timeout -k 5 "$limit" bash "$0" ${dry:+--dry} "$out" 2>&1 | tee "$out/$stage.md"
    status=${PIPESTATUS[0]}
    if ((status)); then failed=1; fi
    echo "($stage: $((SECONDS - began)) s, exit code $status)" | tee -a "$out/$stage.md"
done
rm -rf "$inputs" "$out/inputs_14b" "$out/packages"
exit $failed
