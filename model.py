"""
The Wan video diffusion transformer (DiT) and its public variants.

    velocity = WanModel(CONFIGS["tiny"])(x, timestep, context)       # x (B,C,F,H,W), timestep (B,) in [0,1000]

The model is written as its paper draws it. Submodules are named as in the original checkpoints, so that state dicts
load with strict=True.

Numbers: the large matrices and attention compute in the dtype of their weights (bf16 on GPUs). The timestep path,
modulation, the insides of norms, the residual stream and the head compute in float32, whatever that dtype is. "float32"
here means promote_types(dtype, float32), so that a model in float64 stays in float64. Nothing relies on autocast, nor
on FSDP casting the inputs of blocks (use cast_forward_inputs=False).

Axes: B C F H W for video; L video tokens, T context tokens, D width, N heads, K = D / N; U rows of timesteps, and
time_index (B, 1 or L) says which row a token uses (F.embedding looks it up).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class WanConfig:
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int                       # channels of x and of the condition y together
    out_dim: int                      # channels of x and of the velocity
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int = 0                # width of the CLIP features; 0: the model has no image branch
    image_pos_len: int = 0            # CLIP tokens of first and last image, which get a position embedding (FLF2V)
    scores: bool = False              # a preference model: one score a video instead of a velocity

    @property
    def vae(self):
        """Return the codec whose latents the model takes, by their channels: the embedded world's or a VAE's."""
        return {12: "embedded", 16: "wan2.1", 48: "wan2.2"}.get(self.out_dim, "unknown")

    @property
    def model_type(self):
        """Return the official name of the variant, which follows from the other fields."""
        if self.image_pos_len:
            return "flf2v"
        if self.in_dim > self.out_dim:
            return "i2v"
        if self.vae == "wan2.2":
            return "ti2v"
        return "t2v"

    def count_tokens(self, shape):
        """Return L, the number of tokens of a video whose latents have the shape (C, F, H, W)."""
        return math.prod(size // patch for size, patch in zip(shape[1:], self.patch_size))

    def condition_shapes(self, shape):
        """
        Return {name: shape} of the conditions that go with a sample whose latents have the shape (C, F, H, W). A TI2V
        sample without first_latent is text-to-video.
        """
        channels, frames, height, width = shape
        shapes = {}
        if self.in_dim > self.out_dim:
            shapes["y"] = (self.in_dim - self.out_dim, frames, height, width)
        if self.image_dim:
            shapes["clip_features"] = (self.image_pos_len or 257, self.image_dim)
        if self.model_type == "ti2v" and frames > 1:
            shapes["first_latent"] = (channels, 1, height, width)    # not forward's: see hold_first_frame
        return shapes


# A variant is told by these fields alone. A new kind of condition needs a field of its own, and a place in model_type,
# condition_shapes, forward and check_inputs; a size of a known kind is a row.
WAN_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, out_dim=16)
CONFIGS = {
    "tiny": WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4, in_dim=12, out_dim=12, text_dim=32, text_len=16),
    "wan2.1-t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    "wan2.1-t2v-14b": WanConfig(**WAN_14B, in_dim=16),
    "wan2.1-i2v-14b": WanConfig(**WAN_14B, in_dim=36, image_dim=1280),
    "wan2.1-flf2v-14b": WanConfig(**WAN_14B, in_dim=36, image_dim=1280, image_pos_len=514),
    "wan2.2-ti2v-5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
    "wan2.2-t2v-a14b": WanConfig(**WAN_14B, in_dim=16),              # one of the two experts, which are alike
    "wan2.2-i2v-a14b": WanConfig(**WAN_14B, in_dim=36),              # the same; no CLIP branch, unlike Wan2.1's
}


# ----------------------------------------------------------------------------------------------------------------------
# functions

def timestep_embedding(timestep, dim):
    """
    timestep (U,) in [0, 1000] -> (U, dim) float64, [cos, sin] of timestep * 10000^(-2i/dim). In float32 the angles
    near 1000 would be off by 6e-5.
    """
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2)
    angle = timestep.double()[:, None] * 10000 ** -exponent
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def rope_table(grid, head_dim, device):
    """
    grid (f, h, w) in tokens -> cos, sin (1, L, 1, K) float32, computed in float64, as rotate() takes them: for each of
    the K/2 angles (c, c) and (-s, s). The angles of a token are those of its frame, row and column; each axis
    has its own exponent. Every forward computes the tables, which costs next to nothing: a buffer would be cast by
    .to(bf16), and a cache would keep what inference mode or FakeTensorMode made.
    """
    # not head_dim // 3, which differs for some K, such as 64
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    cosines, sines = [], []
    for axis, (size, width) in enumerate(zip(grid, widths)):
        frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angle = torch.arange(size, device=device)[:, None] * frequency.repeat_interleave(2)      # (size, width)
        shape = [1, 1, 1, width]
        shape[axis] = size
        cosines.append(angle.cos().float().view(shape).expand(*grid, width))
        sines.append(angle.sin().float().view(shape).expand(*grid, width))
    sign = torch.tensor([-1.0, 1.0], device=device).repeat(head_dim // 2)
    cos = torch.cat(cosines, dim=-1).view(1, -1, 1, head_dim)
    sin = torch.cat(sines, dim=-1).view(1, -1, 1, head_dim)
    return cos, sin * sign


def rotate(x, cos, sin):
    """Rotate the interleaved pairs (a, b) of x (B,L,N,K) by rope_table's angles: (a cos - b sin, b cos + a sin)."""
    swapped = x.unflatten(-1, (-1, 2)).roll(1, dims=-1).flatten(-2)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)          # computed in float32, the dtype of the tables


