"""
Evaluation in the embedded world: which captions, with which noise, by which model. The probe: fixed pairs, noise
and sigmas, whatever the run; what is held back for it. The audit: it finds what was planted and nothing else.
"""
import dataclasses
import json
import re
from base64 import b64encode
from types import SimpleNamespace

import pytest
import torch
from conftest import run, textbook_error
from safetensors.torch import load_file, save_file

import evaluate
import toy
import train
from data import open_data, randomness
from samples import read_sample, sample_files, seed_of, write_sample
from evaluate import HeldOut, Probe, audit, audit_report, auc, best_threshold, hold_back, sigma_steps, statistics
from fsdp_utils import start_ranks
from model import WanModel
from pictures import animated_png, to_rgb
from sample import Sampler
from step_folder import stored_weights
from weights import open_wan

SHAPE = (2, 3, 8, 8)


@pytest.fixture
def ranks():
    yield start_ranks()
    torch.distributed.destroy_process_group()


def make_pairs(folder, count, change=lambda win: win, names=("negatives",)):
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        write_sample(
            folder / "real" / f"{i:03d}.safetensors",
            torch.randn(SHAPE, generator=g),
            torch.zeros(1, 4),
            {"prompt": "a"},
        )
        for name in names:
            write_sample(
                folder / name / f"{i:03d}.safetensors",
                change(torch.randn(SHAPE, generator=g)),
                torch.zeros(1, 4),
                {"prompt": "a"},
            )
    return open_data(folder, pairs=True)


# ------------------------------------------------------------------------------------------------------------------
# clips of the embedded world

class Still(torch.nn.Module):
    """A model of velocity 0, whose clips are the noise they start from; it keeps the contexts it saw."""
    def __init__(self):
        super().__init__()
        self.contexts = []

    def forward(self, x, timestep, context):
        self.contexts.append(context)
        return torch.zeros_like(x)


def held_out_noise(index):
    return torch.randn(evaluate.SHAPE, generator=torch.Generator().manual_seed(seed_of("held out", index)))


def test_held_out_clips_are_of_captions_that_are_never_trained_on_each_from_its_own_noise(ranks):
    held_out = HeldOut(70, Sampler(steps=2))
    captions, videos = toy.make_clips(70, seed=1, held_out=True)
    assert held_out.captions == captions and not set(captions) & set(toy.TRAINED)
    model = Still()
    clips = held_out.judge("before", model, ranks)
    noise = torch.stack([held_out_noise(i) for i in range(70)])
    assert torch.equal(clips, toy.decode_pixels(noise).clamp(-1, 1)) and len(noise.unique(dim=0)) == 70
    contexts = torch.cat(model.contexts[::2])                                  # two sampler steps for each context
    for context, caption in zip(contexts, captions, strict=True):
        words = toy.encode_text(caption)
        assert torch.equal(context[:len(words)], words) and not context[len(words):].any()

    # marks are those of the world, of real clips as the codec shows them compared with other real clips
    real = toy.decode_pixels(toy.encode_pixels(videos))
    yardstick = toy.decode_pixels(toy.encode_pixels(toy.make_clips(512, seed=2)[1]))
    assert torch.equal(held_out.real, real) and torch.equal(held_out.yardstick, yardstick)
    assert held_out.marks == {"before": toy.score(clips, captions, yardstick)}


