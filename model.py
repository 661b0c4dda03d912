"""
The Wan video DiT, its public variants, and reading and writing their weights.

    velocity = WanModel(CONFIGS["tiny"])(x, timestep, context)        # x (B,C,F,H,W), timestep (B,) in [0,1000]

Submodules are named as in the original checkpoints, so their state dicts load with strict=True.

Numbers: the large matrices and attention run in the dtype of the parameters (bf16 on GPUs); the timestep path, modulation, the insides of
the norms, the residual stream and the head run in float32 whatever that dtype is. "float32" here is promote_types(dtype, float32), so that a
model in float64 stays in float64. Nothing relies on autocast, nor on FSDP casting the inputs of blocks (use cast_forward_inputs=False).
Memory: what matrices and attention make is kept for backward; norms, modulation, rotation and GELU are cheap and done again (recompute).

Axes: B C F H W for video; L video tokens, T context tokens, D width, N heads, K = D / N; U distinct timesteps.
"""
import math
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

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
    image_pos_len: int = 0            # tokens of first and last image together, which get a position embedding (FLF2V)
    scores: bool = False              # a preference model: one score a video instead of a velocity; the same blocks, another head

    @property
    def model_type(self):             # the official word, which follows from the rest
        return "flf2v" if self.image_pos_len else "i2v" if self.in_dim > self.out_dim else "ti2v" if self.out_dim == 48 else "t2v"

    @property
    def vae(self):                    # whose latents: the embedded world's pixel codec, Wan2.1's VAE, Wan2.2's
        return {12: "embedded", 16: "wan2.1", 48: "wan2.2"}.get(self.out_dim, "unknown")

    def count_tokens(self, latents):   # of a video whose latents have the shape (C, F, H, W)
        return math.prod(size // patch for size, patch in zip(latents[1:], self.patch_size))

    def condition_shapes(self, latents):
        """latents: the shape (C, F, H, W) of a sample -> {name: shape} of what goes with it; ti2v without first_latent is text-to-video."""
        shapes = {"y": (self.in_dim - self.out_dim, *latents[1:])} if self.in_dim > self.out_dim else {}
        shapes |= {"clip_features": (self.image_pos_len or 257, self.image_dim)} if self.image_dim else {}
        return shapes | ({"first_latent": (latents[0], 1, *latents[2:])} if self.model_type == "ti2v" and latents[1] > 1 else {})


WAN_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, out_dim=16)
CONFIGS = {
    "tiny": WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4, in_dim=12, out_dim=12, text_dim=32, text_len=16),
    "wan2.1-t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    "wan2.1-t2v-14b": WanConfig(**WAN_14B, in_dim=16),
    "wan2.1-i2v-14b": WanConfig(**WAN_14B, in_dim=36, image_dim=1280),
    "wan2.1-flf2v-14b": WanConfig(**WAN_14B, in_dim=36, image_dim=1280, image_pos_len=514),
    "wan2.2-ti2v-5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
    "wan2.2-t2v-a14b": WanConfig(**WAN_14B, in_dim=16),                  # one of the two experts, which are alike
    "wan2.2-i2v-a14b": WanConfig(**WAN_14B, in_dim=36),                  # the same; no CLIP branch, unlike Wan2.1's
}


# ---------------------------------------------------------------------------------------------------------------------------------
# the parts

CPUINFO = Path("/proc/cpuinfo")
ONEDNN = CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text() and torch.backends.mkldnn.is_available()   # MKL, PyTorch's default, leaves AVX-512 unused there


def product(x, weight, bias=None, add_to=None):
    """x @ weight.T, plus bias, or added to add_to (then both are 2-d). oneDNN's has no gradient: for use inside of Recompute only."""
    if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out if add_to is None else add_to.add_(out)
    return F.linear(x, weight, bias) if add_to is None else add_to.addmm_(x, weight.t())


