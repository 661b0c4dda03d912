"""The tracker against torch's own allocator, few blocks against all, and what offloading leaves on the device."""
import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model import WanConfig
from dry_run import Live, extrapolate, simulate

SMALL = WanConfig(dim=128, ffn_dim=512, num_heads=8, num_layers=4, in_dim=16, out_dim=16, text_dim=64, text_len=8)
SHAPE = (16, 4, 16, 16)                                   # 256 tokens


def flags(words):
    return ("--ema_decay", "0", *words.split())


def peak_of_the_allocator(run):
    """The most bytes that torch's CPU allocator had given out while run() ran, beyond what it had at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        now += size
        peak = max(peak, now)
    return peak


def test_the_tracker_counts_what_is_alive_and_what_was_at_the_peak_of_each_segment():
    with Live() as live:
        a = torch.zeros(1000)                             # 4000 bytes, 4096 in steps of 512
        live.tag = "later"
        b = (a + 1)[:10]                                  # a view keeps all of its storage
        del a
        live.segment = "second"
        c = torch.zeros(256)                              # 1024
    assert live.now == 4096 + 1024
    assert live.peaks == {"step": (2 * 4096, {"working": 4096, "later": 4096}),
                          "second": (4096 + 1024, {"working": 0, "later": 4096 + 1024})}
    assert len(b) + len(c) == 266


def test_what_torch_pins_takes_the_next_power_of_two_and_other_cpu_memory_what_it_is():
    with Live() as live:
        live.tag = "host"
        a = torch.zeros(142 * 2 ** 18)                    # 142 MiB: a shard of an FFN matrix of 14B
        assert live.counts["host"] == 142 * 2 ** 20 and live.now == 0
        live.retag(a, "pinned")
    assert live.counts["host"] == 256 * 2 ** 20 and live.now == 0


OFFLOADED = "--loss sft --checkpointing full --offload_activations"


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("words", [
    "--loss sft --checkpointing chunked --chunk_tokens 64", slow("--checkpointing full --backward sequential"),
    slow("--checkpointing selective"), slow("--ema_decay 0.9"),
    slow("--lora_rank 4 --checkpointing selective --ema_decay 0.9"),
    slow("--lora_rank 4 --lora_targets q,v --checkpointing full --backward sequential")])
def test_a_plan_is_what_the_same_step_takes_with_real_tensors(words):
    plan, real_plans = simulate(flags(words), SMALL, SHAPE, 1), []

    def run():
        real_plans.append(simulate(flags(words), SMALL, SHAPE, 1, fake=False))
    allocated = peak_of_the_allocator(run)
    assert vars(plan) == vars(real_plans[0])
    assert plan.peak == pytest.approx(allocated, rel=0.02)


@pytest.mark.parametrize("words, ranks", [
    (OFFLOADED, 1), slow("--ref offload", 4), slow("--checkpointing full", 4),
    slow("--checkpointing full --chunk_tokens 24 --backward pair --cp_size 2 --ref cached --offload_activations "
         "--offload_params", 4)])
def test_few_blocks_and_few_chunks_say_what_all_of_them_take(words, ranks):
    config = dataclasses.replace(SMALL, num_layers=8)
    plan, quick = simulate(flags(words), config, SHAPE, ranks), extrapolate(flags(words), config, SHAPE, ranks)
    assert quick.peak == pytest.approx(plan.peak, rel=0.01)
    for name in ("host", "flops", "learning", "moved", "gathered", "exchanged"):
        assert getattr(quick, name) == pytest.approx(getattr(plan, name), rel=0.01), name


# A block of SMALL: matrices 8 * 128^2 + 2 * 128 * 512, biases 9 * 128 + 512, norms 4 * 128 + 2 * 128, modulation
# 6 * 128. Its adapters of rank 4: 8 * 4 * (128 + 128) + 2 * 4 * (128 + 512).
BLOCK, ADAPTERS = 265344, 13312


def four_and_six_blocks(words):
    return [simulate(flags(words), dataclasses.replace(SMALL, num_layers=layers), SHAPE, 1) for layers in (4, 6)]


def test_with_adapters_the_base_is_in_bf16_the_rest_follows_the_adapters_and_there_is_one_model():
    few, more = four_and_six_blocks("--lora_rank 4 --ema_decay 0.9")
    assert "reference" not in more.parts and more.host == 0
    assert more.learning == 6 * ADAPTERS
    grown = {name: (more.parts[name] - few.parts[name]) / 2 for name in ("weights", "optimizer", "ema")}
    assert grown["weights"] == pytest.approx(2 * BLOCK + 4 * ADAPTERS, rel=0.01)         # each in steps of 512 bytes
    assert grown["optimizer"] == pytest.approx(2 * 4 * ADAPTERS, rel=0.25)               # and 20 counts of 4 bytes
    assert grown["ema"] == pytest.approx(4 * ADAPTERS, rel=0.01)


@pytest.mark.parametrize("words, passes", [
    ("--checkpointing off", 3),                            # policy and reference forward, backward
    slow("--checkpointing full --backward sequential", 7)])    # 3 forwards, 2 of the reference, 2 backwards
def test_a_frozen_base_on_the_cpu_is_copied_to_the_device_and_never_back(words, passes):
    few, more = four_and_six_blocks(f"--lora_rank 4 --offload_params {words}")
    assert (more.moved - few.moved) / 2 == passes * (2 * BLOCK + 4 * ADAPTERS) + 4 * ADAPTERS    # and gradients back
    assert "weights" not in more.parts and "gradients" not in more.parts


def test_the_expert_whose_turn_it_is_not_waits_in_cpu_memory():
    words = "--lora_rank 4 --ema_decay 0.9"
    one, two = (simulate(flags(words + more), SMALL, SHAPE, 1) for more in ("", " --switch_every 5"))
    assert two.peak == one.peak and one.host == 0
    assert two.host == one.parts["weights"] + one.parts["optimizer"] + one.parts["ema"]
    words += " --offload_params"
    one, two = (simulate(flags(words + more), SMALL, SHAPE, 1) for more in ("", " --switch_every 5"))
    assert 1.9 * one.host < two.host < 2 * one.host        # all but gradients, which only the trained one has


def test_what_is_offloaded_leaves_the_device():
    stream = 256 * 128 * 4                                # bytes before each block
    few = simulate(flags(OFFLOADED), dataclasses.replace(SMALL, num_layers=4), SHAPE, 1)
    more = simulate(flags(OFFLOADED), dataclasses.replace(SMALL, num_layers=6), SHAPE, 1)
    few_parts, more_parts = few.peaks[1, "begin"][1], more.peaks[1, "begin"][1]
    assert more_parts["activations"] == few_parts["activations"]               # the device's do not grow with blocks
    assert (few.host, more.host) == (4 * stream, 6 * stream)
    assert more.moved - few.moved == 2 * 2 * stream                            # of two blocks, there and back
