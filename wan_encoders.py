"""
Wan's own encoders, from public files: the text encoder (UMT5-XXL), the VAE, and CLIP's vision tower.

    encoders = open_encoders("Wan2.1-I2V-14B-480P", CONFIGS["wan2.1-i2v-14b"], "cuda")
    context = encoders.encode_text("a red ball")                      # (T, D)
    latents = encoders.encode_video(video)                            # (3, F, H, W) in [-1, 1] -> (C, f, h, w)

Reads an original Wan folder (.pth files, nothing in them is executed) or a diffusers folder; nothing is downloaded.
The networks are those of transformers and diffusers, imported when a part is first needed.
"""
import html
import math
import pickle
import re
from functools import wraps
from pathlib import Path

import torch
import torch.nn.functional as F

from streaming import stream_blocks
from weights import find_weights, open_safetensors, read_json

# Wan's negative prompt where a user gives none, and what Wan2.1's image models put before it: "shaking camera",
# "scene cut".
NEGATIVE_PREFIX = {"i2v": "镜头晃动，", "flf2v": "镜头切换，镜头晃动，"}
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What Wan's latents are normalised with: VAE -> mean and standard deviation of each channel.
LATENTS = {
    "wan2.1": (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]),
    "wan2.2": (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
         0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
         -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744])}
CHANNELS = {vae: len(mean) for vae, (mean, _) in LATENTS.items()}
PIXELS = {"wan2.1": 8, "wan2.2": 16}                                  # height and width of a latent, in pixels

# File of each part: in an original Wan folder, in a diffusers folder.
TOKENIZER_FILES = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
TEXT_FILES = ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder/config.json")
VAE_FILES = {"wan2.1": ("Wan2.1_VAE.pth", "vae/config.json"), "wan2.2": ("Wan2.2_VAE.pth", "vae/config.json")}
CLIP_FILES = ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder/config.json")


# ---------------------------------------------------------------------------------------------------------------------
# names in the original .pth files -> names in transformers and diffusers: regular expressions, applied one by one

TEXT_NAMES = {
    r"^token_embedding\.": "shared.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.": "encoder.block.",
    r"\.norm1\.": ".layer.0.layer_norm.",
    r"\.pos_embedding\.embedding\.": ".layer.0.SelfAttention.relative_attention_bias.",   # in every block: UMT5's mark
    r"\.attn\.": ".layer.0.SelfAttention.",
    r"\.norm2\.": ".layer.1.layer_norm.",
    r"\.ffn\.gate\.0\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.ffn\.fc1\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.ffn\.fc2\.": ".layer.1.DenseReluDense.wo."}


def decoder_stage(match):
    """Wan2.1's decoder is one list, which diffusers cuts into stages of four: three residual blocks, one upsampler."""
    return f"decoder.up_blocks.{int(match[1]) // 4}.upsamplers.0."


def decoder_block(match):
    stage, block = divmod(int(match[1]), 4)
    return f"decoder.up_blocks.{stage}.resnets.{block}."


VAE_NAMES = {
    r"^conv1\.": "quant_conv.",
    r"^conv2\.": "post_quant_conv.",
    r"coder\.conv1\.": "coder.conv_in.",
    r"\.head\.0\.": ".norm_out.",
    r"\.head\.2\.": ".conv_out.",
    r"\.shortcut\.": ".conv_shortcut.",
    r"\.middle\.0\.": ".mid_block.resnets.0.",
    r"\.middle\.1\.": ".mid_block.attentions.0.",
    r"\.middle\.2\.": ".mid_block.resnets.1.",
    r"\.residual\.0\.": ".norm1.",
    r"\.residual\.2\.": ".conv1.",
    r"\.residual\.3\.": ".norm2.",
    r"\.residual\.6\.": ".conv2.",
    # Wan2.2's VAE names its stages; Wan2.1's is one list
    r"(down|up)samples\.(\d+)\.\1samples\.\d+\.(?=resample|time_conv)": r"\1_blocks.\2.\1sampler.",
    r"(down|up)samples\.(\d+)\.\1samples\.": r"\1_blocks.\2.resnets.",
    r"encoder\.downsamples\.": "encoder.down_blocks.",
    r"decoder\.upsamples\.(\d+)\.(?=resample|time_conv)": decoder_stage,
    r"decoder\.upsamples\.(\d+)\.": decoder_block}