class Recompute(torch.autograd.Function):
    """See recompute(). Backward keeps the inputs of f and the weights of the layers, and makes again what f made."""
    @staticmethod
    def forward(ctx, f, count, *tensors):                                # `count` inputs of f, then weight, bias, weight, bias, ...
        ctx.f, ctx.count = f, count
        ctx.save_for_backward(*tensors)
        outs = f(*(x.detach() for x in tensors[:count]))                 # detached, so that torch.compile sees one case for policy and reference
        *others, h = outs if isinstance(outs, tuple) else (outs,)
        layers = zip(tensors[count::2], tensors[count + 1::2])
        return *others, *([product(h, weight.to(h.dtype), bias.to(h.dtype)) for weight, bias in layers] or [h])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        tensors, layer_grads = ctx.saved_tensors, []                     # asked for once only, or a checkpoint raises
        inputs = [x.detach().requires_grad_(needed) for x, needed in zip(tensors[:ctx.count], ctx.needs_input_grad[2:])]
        with torch.enable_grad():
            outs = ctx.f(*inputs)
        *others, h = outs if isinstance(outs, tuple) else (outs,)
        of_layers, shape, dtype = [grad.flatten(0, -2) for grad in grads[len(others):]], h.shape, h.dtype
        for grad, needed in zip(of_layers, ctx.needs_input_grad[2 + ctx.count::2]):
            layer_grads += [product(grad.t(), h.detach().flatten(0, -2).t()) if needed else None, grad.sum(0)]
        edges = [torch.autograd.graph.get_gradient_edge(out) if out.requires_grad else None for out in (*others, h)]
        del outs, others, h                                              # before the gradient of h, which is as large, is there
        h_grad = None
        for grad, weight in zip(of_layers, tensors[ctx.count::2]):
            h_grad = product(grad, weight.to(dtype).t(), add_to=h_grad)
        grads = grads if h_grad is None else (*grads[:len(edges) - 1], h_grad.view(shape))
        edges, grads = zip(*[(edge, grad) for edge, grad in zip(edges, grads) if edge]) if any(edges) else ((), ())
        del h_grad
        found = iter(torch.autograd.grad(edges, [x for x in inputs if x.requires_grad], grads) if edges else ())
        return None, None, *(next(found) if x.requires_grad else None for x in inputs), *layer_grads


def recompute(f, inputs, *layers):
    """
    Linear layers of something cheap: h = f(*inputs), or *others, h = f(*inputs). Returns (*others, *(layer(h) for layer in layers)), or h in their place
    without layers; not a tuple if it is one tensor. Layers compute in the dtype of h. Gradients flow to inputs and layers, to nothing else that f uses.
    """
    outs = Recompute.apply(f, len(inputs), *inputs, *(tensor for layer in layers for tensor in (layer.weight, layer.bias)))
    return outs if len(outs) > 1 else outs[0]


def linear(x, weight, bias):
    """F.linear by product()."""
    return Recompute.apply(lambda x: x, 1, x, weight, bias)[0]


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Linear32(nn.Linear):
    """A linear layer that computes in float32, also where its weights arrive in bf16 (FSDP gathers all of a group in one dtype)."""
    def forward(self, x):
        return recompute(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), (x,), self)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, as the product that it is: patches (B, L, C*pf*ph*pw) -> (B, L, D), contiguous, of any share of them."""
    def forward(self, patches):
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ModulatedNorm(nn.LayerNorm):
    """LayerNorm without weights, then shift and scale (U,D) by each token's timestep, in float32; the result is cast to dtype."""
    def forward(self, x, time_index, shift, scale, dtype):
        shift, scale = F.embedding(time_index, shift), 1 + F.embedding(time_index, scale)    # (B, 1 or L, D)
        if scale.shape[:2] == (1, 1):                                    # one video: a single kernel
            return F.layer_norm(x, x.shape[-1:], scale[0, 0], shift[0, 0], self.eps).to(dtype)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=self.eps), scale).to(dtype)


class GatedAdd(nn.Module):
    """The residual stream x + gate * update, in float32, gate (U,D) by each token's timestep."""
    def forward(self, x, time_index, gate, update):
        return torch.addcmul(x, F.embedding(time_index, gate), update)