def attention(q, k, v):
    """q (B,L,N,K), k and v (B,T,N,K) -> (B,L,D). No mask: the padding of the text is attended, as Wan was trained."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return rearrange(out, "b n l k -> b l (n k)")


def split_heads(x, num_heads):
    """(B, L, D) -> (B, L, N, K)."""
    return x.unflatten(-1, (num_heads, -1))


def gated_add(x, time_index, gate, update):
    """Return the residual stream x (B,L,D) + gate * update, in float32, with each token's row of gate (U,D)."""
    return torch.addcmul(x, F.embedding(time_index, gate), update)


# ----------------------------------------------------------------------------------------------------------------------
# modules

class Linear32(nn.Linear):
    """A linear layer that computes in float32, even where its weights are bf16 (FSDP gathers a group in one dtype)."""
    def forward(self, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm32(nn.LayerNorm):
    """LayerNorm of the residual stream in float32, even where its weights are bf16."""
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ModulatedNorm(nn.LayerNorm):
    """LayerNorm(x) * (1 + scale) + shift, in float32, with each token's row of shift and scale (U,D)."""
    def __init__(self, dim, eps):
        super().__init__(dim, eps, elementwise_affine=False)

    def forward(self, x, time_index, shift, scale):
        shift = F.embedding(time_index, shift)                       # (B, 1 or L, D)
        scale = 1 + F.embedding(time_index, scale)
        if scale.shape[:2] == (1, 1):                                # one video with one timestep: a single kernel
            return F.layer_norm(x, self.normalized_shape, scale[0, 0], shift[0, 0], self.eps)
        return torch.addcmul(shift, F.layer_norm(x, self.normalized_shape, eps=self.eps), scale)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, as a matrix product: patches (B, L, C*pf*ph*pw) -> (B, L, D)."""
    def forward(self, patches):
        return F.linear(patches, self.weight.flatten(1), self.bias)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, self.num_heads = config.dim, config.num_heads
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, config.eps), nn.RMSNorm(dim, config.eps)      # over the full width
        self.attend = attention                                      # q, k, v (B,L,N,K) -> (B,L,D)

    def queries_keys_values(self, x, cos, sin):
        """x (B,L,D) and the tables of rope_table -> q, k, v (B,L,N,K)."""
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)
        k = split_heads(self.norm_k(self.k(x)), self.num_heads)
        v = split_heads(self.v(x), self.num_heads)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class CrossAttention(nn.Module):
    """Attention of video tokens to the text and, in models with an image branch, to the image, with the same q."""
    def __init__(self, config):
        super().__init__()
        dim, self.num_heads, self.text_len = config.dim, config.num_heads, config.text_len
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, config.eps), nn.RMSNorm(dim, config.eps)
        self.attend = attention
        self.has_image = config.image_dim > 0
        if self.has_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = nn.RMSNorm(dim, config.eps)

    def keys_values(self, context):
        """context (B,T,D), image tokens first -> k, v (B,T,N,K) of the text and, with an image branch, of the image."""
        # contiguous, so that a frozen reference takes the same matrix kernel as the policy
        text = context[:, -self.text_len:].contiguous()
        keys_values = [self.norm_k(self.k(text)), self.v(text)]
        if self.has_image:
            image = context[:, :-self.text_len].contiguous()
            keys_values += [self.norm_k_img(self.k_img(image)), self.v_img(image)]
        return [split_heads(x, self.num_heads) for x in keys_values]

    def forward(self, x, k, v, k_img=None, v_img=None):
        """x (B,L,D) and what keys_values returns -> (B,L,D)."""
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)
        attended = self.attend(q, k, v)
        if self.has_image:
            attended = attended + self.attend(q, k_img, v_img)
        return self.o(attended)


class Block(nn.Module):
    """
    One layer of the transformer; shift, scale and gate depend on the timestep:

        x <- x + gate1 * self_attn(norm1(x) * (1 + scale1) + shift1)
        x <- x + cross_attn(norm3(x), context)
        x <- x + gate2 * ffn(norm2(x) * (1 + scale2) + shift2)

    Video tokens meet in self_attn.attend only; before_attention and after_attention treat each token by itself.
    """
    def __init__(self, config):
        super().__init__()
        self.norm1 = ModulatedNorm(config.dim, config.eps)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm32(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = ModulatedNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"),
                                 nn.Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / math.sqrt(config.dim))

    def forward(self, x, context, time_mod, time_index, cos, sin):
        """
        x (B,L,D) float32, context (B,T,D), time_mod (U,6,D) float32, time_index (B,1) or (B,L): the row of time_mod
        that is each token's, cos and sin from rope_table -> x (B,L,D) float32.
        """
        modulation = self.modulation + time_mod                      # (U, 6, D)
        q, k, v = self.before_attention(x, time_index, cos, sin, modulation)
        attended = self.self_attn.attend(q, k, v)
        return self.after_attention(x, attended, time_index, modulation, *self.cross_attn.keys_values(context))

    def before_attention(self, x, time_index, cos, sin, modulation):
        """The stream x (B,L,D) -> q, k, v of self-attention (B,L,N,K)."""
        shift1, scale1 = modulation[:, 0], modulation[:, 1]
        dtype = self.modulation.dtype                                # of the matrices: a block has one dtype
        h = self.norm1(x, time_index, shift1, scale1).to(dtype)
        return self.self_attn.queries_keys_values(h, cos, sin)

    def after_attention(self, x, attended, time_index, modulation, *keys_values):
        """The stream x, the output of self-attention (B,L,D), k and v of the context -> the block's output."""
        gate1, shift2, scale2, gate2 = modulation[:, 2:].unbind(1)
        dtype = attended.dtype                                       # of the matrices; x itself stays float32
        x = gated_add(x, time_index, gate1, self.self_attn.o(attended))
        x = x + self.cross_attn(self.norm3(x).to(dtype), *keys_values)         # no gate, no modulation here, as in Wan
        h = self.norm2(x, time_index, shift2, scale2).to(dtype)
        return gated_add(x, time_index, gate2, self.ffn(h))


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = ModulatedNorm(config.dim, config.eps)
        self.head = Linear32(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def forward(self, x, time_emb, time_index):
        """x (B,L,D), time_emb (U,D): the embedding before time_projection -> (B, L, pf*ph*pw*C), all float32."""
        shift, scale = (self.modulation + time_emb[:, None]).unbind(1)
        return self.head(self.norm(x, time_index, shift, scale))


class ScoreHead(nn.Module):
    """
    The head of a preference model: each token's contribution to the score of a noisy video, (B, L, 1) float32. The
    score is the mean over tokens, on a logit scale. Tokens carry their sigma and caption from the blocks.
    """
    def __init__(self, config):
        super().__init__()
        quarters = [math.ceil(config.num_layers * quarter / 4) for quarter in (1, 2, 3, 4)]
        self.taps = sorted({layers - 1 for layers in quarters})      # blocks that are read: the last of each quarter
        self.hidden = nn.ModuleList(Linear32(config.dim, 256) for _ in self.taps)
        self.mix = Linear32(256, 256)
        self.head = nn.Parameter(torch.zeros(256, 1))                # no bias: a difference of scores would not see it

    def forward(self, tokens, time_emb, time_index):
        """tokens: a list, (B,L,D) after each block of taps -> (B, L, 1)."""
        hidden = 0
        for layer, x in zip(self.hidden, tokens):
            hidden = hidden + layer(F.layer_norm(x, x.shape[-1:]))   # (B, L, 256); normalised, as residuals grow
        return F.gelu(self.mix(F.gelu(hidden))) @ self.head.to(hidden.dtype)


class ImageEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Sequential(                                   # eps 1e-5 and the exact GELU, unlike elsewhere
            nn.LayerNorm(config.image_dim), nn.Linear(config.image_dim, config.image_dim), nn.GELU(),
            nn.Linear(config.image_dim, config.dim), nn.LayerNorm(config.dim))
        if config.image_pos_len:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_pos_len, config.image_dim))

    def forward(self, clip_features):
        if hasattr(self, "emb_pos"):
            clip_features = clip_features + self.emb_pos
        return self.proj(clip_features)


