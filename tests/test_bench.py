"""FLOPs compared with those that run; the search for the longest video; output and refusals; gpu.sh on a CPU."""
import dataclasses
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from conftest import ROOT
from dry_run import Live, conditions, token_count
from lora import TARGETS, add_adapters, find_layers
from model import CONFIGS, WanConfig, WanModel

SMALL = WanConfig(dim=128, ffn_dim=512, num_heads=2, num_layers=3, in_dim=16, out_dim=16, text_dim=64, text_len=32)
SHAPE = (16, 4, 16, 16)                                    # 256 tokens


@pytest.mark.parametrize("variant", [{}, {"in_dim": 36, "image_dim": 48}])
def test_the_formula_for_flops_counts_what_a_forward_and_a_backward_run(variant):
    config = dataclasses.replace(SMALL, **variant)
    model, tokens = WanModel(config), token_count(config, SHAPE)
    inputs = {name: torch.randn(1, *shape) for name, shape in conditions(config, SHAPE).items()}
    with Live() as live:
        context = torch.randn(1, config.text_len, config.text_dim)
        velocity = model(torch.randn(1, *SHAPE), torch.rand(1), context, **inputs)
        assert live.counts["flops"] + live.counts["square"] == bench.forward_flops(config, tokens)
        assert live.counts["square"] == config.num_layers * 4 * tokens ** 2 * config.dim
        velocity.sum().backward()
    # Twice a forward, except for what nobody asks for, the gradient of the inputs of the first layers. Flash attention
    # does a quarter of its products again.
    text, image, dim = config.text_len, 257 if config.image_dim else 0, config.dim
    first_layers = 2 * tokens * dim * 4 * config.in_dim + 2 * text * dim * config.text_dim + 2 * dim * config.freq_dim
    again = config.num_layers * 4 * tokens * (tokens + text + image) * dim // 2
    counted = live.counts["flops"] + live.counts["square"]
    assert counted == 3 * bench.forward_flops(config, tokens) - first_layers + again


@pytest.mark.parametrize("variant, targets", [
    ({}, TARGETS), ({"in_dim": 36, "image_dim": 48}, TARGETS + ",k_img,v_img")])