def test_a_picture_shows_of_eight_captions_the_real_clip_those_kept_and_the_present_ones(ranks, tmp_path, monkeypatch):
    sheets = []

    def remember(clips, upscale, group):
        sheets.append((torch.stack(clips), group))
        return b"a sheet"

    monkeypatch.setattr(evaluate, "contact_sheet", remember)
    held_out = HeldOut(64, Sampler())
    latents = toy.encode_pixels(torch.rand(64, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5)
    before = held_out.mark("before", latents, keep=True)
    now = held_out.mark("step 3", latents.flip(0))
    held_out.picture(tmp_path / "step_000003", {"now": now})
    [(clips, group)] = sheets
    assert (tmp_path / "step_000003.png").read_bytes() == b"a sheet" and group == 3
    assert torch.equal(clips.unflatten(0, (8, 3)), torch.stack([held_out.real[:8], before[:8], now[:8]], dim=1))


def load_state(base, state):
    """The model of the files at base with these weights."""
    model = WanModel(open_wan(base)[0])
    model.load_state_dict(state)
    return model


def euler_of_two_steps(model, caption, noise):
    """One clip's latents by the sampler of the run below: two steps, shift 2, guidance 1.5."""
    x, empty = noise[None], torch.zeros(1, 0, toy.TEXT_DIM)
    with torch.no_grad():
        for sigma, sigma_next in ((1.0, 2 / 3), (2 / 3, 0.0)):                 # 2 u / (1 + u) of 1, 1/2 and 0
            timestep = torch.tensor([1000 * sigma])
            v, v_empty = model(x, timestep, toy.encode_text(caption)[None]), model(x, timestep, empty)
            x = x + (sigma_next - sigma) * (v_empty + 1.5 * (v - v_empty))
    return x[0]


def samples_by_caption(folder):
    return [read_sample(path) for path in sample_files(folder)]


def plain_probe(model, folder, sigma):
    """Errors (2, pairs) of a model on the pairs of a folder, each with its own noise, at this sigma."""
    errors = []
    for i, (win, lose) in enumerate(zip(samples_by_caption(folder / "real"), samples_by_caption(folder / "negatives"))):
        noise = torch.randn(win["latents"].shape, generator=randomness(0, i, "probe"))
        batch = {"win": win["latents"], "lose": lose["latents"], "noise": noise, "context": win["context"]}
        batch = {name: value[None] for name, value in batch.items()} | {"sigma": torch.tensor([sigma])}
        with torch.no_grad():
            errors.append(torch.stack([textbook_error(model, batch, side)[0][0] for side in ("win", "lose")]))
    return torch.stack(errors, dim=1)


WORLD_RUN = """--loss dpo --beta 40 --data toy --toy_clips 16 --steps 4 --batch_size 4 --learning_rate 3e-3
    --warmup_steps 1 --ema_decay 0.5 --save_every 1 --keep 9 --seed 4 --sample_every 2 --eval_clips 64 --sample_steps 2
    --flow_shift 2 --guidance 1.5 --probe_every 3 --log_every 2 --min_timestep 200 --max_timestep 900"""


def test_a_run_in_the_embedded_world_trains_on_its_captions_and_judges_the_average_on_others(
        base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    judged, sample_held_out = [], evaluate.sample_held_out

    def remember(*arguments):
        judged.append(sample_held_out(*arguments))
        return judged[-1]

    monkeypatch.setattr(evaluate, "sample_held_out", remember)
    train.main(train.parse_args(["--init", str(base), "--out", "out", *WORLD_RUN.split()]))
    start = load_file(base / "diffusion_pytorch_model.safetensors")
    average = {}
    for step in (1, 2, 3, 4):
        tensors, read = stored_weights(tmp_path / "out" / f"step_{step:06d}", "ema")
        average[step] = load_state(base, {name: read(name) for name in tensors})
    before = load_state(base, start)

    # the data: real clips of trained captions, and what the base makes of the same captions
    [folder] = (tmp_path / "data").glob("toy_16_*_2steps_guidance1.5_shift2")
    wins, losers = samples_by_caption(folder / "real"), samples_by_caption(folder / "negatives")
    captions, videos = toy.make_clips(16, seed=0)
    assert [win["metadata"]["prompt"] for win in wins] == captions and set(captions) <= set(toy.TRAINED)
    assert torch.equal(torch.stack([win["latents"] for win in wins]), toy.encode_pixels(videos))
    for i in (0, 15):
        noise_seed = seed_of(0, f"{i:05d}", 0)
        noise = torch.randn(evaluate.SHAPE, generator=torch.Generator().manual_seed(noise_seed))
        assert torch.allclose(losers[i]["latents"], euler_of_two_steps(before, captions[i], noise), atol=1e-4)

    # clips of held-out captions: by the base, by the average after two steps and by that at the end
    held_out = toy.make_clips(64, seed=1, held_out=True)[0]
    for latents, model in zip(judged, (before, average[2], average[4]), strict=True):
        assert latents.shape == (64, *evaluate.SHAPE)
        for i in (0, 1, 63):
            expected = euler_of_two_steps(model, held_out[i], held_out_noise(i))
            assert torch.allclose(latents[i], expected, atol=1e-4)
    assert (judged[0] - judged[1]).abs().max() > 0.01 < (judged[1] - judged[2]).abs().max()
    marks = json.loads((tmp_path / "out" / "samples" / "marks.json").read_text())
    assert list(marks) == ["before", "step 2", "after"]
    for row, latents in zip(marks.values(), judged):
        clips = toy.decode_pixels(latents).clamp(-1, 1)
        assert row["drift"] == pytest.approx(toy.metrics(clips, held_out)["drift"].mean().item())
    assert {path.name for path in (tmp_path / "out" / "samples").glob("*.png")} == {"after.png", "step_000002.png"}

    # the page: the clips of the picture, and the marks
    text = (tmp_path / "out" / "samples" / "after.html").read_text()
    clips = [toy.decode_pixels(toy.encode_pixels(toy.make_clips(64, seed=1, held_out=True)[1]))]
    clips += [toy.decode_pixels(latents).clamp(-1, 1) for latents in (judged[0], judged[2])]
    for i, caption in enumerate(held_out[:8]):
        start, end = text.index(f"<h2>{caption}</h2>"), text.index("</table>", text.index(f"<h2>{caption}</h2>"))
        for label, videos in zip(("real", "before", "after"), clips, strict=True):
            moving = b64encode(animated_png(to_rgb(videos[i]), fps=8)).decode()
            assert f"<tr><th>{label}</th>" in text[start:end] and moving in text[start:end]
    for label, row in marks.items():
        assert f"<tr><th>{label}</th><td>{row['colour']:.3f}</td>" in text
    assert "<th>real clips</th>" in text and "<th>better is</th><td>higher</td>" in text

    # the probe: other held-out captions, the average after three steps and at the end
    [folder] = (tmp_path / "data").glob("toy_held_out_16_*_2steps_guidance1.5_shift2")
    captions, videos = toy.make_clips(16, seed=3, held_out=True)
    wins = samples_by_caption(folder / "real")
    assert [win["metadata"]["prompt"] for win in wins] == captions and not set(captions) & set(toy.TRAINED)
    assert torch.equal(torch.stack([win["latents"] for win in wins]), toy.encode_pixels(videos))
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "probe" in row] == [2, 3]
    sigmas = [0.2875, 0.4625, 0.6375, 0.8125]              # the middles of four parts of 0.2 to 0.9
    for step in (2, 3):
        probe = rows[step]["probe"]
        assert probe["pairs"] == 16 and probe["sigma"] == pytest.approx(sigmas)
        for k, sigma in enumerate(sigmas):
            err, ref_err = plain_probe(average[step + 1], folder, sigma), plain_probe(before, folder, sigma)
            margin = -40 * ((err[0] - ref_err[0]) - (err[1] - ref_err[1]))
            assert probe["err_win"][k] == pytest.approx(err[0].mean().item(), rel=1e-5)
            assert probe["err_lose"][k] == pytest.approx(err[1].mean().item(), rel=1e-5)
            assert probe["ref_err_win"][k] == pytest.approx(ref_err[0].mean().item(), rel=1e-5)
            assert probe["ref_err_lose"][k] == pytest.approx(ref_err[1].mean().item(), rel=1e-5)
            assert probe["margin"][k] == pytest.approx(margin.mean().item(), rel=1e-3, abs=1e-3)
            assert probe["accuracy"][k] == (margin > 0).float().mean()

    # what is printed: every second step and the last, the audit from the lowest sigma up, the marks
    said = capsys.readouterr().out
    assert re.findall(r"^step +(\d+)  loss", said, re.M) == ["0", "2", "3"]
    assert "16 pairs in the embedded world, latents (12, 8, 8, 8) = 128 tokens" in said and "sigma 0.2 " in said
    assert re.search(r"^real clips +1\.000 +1\.000 +1\.000", said, re.M)


# ------------------------------------------------------------------------------------------------------------------
# data of the embedded world

def toy_args(*flags):
    return train.parse_args(["--data", "toy", "--toy_clips", "3", "--sample_steps", "1", "--batch_size", "2", *flags])


def test_a_loss_without_pairs_needs_real_clips_only_and_what_is_there_is_not_made_again(
        base, ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_wan", lambda *arguments: pytest.fail("a model was loaded"))
    args, config = toy_args("--loss", "sft", "--init", str(base)), open_wan(base)[0]
    dataset = evaluate.open_dataset(args, config, ranks, pairs=False)
    assert len(dataset) == 3 and "lose" not in dataset[0] and evaluate.is_toy_data(dataset)
    assert evaluate.is_toy_data([dataset[0]])
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["toy_3"]
    files = sample_files(tmp_path / "data" / "toy_3" / "real")
    times = [file.stat().st_mtime_ns for file in files]
    evaluate.open_dataset(args, config, ranks, pairs=False)
    assert [file.stat().st_mtime_ns for file in files] == times
    content = files[1].read_bytes()
    files[1].unlink()                                      # as after a kill
    evaluate.open_dataset(args, config, ranks, pairs=False)
    assert files[1].read_bytes() == content


def test_the_embedded_world_is_for_the_tiny_model_and_batches_are_of_one_shape(base, ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = open_wan(base)[0]
    for changes in ({"in_dim": 16, "out_dim": 16}, {"in_dim": 28}, {"text_dim": 64}):
        other = dataclasses.replace(config, **changes)
        with pytest.raises(ValueError, match="--model auto with --data toy: the embedded world is for the tiny model"):
            evaluate.open_dataset(toy_args(), other, ranks, pairs=True)
        with pytest.raises(ValueError, match="--init x with --data toy"):
            evaluate.open_captions(SimpleNamespace(data="toy", init="x"), other, ranks)
    for i in range(2):
        latents = torch.zeros(12, 1 + i, 4, 4)
        for kind in ("real", "negatives"):
            write_sample(tmp_path / "mixed" / kind / f"{i}.safetensors", latents, torch.zeros(1, 32), {})
    args = train.parse_args(["--data", "mixed", "--batch_size", "2", "--grad_accum", "2"])
    assert len(evaluate.open_dataset(args, config, ranks, pairs=True)) == 2            # one at a time
    args.grad_accum = 1
    with pytest.raises(ValueError, match="2 samples go through the model together"):
        evaluate.open_dataset(args, config, ranks, pairs=True)
    args.data = "mixed/real"
    with pytest.raises(ValueError, match="2 samples go through the model together"):
        evaluate.open_captions(args, config, ranks)
    two_ranks = SimpleNamespace(data_ranks=2)
    assert len(evaluate.open_captions(args, config, two_ranks)) == 2
    assert len(evaluate.open_dataset(args, config, two_ranks, pairs=False)) == 2
    args.bad_samples = "skip"
    assert evaluate.open_dataset(args, config, two_ranks, pairs=False).skip


def test_captions_of_the_embedded_world_are_a_dataset_without_clips(base, ranks):
    captions = evaluate.open_captions(SimpleNamespace(data="toy", init="x"), open_wan(base)[0], ranks)
    assert len(captions) == len(toy.TRAINED) and captions[3]["name"] == toy.TRAINED[3]
    item = captions[3]
    assert torch.equal(item["context"], toy.encode_text(toy.TRAINED[3]))
    assert item["win"].is_meta and item["win"].shape == (12, 8, 8, 8)
    assert captions.fingerprint() != evaluate.Captions(toy.TRAINED[1:]).fingerprint()


def test_a_wan_run_that_needs_the_empty_caption_is_refused_where_it_is_not_stored(base, tmp_path):
    wan = dataclasses.replace(open_wan(base)[0], in_dim=16, out_dim=16)
    dataset = make_pairs(tmp_path, 1)

    def check(config=wan, **flags):
        args = SimpleNamespace(**{"data": "x", "caption_dropout": 0.0, "guidance": 1.0, "sample_every": 0} | flags)
        evaluate.check_empty_caption(args, dataset, config)

    check()
    check(guidance=5.0)                                    # negatives are there, and nothing is sampled
    check(sample_every=5)
    check(open_wan(base)[0], caption_dropout=0.1)          # the embedded world's is known
    for flags in ({"caption_dropout": 0.1}, {"guidance": 5.0, "sample_every": 5}):
        with pytest.raises(ValueError, match="no empty_caption.context next to the real samples.*encode.py"):
            check(**flags)
    save_file({"context": torch.ones(1, 4)}, tmp_path / "real" / "empty_caption.context")
    check(caption_dropout=0.1)


def test_what_is_sampled_in_a_run_depends_on_data_and_flags(tmp_path):
    other = make_pairs(tmp_path, 8)
    metadata = {"source": "embedded world"}
    toy_data = [{"win": torch.zeros(1, 1, 1, 1), "context": torch.zeros(0, 4), "metadata": metadata}]
    args = train.parse_args(["--eval_clips", "64", "--sample_steps", "7", "--flow_shift", "2", "--guidance", "4"])
    held_out = evaluate.open_held_out(args, toy_data, None)
    assert isinstance(held_out, HeldOut) and len(held_out.captions) == 64
    assert held_out.sampler == Sampler("euler", 7, 2.0, 4.0)
    assert evaluate.open_held_out(args, other, None) is None
    args.sample_every = 5
    preview = evaluate.open_held_out(args, other, None)
    assert isinstance(preview, evaluate.Preview) and len(preview.items) == 4 and preview.sampler == held_out.sampler
    held_back = make_pairs(tmp_path / "held", 1)
    [item] = evaluate.open_held_out(args, other, held_back).items             # of those held back where there are any
    assert torch.equal(item["win"], held_back[0]["win"])
    args.eval_clips = 0
    assert isinstance(evaluate.open_held_out(args, toy_data, None), evaluate.Preview)


# ------------------------------------------------------------------------------------------------------------------
# pairs that are never trained on

def test_what_is_held_back_shares_no_file_with_what_is_left_and_takes_all_losers_of_a_win(tmp_path):
    dataset = make_pairs(tmp_path, 12, names=("negatives", "negatives_2"))
    left, held = hold_back(dataset, 3)
    files = [{path for pair in part.pairs for path in pair} for part in (left, held)]
    assert len(held) == 6 and len(left) == 18 and not files[0] & files[1] and len(held.wins) == 3
    again = open_data(tmp_path, pairs=True)
    assert hold_back(again, 3)[1].pairs == held.pairs and set(hold_back(again, 4)[1].pairs) > set(held.pairs)
    with pytest.raises(ValueError, match="--hold_back 12.*12 different wins in 24 pairs"):
        hold_back(dataset, 12)
    held.pairs[0][1].write_bytes(b"cut off")
    # what is known to be bad is not looked at
    left, held = hold_back(open_data(tmp_path, pairs=True, skip=True), 3)
    assert len(held) == 5 and len(left) == 18 and left.skip and not held.skip


def test_a_loser_that_wins_another_pair_is_held_back_with_it(tmp_path):
    make_pairs(tmp_path, 4)
    rows = [("real/000", "real/001"), ("real/001", "real/002"), ("real/003", "negatives/003")]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"win": f"{a}.safetensors", "lose": f"{b}.safetensors", "prompt": "a"}) + "\n" for a, b in rows
        )
    )
    dataset = open_data(tmp_path / "pairs.jsonl", pairs=True)
    for count in (1, 2):
        left, held = hold_back(dataset, count)
        assert not {path for pair in left.pairs for path in pair} & {path for pair in held.pairs for path in pair}