# ----------------------------------------------------------------------------------------------------------------------
# the model

class WanModel(nn.Module):
    """
    The DiT, or a preference model on its blocks (config.scores). See forward for inputs and output.

    Seams: the attributes of an instance that other files replace. Nothing else is patched.

        block.forward             checkpointing of a block (memory.py)
        block.before_attention,
        block.after_attention     its token-wise halves, run in chunks of tokens or compiled (memory.py)
        model.run_blocks          checkpointing of several blocks together (memory.py)
        block.self_attn.attend    the exchange of tokens for heads around attention (fsdp_utils.py)
        block.self_attn.attend,
        block.cross_attn.attend   attention without a graph by the kernel that a graph would get (memory.py)
        model.split, model.join   the tokens that this rank has in between (fsdp_utils.py)
        nn.Linear layers          adapters with the same call: a block calls its layers and never reads their weights

    A preference model keeps the blocks of a velocity model, frozen (fsdp_utils.build_model), and trains a ScoreHead.
    A subclass keeps the names of the modules; models are built in fsdp_utils.build_model and weights.load_wan.
    """
    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"),
                                            nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = ScoreHead(config) if config.scores else Head(config)
        self.init_weights()

    def init_weights(self):
        """
        Initialises weights as the official code does for training from scratch. Modulations keep their randn / sqrt(D).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        std = 0.02 if self.config.dim >= 1024 else self.config.dim ** -0.5     # 0.02 starves a narrow model of text
        for layer in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(layer.weight, std=std)
        if not self.config.scores:                                   # the first velocity is zero; ScoreHead starts at 0
            nn.init.zeros_(self.head.head.weight)

    def split(self, patches, cos, sin, time_index):
        """patches (B,L,..), tables (1,L,1,K), time_index (B, 1 or L) -> those of this rank's tokens; here of all."""
        return patches, cos, sin, time_index

    def join(self, tokens):
        """tokens (B,l,..) of this rank -> (B,L,..) of all ranks that share the video; here there is one."""
        return tokens

    def run_blocks(self, begin, end, x, *inputs):
        """Take the stream x (B,L,D) through blocks begin .. end - 1. inputs: the other arguments of Block.forward."""
        for block in self.blocks[begin:end]:
            x = block(x, *inputs)
        return x

    def forward(self, x, timestep, context, y=None, clip_features=None):
        """
        x             (B, C, F, H, W)          noisy latents
        timestep      (B,) or per token (B,L)  1000 * sigma, in [0, 1000]; float32, as bf16 has steps of 4 there
        context       (B, T, text_dim)         text embeddings, T <= text_len; zeros are appended, and attended
        y             (B, in_dim - C, F, H, W) image condition, mask channels first (i2v, flf2v)
        clip_features (B, 257, image_dim)      of the image (Wan2.1 i2v), or of first and last image (B, 514, image_dim)
        Returns the velocity noise - latents (B, C, F, H, W) float32; of a preference model the scores (B,).
        """
        self.check_inputs(x, timestep, context, y, clip_features)
        config = self.config
        pf, ph, pw = config.patch_size
        f, h, w = x.shape[2] // pf, x.shape[3] // ph, x.shape[4] // pw         # L = f * h * w
        dtype = self.patch_embedding.weight.dtype                    # of the matrices

        # what belongs to each token
        if y is not None:
            x = torch.cat([x, y.to(x.dtype)], dim=1)
        patches = rearrange(x, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)
        cos, sin = rope_table((f, h, w), config.dim // config.num_heads, x.device)
        if timestep.ndim == 1:
            time_index = torch.arange(len(timestep), device=timestep.device)[:, None]            # (B, 1)
        else:                                                        # one row a value: (B,L,6,D) would take gigabytes
            timestep, time_index = timestep.unique(return_inverse=True)                          # (U,), (B, L)
        patches, cos, sin, time_index = self.split(patches, cos, sin, time_index)
        x = self.patch_embedding(patches.to(dtype))                  # (B, L, D)
        x = x.to(torch.promote_types(dtype, torch.float32))          # the residual stream

        # what all tokens share
        time_emb = self.time_embedding(timestep_embedding(timestep, config.freq_dim).to(x.dtype))    # (U, D)
        time_mod = self.time_projection(time_emb).unflatten(1, (6, -1))                              # (U, 6, D)
        context = F.pad(context, (0, 0, 0, config.text_len - context.shape[1]))
        context = self.text_embedding(context.to(dtype))             # (B, text_len, D)
        if clip_features is not None:
            context = torch.cat([self.img_emb(clip_features.to(dtype)), context], dim=1)

        inputs = (context, time_mod, time_index, cos, sin)
        if config.scores:
            return self.score(x, time_emb, time_index, inputs)
        x = self.run_blocks(0, len(self.blocks), x, *inputs)
        x = self.join(self.head(x, time_emb, time_index))            # (B, L, pf*ph*pw*C), small next to a hidden state
        return rearrange(x, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",                # c is innermost
                         f=f, h=h, w=w, pf=pf, ph=ph, pw=pw)

    def score(self, x, time_emb, time_index, inputs):
        """Return the scores (B,) of the stream x (B,L,D), which the head reads after each block of its taps."""
        tokens, begin = [], 0
        for tap in self.head.taps:
            x = self.run_blocks(begin, tap + 1, x, *inputs)
            tokens.append(x)
            begin = tap + 1
        return self.join(self.head(tokens, time_emb, time_index)).mean(dim=(1, 2))

    def check_inputs(self, x, timestep, context, y, clip_features):
        """Raise ValueError where the inputs of forward do not fit the config or each other."""
        config, batch, patch_size = self.config, len(x), self.config.patch_size
        x_shape, timestep_shape, context_shape = tuple(x.shape), tuple(timestep.shape), tuple(context.shape)
        divides = x.ndim == 5 and all(size % patch == 0 for size, patch in zip(x_shape[2:], patch_size))
        if not divides or x_shape[1] != config.out_dim:
            raise ValueError(f"x is {x_shape}; expected (B, {config.out_dim}, F, H, W) with F, H, W multiples of "
                             f"{patch_size}")
        tokens = math.prod(x_shape[2:]) // math.prod(patch_size)
        is_coarse = timestep.dtype in (torch.bfloat16, torch.float16)
        if timestep_shape not in ((batch,), (batch, tokens)) or is_coarse:
            raise ValueError(f"timestep is {timestep_shape} {timestep.dtype}; expected ({batch},) or one per token, "
                             f"({batch}, {tokens}), in float32: 16 bits cannot tell 999 from 1000")
        expected_context = (batch, config.text_dim)
        if context.ndim != 3 or context_shape[::2] != expected_context or context_shape[1] > config.text_len:
            raise ValueError(f"context is {context_shape}; expected ({batch}, at most {config.text_len}, "
                             f"{config.text_dim})")
        expected_shapes = config.condition_shapes(x_shape[1:])
        for name, condition in (("y", y), ("clip_features", clip_features)):
            shape = None if condition is None else tuple(condition.shape)
            expected = (batch, *expected_shapes[name]) if name in expected_shapes else None
            if shape != expected:
                raise ValueError(f"the condition {name} is {shape}; this {config.model_type} model with x {x_shape} "
                                 f"takes {expected}")


def hold_first_frame(x, timestep, first_latent, patch_size):
    """
    TI2V with a given image: put the clean first_latent (B,C,1,H,W) in frame 0 of the noisy latents x (B,C,F,H,W), and
    give its tokens timestep 0; all others keep timestep (B,). Returns x (B,C,F,H,W) and timestep (B,L) for the model,
    whose output for frame 0 the caller ignores.
    """
    tokens_per_frame = math.prod(x.shape[3:]) // math.prod(patch_size[1:])
    frames = torch.arange(x.shape[2] // patch_size[0], device=x.device)
    frame_of_token = frames.repeat_interleave(tokens_per_frame)      # (L,)
    return torch.cat([first_latent.to(x), x[:, :, 1:]], dim=2), timestep[:, None] * (frame_of_token > 0)