CLIP_NAMES = {
    r"^visual\.cls_embedding$": "embeddings.class_embedding",
    r"^visual\.pos_embedding$": "embeddings.position_embedding.weight",
    r"^visual\.patch_embedding\.": "embeddings.patch_embedding.",
    r"^visual\.pre_norm\.": "pre_layrnorm.",
    r"^visual\.post_norm\.": "post_layernorm.",
    r"^visual\.transformer\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.mlp\.0\.": ".mlp.fc1.",
    r"\.mlp\.2\.": ".mlp.fc2.",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
    r"\.attn\.to_qkv\.": ".self_attn.qkv_proj."}


def rename(name, table):
    for pattern, new in table.items():
        name = re.sub(pattern, new, name)
    return name


# Original files come without settings, which are read off the shapes of the tensors.
# Each function: state dict of a .pth file -> the library's state dict, settings of the library's class

def text_from_original(state):
    state = {rename(name, TEXT_NAMES): tensor for name, tensor in state.items()}
    first = "encoder.block.0.layer"
    buckets, heads = state[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape
    settings = {
        "vocab_size": len(state["shared.weight"]),
        "d_model": len(state["encoder.final_layer_norm.weight"]),
        "num_heads": heads,
        "d_kv": len(state[f"{first}.0.SelfAttention.q.weight"]) // heads,
        "d_ff": len(state[f"{first}.1.DenseReluDense.wi_0.weight"]),
        "relative_attention_num_buckets": buckets,
        "num_layers": sum("Attention.q." in name for name in state),
        "feed_forward_proj": "gated-gelu"}
    return state, settings


def vae_from_original(state):
    state = {rename(name, VAE_NAMES): tensor for name, tensor in state.items()}
    channels = len(state["post_quant_conv.weight"])
    settings = {
        "z_dim": channels,
        "latents_mean": (),
        "latents_std": (),
        "base_dim": len(state["encoder.conv_in.weight"]),
        "decoder_base_dim": len(state["decoder.conv_in.weight"]) // 4}
    for vae, (mean, std) in LATENTS.items():
        if channels == CHANNELS[vae]:
            settings |= {"latents_mean": mean, "latents_std": std}
    if channels == CHANNELS["wan2.2"]:                                # sees patches of 2 x 2 pixels as channels
        settings |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
                     "scale_factor_spatial": PIXELS["wan2.2"]}
    return state, settings


def clip_from_original(state):
    vision = {}                       # without the text tower, and without visual.head, which maps to the shared space
    for name, tensor in state.items():
        if not name.startswith("visual.") or name == "visual.head":
            continue
        new = rename(name, CLIP_NAMES)
        if "qkv_proj" in new:                                         # the three as one matrix
            for letter, rows in zip("qkv", tensor.chunk(3)):
                vision[new.replace("qkv_proj", f"{letter}_proj")] = rows
        else:
            vision[new] = tensor.squeeze()                            # two embeddings have axes of 1 in front
    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    side = round((len(vision["embeddings.position_embedding.weight"]) - 1) ** 0.5)        # of the image, in patches
    settings = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": side * patch,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "intermediate_size": len(vision["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": sum("fc1.weight" in name for name in vision)}
    return vision, settings


# ---------------------------------------------------------------------------------------------------------------------
# reading the files

def find_part(path, files):
    """The first file of a part of the encoders. files: its name in an original folder, its name in a diffusers one."""
    for name in files:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path}: neither {files[0]} (original Wan folder) nor {files[1]} (diffusers folder) in it; "
                     "give the folder of the whole model")


