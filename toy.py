"""
The embedded world: clips of a shape that flies and bounces, their captions, text codec and pixel codec, exact metrics.

It replaces real video, UMT5 and the VAE, so that the code that trains Wan trains here, on a laptop, in minutes. Because
the world is procedural, the quality of a generated clip is not a matter of taste: does the shape have the caption's
colour, does it keep its size, does it fly where physics takes it, is the background clean.

    caption  "large red triangle moving fast down left"
    video    (3, F, 32, 32) in [-1, 1]         latents (12, F, 8, 8)         context (words, 32)
"""
import math
import zlib
from itertools import product

import torch
from einops import rearrange

COLOURS = {                                        # RGB in [0, 1]
    "red": (0.90, 0.15, 0.15), "green": (0.15, 0.85, 0.25), "blue": (0.20, 0.35, 0.95),
    "yellow": (0.90, 0.85, 0.15), "magenta": (0.85, 0.25, 0.85), "cyan": (0.20, 0.85, 0.90),
}
SHAPES = {                                         # radius, or inradius, over r: all three have the same area
    "circle": 1.0,
    "square": math.sqrt(math.pi) / 2,
    "triangle": math.sqrt(math.pi / (3 * math.sqrt(3))),
}
REACH = {                                          # distance of the centre from a wall, over r, when the shape bounces
    "circle": 1.0,
    "square": math.sqrt(math.pi) / 2,
    "triangle": 2 * SHAPES["triangle"],
}
SIZES = {"small": 4.5, "large": 6.0}               # r in pixels: the area is pi r^2
SPEEDS = {"slowly": 1.5, "fast": 3.0}              # pixels per frame
DIRECTIONS = {                                     # x, y; y grows downwards
    "right": (1, 0), "down right": (1, 1), "down": (0, 1), "down left": (-1, 1),
    "left": (-1, 0), "up left": (-1, -1), "up": (0, -1), "up right": (1, -1),
}
BACKGROUND = 0.12
SIDE, FRAMES = 32, 8

CAPTIONS = [f"{size} {colour} {shape} moving {speed} {direction}"
            for size, colour, shape, speed, direction in product(SIZES, COLOURS, SHAPES, SPEEDS, DIRECTIONS)]    # 576
# Every word and most combinations are trained on; these combinations are not. A fixed hash decides, so nobody can tune
# the choice.
HELD_OUT = [caption for caption in CAPTIONS if zlib.crc32(caption.encode()) % 6 == 0]
TRAINED = [caption for caption in CAPTIONS if zlib.crc32(caption.encode()) % 6 != 0]


def parse(caption):
    """
    The words of a caption of this world: size, colour, shape, speed, direction.

    Raises ValueError for any other caption: the metrics below are defined for this world only.
    """
    words = caption.split()
    size, colour, shape, speed, direction = [""] * 5
    if len(words) > 5:
        size, colour, shape, _, speed = words[:5]
        direction = " ".join(words[5:])
    if not (size in SIZES and colour in COLOURS and shape in SHAPES and speed in SPEEDS and direction in DIRECTIONS):
        raise ValueError(f'"{caption}" is not a caption of the embedded world; one looks like "{CAPTIONS[0]}"')
    return size, colour, shape, speed, direction


# ----------------------------------------------------------------------------------------------------------------------
# clips

def coverage(shape, centre, r):
    """
    The share of every pixel that a shape covers, (..., 32, 32) in [0, 1].

    shape: a word; centre (..., 2): x, y in pixels; r (...): pixels.
    """
    grid = torch.arange(SIDE, dtype=torch.float32) + 0.5
    x = grid[None, :] - centre[..., 0, None, None]                            # (..., 1, W)
    y = grid[:, None] - centre[..., 1, None, None]                            # (..., H, 1)
    reach = SHAPES[shape] * r[..., None, None]
    if shape == "circle":
        depth = reach - torch.sqrt(x ** 2 + y ** 2)                         # signed distance to the outline, > 0 inside
    elif shape == "square":
        depth = reach - torch.maximum(x.abs(), y.abs())
    else:                                                                     # equilateral, tip up, around its centroid
        depth = reach - torch.maximum(y, 0.5 * math.sqrt(3) * x.abs() - 0.5 * y)
    return (depth + 0.5).clamp(0, 1)                                          # one pixel of anti-aliasing