def test_sigmas_are_the_middles_of_equal_parts_of_the_range_trained_on():
    assert sigma_steps(600, 1000) == pytest.approx([0.65, 0.75, 0.85, 0.95])
    assert sigma_steps(0, 1000, 2) == pytest.approx([0.25, 0.75])


def test_the_probe_by_hand(tmp_path, ranks):
    # errors: of the base, the mean of the latents' squares times sigma; of the other model, wins 0.1 better and losers
    # 0.1 worse, but in the last pair the other way round
    dataset = make_pairs(tmp_path, 3)
    turned = [1.0, 1.0, -1.0]
    base, other = (SimpleNamespace(config=SimpleNamespace(scores=False), off=off) for off in (0.0, 0.1))

    def errors(model, batch):
        assert batch["noise"].shape == batch["win"].shape and batch["sigma"].shape == batch["win"].shape[:1]
        turns = torch.tensor(
            [turned[next(i for i in range(3) if torch.equal(dataset[i]["win"], win))] for win in batch["win"]]
        )
        return torch.stack(
            [
                batch[name].square().mean(dim=(1, 2, 3, 4)) * batch["sigma"] + sign * model.off * turns
                for name, sign in (("win", -1), ("lose", 1))
            ]
        )

    probe = Probe(dataset, errors, base, [0.2, 0.8], ranks, batch_size=2)
    ref = [sum(dataset[i]["win"].square().mean().item() for i in range(3)) / 3 * sigma for sigma in (0.2, 0.8)]
    found = probe(base, beta=10)
    assert (
        found["ref_err_win"] == pytest.approx(ref)
        and found["accuracy"] == [0.5, 0.5]
        and found["margin"] == pytest.approx([0, 0])
    )
    found = probe(other, beta=10)
    assert found["pairs"] == 3 and found["sigma"] == [0.2, 0.8] and found["ref_err_win"] == pytest.approx(ref)
    assert found["accuracy"] == pytest.approx([2 / 3] * 2)
    assert found["win_gap"] == pytest.approx([-0.1 / 3] * 2) and found["lose_gap"] == pytest.approx([0.1 / 3] * 2)
    assert found["margin"] == pytest.approx([10 * 0.2 / 3] * 2) and found["err_win"] == pytest.approx(
        [value - 0.1 / 3 for value in ref]
    )


