"""The embedded world: where shapes fly, what the codecs keep, and that the exact metrics mark each kind of damage."""
import math

import pytest
import torch

import toy


@pytest.fixture(scope="module")
def clips():
    captions, videos = toy.make_clips(192, seed=3)
    return captions, videos, toy.decode_pixels(toy.encode_pixels(videos))


def mean_marks(video, captions):
    return {name: values.mean().item() for name, values in toy.metrics(video, captions).items()}


def test_captions_are_split_for_good_and_every_word_is_trained_on():
    assert len(toy.CAPTIONS) == 576 == len(set(toy.CAPTIONS))
    assert not set(toy.HELD_OUT) & set(toy.TRAINED) and len(toy.HELD_OUT) == 89
    assert set(" ".join(toy.HELD_OUT).split()) <= set(" ".join(toy.TRAINED).split())
    captions, _ = toy.make_clips(200, seed=0, held_out=True)
    assert set(captions) == set(toy.HELD_OUT)   # all of them, before any comes again too often
    counts = [captions.count(caption) for caption in set(captions)]
    assert max(counts) - min(counts) == 1


def test_a_clip_is_a_function_of_its_seed_and_index():
    captions, videos = toy.make_clips(20, seed=5)
    more_captions, more = toy.make_clips(40, seed=5)
    assert captions == more_captions[:20] and torch.equal(videos, more[:20])
    assert not torch.equal(videos, toy.make_clips(20, seed=6)[1])


def test_a_shape_flies_straight_and_bounces_where_it_should():
    # large circle: walls at 6 and 26. From x = 20, 3 pixels a frame to the right: 20 23 26 | 23 20 17 14 11
    path = toy.trajectory(torch.tensor([20.0, 10.0]), "large red circle moving fast right")
    assert torch.allclose(path[:, 0], torch.tensor([20.0, 23, 26, 23, 20, 17, 14, 11])) and (path[:, 1] == 10).all()
    # both axes: 1.5 / sqrt 2 a frame, from (7, 6.5) up left; small circle: walls at 4.5 and 27.5
    step = 1.5 / math.sqrt(2)
    path = toy.trajectory(torch.tensor([7.0, 6.5]), "small red circle moving slowly up left")
    x = [7 - i * step for i in range(3)] + [9 - 7 + i * step for i in range(3, 8)]
    y = [6.5 - i * step for i in range(2)] + [9 - 6.5 + i * step for i in range(2, 8)]
    assert torch.allclose(path, torch.tensor(list(zip(x, y))), atol=1e-5)


@pytest.mark.parametrize("shape", toy.SHAPES)
def test_every_shape_covers_pi_r_squared_pixels_and_stays_in_the_frame(shape):
    mask = toy.coverage(shape, torch.tensor([[16.0, 16.0], [13.3, 17.9]]), torch.tensor([6.0, 4.5]))
    assert mask.sum(dim=(1, 2)).tolist() == pytest.approx([math.pi * 36, math.pi * 4.5 ** 2], rel=0.03)
    assert mask.min() == 0 and mask.max() == 1
    reach = 6 * toy.REACH[shape]
    corner = toy.coverage(shape, torch.tensor([reach, reach]), torch.tensor(6.0))
    assert corner.sum().item() == pytest.approx(math.pi * 36, rel=0.03)         # nothing is cut off where it bounces


def test_the_pixel_codec_inverts_itself_on_latents_and_keeps_clips_well(clips):
    _, videos, decoded = clips
    latents = torch.randn(2, toy.CHANNELS, 5, 3, 7, dtype=torch.float64)
    assert torch.allclose(toy.encode_pixels(toy.decode_pixels(latents)), latents, atol=1e-12)
    assert toy.decode_pixels(latents).shape == (2, 3, 5, 12, 28)
    psnr = -10 * torch.log10(((videos - decoded) / 2).square().mean())
    assert psnr > 29, psnr
    # what noise of variance one is mixed with
    assert toy.encode_pixels(videos).std().item() == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="multiples of 4"):
        toy.encode_pixels(torch.zeros(3, 2, 30, 32))


def test_the_text_codec_tells_words_apart_and_knows_the_empty_caption():
    context = toy.encode_text("large red circle moving fast left")
    assert context.shape == (6, toy.TEXT_DIM) and toy.encode_text("").shape == (0, toy.TEXT_DIM)
    assert torch.equal(context, toy.encode_text("Large red  circle moving fast left"))
    words = sorted({word for caption in toy.CAPTIONS for word in caption.split()})
    vectors = torch.nn.functional.normalize(torch.cat([toy.encode_text(word) for word in words]), dim=1)
    assert ((vectors @ vectors.T) - torch.eye(len(vectors))).abs().max() < 0.75
    assert toy.encode_text("word " * 40).shape == (toy.TEXT_LEN, toy.TEXT_DIM)


def test_real_clips_get_perfect_marks(clips):
    captions, videos, decoded = clips
    marks = toy.metrics(decoded, captions)   # as the codec shows them, which is all that a model can make
    assert marks["colour"].min() == 1 and marks["shape"].min() == 1 and marks["direction"].min() == 1
    assert marks["broken"].max() == 0
    assert marks["drift"].max() < 0.3 and marks["size"].max() < 0.1 and marks["background"].max() < 3
    # as drawn: the templates have the codec's blur, so small outlines are close calls
    marks = mean_marks(videos, captions)
    assert marks["colour"] == 1 and marks["direction"] == 1 and marks["shape"] > 0.98 and marks["drift"] < 0.05
    assert marks["size"] < 0.01