def read_part(file, from_original):
    """
    The library's state dict and the settings of its class.

    file: an original .pth file, read by from_original, or the config.json next to .safetensors files.
    """
    if file.suffix == ".json":
        state = {name: open_safetensors(shard).get_tensor(name) for name, shard in find_weights(file.parent).items()}
        return state, read_json(file)
    try:
        return from_original(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError,
            KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a whole file with the tensors of Wan's of this name ({error!r:.200}); "
                         "copy or download it again") from error


def fill(build, state, file, device, dtype):
    """The network build() with exactly the tensors of `state`, in dtype (None: each in its own), for inference."""
    from accelerate import init_empty_weights
    with init_empty_weights():                                        # no time and memory for random weights
        network = build()
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split()):.600}; copy or download it again") from error
    return network.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# decoding in tiles

WHOLE = 10**6
TILES = (WHOLE, 64, 48, 32)                                           # in latents; one is tried after another
OVERLAP = 16                                                          # latents that neighbouring tiles share, at least
UNUSED = 4                                                            # of these, next to a tile's edge, are cut off


def tile_starts(size, tile):
    """Where tiles of `tile` latents start along a side of `size` latents, spread evenly."""
    if size <= tile:
        return [0]
    count = math.ceil((size - OVERLAP) / (tile - OVERLAP))
    return [i * (size - tile) // (count - 1) for i in range(count)]


def tile_weights(start, size, tile, pixels):
    """
    The weight of each pixel of a tile along a side of `size` latents: 1 inside; next to an edge inside the picture
    first 0, where the network's zero padding of the tile has an effect, then a ramp.
    """
    length = min(tile, size) * pixels
    place = (torch.arange(length) + 0.5) / pixels                     # in latents
    weights = torch.ones(length)
    if start > 0:
        weights = weights.minimum((place - UNUSED) / (OVERLAP - 2 * UNUSED))
    if start + tile < size:
        weights = weights.minimum((length / pixels - place - UNUSED) / (OVERLAP - 2 * UNUSED))
    return weights.clamp(min=0)


def decode_in_tiles(decode, latents, tile, pixels):
    """
    The video (3, F, pixels * h, pixels * w) of latents (C, f, h, w) from tiles of at most tile x tile latents,
    decoded one by one: where tiles overlap, one fades into the other. A decoder that sees no further than UNUSED
    latents gives the same video as without tiles. What fits into one tile is decoded as a whole.
    """
    height, width = latents.shape[2:]
    if max(height, width) <= tile:
        return decode(latents)
    video, total = None, torch.zeros(pixels * height, pixels * width)
    for top in tile_starts(height, tile):
        for left in tile_starts(width, tile):
            part = decode(latents[:, :, top:top + tile, left:left + tile])
            weights = tile_weights(top, height, tile, pixels)[:, None] * tile_weights(left, width, tile, pixels)
            if video is None:
                video = torch.zeros(*part.shape[:2], *total.shape)
            rows = slice(pixels * top, pixels * top + part.shape[2])
            columns = slice(pixels * left, pixels * left + part.shape[3])
            video[:, :, rows, columns] += part * weights
            total[rows, columns] += weights
    return video / total


# ---------------------------------------------------------------------------------------------------------------------
# the encoders

def open_encoders(path, config, device="cpu", offload=False):
    """
    The Encoders of a model; loads nothing yet.

    path: an original Wan folder or a diffusers folder, whole; config: the WanConfig of the model; offload: the blocks
    of the text encoder stay in CPU memory, see streaming.Stream.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such folder; expected an original Wan folder or a diffusers one, "
                         "with text encoder, tokenizer and VAE")
    if config.vae not in LATENTS:
        raise ValueError(f"a model with {config.out_dim} latent channels has no Wan encoders; "
                         "those are for 16 (Wan2.1, A14B) and 48 (Wan2.2-TI2V-5B)")
    return Encoders(Path(path), config, torch.device(device), offload)


def exact(method):
    """
    Wrap a method to run without gradients and without TF32, which PyTorch otherwise uses for float32 convolutions on
    GPUs.
    """
    @wraps(method)
    def run(*arguments):
        convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        before = convolutions.fp32_precision, products.fp32_precision
        convolutions.fp32_precision = products.fp32_precision = "ieee"
        try:
            with torch.no_grad():
                return method(*arguments)
        finally:
            convolutions.fp32_precision, products.fp32_precision = before
    return run


class Encoders:
    """
    Text encoder, VAE and CLIP of a Wan model, each loaded when it is first needed and kept until free(part).

    Inputs may be on any device; results are float32 on the CPU. The text encoder runs in bf16 on a GPU, as Wan's own
    does (11 GB), and elsewhere in the dtype it is stored in. VAE and CLIP run in float32 without TF32: a model learns
    from latents, and both networks are small.
    """
    name = "wan"
    frame_step = 4                                                    # a video has frame_step * n + 1 frames

    def __init__(self, path, config, device, offload=False):
        self.path = path
        self.config = config
        self.device = device
        self.offload = offload                                        # blocks of the text encoder to CPU memory
        self.tile = WHOLE                                             # side of what the GPU can decode, in latents
        self.loaded = {}
        self.has_warned = False                                       # of a prompt that is too long
        self.multiple = PIXELS[config.vae] * config.patch_size[1]     # of height and width, in pixels
        self.parts = ("text", "vae", "clip") if config.image_dim else ("text", "vae")

    def files(self):
        """The files of all parts, for a fingerprint. Raises ValueError for one that is missing."""
        files = [find_part(self.path, TOKENIZER_FILES)]
        kinds = {"text": TEXT_FILES, "vae": VAE_FILES[self.config.vae], "clip": CLIP_FILES}
        for part in self.parts:
            first = find_part(self.path, kinds[part])
            files.append(first)
            if first.suffix == ".json":                               # the settings of a diffusers part
                files += sorted(set(find_weights(first.parent).values()))
        return files

    def part(self, name):
        """
        "text": tokenizer, encoder · "vae": VAE, mean and deviation of its latents (C, 1, 1, 1) · "clip": vision tower

        Raises ValueError for files that are missing, damaged, or another model's.
        """
        if name not in self.loaded:
            self.loaded[name] = getattr(self, f"load_{name}")()
        return self.loaded[name]

    def free(self, name):
        self.loaded.pop(name, None)
        torch.cuda.empty_cache()                                      # does nothing where there is no GPU

    def load_text(self):
        from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
        tokenizer_file = find_part(self.path, TOKENIZER_FILES)
        # This file is all of the tokenizer. AutoTokenizer would make a T5Tokenizer: in transformers 5 only part of it.
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
        if tokenizer("a").input_ids[-1:] != [1]:
            raise ValueError(f"{tokenizer_file}: \"a\" becomes {tokenizer('a').input_ids}, expected the end mark, 1, "
                             "in the last place; not the tokenizer of UMT5")
        file = find_part(self.path, TEXT_FILES)
        state, settings = read_part(file, text_from_original)
        width, vocabulary = settings.get("d_model"), settings.get("vocab_size", 0)
        if width != self.config.text_dim or vocabulary < len(tokenizer):
            raise ValueError(f"{file}: {vocabulary} tokens of width {width}, expected width {self.config.text_dim} "
                             f"for this model and at least the {len(tokenizer)} tokens of {tokenizer_file}")
        # The encoder's own table is `shared`, and not stored. Some releases of transformers leave zeros there, and the
        # video is garbage: tied here.
        shared = state.get("shared.weight", torch.empty(0))
        if not torch.equal(state.pop("encoder.embed_tokens.weight", shared), shared):
            raise ValueError(f"{file}: encoder.embed_tokens.weight is not shared.weight, as it should be; "
                             "download the folder again")
        state["encoder.embed_tokens.weight"] = shared
        dtype = torch.bfloat16 if self.device.type == "cuda" else None
        device = "cpu" if self.offload else self.device
        encoder = fill(lambda: UMT5EncoderModel(UMT5Config.from_dict(settings)), state, file, device, dtype)
        encoder.encoder.embed_tokens.weight = encoder.shared.weight
        if self.offload:
            stream_blocks(encoder.encoder, "block", self.device)
            encoder.to(self.device)
        return tokenizer, encoder

    def load_vae(self):
        from diffusers import AutoencoderKLWan
        file = find_part(self.path, VAE_FILES[self.config.vae])
        state, settings = read_part(file, vae_from_original)
        mean = torch.tensor(settings.get("latents_mean") or ()).view(-1, 1, 1, 1).to(self.device)
        std = torch.tensor(settings.get("latents_std") or ()).view(-1, 1, 1, 1).to(self.device)
        channels = CHANNELS[self.config.vae]
        if not settings.get("z_dim") == len(mean) == len(std) == channels:
            raise ValueError(f"{file}: a VAE with {settings.get('z_dim')} latent channels, {len(mean)} means and "
                             f"{len(std)} deviations of them; expected {channels} for this model")
        vae = fill(lambda: AutoencoderKLWan.from_config(settings), state, file, self.device, torch.float32)
        return vae, mean, std

    def load_clip(self):
        from transformers import CLIPVisionConfig, CLIPVisionModel
        file = find_part(self.path, CLIP_FILES)
        state, settings = read_part(file, clip_from_original)
        if settings.get("hidden_size") != self.config.image_dim:
            raise ValueError(f"{file}: features of width {settings.get('hidden_size')}, "
                             f"expected {self.config.image_dim} for this model")

        def build():
            model = CLIPVisionModel(CLIPVisionConfig.from_dict(settings))
            return getattr(model, "vision_model", model)              # transformers 4 has the tower one level down

        state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}    # and so do files
        return fill(build, state, file, self.device, torch.float32)

    @exact
    def encode_text(self, prompt):
        """
        The context (T, D) of a prompt: T <= 512 rows, the end mark's among them.

        The rows are those of a prompt padded to 512 tokens, encoded with the attention mask, cut at the true length.
        """
        import ftfy
        tokenizer, encoder = self.part("text")
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))    # cleaned as Wan does; twice, for &amp;lt;
        text = " ".join(text.split())
        limit = self.config.text_len
        count = len(tokenizer(text).input_ids)
        if count > limit and not self.has_warned:
            self.has_warned = True
            print(f"WARNING: the text encoder reads {limit} tokens, and the end of longer prompts is lost; the first "
                  f"has {count}: {text[:60]!r} ...", flush=True)
        tokens = tokenizer(text, truncation=True, max_length=limit).input_ids
        return encoder(torch.tensor([tokens], device=self.device)).last_hidden_state[0].float().cpu()

    @exact
    def encode_video(self, video):
        """
        The latents (C, n + 1, h, w), normalised, of a video (3, 4n + 1, H, W) in [-1, 1].

        They are the mean of the VAE's distribution, not a draw from it. Raises ValueError for another shape or range.
        """
        whole = video.ndim == 4 and len(video) == 3 and video.shape[1] % self.frame_step == 1
        if not whole or video.shape[2] % self.multiple or video.shape[3] % self.multiple or not video.abs().max() <= 1:
            raise ValueError(f"a video of {tuple(video.shape)}, values from {video.min():g} to {video.max():g}; "
                             "expected 3 channels, 4n+1 frames, height and width multiples of "
                             f"{self.multiple}, values in [-1, 1]")
        vae, mean, std = self.part("vae")
        distribution = vae.encode(video[None].to(self.device, torch.float32)).latent_dist
        return ((distribution.mode()[0] - mean) / std).cpu()

    @exact
    def decode_video(self, latents):
        """
        latents (C, f, h, w), normalised -> video (3, 4 (f-1) + 1, H, W) in [-1, 1].

        Where the whole takes more memory than the GPU has, this and later videos are decoded in tiles.
        """
        vae, mean, std = self.part("vae")
        latents = latents.to(self.device, torch.float32) * std + mean

        def decode(tile):
            return vae.decode(tile[None]).sample[0].clamp(-1, 1).cpu()

        while True:
            try:
                return decode_in_tiles(decode, latents, self.tile, PIXELS[self.config.vae])
            except torch.OutOfMemoryError:
                if self.tile == TILES[-1]:
                    raise
            self.tile = TILES[TILES.index(self.tile) + 1]
            print("decoding takes more memory than the GPU has: videos are decoded in tiles of "
                  f"{self.tile} x {self.tile} latents, which overlap", flush=True)
            vae.clear_cache()                                         # frames that the failed decode has kept
            torch.cuda.empty_cache()

    @exact
    def encode_image(self, image):
        """image (3, H, W) in [-1, 1] -> CLIP features (257, 1280) of the last block but one, class token first."""
        clip = self.part("clip")
        side = clip.config.image_size
        image = image[None].to(self.device, torch.float32)
        pixels = F.interpolate(image, (side, side), mode="bicubic")   # squashed, as Wan does; not cropped
        mean = torch.tensor(CLIP_MEAN, device=self.device).view(3, 1, 1)
        std = torch.tensor(CLIP_STD, device=self.device).view(3, 1, 1)
        return clip((pixels * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states[-2][0].cpu()

    def conditions(self, first, last, frames):
        """
        The model's inputs in addition to the text, by name, for a clip of `frames` frames:

            y              (20, f, h, w)   i2v, flf2v: mask (4), then latents (16) of the clip, grey without an image
            clip_features  (257 n, 1280)   the same in Wan2.1: of the first image, then of the last
            first_latent   (48, 1, h, w)   ti2v with a first image

        first, last: images (3, H, W) in [-1, 1], of the video's size, or None. Channel c of frame j of the mask is for
        video frame 4 (j-1) + 1 + c, all channels of frame 0 for video frame 0; 1 where it is given.
        Raises ValueError for images that the model does not take.
        """
        kind = self.config.model_type
        images = {name: image for name, image in (("first", first), ("last", last)) if image is not None}
        allowed = {"t2v": [[]], "ti2v": [[], ["first"]], "i2v": [["first"]], "flf2v": [["first", "last"]]}
        if [*images] not in allowed[kind]:
            raise ValueError(f"images for a {kind} model: {[*images]}; "
                             "t2v takes none, ti2v none or the first, i2v the first, flf2v first and last")
        if last is not None and (last.shape != first.shape or frames < 5):
            raise ValueError(f"first and last image of {tuple(first.shape)} and {tuple(last.shape)}, {frames} frames; "
                             "expected one size, 5 frames or more")
        if not images:
            return {}
        if kind == "ti2v":
            return {"first_latent": self.encode_video(first[:, None])}
        side = PIXELS[self.config.vae]
        video = torch.zeros(3, frames, *first.shape[1:])              # grey frames do not become zero latents
        mask = torch.zeros(4, (frames - 1) // 4 + 1, first.shape[1] // side, first.shape[2] // side)
        video[:, 0] = first
        mask[:, 0] = 1
        if last is not None:
            video[:, -1] = last
            mask[3, -1] = 1
        conditions = {"y": torch.cat([mask, self.encode_video(video)])}
        if self.config.image_dim:
            conditions["clip_features"] = torch.cat([self.encode_image(image) for image in images.values()])
        return conditions