def step_of(caption):
    """The path of the shape in one frame of free flight, (2,): x, y in pixels."""
    _, _, _, speed, direction = parse(caption)
    heading = torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    return SPEEDS[speed] * heading / heading.norm()


def trajectory(start, caption, frames=FRAMES):
    """
    The path of the shape by physics, straight and elastic at the walls: start (..., 2) -> (..., frames, 2), in pixels.

    Folding the free flight back into [reach, SIDE - reach] is exact for any number of bounces.
    """
    size, _, shape, _, _ = parse(caption)
    low = REACH[shape] * SIZES[size]
    span = SIDE - 2 * low
    free = start[..., None, :] + step_of(caption) * torch.arange(frames, dtype=torch.float32)[:, None] - low
    return low + span - ((free % (2 * span)) - span).abs()


def render(caption, centres):
    """A clip from the positions of its shape: centres (F, 2) in pixels -> video (3, F, 32, 32) in [-1, 1]."""
    size, colour, shape, _, _ = parse(caption)
    mask = coverage(shape, centres, torch.full(centres.shape[:-1], SIZES[size]))                  # (F, H, W)
    rgb = torch.tensor(COLOURS[colour])[:, None, None, None]
    return 2 * (BACKGROUND + mask * (rgb - BACKGROUND)) - 1


def make_clip(caption, seed, frames=FRAMES):
    """
    One real clip, (3, frames, 32, 32) in [-1, 1]: the caption's shape from a random start, drawn from the seed alone.

    The start leaves room for two steps ahead, before the first bounce, and for one step back: otherwise "moving right"
    at a wall would look like "moving left".
    """
    size, _, shape, _, _ = parse(caption)
    low = REACH[shape] * SIZES[size]
    step = step_of(caption)
    lowest = low + torch.maximum(step, -2 * step)
    highest = SIDE - low - torch.maximum(2 * step, -step)
    start = lowest + torch.rand(2, generator=torch.Generator().manual_seed(seed)) * (highest - lowest)
    return render(caption, trajectory(start, caption, frames))


def make_clips(count, seed, held_out=False):
    """
    Captions and real clips of the world: a list of `count` captions, and videos (count, 3, 8, 32, 32) in [-1, 1].

    Each is a function of (seed, index). Captions come in a shuffled round-robin, so that any count is balanced.
    """
    pool = HELD_OUT if held_out else TRAINED
    order = []
    while len(order) < count:
        turn = len(order) // len(pool)
        order += torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed * 1000 + turn)).tolist()
    captions = [pool[i] for i in order[:count]]
    # Held-out clips never share a seed with trained ones, whatever the user's seed is.
    clips = [make_clip(caption, (seed * 1_000_000 + i) * 2 + held_out) for i, caption in enumerate(captions)]
    return captions, torch.stack(clips)


# ----------------------------------------------------------------------------------------------------------------------
# codecs

TEXT_DIM, TEXT_LEN = 32, 16
BLOCK, CHANNELS = 4, 12
# One scale for all channels, which gives the latents of the world unit variance; whitening each channel would spend the
# loss on detail.
LATENT_SCALE = 0.6


def encode_text(caption):
    """
    One fixed random vector per word, (words, 32), at most 16 rows; no rows for "", the unconditional context of
    classifier-free guidance.

    A vector is drawn from the word's own hash: deterministic, any vocabulary, no tokenizer. Cross-attention has no
    order, so this is a bag of words. Vectors are long (norm about 34), since a narrow model learns slowly from faint
    ones.
    """
    rows = []
    for word in caption.lower().split()[:TEXT_LEN]:
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        rows.append(6 * torch.randn(TEXT_DIM, generator=generator))
    return torch.stack(rows) if rows else torch.zeros(0, TEXT_DIM)


def _pixel_basis():
    """
    The 12 orthonormal directions of a 4x4 RGB block that latents keep, (12, 3, 4, 4): three colour axes times the four
    lowest DCT waves.
    """
    pixel = torch.arange(BLOCK, dtype=torch.float64) + 0.5
    waves = torch.stack([torch.cos(math.pi * k * pixel / BLOCK) for k in range(2)])
    waves = waves / waves.norm(dim=1, keepdim=True)                           # (2, 4): flat, half a wave
    axes = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)    # grey, red-green, yellow-blue
    axes = axes / axes.norm(dim=1, keepdim=True)
    return torch.einsum("ac,iy,jx->aijcyx", axes, waves, waves).reshape(CHANNELS, 3, BLOCK, BLOCK)


