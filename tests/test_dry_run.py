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
    slow("--checkpointing selective"), slow("--ema_decay 0.9")])
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


def test_what_is_offloaded_leaves_the_device():
    stream = 256 * 128 * 4                                # bytes before each block
    few = simulate(flags(OFFLOADED), dataclasses.replace(SMALL, num_layers=4), SHAPE, 1)
    more = simulate(flags(OFFLOADED), dataclasses.replace(SMALL, num_layers=6), SHAPE, 1)
    few_parts, more_parts = few.peaks[1, "begin"][1], more.peaks[1, "begin"][1]
    assert more_parts["activations"] == few_parts["activations"]               # the device's do not grow with blocks
    assert (few.host, more.host) == (4 * stream, 6 * stream)
    assert more.moved - few.moved == 2 * 2 * stream                            # of two blocks, there and back
