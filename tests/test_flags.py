"""The flags of both trainers: their defaults, with which the published numbers were made, and the numbers refused."""
from types import SimpleNamespace

import pytest

import train
import train_spo
from conftest import main_fails
from run_folder import check_common_flags

# Another default changes every run that does not name the flag, so it is changed here as well, knowingly.
FOLDER = {"keep": 2, "save_minutes": 30.0, "resume": "", "tracker": "none"}
MEMORY = {"cp_size": 1, "ref": "auto", "checkpointing": "off", "chunk_tokens": -1, "compile": False,
          "offload_activations": False, "offload_params": False}
ADAPTERS = {"lora_rank": 0, "lora_alpha": 0.0, "lora_targets": "q,k,v,o,ffn.0,ffn.2", "init_lora": ""}
TRAIN = FOLDER | MEMORY | ADAPTERS | {
    "loss": "regdpo", "model": "auto", "init": "toy_base", "data": "toy", "bad_samples": "stop", "out": "out/{loss}",
    "seed": 0, "caption_dropout": 0.0, "beta": 30.0, "r": None, "r_scale": 1.0, "r_min": 0.0, "clip": 0.1,
    "weight_steps": 50, "threshold": 0.9, "tau": 50.0, "penalty": 5.0, "mu": 0.9, "timestep_sampling": "uniform",
    "flow_shift": 3.0, "min_timestep": 0.0, "max_timestep": 1000.0, "steps": 300, "batch_size": 16, "grad_accum": 1,
    "learning_rate": 1e-4, "weight_decay": 1e-3, "warmup_steps": 20, "decay_steps": 0, "max_grad_norm": 1.0,
    "loss_scale": 0.0, "ema_decay": 0.98, "backward": "joint", "replicate": 1, "save_every": 100, "probe_every": 50,
    "hold_back": 0, "log_every": 10, "toy_clips": 512, "sample_every": 0, "eval_clips": 256, "sample_steps": 20,
    "guidance": 1.0, "switch_every": 0}
SPO = FOLDER | MEMORY | ADAPTERS | {
    "init": "toy_base", "score": "toy", "data": "toy", "out": "out/spo", "seed": 0, "kernel": "ddim", "eta": -1.0,
    "sample_steps": 20, "flow_shift": 3.0, "guidance": 1.0, "unbranched": 0.2, "pool": 4, "threshold": [0.1],
    "beta": 500.0, "clip": 0.1, "step_weight": "none", "steps": 30, "batch_size": 16, "updates": 4, "grad_accum": 1,
    "learning_rate": 3e-4, "weight_decay": 1e-3, "warmup_steps": 10, "max_grad_norm": 1.0, "ema_decay": 0.95,
    "save_every": 10, "eval_clips": 256}


@pytest.mark.parametrize("parse_args, defaults", [(train.parse_args, TRAIN), (train_spo.parse_args, SPO)])
def test_the_defaults_are_those_of_the_published_runs(parse_args, defaults):
    flags = vars(parse_args([]))
    flags.pop("defaults", None)
    assert flags == defaults


def test_the_help_of_a_flag_names_the_objectives_that_read_it(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "aim at a margin of 1 / (2 tau) (--loss ipo)" in said
    assert "[1 - clip, 1 + clip] (--loss dpo_cm, sdpo)" in said


RANKS = SimpleNamespace(data_ranks=2)


@pytest.mark.parametrize("name, bad, good", [
    ("steps", 0, 1), ("grad_accum", 0, 1), ("keep", 0, 1), ("save_every", 0, 1), ("sample_steps", 0, 1),
    ("log_every", 0, 1), ("toy_clips", 0, 1), ("batch_size", 0, 2), ("max_grad_norm", 0.0, 1e-9),
    ("max_grad_norm", float("nan"), float("inf")), ("learning_rate", 0.0, 1e-9), ("ema_decay", 1.0, 0.999),
    ("ema_decay", -0.1, 0.0), ("caption_dropout", 1.1, 1.0), ("caption_dropout", -0.1, 0.0), ("eval_clips", 63, 64),
    ("eval_clips", 1, 0)])
def test_numbers_that_no_trainer_can_use_are_refused_up_to_the_last_that_one_can(name, bad, good):
    args = train.parse_args([])
    setattr(args, name, good)
    check_common_flags(args, RANKS)
    setattr(args, name, bad)
    with pytest.raises(ValueError, match=f"--{name} {bad}: expected"):
        check_common_flags(args, RANKS)


def test_updates_of_spo_are_counted_from_1_on():
    args = train_spo.parse_args(["--updates", "1"])
    check_common_flags(args, RANKS)
    args.updates = 0
    with pytest.raises(ValueError, match="--updates 0: expected at least 1"):
        check_common_flags(args, RANKS)


def test_a_batch_divides_over_ranks_and_parts():
    args = train.parse_args(["--batch_size", "12", "--grad_accum", "3"])
    check_common_flags(args, RANKS)
    args.batch_size = 16
    with pytest.raises(ValueError, match="2 data ranks x --grad_accum 3; take a multiple of 6"):
        check_common_flags(args, RANKS)


@pytest.mark.parametrize("flags, words", [
    ("--loss preference --ref cached", "--ref cached is about the reference of a loss like dpo; --loss preference has"),
    ("--loss sft --ref offload", "--ref offload is about the reference of a loss like dpo; --loss sft has none"),
    ("--loss preference --sample_every 5", "--sample_every samples a policy, and --loss preference trains none"),
    ("--loss sft --hold_back 1", "--hold_back 1 keeps pairs for a probe; --loss sft reads none"),
    ("--loss preference --init scratch", "--init scratch with --loss preference"),
    ("--bad_samples skip --ref cached", "--bad_samples skip: expected stop with --ref cached"),
    ("--loss dpo --caption_dropout 0.1", "--caption_dropout 0.1 does nothing in --loss dpo; it belongs to --loss sft"),
    ("--loss ipo --tau 0", "--loss ipo: tau is 0.0"),
    ("--flow_shift 0", "--flow_shift 0.0: expected a number above 0"),
])
def test_flags_that_do_not_go_together_are_refused(world, tmp_path, flags, words):
    assert words in main_fails(world, tmp_path, *flags.split())
    assert not (tmp_path / "out").exists()


def test_a_loss_that_needs_both_outputs_does_not_take_branches_on_two_ranks():
    args = train.parse_args("--loss diffusion_sdpo --backward pair".split())
    with pytest.raises(ValueError, match="diffusion_sdpo needs both outputs on one rank; use --backward joint or seq"):
        train.check_args(args, RANKS)