def test_scores_of_a_preference_model_have_an_accuracy_and_no_reference(tmp_path, ranks):
    dataset = make_pairs(tmp_path, 3)
    model = SimpleNamespace(config=SimpleNamespace(scores=True))
    score = lambda model, batch: torch.stack([batch[name].mean(dim=(1, 2, 3, 4)) for name in ("win", "lose")])
    found = Probe(dataset, score, model, [0.5], ranks, 8)(model, beta=1.0)
    assert found["accuracy"] == [
        pytest.approx(sum(dataset[i]["win"].mean() > dataset[i]["lose"].mean() for i in range(3)).item() / 3)
    ]
    assert found.keys() == {"pairs", "sigma", "margin", "accuracy"}
    assert Probe(dataset, lambda model, batch: torch.zeros(2, len(batch["win"])), model, [0.5], ranks, 8)(model, 1.0)[
        "accuracy"
    ] == [0.5]  # ties count half


def test_a_preference_model_is_marked_on_held_out_pairs_by_how_often_it_is_right_at_each_sigma(
        base, ranks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--loss preference --data toy --init {base} --out out --eval_clips 64 --sample_steps 1".split()
    args = train.parse_args(flags)
    args.out = tmp_path / "out"

    def errors(model, batch):                              # always right below sigma 0.25, always wrong above
        sign = 1 if batch["sigma"][0] < 0.25 else -1
        assert len(batch["win"]) == 64
        return torch.stack([torch.full((64,), sign), torch.zeros(64)])

    model = SimpleNamespace(config=SimpleNamespace(scores=True))
    evaluate.mark_scores(args, open_wan(base)[0], ranks, errors, model)
    marks = json.loads((tmp_path / "out" / "samples" / "marks.json").read_text())
    sigmas = [float(name.removeprefix("sigma ")) for name in marks]
    assert min(sigmas) == 0.02 and max(sigmas) == 1 and len(sigmas) == 13
    assert list(marks.values()) == [1.0 if sigma < 0.25 else 0.0 for sigma in sigmas]
    assert "held-out accuracy: sigma 0.02 1.000" in capsys.readouterr().out
    [folder] = (tmp_path / "data").glob("toy_held_out_64_*_1steps_guidance1_shift3")
    assert {win["metadata"]["prompt"] for win in samples_by_caption(folder / "real")} <= set(toy.HELD_OUT)


PROBED = ("--hold_back", "5", "--probe_every", "3", "--min_timestep", "200")


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("probed") / "out", *PROBED)[0]