BASIS = _pixel_basis()


def encode_pixels(video):
    """
    video (..., 3, F, H, W) in [-1, 1], H and W multiples of 4 -> latents (..., 12, F, H/4, W/4).

    A fixed linear codec, frame by frame. It keeps a quarter of the numbers of a video, because a small model needs far
    fewer numbers per token than its width (the velocity contains the noise itself). decode_pixels inverts it on the
    space it keeps: encode(decode(latents)) == latents.
    """
    if video.shape[-4] != 3 or video.shape[-1] % BLOCK or video.shape[-2] % BLOCK:
        raise ValueError(f"the pixel codec takes video (..., 3, F, H, W) with H and W multiples of {BLOCK}; "
                         f"got {tuple(video.shape)}")
    blocks = rearrange(video, "... c f (h y) (w x) -> ... c f h w y x", y=BLOCK, x=BLOCK)
    offset = 2 * BACKGROUND - 1                                               # the background is the latents' zero
    return torch.einsum("...cfhwyx,kcyx->...kfhw", blocks - offset, BASIS.to(video)) / LATENT_SCALE


def decode_pixels(latents):
    """latents (..., 12, F, h, w) -> video (..., 3, F, 4h, 4w), about [-1, 1], not clamped."""
    blocks = torch.einsum("...kfhw,kcyx->...cfhwyx", latents * LATENT_SCALE, BASIS.to(latents)) + 2 * BACKGROUND - 1
    return rearrange(blocks, "... c f h w y x -> ... c f (h y) (w x)")


class PixelCodec:
    """The codec under the names of wan_encoders.Encoders; nothing is loaded or freed, and no file is needed."""
    name = "pixel"
    frame_step = 1   # any number of frames
    multiple = 2 * BLOCK   # blocks in the model's patches of 2 x 2
    parts = ()
    encode_text = staticmethod(encode_text)
    encode_video = staticmethod(encode_pixels)

    def files(self):
        return []

    def part(self, name):
        return None

    def free(self, name):
        return None

    def decode_video(self, latents):
        return decode_pixels(latents).clamp(-1, 1)

    def conditions(self, first, last, frames):
        return {}


# ----------------------------------------------------------------------------------------------------------------------
# exact metrics

def _moments(video):
    """
    The place and size of the shape: mask (..., F, H, W) in [0, 1], area (..., F) in pixels, centre (..., F, 2).

    centre is x, y in pixels, the middle of the frame where there is no shape.
    video (..., 3, F, 32, 32) in [-1, 1].
    """
    rgb = (video.clamp(-1, 1) + 1) / 2
    contrast = (rgb - BACKGROUND).abs().amax(dim=-4)                          # (..., F, H, W)
    peak = contrast.amax(dim=(-1, -2), keepdim=True).clamp(min=0.5)           # every colour has at least 0.73
    mask = ((contrast - 0.1) / (peak - 0.2)).clamp(0, 1)                      # dead zones of 0.1: codec ringing
    area = mask.sum(dim=(-1, -2))
    grid = torch.arange(SIDE, dtype=video.dtype) + 0.5
    weight = area.clamp(min=1e-6)
    x = (mask.sum(-2) * grid).sum(-1) / weight
    y = (mask.sum(-1) * grid).sum(-1) / weight
    centre = torch.stack([x, y], dim=-1)
    return mask, area, torch.where(area[..., None] > 1, centre, torch.full_like(centre, SIDE / 2))


def _seen_colours(rgb, mask):
    """The colour of the shape in every frame, (B, F): an index into COLOURS. rgb (B, 3, F, H, W), mask (B, F, H, W)."""
    palette = torch.tensor(list(COLOURS.values()))                            # (6, 3)
    core = (mask > 0.6).to(rgb.dtype)                                         # without the blended rim
    pixels = core.sum(dim=(-1, -2))[:, None].clamp(min=1)                     # (B, 1, F)
    mean = (rgb * core[:, None]).sum(dim=(-1, -2)) / pixels                   # (B, 3, F)
    return (mean.transpose(1, 2)[..., None, :] - palette).norm(dim=-1).argmin(dim=-1)