class AddNorm(nn.LayerNorm):
    """GatedAdd, then LayerNorm of the stream, cast to the dtype of the update; returns both."""
    def forward(self, x, time_index, gate, update, weight, bias):
        x = torch.addcmul(x, F.embedding(time_index, gate), update)
        return x, F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), self.eps).to(update.dtype)


class RMSNorm(nn.RMSNorm):
    """Over the whole width (in float32, also on bf16, by rms_norm itself), then split into heads (B, L, N, K) and, given tables, rotated."""
    def forward(self, x, weight, num_heads, *tables):
        x = F.rms_norm(x, x.shape[-1:], weight, self.eps).unflatten(-1, (num_heads, -1))
        return rotate(x, *tables) if tables else x


def timestep_embedding(timestep, dim):
    """timestep (U,) in [0, 1000] -> (U, dim) float64, [cos, sin] of timestep * 10000^(-2i/dim); in float32 it is off by 6e-5 near 1000."""
    angle = timestep.double()[:, None] * 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def rope_table(grid, head_dim, device):
    """
    grid (f, h, w) in tokens -> cos, sin (L, 1, K) float32, computed in float64, as rotate() takes them: each of the K/2 angles twice, the first sine
    negative. The angles of a token are those of its frame, row and column; each axis has its own exponent. Made anew in each forward, which costs
    next to nothing: a buffer would be cast by .to(bf16), and a cache would keep what was made in inference mode or by FakeTensorMode.
    """
    spatial = 2 * (head_dim // 6)                                        # not head_dim // 3: differs for heads other than 128
    angles = []
    for axis, (size, width) in enumerate(zip(grid, (head_dim - 2 * spatial, spatial, spatial))):
        frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angle = torch.arange(size, device=device)[:, None] * frequency.repeat_interleave(2)  # (size, width)
        angles.append(angle.view([size if i == axis else 1 for i in range(3)] + [width]))
    table = lambda f: torch.cat([f(angle).float().expand(*grid, -1) for angle in angles], dim=-1).reshape(-1, 1, head_dim)
    return table(torch.cos), table(torch.sin) * torch.tensor([-1.0, 1.0], device=device).repeat(head_dim // 2)


def rotate(x, cos, sin):
    """Rotate the interleaved pairs (a, b) of x (B, L, N, K) by the angles of rope_table, in float32: (a cos - b sin, b cos + a sin)."""
    swapped = x.unflatten(-1, (-1, 2)).roll(1, dims=-1).flatten(-2)      # (b, a)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def attention(q, k, v):
    """q (B, L, N, K), k and v (B, T, N, K) -> (B, L, D). No mask: the padding of the text is attended, as Wan was trained."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return rearrange(out, "b n l k -> b l (n k)")


class Attention(nn.Module):
    """The layers around an attention, which Block calls; in cross-attention with an image branch, those for the image tokens too."""
    def __init__(self, config, image=False):
        super().__init__()
        dim = config.dim
        self.q, self.k, self.v, self.o = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim, eps=config.eps), RMSNorm(dim, eps=config.eps)
        if image:
            self.k_img, self.v_img, self.norm_k_img = Linear(dim, dim), Linear(dim, dim), RMSNorm(dim, eps=config.eps)
        self.num_heads, self.attend = config.num_heads, attention        # q, k, v (B,L,N,K) -> (B,L,D); context parallelism puts its exchange around attend


class Block(nn.Module):
    keep_hidden = True                                                   # False: ffn[0] is done again in backward too (fsdp_utils.checkpoint_blocks)

    def __init__(self, config):
        super().__init__()
        dim, self.num_heads, self.text_len, self.has_image = config.dim, config.num_heads, config.text_len, config.image_dim > 0
        self.norm1 = ModulatedNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = AddNorm(dim, eps=config.eps)
        self.cross_attn = Attention(config, self.has_image)
        self.norm2, self.add2 = ModulatedNorm(dim, config.eps, elementwise_affine=False), GatedAdd()
        self.ffn = nn.Sequential(Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def heads(self, norm, x, *tables):
        """x (B, L, D) -> normed and, given tables, rotated (B, L, N, K)."""
        return recompute(lambda x, weight, *tables: norm(x, weight, self.num_heads, *tables), (x, norm.weight, *tables))

    def before_attention(self, x, time_index, cos, sin, modulation):
        """Token by token: the stream x (B,L,D), cos and sin (1,L,1,K), modulation (U,6,D) -> q, k, v of self-attention (B,L,N,K)."""
        attn, dtype = self.self_attn, self.ffn[0].weight.dtype           # of the matrices; x itself stays float32
        norm = lambda x, m: self.norm1(x, time_index, m[:, 0], m[:, 1], dtype)
        q, k, v = recompute(norm, (x, modulation), attn.q, attn.k, attn.v)
        return self.heads(attn.norm_q, q, cos, sin), self.heads(attn.norm_k, k, cos, sin), v.unflatten(-1, (self.num_heads, -1))

    def keys(self, context):
        """-> k, v of the text (B,T,N,K) and, with an image branch, k, v of the image tokens, which stand before it."""
        cross, image, text = self.cross_attn, context[:, :-self.text_len], context[:, -self.text_len:]
        split = lambda v: v.unflatten(-1, (self.num_heads, -1))
        found = [self.heads(cross.norm_k, cross.k(text)), split(cross.v(text))]
        return found + [self.heads(cross.norm_k_img, cross.k_img(image)), split(cross.v_img(image))] if self.has_image else found

    def after_attention(self, x, attended, time_index, modulation, *keys):
        """Token by token: the stream x and what self-attention made of it (B,L,D) -> the stream after the block (B,L,D)."""
        cross, ffn, dtype = self.cross_attn, self.ffn, attended.dtype
        add_norm = lambda x, update, m, weight, bias: self.norm3(x, time_index, m[:, 2], update, weight, bias)
        x, q = recompute(add_norm, (x, self.self_attn.o(attended), modulation, self.norm3.weight, self.norm3.bias), cross.q)
        q = self.heads(cross.norm_q, q)
        attended = reduce(torch.add, [cross.attend(q, k, v) for k, v in zip(keys[::2], keys[1::2])])         # text and image apart, with the same queries
        x = x + cross.o(attended)                                        # no gate and no modulation here, as in Wan

        norm = lambda x, m: self.norm2(x, time_index, m[:, 3], m[:, 4], dtype)
        if self.keep_hidden:
            update = recompute(ffn[1], (recompute(norm, (x, modulation), ffn[0]),), ffn[2])
        else:
            activated = lambda x, m, weight, bias: ffn[1](linear(norm(x, m), weight, bias))
            update = recompute(activated, (x, modulation, ffn[0].weight, ffn[0].bias), ffn[2])
        return recompute(lambda x, update, m: self.add2(x, time_index, m[:, 5], update), (x, update, modulation))

    def forward(self, x, context, time_mod, time_index, cos, sin):
        """x (B,L,D) float32, context (B,T,D), time_mod (U,6,D) float32, time_index (B,1) or (B,L), tables of rope_table -> x (B,L,D)."""
        modulation = self.modulation + time_mod                          # (U, 6, D): shift, scale, gate of self-attention, then of the FFN
        q, k, v = self.before_attention(x, time_index, cos[None], sin[None], modulation)
        return self.after_attention(x, self.self_attn.attend(q, k, v), time_index, modulation, *self.keys(context))


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = ModulatedNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def forward(self, x, time_emb, time_index):
        """x (B,L,D), time_emb (U,D): the embedding before time_projection -> (B, L, p_f*p_h*p_w*C), all float32."""
        norm = lambda x, m: self.norm(x, time_index, m[:, 0], m[:, 1], x.dtype)
        return recompute(norm, (x, self.modulation + time_emb[:, None]), self.head)


class ScoreHead(nn.Module):
    """In Head's place, how much a noisy video is preferred: what every token says to it, (B, L, 1) float32. The score is the mean, on a logit scale."""
    def __init__(self, config):
        super().__init__()
        self.taps = sorted({math.ceil(config.num_layers * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})        # blocks: the last of each quarter
        self.hidden = nn.ModuleList(Linear32(config.dim, 256) for _ in self.taps)
        self.mix = Linear32(256, 256)
        self.head = nn.Parameter(torch.zeros(256, 1))                    # 0: training starts at log 2; no bias, which a difference of scores would not see

    def forward(self, tokens, time_emb, time_index):
        """tokens: a list, (B,L,D) after each block of taps. They know their sigma and caption from the blocks."""
        hidden = sum(layer(F.layer_norm(x, x.shape[-1:])) for layer, x in zip(self.hidden, tokens))     # (B, L, 256); normalised, as residuals grow
        return F.gelu(self.mix(F.gelu(hidden))) @ self.head.to(hidden.dtype)


class ImageEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Sequential(                                       # eps 1e-5 and the exact GELU, unlike everywhere else
            nn.LayerNorm(config.image_dim), nn.Linear(config.image_dim, config.image_dim), nn.GELU(),
            nn.Linear(config.image_dim, config.dim), nn.LayerNorm(config.dim))
        if config.image_pos_len:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_pos_len, config.image_dim))

    def forward(self, clip_features):
        return self.proj(clip_features + self.emb_pos if hasattr(self, "emb_pos") else clip_features)


# ---------------------------------------------------------------------------------------------------------------------------------
# the model

class WanModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = ScoreHead(config) if config.scores else Head(config)
        self.context_parallel = None                                     # fsdp_utils.ContextParallel, where ranks share the tokens of a video
        self.init_weights()

    def init_weights(self):
        """As the official code does for training from scratch. The head starts at zero; modulations keep their randn / sqrt(D)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        std = 0.02 if self.config.dim >= 1024 else self.config.dim ** -0.5                   # 0.02 starves a narrow model of text and time
        for layer in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(self.head.head if self.config.scores else self.head.head.weight)

    def check_inputs(self, x, timestep, context, y, clip_features):
        config, batch = self.config, len(x)
        shape = lambda tensor: None if tensor is None else tuple(tensor.shape)
        if x.ndim != 5 or x.shape[1] != config.out_dim or any(size % patch for size, patch in zip(x.shape[2:], config.patch_size)):
            raise ValueError(f"x is {shape(x)}; expected (B, {config.out_dim}, F, H, W) with F, H, W multiples of {config.patch_size}")
        tokens = math.prod(x.shape[2:]) // math.prod(config.patch_size)
        if shape(timestep) not in ((batch,), (batch, tokens)) or timestep.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"timestep is {shape(timestep)} {timestep.dtype}; expected ({batch},) or one per token, ({batch}, {tokens}), "
                             "in float32: 16 bits cannot tell 999 from 1000")
        if context.ndim != 3 or len(context) != batch or context.shape[1] > config.text_len or context.shape[2] != config.text_dim:
            raise ValueError(f"context is {shape(context)}; expected ({batch}, at most {config.text_len}, {config.text_dim})")
        expected = {name: (batch, *rest) for name, rest in config.condition_shapes(x.shape[1:]).items()}
        for name, condition in (("y", y), ("clip_features", clip_features)):
            if shape(condition) != expected.get(name):
                raise ValueError(f"the condition {name} is {shape(condition)}; this {config.model_type} model with x {shape(x)} takes {expected.get(name)}")

    def trunk(self, x, timestep, context, y=None, clip_features=None):
        """
        Everything before the head. Returns tokens (B,L,D), of a preference model a list of them, time_emb (U,D), time_index (B,1) or (B,L), the row of
        time_emb that each token has. Under context parallelism L is this rank's share of the tokens.
        """
        self.check_inputs(x, timestep, context, y, clip_features)
        dtype = self.patch_embedding.weight.dtype                        # of the matrices
        x = x if y is None else torch.cat([x, y.to(x.dtype)], dim=1)
        pf, ph, pw = self.config.patch_size
        cos, sin = rope_table((x.shape[2] // pf, x.shape[3] // ph, x.shape[4] // pw), self.config.dim // self.config.num_heads, x.device)
        x = rearrange(x, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)      # (B, L, C*pf*ph*pw)

        if timestep.ndim == 1:
            time_index = torch.arange(len(timestep), device=timestep.device)[:, None]        # (B, 1): one timestep for a whole video
        else:
            timestep, time_index = timestep.unique(return_inverse=True)  # (U,), (B, L): [B,L,6,D] would be gigabytes for two timesteps
        if self.context_parallel is not None:                            # from here on this rank has its share of the L tokens
            x, cos, sin, time_index = self.context_parallel.split(x, cos, sin, time_index)
        x = self.patch_embedding(x.to(dtype)).to(torch.promote_types(dtype, torch.float32))              # (B, L, D), the residual stream
        time_emb = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim).to(x.dtype))      # (U, D)
        time_mod = self.time_projection(time_emb).unflatten(1, (6, -1))  # (U, 6, D)

        context = self.text_embedding(F.pad(context, (0, 0, 0, self.config.text_len - context.shape[1])).to(dtype))             # (B, text_len, D)
        if clip_features is not None:
            context = torch.cat([self.img_emb(clip_features.to(dtype)), context], dim=1)

        ends = [tap + 1 for tap in self.head.taps] if self.config.scores else [len(self.blocks)]
        tokens = []
        for begin, end in zip([0, *ends], ends):
            x = self.run_blocks(begin, end, x, context, time_mod, time_index, cos, sin)
            tokens.append(x)
        return tokens if self.config.scores else x, time_emb, time_index

    def run_blocks(self, begin, end, x, *rest):
        for block in self.blocks[begin:end]:
            x = block(x, *rest)
        return x

    def forward(self, x, timestep, context, y=None, clip_features=None):
        """
        x             (B, C, F, H, W)          noisy latents
        timestep      (B,) or per token (B,L)  1000 * sigma, in [0, 1000]; float32, as bf16 has steps of 4 there
        context       (B, T, text_dim)         text embeddings, T <= text_len; the rest is filled with zeros, which the model does attend
        y             (B, in_dim - C, F, H, W) image condition, mask channels first (i2v, flf2v)
        clip_features (B, 257, image_dim)      of the image (Wan2.1 i2v); first and last image in a row, (B, 514, image_dim), for flf2v
        Returns the velocity noise - latents (B, C, F, H, W), float32; of a preference model (config.scores) the scores (B,).
        """
        tokens, time_emb, time_index = self.trunk(x, timestep, context, y, clip_features)
        tokens = self.head(tokens, time_emb, time_index)                 # (B, L, pf*ph*pw*C)
        if self.context_parallel is not None:
            tokens = self.context_parallel.join(tokens)                  # of all ranks: small beside one hidden state
        if self.config.scores:
            return tokens.mean(dim=(1, 2))
        (f, h, w), (pf, ph, pw) = x.shape[2:], self.config.patch_size
        return rearrange(tokens, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",            # channels are innermost
                         f=f // pf, h=h // ph, w=w // pw, pf=pf, ph=ph, pw=pw)


def hold_first_frame(x, timestep, first_latent, patch_size):
    """
    TI2V with a given image: frame 0 of the noisy latents x (B,C,F,H,W) is the clean first_latent (B,C,1,H,W) and its tokens have timestep 0; all
    others keep timestep (B,). Returns x (B,C,F,H,W) and timestep (B,L) for the model. What the model says about frame 0 does not count.
    """
    per_frame = math.prod(x.shape[3:]) // math.prod(patch_size[1:])
    frames = torch.arange(x.shape[2] // patch_size[0], device=x.device).repeat_interleave(per_frame)       # (L,)
    return torch.cat([first_latent.to(x), x[:, :, 1:]], dim=2), timestep[:, None] * (frames > 0)