def same_probe(rows, theirs):
    for row, other in zip(rows, theirs):
        assert ("probe" in row) == ("probe" in other) == (row["step"] in (2, 5))
        for name, values in other.get("probe", {}).items():
            assert row["probe"][name] == pytest.approx(values, rel=1e-3, abs=1e-5), (row["step"], name)


@pytest.mark.slow
def test_the_probe_is_the_same_on_two_ranks_and_after_a_resume_and_its_pairs_cannot_change(world, probed, tmp_path):
    run(world, tmp_path / "out", *PROBED, "--steps", "3", "--backward", "pair", "--ref", "cached", ranks=2)
    # against the base, not against where it resumed
    same_probe(run(world, tmp_path / "out", *PROBED, "--resume", "latest")[0], probed)
    with pytest.raises(ValueError, match="hold_back = 5, this run has hold_back = 6"):
        run(world, tmp_path / "out", *PROBED, "--steps", "9", "--resume", "latest", "--hold_back", "6")


@pytest.mark.slow
def test_the_probe_is_the_same_where_ranks_share_tokens_and_weights_wait_on_the_cpu(world, probed, tmp_path):
    same_probe(run(world, tmp_path / "out", *PROBED, "--cp_size", "2", "--offload_params", ranks=2)[0], probed)


