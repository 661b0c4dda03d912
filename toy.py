"""
The embedded world: clips of one shape that flies and bounces, their captions, a text codec, a pixel codec, and exact metrics.

It stands in for real video, UMT5 and the VAE, so that the very code that trains Wan trains here, on a laptop, in minutes. Because the
world is procedural, the quality of a generated clip is not a matter of taste: is the shape the colour that the caption says, does it
keep its size, does it fly where physics says, is the background clean.

    caption  "large red triangle moving fast down left"
    video    (3, F, 32, 32) in [-1, 1]         latents (12, F, 8, 8)         context (words, 32)
"""
import math
import zlib
from itertools import product

import torch
from einops import rearrange

COLOURS = {"red": (0.90, 0.15, 0.15), "green": (0.15, 0.85, 0.25), "blue": (0.20, 0.35, 0.95),
           "yellow": (0.90, 0.85, 0.15), "magenta": (0.85, 0.25, 0.85), "cyan": (0.20, 0.85, 0.90)}          # RGB in [0, 1]
SHAPES = {"circle": 1.0, "square": math.sqrt(math.pi) / 2, "triangle": math.sqrt(math.pi / (3 * math.sqrt(3)))}   # radius or inradius / r: equal areas
REACH = {"circle": 1.0, "square": math.sqrt(math.pi) / 2, "triangle": 2 * SHAPES["triangle"]}                 # distance / r at which it bounces
SIZES = {"small": 4.5, "large": 6.0}                                                                         # r in pixels: area = pi r^2
SPEEDS = {"slowly": 1.5, "fast": 3.0}                                                                        # pixels a frame
DIRECTIONS = {"right": (1, 0), "down right": (1, 1), "down": (0, 1), "down left": (-1, 1),
              "left": (-1, 0), "up left": (-1, -1), "up": (0, -1), "up right": (1, -1)}                      # x, y; y grows downwards
BACKGROUND = 0.12
SIDE, FRAMES = 32, 8

CAPTIONS = [f"{size} {colour} {shape} moving {speed} {direction}"
            for size, colour, shape, speed, direction in product(SIZES, COLOURS, SHAPES, SPEEDS, DIRECTIONS)]    # 576
# Every word and most combinations are trained on; these combinations are not. A fixed hash decides, so no one can tune the choice.
HELD_OUT = [c for c in CAPTIONS if zlib.crc32(c.encode()) % 6 == 0]
TRAINED = [c for c in CAPTIONS if zlib.crc32(c.encode()) % 6 != 0]


def parse(caption):
    """
    The words of a caption of this world: size, colour, shape, speed, direction.

    Raises ValueError for any other caption: the metrics below are defined for this world only.
    """
    words = caption.split()
    size, colour, shape, speed, direction = (*words[:3], words[4], " ".join(words[5:])) if len(words) > 5 else [""] * 5
    if not (size in SIZES and colour in COLOURS and shape in SHAPES and speed in SPEEDS and direction in DIRECTIONS):
        raise ValueError(f'"{caption}" is no caption of the embedded world; one looks like "{CAPTIONS[0]}"')
    return size, colour, shape, speed, direction


# ------------------------------------------------------------------------------------------------------------------
# clips

def coverage(shape, centre, r):
    """
    How much of every pixel a shape covers. shape a word; centre (..., 2) x, y in pixels; r (...) in pixels. Returns (..., 32, 32) in [0, 1].
    """
    grid = torch.arange(SIDE, dtype=torch.float32) + 0.5
    x = grid[None, :] - centre[..., 0, None, None]                            # (..., 1, W)
    y = grid[:, None] - centre[..., 1, None, None]                            # (..., H, 1)
    reach = SHAPES[shape] * r[..., None, None]
    if shape == "circle":
        depth = reach - torch.sqrt(x ** 2 + y ** 2)                           # signed distance to the outline, > 0 inside
    elif shape == "square":
        depth = reach - torch.maximum(x.abs(), y.abs())
    else:                                                                     # equilateral, tip up, centred on its centroid
        depth = reach - torch.maximum(y, 0.5 * math.sqrt(3) * x.abs() - 0.5 * y)
    return (depth + 0.5).clamp(0, 1)                                          # one pixel of anti-aliasing


def trajectory(start, caption, frames=FRAMES):
    """
    Where physics takes the shape: straight, elastic at the walls. start (..., 2) in pixels. Returns (..., frames, 2) in pixels.

    Folding the free flight back into [reach, SIDE - reach] is exact for any number of bounces.
    """
    size, _, shape, speed, direction = parse(caption)
    low = REACH[shape] * SIZES[size]
    span = SIDE - 2 * low
    heading = torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    velocity = SPEEDS[speed] * heading / heading.norm()
    free = start[..., None, :] + velocity * torch.arange(frames, dtype=torch.float32)[:, None] - low
    return low + span - ((free % (2 * span)) - span).abs()