def _seen_shapes(captions, mask, centre, r):
    """
    The outline of the shape in every frame, (B, F): an index into SHAPES.

    It is the one whose template overlaps best (soft intersection over union), drawn with equal area at the measured
    place, in the caption's colour and through the codec. mask (B, F, H, W), centre (B, F, 2), r (B, F).
    """
    colours = torch.tensor([COLOURS[parse(caption)[1]] for caption in captions])     # (B, 3)
    contrast = colours[:, :, None, None, None] - BACKGROUND                              # (B, 3, 1, 1, 1)
    overlaps = []
    for name in SHAPES:
        template = 2 * (BACKGROUND + coverage(name, centre, r)[:, None] * contrast) - 1  # (B, 3, F, H, W)
        template, _, _ = _moments(decode_pixels(encode_pixels(template)))                # (B, F, H, W)
        intersection = torch.minimum(mask, template).sum(dim=(-1, -2))
        union = torch.maximum(mask, template).sum(dim=(-1, -2))
        overlaps.append(intersection / union.clamp(min=1e-6))
    return torch.stack(overlaps, dim=-1).argmax(dim=-1)


def _distances(caption, centre, present):
    """
    Mean distance of a clip's path from the paths that physics predicts from its first frame, (8,): one per direction.

    In pixels, at most 8 per frame, and 8 for a frame without a shape. centre (F, 2), present (F,).
    """
    size, colour, shape, speed, _ = parse(caption)
    distances = []
    for direction in DIRECTIONS:
        path = trajectory(centre[0], f"{size} {colour} {shape} moving {speed} {direction}", len(centre))
        distance = (centre - path).norm(dim=-1).clamp(max=8)                   # (F,)
        distances.append(torch.where(present, distance, torch.full_like(distance, 8)).mean())
    return torch.stack(distances)


def _background(caption, rgb, centre):
    """
    Root mean square deviation of a clip from the plain background, away from the shape, in 1/255; 255 where the shape
    leaves no background. rgb (3, F, H, W), centre (F, 2).
    """
    size, _, shape, _, _ = parse(caption)
    reach = REACH[shape] * SIZES[size] + 3
    path = trajectory(centre[0], caption, len(centre))
    places = torch.stack([path, centre])                                      # (2, F, 2): where it should be, and is
    grid = torch.arange(SIDE, dtype=torch.float32) + 0.5
    squared = (grid[:, None] - places[..., 1, None, None]) ** 2 + (grid - places[..., 0, None, None]) ** 2
    away = ~(squared < reach ** 2).any(dim=0)                                 # (F, H, W)
    if not away.any():
        return torch.tensor(255.0)
    return 255 * ((rgb[away.expand_as(rgb)] - BACKGROUND) ** 2).mean().sqrt()


def metrics(video, captions):
    """
    Exact marks of generated clips, that is, of clips that come from decode_pixels: {name: (B,)}

        colour      fraction of frames whose shape has the caption's colour                    real clips 1
        shape       fraction of frames whose outline is the caption's                          real clips 1
        direction   1 if the flight fits the caption's direction best of all eight, else 0     real clips 1
        drift       mean distance in pixels, at most 8, from the trajectory that physics
                    continues from the first frame                                             real clips < 0.3
        size        mean of |r / r of the caption - 1|                                         real clips < 0.1
        background  root mean square deviation from the plain background, away from
                    the shape, in 1/255                                                        real clips < 3
        broken      1 if the clip is not usable: colour or shape wrong in a quarter of it,
                    direction wrong, drift > 2 pixels or size > 0.25

    video (B, 3, F, 32, 32) in [-1, 1]; captions: list of B captions. Raises ValueError for captions of another world.
    """
    mask, area, centre = _moments(video)
    rgb = (video.clamp(-1, 1) + 1) / 2
    r = (area / math.pi).sqrt().clamp(min=0.5)
    present = area > 8                                                        # the smallest shape has 50 pixels
    seen_colour = _seen_colours(rgb, mask)                                    # (B, F)
    seen_shape = _seen_shapes(captions, mask, centre, r)                      # (B, F)
    marks = {name: [] for name in ("colour", "shape", "direction", "drift", "size", "background")}
    for i, caption in enumerate(captions):
        size, colour, shape, _, direction = parse(caption)
        own = list(DIRECTIONS).index(direction)
        distances = _distances(caption, centre[i], present[i])
        colour_is_right = (seen_colour[i] == list(COLOURS).index(colour)) & present[i]
        shape_is_right = (seen_shape[i] == list(SHAPES).index(shape)) & present[i]
        direction_is_right = (distances.argmin() == own) & present[i].any()
        marks["colour"].append(colour_is_right.float().mean())
        marks["shape"].append(shape_is_right.float().mean())
        marks["direction"].append(direction_is_right.float())
        marks["drift"].append(distances[own])
        marks["size"].append((r[i] / SIZES[size] - 1).abs().mean())
        marks["background"].append(_background(caption, rgb[i], centre[i]))
    marks = {name: torch.stack(values) for name, values in marks.items()}
    is_broken = (marks["colour"] < 0.75) | (marks["shape"] < 0.75) | (marks["direction"] < 1)
    is_broken |= (marks["drift"] > 2) | (marks["size"] > 0.25)
    marks["broken"] = is_broken.float()
    return marks