def test_runs_of_another_loss_and_seed_are_probed_with_the_same_pairs_noise_and_sigmas(world, probed, tmp_path):
    # a step of nearly no size: what the probe says is the reference's, to the last digit the log has
    rows = run(
        world, tmp_path / "out", *PROBED, "--loss", "dpo", "--seed", "7", "--steps", "3", "--learning_rate", "1e-12"
    )[0]
    for name in ("ref_err_win", "ref_err_lose", "sigma", "pairs"):
        assert rows[2]["probe"][name] == probed[2]["probe"][name] == probed[5]["probe"][name]
    assert rows[2]["probe"]["err_win"] == pytest.approx(probed[2]["probe"]["ref_err_win"], rel=1e-5)
    # and it sees the model move
    assert probed[5]["probe"]["err_win"] != pytest.approx(probed[2]["probe"]["err_win"], rel=1e-5)


def test_holding_back_pairs_of_a_loss_without_pairs_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="--hold_back 2.*--loss sft reads none"):
        train.main(
            train.parse_args(
                ["--loss", "sft", "--hold_back", "2", "--data", str(world / "data"), "--out", str(tmp_path / "out")]
            )
        )
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------
# the audit

def test_the_best_threshold_by_hand():
    # sorted 1l 2l 3w 4l 5w 6w: wins above 2 .. 3 or above 4 .. 5 is right in five of six; the first of them is taken
    assert best_threshold(torch.tensor([3.0, 5.0, 6.0]), torch.tensor([1.0, 2.0, 4.0])) == (
        pytest.approx(5 / 6),
        2.5,
        True,
    )
    # wins below it
    assert best_threshold(torch.tensor([1.0, 2.0]), torch.tensor([8.0, 9.0])) == (1.0, 5.0, False)
    # equal numbers are not told apart by their order
    assert best_threshold(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))[0] == 0.5