def render(caption, centres):
    """A clip from the positions of its shape. centres (F, 2) in pixels. Returns video (3, F, 32, 32) in [-1, 1]."""
    size, colour, shape, _, _ = parse(caption)
    mask = coverage(shape, centres, torch.full(centres.shape[:-1], SIZES[size]))                  # (F, H, W)
    rgb = torch.tensor(COLOURS[colour])[:, None, None, None]
    return 2 * (BACKGROUND + mask * (rgb - BACKGROUND)) - 1


def make_clip(caption, seed, frames=FRAMES):
    """
    One real clip: a caption's shape from a random start, drawn from the seed alone. Returns video (3, frames, 32, 32) in [-1, 1].

    The start leaves room for two steps before the first bounce and one behind: otherwise "moving right" at a wall would look like "moving left".
    """
    size, _, shape, speed, direction = parse(caption)
    low = REACH[shape] * SIZES[size]
    heading = torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    step = SPEEDS[speed] * heading / heading.norm()
    lowest = low + torch.maximum(step, -2 * step)
    highest = SIDE - low - torch.maximum(2 * step, -step)
    start = lowest + torch.rand(2, generator=torch.Generator().manual_seed(seed)) * (highest - lowest)
    return render(caption, trajectory(start, caption, frames))


def make_clips(count, seed, held_out=False):
    """
    Captions and real clips of the world, each a function of (seed, index): the captions in a shuffled round-robin, so that any count is balanced.

    Returns captions (list of count), videos (count, 3, 8, 32, 32) in [-1, 1].
    """
    captions = HELD_OUT if held_out else TRAINED
    turns = -(-count // len(captions))
    order = [i for turn in range(turns) for i in torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed * 1000 + turn)).tolist()]
    captions = [captions[i] for i in order[:count]]
    # held-out clips never share a seed with trained ones, whatever the user's seed is
    return captions, torch.stack([make_clip(c, (seed * 1_000_000 + i) * 2 + held_out) for i, c in enumerate(captions)])


# ------------------------------------------------------------------------------------------------------------------
# codecs

TEXT_DIM, TEXT_LEN = 32, 16
BLOCK, CHANNELS = 4, 12
LATENT_SCALE = 0.6     # one common scale that gives latents of the world unit variance; whitening each channel would spend the loss on detail


def encode_text(caption):
    """
    One fixed random vector per word, from the word's own hash: deterministic, any vocabulary, no tokenizer. Cross-attention has no order, so this is a
    bag of words. Long vectors (norm about 34), since a narrow model learns slowly from faint ones. "" gives no rows: the unconditional context of classifier-free guidance. Returns context (words, 32), at most 16 rows.
    """
    words = caption.lower().split()[:TEXT_LEN]
    rows = [6 * torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(zlib.crc32(word.encode()))) for word in words]
    return torch.stack(rows) if rows else torch.zeros(0, TEXT_DIM)


def _pixel_basis():
    """The 12 orthonormal directions of a 4x4 RGB block that latents keep: three colour axes x the four lowest DCT waves. Returns (12, 3, 4, 4)."""
    waves = torch.stack([torch.cos(math.pi * k * (torch.arange(BLOCK, dtype=torch.float64) + 0.5) / BLOCK) for k in range(2)])
    waves = waves / waves.norm(dim=1, keepdim=True)                           # (2, 4): flat, half a wave
    axes = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)                # grey, red-green, yellow-blue
    axes = axes / axes.norm(dim=1, keepdim=True)
    return torch.einsum("ac,iy,jx->aijcyx", axes, waves, waves).reshape(CHANNELS, 3, BLOCK, BLOCK)


BASIS = _pixel_basis()


def encode_pixels(video):
    """
    video (..., 3, F, H, W) in [-1, 1], H and W multiples of 4 -> latents (..., 12, F, H/4, W/4).

    A fixed linear codec, frame by frame: a quarter of the numbers of a video, because a small model needs far fewer numbers per token than its width
    (the velocity contains the noise itself). decode_pixels inverts it on the space it keeps: encode(decode(latents)) == latents.
    """
    if video.shape[-4] != 3 or video.shape[-1] % BLOCK or video.shape[-2] % BLOCK:
        raise ValueError(f"the pixel codec takes video (..., 3, F, H, W) with H and W multiples of {BLOCK}; got {tuple(video.shape)}")
    blocks = rearrange(video, "... c f (h y) (w x) -> ... c f h w y x", y=BLOCK, x=BLOCK)
    offset = 2 * BACKGROUND - 1                                               # the background is the zero of latent space
    return torch.einsum("...cfhwyx,kcyx->...kfhw", blocks - offset, BASIS.to(video)) / LATENT_SCALE