def test_the_formula_for_flops_with_adapters_is_what_torch_counts(variant, targets):
    config, rank = dataclasses.replace(SMALL, **variant), 4
    model, tokens = WanModel(config), token_count(config, SHAPE)
    add_adapters(model, find_layers(model, targets), rank)
    args = bench.step_args(("--lora_rank", str(rank), "--lora_targets", targets), 1)
    inputs = {name: torch.randn(1, *shape) for name, shape in conditions(config, SHAPE).items()}
    context = torch.randn(1, config.text_len, config.text_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:      # it knows no other on CPUs
        velocity = model(torch.randn(1, *SHAPE), torch.rand(1), context, **inputs)
        forward = counter.get_total_flops()
        velocity.sum().backward()
    assert forward == bench.forward_flops(config, tokens) + bench.adapter_flops(args, config, tokens)
    # Nobody asks for the gradients of the first stream, through q, k and v and their adapters, and of the context,
    # through the adapters of k and v.
    dim, image = config.dim, 257 if config.image_dim else 0
    first_layers = 3 * 2 * tokens * (dim * dim + dim * rank)
    of_context = config.num_layers * 2 * 2 * (config.text_len + image) * dim * rank
    backward = counter.get_total_flops() - forward
    assert backward == bench.backward_flops(args, config, tokens) - first_layers - of_context

    # a pair: forward and backward of both videos, and the reference's forward, which has no adapters where these were
    # fresh, and does not run in the step where its errors were scored
    a_pair = 2 * (forward + bench.backward_flops(args, config, tokens))
    assert bench.step_flops(args, config, tokens) == a_pair + 2 * bench.forward_flops(config, tokens)
    args.init_lora = "lora.safetensors"
    assert bench.step_flops(args, config, tokens) == a_pair + 2 * forward
    args.ref = "cached"
    assert bench.step_flops(args, config, tokens) == a_pair
    assert bench.step_flops(args, config, tokens, with_scoring=True) == a_pair + 2 * forward


@pytest.mark.parametrize("guess", [1, 2, 40, 5000])
@pytest.mark.parametrize("load, most", [
    (lambda n: n / 100, 100), (lambda n: 0.6 + n / 1000, 400), (lambda n: max(0.5 + n / 1000, n / 300), 300),
    (lambda n: n / 1.5, 1), (lambda n: 1.1 + n, 0)])
def test_the_longest_is_found_from_any_guess(load, most, guess):
    calls = []

    def counted_load(n):
        calls.append(n)
        return load(n)
    longest = bench.longest(counted_load, guess)
    assert 0.99 * most <= longest <= most
    assert longest == 0 or load(longest) <= 1
    assert len(calls) <= 8


def test_a_right_guess_of_the_longest_costs_one_call():
    calls = []

    def load(n):
        calls.append(n)
        return n / 1000
    assert bench.longest(load, 995) == 995 and calls == [995]


def test_rungs_name_every_mode_and_keep_what_came_before():
    ladder = bench.rungs(8, SMALL)
    assert [name.split()[0] for name, _ in ladder[:4]] == ["FSDP", "selective", "chunked", "full"]
    assert all(set(before) <= set(after) for (_, before), (_, after) in zip(ladder[3:-1], ladder[4:])
               if "--cp_size" not in before)
    assert ladder[-1][1][-1] == "--offload_params" and dict(ladder)["each video over 2 ranks"][-1] == "2"


def flags_printed(capsys):
    return re.search(r"train\.py --model \S+ (.*): (fits|does not fit)", capsys.readouterr().out).groups()


def test_a_plan_names_the_first_flags_that_fit_and_the_longest_video_with_them(monkeypatch, capsys):
    def pretended(flags, config, shape, ranks):            # 40 GB and 2 GB a latent frame, half of both with each flag
        size = round((40 + 2 * shape[1]) * 1e9 / 2 ** sum(word.startswith("--") for word in flags))
        return SimpleNamespace(peak=size, parts={"weights": size}, host=0, flops=1, learning=1, moved=0, gathered=0,
                               exchanged=0)
    monkeypatch.setattr(bench, "extrapolate", pretended)
    clip = "--plan --ranks 8 --frames 81 --margin 0"
    bench.main(f"{clip} --gpu_memory 50".split())          # 82 GB without a flag, 41 with one
    printed = capsys.readouterr().out
    assert "train.py --model wan2.1-t2v-14b --checkpointing selective: fits" in printed
    assert "no flag, takes 82.0 GB" in printed
    assert "so: 117 frames of 480 x 832 = 46,800 tokens" in printed            # 30 latent frames: 50 GB

    bench.main(f"{clip} --gpu_memory 50 --checkpointing full --backward pair --ref cached".split())
    assert flags_printed(capsys) == ("--checkpointing full --backward pair --ref cached", "fits")
    bench.main(f"{clip} --gpu_memory 15 --checkpointing full".split())
    assert flags_printed(capsys) == ("--checkpointing full", "does not fit")
    bench.main("--plan --ranks 8 --gpu_memory 0.2 --margin 0".split())         # nothing fits: the last rung
    flags, fits = flags_printed(capsys)
    assert flags.endswith("--offload_activations --cp_size 4 --offload_params") and fits == "does not fit"


def test_the_first_flags_that_fit_are_taken_for_adapters(monkeypatch, capsys):
    gigabytes = {"off": 400, "selective": 100, "chunked": 40, "full": 10}      # kept for each branch

    def pretended(flags, config, shape, ranks):            # and 10 on the card, and the base's 30 there or on the CPU
        mode = flags[flags.index("--checkpointing") + 1]
        kept = gigabytes[mode] * (1 if "sequential" in flags else 2) * shape[1]
        kept_on_host, base_on_host = "--offload_activations" in flags, "--offload_params" in flags
        host = kept_on_host * kept + base_on_host * 30
        return SimpleNamespace(peak=1e9 * (40 + kept - host), parts={"weights": 1e9}, host=1e9 * host, flops=1,
                               learning=1, moved=0, gathered=0, exchanged=0)
    monkeypatch.setattr(bench, "extrapolate", pretended)
    monkeypatch.setattr(bench, "least_bytes", lambda *args: (0, 0))

    def flags_for(gpu_memory, host_memory):
        plan = f"--plan --frames 1 --margin 0 --gpu_memory {gpu_memory} --host_memory {host_memory}"
        bench.main([*plan.split(), "--loss", "dpo", "--lora_rank", "4"])
        flags, fits = flags_printed(capsys)
        start = "--loss dpo --lora_rank 4 --checkpointing "
        assert flags.startswith(start) and fits == "fits"
        return flags.removeprefix(start)
    assert flags_for(840, 999) == "off --backward joint"      # nothing is moved to the CPU for nothing
    assert flags_for(839, 999) == "off --backward joint --offload_params"
    assert flags_for(240, 0) == "selective --backward joint"
    assert flags_for(239, 29) == "chunked --backward joint"   # one branch at a time takes another forward
    assert flags_for(100, 30) == "chunked --backward joint --offload_params"
    assert flags_for(80, 0) == "chunked --backward sequential"
    assert flags_for(40, 80) == "chunked --backward joint --offload_activations"
    assert flags_for(10, 50) == "full --chunk_tokens 0 --backward joint --offload_params --offload_activations"


def test_flags_that_cannot_fit_are_not_simulated(monkeypatch):
    # 14B keeps 53 bytes for each token, layer and channel, 356 GB in off and 13 in full; its base has 28 GB
    config, shape = CONFIGS["wan2.1-t2v-14b"], (16, 21, 60, 104)
    simulated = []

    def pretended(flags, config, shape, ranks):
        simulated.append(flags)
        return SimpleNamespace(peak=2e9, host=1e9, flops=1, learning=1, moved=0, gathered=0, exchanged=0)
    monkeypatch.setattr(bench, "extrapolate", pretended)
    choices = [tuple(f"--lora_rank 4 --backward sequential --checkpointing {words}".split()) for words in (
        "off", "full", "full --offload_params", "full --offload_params --offload_activations")]
    for card, host, expected in ((400e9, 1e9, choices[:1]), (50e9, 1e9, choices[1:2]), (20e9, 30e9, choices[2:3]),
                                 (5e9, 60e9, choices[3:]), (5e9, 30e9, [])):
        assert bench.first_that_fits(choices, config, shape, 1, card, host) == (expected or choices)[-1]
        assert simulated == expected
        simulated.clear()


@pytest.mark.slow
def test_what_flags_take_at_least_is_less_than_what_they_take():
    config, shape = dataclasses.replace(SMALL, dim=256, ffn_dim=1024, num_layers=6), (16, 8, 16, 16)
    for flags in bench.lora_choices(1):
        flags = ("--lora_rank", "4", *flags)
        plan = bench.extrapolate(flags, config, shape, 1)
        card, host = bench.least_bytes(flags, config, 512, 1)
        assert card < plan.peak and host <= plan.host, flags


@pytest.mark.slow
def test_a_plan_runs_from_the_command_line(capsys):
    memory = "--checkpointing full --backward sequential --gpu_memory 1 --margin 0.5"
    bench.main(f"--plan --model tiny --tokens 128 {memory}".split())
    printed = capsys.readouterr().out
    assert "fits" in printed and "activations" in printed and re.search(r"fits so: [\d,]+ tokens a video", printed)


@pytest.mark.slow
def test_what_is_measured_is_printed_run_by_run(capsys):
    runs = "--learning_rate 1e-5 + --checkpointing full --ref cached + --data nowhere"
    bench.main(f"--model tiny --warm_up 1 --timed 2 {runs}".split())
    first, second, third = capsys.readouterr().out.strip().split("\n")[-3:]
    seconds, speed, mfu, memory = (float(cell) for cell in first.split("|")[2:6])
    assert seconds > 0 and 0 < speed < 1 and 0 < mfu < 1 and memory > 0.1
    assert second.startswith("| --checkpointing full --ref cached | ") and "nowhere" in third.split("|")[2]


@pytest.mark.parametrize("words, message", [
    ("--frames 80", "1 more than a multiple of 4"), ("--size 480 830", "multiples of 16"), ("--ranks 0", "at least 1"),
    ("--tokens 100 --frames 81", "give one"), ("--margin 90", "leaves nothing"), ("--timed 0", "at least 1"),
    ("--ranks 8 --cp_size 3", "--cp_size 3"), ("--ranks 3 --backward pair", "even number"),
    ("--ranks 5 --cp_size 5 --model wan2.1-t2v-1.3b", "does not divide the 12 heads"),
    ("--ranks 2 --loss sft --backward pair", "sft"), ("--checkpointing full --chunk_tokens -2", "expected")])
def test_what_cannot_be_planned_is_said_at_once(words, message):
    with pytest.raises(ValueError, match=message):
        bench.main(["--plan", *words.split()])


@pytest.mark.parametrize("words", ["--plan --checkpoint full", "--checkpointing half"])
def test_a_flag_that_train_does_not_know_is_refused_before_anything_runs(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(words.split())
    assert "error" in capsys.readouterr().err


@pytest.mark.slow
def test_every_stage_of_the_gpu_script_runs_on_a_cpu(tmp_path):
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--dry", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    rows = {stage: (tmp_path / f"{stage}.md").read_text() for stage in "abcdefgh"}
    assert all("exit code 0" in text for text in rows.values())
    assert "matrix product" in rows["a"]
    assert "| SDPA's choice | 0.00e+00 | 0.00e+00 |" in rows["b"] and "2 rows: errors within 0.0e+00" in rows["b"]
    assert "| 1,280 | ours | selective |" in rows["c"]
    for stage, runs in (("d", 2), ("e", 1)):
        cells = [line.split("|") for line in rows[stage].splitlines() if line.startswith("| --c")]
        assert len(cells) >= runs and all(float(row[2]) > 0 and float(row[6]) > 0 for row in cells), rows[stage]
    assert "3 clips" in rows["g"] and "skipped" in rows["h"]


def test_the_gpu_script_says_how_it_is_called():
    done = subprocess.run([str(ROOT / "benchmarks" / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "gpu.sh OUT" in done.stdout