def test_auc_by_hand():
    # three of four pairs, and a tie
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx(3.5 / 4)


def test_statistics_by_hand():
    x = torch.zeros(1, 1, 2, 2, 2)
    # the second frame: grain 2 along W, and 1 or 3 away from the first
    x[0, 0, 1] = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    found = {name: value.item() for name, value in statistics(x).items() if name.endswith("channel 0")}
    assert (
        found["mean, channel 0"] == 1
        and found["grain, channel 0"] == pytest.approx(2)
        and found["flicker, channel 0"] == pytest.approx(5)
    )
    assert found["grain in flat parts, channel 0"] == 0 and found["flicker in flat parts, channel 0"] == 1
    assert "flicker, channel 0" not in statistics(torch.zeros(1, 1, 1, 2, 2))


def plain_statistics(x):
    """{name: number} of one video (C, F, H, W), loop by loop."""
    numbers = {}
    for c, video in enumerate(x):
        numbers[f"mean, channel {c}"], numbers[f"std, channel {c}"] = video.mean(), video.std()
        for name, change in (("grain", video[..., 1:] - video[..., :-1]), ("flicker", video[1:] - video[:-1])):
            sizes = change.abs().flatten().sort().values
            numbers[f"{name}, channel {c}"] = (sizes ** 2).mean()
            numbers[f"{name} in flat parts, channel {c}"] = sizes[len(sizes) // 5]
    for name in {name.split(",")[0] for name in numbers}:
        of_channels = [value for other, value in numbers.items() if other.startswith(f"{name},")]
        numbers[f"{name}, all channels"] = sum(of_channels) / len(of_channels)
    return {name: float(value) for name, value in numbers.items()}


def plain_threshold(win, lose):
    """The best of all thresholds between neighbouring numbers: share on the right side, threshold, above."""
    values = sorted(win + lose)
    best = (0.5, values[0], False)
    for below, above in zip(values, values[1:]):
        threshold = (below + above) / 2
        right = sum(value > threshold for value in win) + sum(value <= threshold for value in lose)
        share = right / len(values)
        for candidate in ((share, threshold, True), (1 - share, threshold, False)):
            best = max(best, candidate, key=lambda fit: fit[0])
    return best


def test_the_audit_is_what_its_description_says_loop_by_loop():
    g = torch.Generator().manual_seed(3)
    wins = [torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64) for _ in range(14)]
    losers = [1.15 * torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64) + 0.05 for _ in range(14)]
    for row in audit(list(zip(wins, losers)), [0.0, 0.3]):
        sigma = row["sigma"]
        numbers = []
        for i, pair in enumerate(zip(wins, losers)):
            noise = torch.randn(2, 3, 4, 5, generator=randomness(0, i, "audit"))
            numbers.append([plain_statistics((1 - sigma) * video + sigma * noise) for video in pair])
        fits = {}
        for name in numbers[0][0]:                         # picked on every other pair
            of_win, of_lose = [[pair[side][name] for pair in numbers[::2]] for side in (0, 1)]
            fits[name] = plain_threshold(of_win, of_lose)
        share, threshold, above = fits[row["statistic"]]
        assert share == pytest.approx(max(fit[0] for fit in fits.values()))
        right = []
        for win, lose in numbers[1::2]:                    # tried on the rest
            right += [(win[row["statistic"]] > threshold) == above, (lose[row["statistic"]] > threshold) != above]
        assert row["accuracy"] == pytest.approx(sum(right) / len(right))
        columns = [torch.tensor([pair[side][row["statistic"]] for pair in numbers]) for side in (0, 1)]
        wins_more = (columns[0][:, None] > columns[1][None, :]).double().mean().item()
        assert row["auc"] == pytest.approx(wins_more)