def decode_pixels(latents):
    """latents (..., 12, F, h, w) -> video (..., 3, F, 4h, 4w), about [-1, 1], not clamped."""
    blocks = torch.einsum("...kfhw,kcyx->...cfhwyx", latents * LATENT_SCALE, BASIS.to(latents)) + 2 * BACKGROUND - 1
    return rearrange(blocks, "... c f h w y x -> ... c f (h y) (w x)")


# ------------------------------------------------------------------------------------------------------------------
# exact metrics

def _moments(video):
    """
    Where the shape is and how large. video (..., 3, F, 32, 32) in [-1, 1].
    Returns mask (..., F, H, W) in [0, 1], area (..., F) in pixels, centre (..., F, 2) in pixels (x, y; the middle of the frame where nothing is).
    """
    rgb = (video.clamp(-1, 1) + 1) / 2
    contrast = (rgb - BACKGROUND).abs().amax(dim=-4)                                               # (..., F, H, W)
    peak = contrast.amax(dim=(-1, -2), keepdim=True).clamp(min=0.5)                                # every colour has at least 0.73
    mask = ((contrast - 0.1) / (peak - 0.2)).clamp(0, 1)                                           # dead zones of 0.1: codec ringing
    area = mask.sum(dim=(-1, -2))
    grid = torch.arange(SIDE, dtype=video.dtype) + 0.5
    weight = area.clamp(min=1e-6)
    centre = torch.stack([(mask.sum(-2) * grid).sum(-1) / weight, (mask.sum(-1) * grid).sum(-1) / weight], dim=-1)
    return mask, area, torch.where(area[..., None] > 1, centre, torch.full_like(centre, SIDE / 2))


def metrics(video, captions):
    """
    Exact marks of generated clips, that is, clips that come from decode_pixels. video (B, 3, F, 32, 32) in [-1, 1]; captions: list of B captions of this world. Returns {name: (B,)}:

        colour      fraction of frames whose shape has the caption's colour                    real clips 1
        shape       fraction of frames whose outline is the caption's                          real clips 1
        direction   1 if the flight fits the caption's direction best of all eight, else 0     real clips 1
        drift       mean distance in pixels from the trajectory that physics continues from the first frame, at most 8   real clips < 0.3
        size        mean of |r / r of the caption - 1|                                         real clips < 0.1
        background  root mean square deviation from the plain background, away from the shape, in 1/255      real clips < 3
        broken      1 if the clip is not usable: a colour, shape or direction wrong in a quarter of it, drift > 2 pixels or size > 0.25

    Raises ValueError for captions of another world.
    """
    mask, area, centre = _moments(video)
    rgb = (video.clamp(-1, 1) + 1) / 2
    present = area > 8                                                                             # the smallest shape has 50 pixels
    palette = torch.tensor(list(COLOURS.values()))                                                 # (6, 3)
    core = (mask > 0.6).to(rgb.dtype)                                                              # without the blended rim
    mean = (rgb * core[:, None]).sum(dim=(-1, -2)) / core.sum(dim=(-1, -2))[:, None].clamp(min=1)  # (B, 3, F)
    seen_colour = (mean.transpose(1, 2)[..., None, :] - palette).norm(dim=-1).argmin(dim=-1)       # (B, F)

    # Outline: the template of equal area at the measured place, seen through the codec, that overlaps best (soft intersection over union).
    r = (area / math.pi).sqrt().clamp(min=0.5)
    contrast = torch.stack([palette[list(COLOURS).index(parse(c)[1])] for c in captions])[:, :, None, None, None] - BACKGROUND      # (B, 3, 1, 1, 1)
    overlaps = []
    for name in SHAPES:
        template = 2 * (BACKGROUND + coverage(name, centre, r)[:, None] * contrast) - 1                # (B, 3, F, H, W)
        template = _moments(decode_pixels(encode_pixels(template)))[0]                                 # (B, F, H, W)
        overlaps.append(torch.minimum(mask, template).sum(dim=(-1, -2)) / torch.maximum(mask, template).sum(dim=(-1, -2)).clamp(min=1e-6))
    seen_shape = torch.stack(overlaps, dim=-1).argmax(dim=-1)                                      # (B, F)

    colours, shapes, directions = list(COLOURS), list(SHAPES), list(DIRECTIONS)
    marks = {name: [] for name in ("colour", "shape", "direction", "drift", "size", "background")}
    grid = torch.arange(SIDE, dtype=torch.float32) + 0.5
    for i, caption in enumerate(captions):
        size, colour, shape, speed, direction = parse(caption)
        off = []                                                                                   # mean distance per direction
        for other in directions:
            path = trajectory(centre[i, 0], f"{size} {colour} {shape} moving {speed} {other}", video.shape[2])
            distance = (centre[i] - path).norm(dim=-1).clamp(max=8)                                # (F,)
            off.append(torch.where(present[i], distance, torch.full_like(distance, 8)).mean())
            if other == direction:
                reach = REACH[shape] * SIZES[size] + 3
                places = torch.stack([path, centre[i]])                                            # (2, F, 2): where it should be and where it is
                near = ((grid[:, None] - places[..., 1, None, None]) ** 2 + (grid - places[..., 0, None, None]) ** 2 < reach ** 2).any(dim=0)
        off = torch.stack(off)
        mine = directions.index(direction)
        marks["colour"].append(((seen_colour[i] == colours.index(colour)) & present[i]).float().mean())
        marks["shape"].append(((seen_shape[i] == shapes.index(shape)) & present[i]).float().mean())
        marks["direction"].append(((off.argmin() == mine) & present[i].any()).float())
        marks["drift"].append(off[mine])
        marks["size"].append((r[i] / SIZES[size] - 1).abs().mean())
        away = (~near).expand_as(rgb[i])
        marks["background"].append(255 * ((rgb[i][away] - BACKGROUND) ** 2).mean().sqrt() if away.any() else torch.tensor(255.0))
    marks = {name: torch.stack(values) for name, values in marks.items()}
    marks["broken"] = ((marks["colour"] < 0.75) | (marks["shape"] < 0.75) | (marks["direction"] < 1)
                       | (marks["drift"] > 2) | (marks["size"] > 0.25)).float()
    return marks


