"""FLOPs against what runs; the search for the longest video; what is printed and refused."""
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

import bench
from model import WanConfig, WanModel
from dry_run import Live, conditions, token_count

SMALL = WanConfig(dim=128, ffn_dim=512, num_heads=2, num_layers=3, in_dim=16, out_dim=16, text_dim=64, text_len=32)
SHAPE = (16, 4, 16, 16)                                   # 256 tokens


@pytest.mark.parametrize("variant", [{}, {"in_dim": 36, "image_dim": 48}])
def test_the_formula_for_flops_counts_what_a_forward_and_a_backward_run(variant):
    config = dataclasses.replace(SMALL, **variant)
    model, tokens = WanModel(config), token_count(config, SHAPE)
    inputs = {name: torch.randn(1, *shape) for name, shape in conditions(config, SHAPE).items()}
    with Live() as live:
        velocity = model(torch.randn(1, *SHAPE), torch.rand(1), torch.randn(1, config.text_len, config.text_dim), **inputs)
        assert live.counts["flops"] + live.counts["square"] == bench.forward_flops(config, tokens)
        assert live.counts["square"] == config.num_layers * 4 * tokens ** 2 * config.dim
        velocity.sum().backward()
    # twice a forward, but for what nobody asks for, the gradient of the inputs of the first layers; flash attention does a quarter of its products again
    text, image, d = config.text_len, 257 if config.image_dim else 0, config.dim
    first = 2 * tokens * d * 4 * config.in_dim + 2 * text * d * config.text_dim + 2 * d * config.freq_dim
    again = config.num_layers * 4 * tokens * (tokens + text + image) * d // 2
    assert live.counts["flops"] + live.counts["square"] == 3 * bench.forward_flops(config, tokens) - first + again


@pytest.mark.parametrize("guess", [1, 2, 40, 5000])
@pytest.mark.parametrize("load, most", [(lambda n: n / 100, 100), (lambda n: 0.6 + n / 1000, 400), (lambda n: max(0.5 + n / 1000, n / 300), 300),
                                        (lambda n: n / 1.5, 1), (lambda n: 1.1 + n, 0)])
def test_the_longest_is_found_from_any_guess(load, most, guess):
    calls = []
    found = bench.longest(lambda n: calls.append(n) or load(n), guess)
    assert 0.99 * most <= found <= most and load(found) <= 1 or most == found == 0
    assert len(calls) <= 8


def flags_printed(capsys):
    return re.search(r"train\.py --model \S+ (.*): (fits|does not fit)", capsys.readouterr().out).groups()


def test_a_plan_names_the_first_flags_that_fit_and_the_longest_video_with_them(monkeypatch, capsys):
    def pretended(flags, config, shape, ranks):            # 40 GB and 2 GB a latent frame, half as much of both with each flag
        size = round((40 + 2 * shape[1]) * 1e9 / 2 ** sum(word.startswith("--") for word in flags))
        return SimpleNamespace(peak=size, parts={"weights": size}, host=0, flops=1, learning=1, moved=0, gathered=0, exchanged=0)
    monkeypatch.setattr(bench, "extrapolate", pretended)
    bench.main("--plan --ranks 8 --frames 81 --gpu_memory 50 --margin 0".split())                  # 82 GB without a flag, 41 with one
    printed = capsys.readouterr().out
    assert "train.py --model wan2.1-t2v-14b --checkpointing selective: fits" in printed and "no flag, takes 82.0 GB" in printed
    assert "so: 117 frames of 480 x 832 = 46,800 tokens" in printed                              # 30 latent frames: 50 GB

    bench.main("--plan --ranks 8 --frames 81 --gpu_memory 50 --margin 0 --checkpointing full --backward pair --ref cached".split())
    assert flags_printed(capsys) == ("--checkpointing full --backward pair --ref cached", "fits")
    bench.main("--plan --ranks 8 --frames 81 --gpu_memory 15 --margin 0 --checkpointing full".split())
    assert flags_printed(capsys) == ("--checkpointing full", "does not fit")
    bench.main("--plan --ranks 8 --gpu_memory 0.2 --margin 0".split())                             # nothing fits: the last rung
    flags, fits = flags_printed(capsys)
    assert flags.endswith("--offload_activations --cp_size 4 --offload_params") and fits == "does not fit"


@pytest.mark.slow
def test_a_plan_runs_from_the_command_line(capsys):
    bench.main("--plan --model tiny --tokens 128 --checkpointing full --backward sequential --gpu_memory 1 --margin 0.5".split())
    printed = capsys.readouterr().out
    assert "fits" in printed and "activations" in printed and re.search(r"fits so: [\d,]+ tokens a video", printed)


@pytest.mark.slow
def test_what_is_measured_is_printed_run_by_run(capsys):
    bench.main("--model tiny --learning_rate 1e-5 + --checkpointing full --ref cached + --data nowhere".split())
    first, second, third = capsys.readouterr().out.strip().split("\n")[-3:]
    seconds, speed, mfu, memory = (float(cell) for cell in first.split("|")[2:6])
    assert seconds > 0 and 0 < speed < 1 and 0 < mfu < 1 and memory > 0.1
    assert second.startswith("| --checkpointing full --ref cached | ") and "nowhere" in third.split("|")[2]


@pytest.mark.parametrize("words, message", [("--frames 80", "1 more than a multiple of 4"), ("--size 480 830", "multiples of 16"), ("--ranks 0", "at least 1"),
                                            ("--tokens 100 --frames 81", "give one"), ("--margin 90", "leaves nothing"), ("--ranks 8 --cp_size 3", "--cp_size 3"),
                                            ("--ranks 5 --cp_size 5 --model wan2.1-t2v-1.3b", "does not divide the 12 heads"), ("--ranks 3 --backward pair", "even number"),
                                            ("--ranks 2 --loss sft --backward pair", "sft"), ("--checkpointing full --chunk_tokens -2", "expected")])
def test_what_cannot_be_planned_is_said_at_once(words, message):
    with pytest.raises(ValueError, match=message):
        bench.main(["--plan", *words.split()])


@pytest.mark.parametrize("words", ["--plan --checkpoint full", "--checkpointing half"])
def test_a_flag_that_train_does_not_know_is_refused_before_anything_runs(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(words.split())
    assert "error" in capsys.readouterr().err