def test_a_report_reads_so_many_pairs_spread_over_the_data_and_fewer_of_large_videos(monkeypatch):
    seen = []

    def remember(pairs, sigmas):
        seen.append((len(pairs), [float(win.flatten()[0]) for win, _ in pairs], sigmas))
        return [{"sigma": sigma, "accuracy": 0.5, "statistic": "mean", "auc": 0.5} for sigma in sigmas]

    monkeypatch.setattr(evaluate, "audit", remember)

    class Data:
        def __init__(self, count, odd=()):
            self.count, self.odd = count, odd

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            shape = (1, 1, 2, 3) if index in self.odd else (1, 1, 2, 2)
            return {"win": torch.full(shape, float(index)), "lose": torch.zeros(shape)}

    report = audit_report(Data(40), 0.6)
    count, places, sigmas = seen[-1]
    assert count == 40 and places == list(range(40)) and sigmas == [0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8]
    assert "tells win from lose in 20 pairs it was not picked on" in report
    assert "clean 0.50, sigma 0.05 0.50, " in report and "(clean: mean, AUC 0.50)" in report
    assert "the same in 1 of 40 pairs" in report           # the first is of zeros
    audit_report(Data(300), 0.33)
    assert seen[-1][0] == 128 and seen[-1][1][:4] == [0, 2, 4, 7] and 0.33 in seen[-1][2]
    audit_report(Data(300), 0.0, elements=20 * 4)
    assert seen[-1][0] == 20 and seen[-1][1][1] == 15
    audit_report(Data(300), 0.0, elements=4)
    assert seen[-1][0] == 16
    audit_report(Data(9, odd={4}), 0.0)                    # one of another shape is left out
    assert seen[-1][0] == 8
    assert "no audit of 7 pairs: 8 of one shape are needed" in audit_report(Data(9, odd={4, 5}), 0.0)
    assert len(seen) == 5


def test_the_warning_names_the_lowest_noise_that_hides_the_difference(monkeypatch, tmp_path):
    shares = {0.0: 1.0, 0.05: 1.0, 0.1: 0.91, 0.2: 0.85, 0.4: 0.79, 0.6: 0.6, 0.8: 0.5}
    rows = [{"sigma": sigma, "accuracy": share, "statistic": "grain", "auc": 0.9} for sigma, share in shares.items()]
    monkeypatch.setattr(evaluate, "audit", lambda pairs, sigmas: rows)
    dataset = make_pairs(tmp_path, 8)
    report = audit_report(dataset, 0.1)
    assert "NOTE: at the lowest noise trained on (sigma 0.1) grain alone tells win from lose in 91%" in report
    assert "--min_timestep 400 at least (79% there" in report
    assert "NOTE" not in audit_report(dataset, 0.2)     # 85% there
    for row in rows:
        row["accuracy"] = max(0.8, row["accuracy"])
    report = audit_report(dataset, 0.0)
    assert "in 100%" in report and "--min_timestep" not in report             # no noise hides it
    rows[0]["accuracy"] = 0.9
    assert "NOTE" not in audit_report(dataset, 0.0)


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda x: x + 0.5, "mean"),
        (lambda x: torch.cat([x[:1], 1.3 * x[1:]]), "channel 1"),
        (lambda x: x[:, :1].expand_as(x), "flicker"),
        (lambda x: x + 0.02 * x.flip(-1), "grain in flat parts"),
    ],
)
def test_the_audit_names_a_difference_that_was_planted(change, name):
    g = torch.Generator().manual_seed(0)
    half = torch.tensor([1.0] * 4 + [0.0] * 4) if "flat" in name else 1.0  # a picture whose right half is flat
    pairs = [
        (half * torch.randn(2, 4, 8, 8, generator=g), change(half * torch.randn(2, 4, 8, 8, generator=g)))
        for _ in range(64)
    ]
    clean, noisy = audit(pairs, [0.0, 0.97])
    assert clean["accuracy"] > 0.9 and name in clean["statistic"] and abs(clean["auc"] - 0.5) > 0.45
    assert noisy["accuracy"] < 0.7                                             # noise hides it


def test_the_audit_finds_nothing_where_nothing_is_although_it_looks_at_many_numbers():
    g = torch.Generator().manual_seed(1)
    assert all(
        row["accuracy"] < 0.65
        for row in audit([torch.randn(2, 6, 3, 8, 8, generator=g).unbind() for _ in range(128)], [0.0, 0.5])
    )


def test_the_report_warns_at_the_noise_that_is_trained_on_only(tmp_path):
    dataset = make_pairs(tmp_path, 40, change=lambda x: 1.5 * x)
    assert "NOTE: at the lowest noise trained on (sigma 0)" in audit_report(
        dataset, 0.0
    ) and "--min_timestep" in audit_report(dataset, 0.0)
    assert "NOTE" not in audit_report(dataset, 0.9)


def test_the_report_counts_pairs_of_equal_clips_and_says_when_there_are_too_few(tmp_path):
    for i in range(3):
        for name in ("real", "negatives"):
            write_sample(
                tmp_path / name / f"{i}.safetensors",
                torch.full(SHAPE, float(i)) + (i == 2) * (name == "real"),
                torch.zeros(1, 4),
                {},
            )
    report = audit_report(open_data(tmp_path, pairs=True), 0.0)
    assert "WARNING: win and lose are the same in 2 of 3 pairs" in report and "no audit of 3 pairs" in report