def features(video):
    """Hand-made features of clips for the Frechet distance: video (B, 3, F, 32, 32) in [-1, 1] -> (B, 37)."""
    rgb = (video.clamp(-1, 1) + 1) / 2
    mask, area, centre = _moments(video)
    mask = mask[:, None]
    colour = (rgb * mask).sum(dim=(2, 3, 4)) / mask.sum(dim=(2, 3, 4)).clamp(min=1)                # (B, 3)
    speed = (centre[:, 1:] - centre[:, :-1]).norm(dim=-1)                                          # (B, F-1)
    change = (rgb[:, :, 1:] - rgb[:, :, :-1]).abs().mean(dim=(1, 3, 4))                            # (B, F-1)
    blurred = torch.nn.functional.avg_pool3d(rgb, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    grain = rgb - blurred                                                                          # (B, 3, F, H, W)
    off_shape = ((grain ** 2) * (1 - mask)).sum(dim=(1, 3, 4)) / (1 - mask).sum(dim=(1, 3, 4)).clamp(min=1)     # (B, F)
    parts = [colour, area.sqrt(), speed, change, (off_shape + 1e-4).log(), centre.mean(dim=1), centre.std(dim=1)]
    return torch.cat(parts, dim=1)


def frechet(video, real):
    """
    Frechet distance between two sets of clips on features(), a float: each feature is scaled by its spread over the
    real clips, and the distance is divided by the number of features.

    video (B, 3, F, 32, 32), real (R, 3, F, 32, 32); B and R at least 64, or the covariances say little. 0 for equal
    sets, but not for two samples of one distribution: two sets of 256 real clips are about 0.03 apart.
    """
    return frechet_of_features(features(video), features(real))


def frechet_of_features(features_of_video, features_of_real):
    """The distance of frechet() from features (B, 37) and (R, 37)."""
    a = features_of_video.double()
    b = features_of_real.double()
    mean, spread = b.mean(0), b.std(0).clamp(min=1e-6)
    a, b = (a - mean) / spread, (b - mean) / spread
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp(min=0).sqrt().sum()
    between_means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return (between_means + cov_a.trace() + cov_b.trace() - 2 * cross).item() / a.shape[1]


def score(video, captions, real):
    """One row of the table, {name: float}: the mean of every mark, and the Frechet distance to real clips."""
    means = {name: values.mean().item() for name, values in metrics(video, captions).items()}
    return means | {"frechet": frechet(video, real)}


def better(name):
    """The direction in which this metric is better, as a word."""
    return "higher" if name in ("colour", "shape", "direction") else "lower"


def print_table(marks):
    """Print marks {row title: {metric: float}}, the exact metrics of the embedded world, one row each."""
    names = list(next(iter(marks.values())))
    print(f"\n{'held-out captions':<20}" + "".join(f"{name:>12}" for name in names))
    for title, row in marks.items():
        print(f"{title:<20}" + "".join(f"{row[name]:>12.3f}" for name in names))
    print("better is:          " + "".join(f"{better(name):>12}" for name in names), flush=True)