def test_marks_fall_in_order_with_noise(clips):
    captions, _, decoded = clips
    noise = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(0))
    rows = [mean_marks(decoded + level * noise, captions) for level in (0, 0.1, 0.3, 0.9)]
    assert rows[0]["background"] < 1 < 8 < rows[1]["background"] < rows[2]["background"] < rows[3]["background"]
    assert rows[0]["drift"] < rows[1]["drift"] < rows[2]["drift"] and rows[2]["broken"] > 0.9
    assert rows[0]["shape"] > rows[2]["shape"]


def test_a_wrong_colour_shape_or_direction_costs_that_mark_and_no_other(clips):
    captions, videos, _ = clips

    def relabel(place, words):
        words, wrong = list(words), []
        for caption in captions:
            parts = list(toy.parse(caption))
            parts[place] = words[(words.index(parts[place]) + 1) % len(words)]
            wrong.append(f"{parts[0]} {parts[1]} {parts[2]} moving {parts[3]} {parts[4]}")
        return mean_marks(videos, wrong)

    colour, shape, direction = relabel(1, toy.COLOURS), relabel(2, toy.SHAPES), relabel(4, toy.DIRECTIONS)
    assert colour["colour"] == 0 and colour["shape"] > 0.99 and colour["direction"] == 1 and colour["drift"] < 0.1
    assert shape["shape"] < 0.02 and shape["colour"] == 1
    assert direction["direction"] < 0.02 and direction["drift"] > 1.5 and direction["colour"] == 1
    assert direction["shape"] > 0.99
    assert min(row["broken"] for row in (colour, shape, direction)) > 0.98


def test_motion_damage_shows_as_drift_in_the_right_order(clips):
    captions, _, decoded = clips
    shuffled = decoded[:, :, torch.tensor([4, 0, 6, 2, 7, 1, 5, 3])]
    still = decoded[:, :, :1].expand_as(decoded)

    def drift(speed):
        return torch.stack([torch.roll(decoded[:, :, f], round(f * speed), dims=-1) for f in range(8)], dim=2)

    drifting = [drift(speed) for speed in (0.3, 0.6, 1.0)]
    drifts = [mean_marks(video, captions)["drift"] for video in (decoded, *drifting, shuffled)]
    assert drifts == sorted(drifts) and drifts[1] > 3 * drifts[0] and drifts[-1] > 3
    assert mean_marks(still, captions)["drift"] > 3 and mean_marks(still, captions)["broken"] > 0.95


def test_a_shape_that_vanishes_or_pulses_is_seen(clips):
    captions, videos, _ = clips
    gone = videos.clone()
    gone[:, :, 4:] = 2 * toy.BACKGROUND - 1
    marks = mean_marks(gone, captions)
    assert marks["colour"] == 0.5 and marks["drift"] > 3.9 and marks["broken"] == 1
    caption = "small red circle moving fast right"
    path = toy.trajectory(torch.tensor([8.0, 16.0]), caption)
    frames = [toy.render(caption if f % 2 else "large" + caption[5:], path)[:, f] for f in range(8)]
    pulse = torch.stack(frames, dim=1)[None]
    steady = toy.metrics(toy.render(caption, path)[None], [caption])["size"].item()
    assert toy.metrics(pulse, [caption])["size"].item() == pytest.approx((6.0 / 4.5 - 1) / 2, abs=0.05)
    assert steady < 0.02


def test_a_grid_over_the_picture_shows_in_background_and_frechet(clips):
    captions, _, decoded = clips
    other = toy.decode_pixels(toy.encode_pixels(toy.make_clips(192, seed=4)[1]))
    grid = 0.06 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2 - 1)
    clean, gridded = (mean_marks(video, captions)["background"] for video in (decoded, decoded + grid))
    assert gridded > 5 > 5 * clean
    assert toy.frechet(decoded + grid, other) > 3 * toy.frechet(decoded, other)


def test_frechet_is_zero_for_equal_sets_and_grows_with_damage(clips):
    _, _, decoded = clips
    other = toy.decode_pixels(toy.encode_pixels(toy.make_clips(192, seed=4)[1]))
    assert abs(toy.frechet(decoded, decoded)) < 1e-8
    noise = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(0))
    shuffled = decoded[:, :, torch.tensor([4, 0, 6, 2, 7, 1, 5, 3])]
    same, little, more = (toy.frechet(video, other)
                          for video in (decoded, decoded + 0.05 * noise, decoded + 0.2 * noise))
    assert same < 0.1 < little < more and toy.frechet(shuffled, other) > 5 * same


def test_frechet_of_gaussians_is_the_closed_form(monkeypatch):
    # uncorrelated features; mean 0, deviations (1, 1) against mean (3, 0), deviations (2, 1),
    # each in units of the real set's deviation, per feature:
    # ((3 / 2)^2 + (1/2)^2 + 1 - 2 * 1/2   +   0 + 1 + 1 - 2) / 2 = (2.25 + 0.25) / 2
    monkeypatch.setattr(toy, "features", lambda x: x)
    line = torch.linspace(-1, 1, 11, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    grid = grid / grid.std(0)
    real = torch.tensor([3.0, 0.0]) + grid * torch.tensor([2.0, 1.0])
    assert toy.frechet(grid, real) == pytest.approx(1.25, rel=1e-9)


def test_a_caption_of_another_world_is_refused():
    for caption in ("a cat", "large red circle moving fast sideways", ""):
        with pytest.raises(ValueError, match="not a caption of the embedded world"):
            toy.metrics(torch.zeros(1, 3, 8, 32, 32), [caption])