def features(video):
    """Hand-made features of clips for the Frechet distance. video (B, 3, F, 32, 32) in [-1, 1] -> (B, 37)."""
    rgb = (video.clamp(-1, 1) + 1) / 2
    mask, area, centre = _moments(video)
    core = mask[:, None]
    colour = (rgb * core).sum(dim=(2, 3, 4)) / core.sum(dim=(2, 3, 4)).clamp(min=1)                             # (B, 3)
    speed = (centre[:, 1:] - centre[:, :-1]).norm(dim=-1)                                                       # (B, F-1)
    change = (rgb[:, :, 1:] - rgb[:, :, :-1]).abs().mean(dim=(1, 3, 4))                                         # (B, F-1)
    grain = rgb - torch.nn.functional.avg_pool3d(rgb, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)         # what a 3x3 blur removes
    flat = ((grain ** 2) * (1 - core)).sum(dim=(1, 3, 4)) / (1 - core).sum(dim=(1, 3, 4)).clamp(min=1)          # (B, F): grain off the shape
    return torch.cat([colour, area.sqrt(), speed, change, (flat + 1e-4).log(), centre.mean(dim=1), centre.std(dim=1)], dim=1)


def frechet(video, real):
    """
    Frechet distance between two sets of clips on features(), each scaled by its spread over the real ones, divided by the number of features.

    video (B, 3, F, 32, 32), real (R, 3, F, 32, 32); B and R at least 64, or the covariances say little. 0 for equal sets; an unbiased zero is not to
    be had from samples: two sets of 256 real clips are about 0.03 apart. Returns a float.
    """
    a, b = features(video).double(), features(real).double()
    a, b = ((x - b.mean(0)) / b.std(0).clamp(min=1e-6) for x in (a, b))
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp(min=0).sqrt().sum()
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item() / a.shape[1]


def score(video, captions, real):
    """One row of the table: the mean of every mark, and the Frechet distance to real clips. Returns {name: float}."""
    return {name: values.mean().item() for name, values in metrics(video, captions).items()} | {"frechet": frechet(video, real)}


def print_table(marks):
    """marks {row title: {metric: float}}: the exact metrics of the embedded world, one row each."""
    names = list(next(iter(marks.values())))
    print(f"\n{'held-out captions':<20}" + "".join(f"{name:>12}" for name in names))
    for title, row in marks.items():
        print(f"{title:<20}" + "".join(f"{row[name]:>12.3f}" for name in names))
    print("better is:          " + "".join(f"{'higher' if name in ('colour', 'shape', 'direction') else 'lower':>12}" for name in names), flush=True)
