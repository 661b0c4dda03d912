"""Small models of every variant against diffusers; numbers, presets, first weights, and inputs that are refused."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from make_golden import CASES, GOLDEN, diffusers_twin, make_case, velocity_and_gradients
from model import CONFIGS, SelfAttention, WanConfig, WanModel, rope_table, rotate, timestep_embedding
from weights import expected_shapes


def relative_error(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def same_tensors(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def diffusers():
    reason = "diffusers is not installed (requirements-video.txt); the golden file has its numbers"
    return pytest.importorskip("diffusers", reason=reason)


# ----------------------------------------------------------------------------------------------------------------------
# the function

@pytest.mark.parametrize("name", CASES)
def test_velocity_and_input_gradients_equal_those_of_diffusers(name, diffusers):
    model, inputs, grad = make_case(name)
    ours, theirs = [velocity_and_gradients(forward, inputs, grad) for forward in (model, diffusers_twin(model))]
    assert ours.keys() == theirs.keys() and len(ours) == len(inputs)
    for key in ours:
        assert relative_error(ours[key], theirs[key]) <= 2e-5, key


@pytest.mark.parametrize("name", CASES)
def test_velocity_and_input_gradients_equal_those_of_the_golden_file(name):
    model, inputs, grad = make_case(name)
    ours, golden = velocity_and_gradients(model, inputs, grad), load_file(GOLDEN)
    for key in ("velocity", "d_x"):
        assert ours[key].dtype == torch.float32
        assert relative_error(ours[key], golden[f"{name}.{key}"]) <= 2e-5, key


def test_every_epsilon_shows_in_the_case_of_tiny_activations():
    model, inputs, _ = make_case("tiny-activations")
    norms = {name: module for name, module in model.named_modules() if hasattr(module, "eps")}
    assert {name.removeprefix("blocks.0.") for name in norms if "blocks.1" not in name} == {
        "img_emb.proj.0", "img_emb.proj.4", "norm1", "norm2", "norm3", "self_attn.norm_q", "self_attn.norm_k",
        "cross_attn.norm_q", "cross_attn.norm_k", "cross_attn.norm_k_img", "head.norm"}
    with torch.no_grad():
        velocity = model(**inputs)
        for name, norm in norms.items():
            right, norm.eps = norm.eps, norm.eps * 10      # 1e-5 where Wan has 1e-6
            difference = relative_error(model(**inputs), velocity)
            assert difference > 2e-4, f"2e-5 to diffusers would not show a wrong eps in {name}"
            norm.eps = right


def test_parameter_gradients_equal_finite_differences_in_float64():
    model, inputs, grad = make_case("i2v-clip")
    model, inputs, grad = model.double(), {name: value.double() for name, value in inputs.items()}, grad.double()
    (model(**inputs) * grad).sum().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.1."):
            continue
        direction, step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append((model(**inputs) * grad).sum().item())
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        derivative = (parameter.grad * direction).sum().item()                 # about 1 to 1000
        assert derivative == pytest.approx(slope, rel=1e-5, abs=1e-4), name


def test_gradients_do_not_depend_on_what_else_is_frozen():
    model, inputs, grad = make_case("i2v-clip")
    expected = velocity_and_gradients(model, inputs, grad)
    (model(**inputs) * grad).sum().backward()
    model.requires_grad_(False)
    assert same_tensors(velocity_and_gradients(model, inputs, grad), expected)
    for name in ("blocks.0.modulation", "blocks.0.self_attn.norm_q.weight", "blocks.0.norm3.weight",
                 "blocks.1.ffn.0.bias", "blocks.0.cross_attn.norm_k_img.weight", "head.modulation"):
        parameter = model.get_parameter(name).requires_grad_(True)
        (alone,) = torch.autograd.grad((model(**inputs) * grad).sum(), [parameter])
        assert relative_error(alone, parameter.grad) < 1e-6, name
        parameter.requires_grad_(False)


def test_timestep_embedding_is_cosines_first_and_exact_near_1000():
    row = timestep_embedding(torch.tensor([999.0]), 256)[0]
    assert row[0].item() == math.cos(999) and row[128].item() == math.sin(999)
    assert row[128 + 64].item() == pytest.approx(math.sin(999 / 100), abs=1e-12)      # i = 64 of 128: 10000^(-1/2)


def test_rope_turns_interleaved_pairs_by_frame_row_and_column():
    # K = 24: 8 channels per axis, 4 angles each
    # token (frame 1, row 2, column 3) of a 2 x 3 x 5 grid is number 1 * 15 + 2 * 5 + 3 = 28
    cos, sin = rope_table((2, 3, 5), 24, "cpu")
    assert cos.shape == sin.shape == (1, 30, 1, 24) and cos.dtype == sin.dtype == torch.float32
    frequency = [1, 0.1, 0.01, 0.001]
    angles = torch.tensor([position * f for position in (1, 2, 3) for f in frequency], dtype=torch.float64)
    for table, expected in ((cos[..., ::2], angles.cos()), (cos[..., 1::2], angles.cos()),
                            (sin[..., ::2], -angles.sin()), (sin[..., 1::2], angles.sin())):
        torch.testing.assert_close(table[0, 28, 0].double(), expected, atol=1e-7, rtol=0)
    pair = torch.zeros(1, 30, 1, 24)
    pair[..., 8] = 1.0                                     # first pair of the row axis: (1, 0) -> (cos 2, sin 2)
    turned = rotate(pair, cos, sin)[0, 28, 0]
    assert turned[8].item() == pytest.approx(math.cos(2)) and turned[9].item() == pytest.approx(math.sin(2))
    turned = rotate(pair.roll(1, -1), cos, sin)[0, 28, 0]  # (0, 1) -> (-sin 2, cos 2)
    assert turned[8].item() == pytest.approx(-math.sin(2)) and turned[9].item() == pytest.approx(math.cos(2))
    _, sin = rope_table((1, 1, 2), 64, "cpu")              # K = 64 = 24 + 20 + 20; token 1 is in column 1
    assert (sin[0, 1, 0] != 0).tolist() == [False] * 44 + [True] * 20


def test_videos_of_a_batch_do_not_mix_and_one_timestep_per_token_says_the_same_as_one_per_video():
    model, inputs, _ = make_case("tiny")
    with torch.no_grad():
        velocity = model(**inputs)
        alone = [model(**{name: value[i:i + 1] for name, value in inputs.items()}) for i in (0, 1)]
        per_token = model(**inputs | {"timestep": inputs["timestep"][:, None].repeat(1, 45)})
    assert relative_error(torch.cat(alone), velocity) < 1e-6
    assert relative_error(per_token, velocity) < 1e-6


def test_context_is_filled_with_zeros_and_these_are_attended():
    model, inputs, _ = make_case("tiny")
    context = inputs["context"]
    with torch.no_grad():
        velocity = model(**inputs)
        filled = torch.cat([context, torch.zeros(2, 7, 32)], dim=1)
        assert torch.equal(model(**inputs | {"context": filled}), velocity)
        empty = model(**inputs | {"context": context[:, :0]})
        assert torch.equal(empty, model(**inputs | {"context": torch.zeros(2, 16, 32)}))
        model.text_embedding[0].bias += 1.0                # what a padding row becomes
        assert relative_error(model(**inputs | {"context": context[:, :0]}), velocity) > 0.01


class Adapter(torch.nn.Module):
    """A layer that can be called, and that has no weight of its own."""
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_a_block_calls_its_layers_and_never_reads_their_weights():
    model, inputs, grad = make_case("i2v-clip")
    expected = velocity_and_gradients(model, inputs, grad)
    for block in model.blocks:
        names = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
        for name in names:
            block.set_submodule(name, Adapter(block.get_submodule(name)))
    assert len(names) == 12
    assert same_tensors(velocity_and_gradients(model, inputs, grad), expected)


def test_a_block_takes_tensors_only_and_checkpointing_by_patching_its_forward_changes_nothing():
    model, inputs, grad = make_case("ti2v")
    assert isinstance(model.blocks, torch.nn.ModuleList)
    expected = velocity_and_gradients(model, inputs, grad)

    def checkpointed(forward):
        def call(*args):
            assert all(isinstance(arg, torch.Tensor) for arg in args)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
        return call
    for block in model.blocks:
        block.forward = checkpointed(block.forward)
    assert same_tensors(velocity_and_gradients(model, inputs, grad), expected)


# ----------------------------------------------------------------------------------------------------------------------
# numbers

@pytest.mark.parametrize("name", CASES)
def test_bf16_weights_cost_less_than_4e3_and_an_odd_timestep_is_not_rounded(name):
    model, inputs, _ = make_case(name)
    half, rounded = WanModel(model.config).bfloat16(), WanModel(model.config)
    half.load_state_dict(model.state_dict())
    rounded.load_state_dict(half.state_dict())             # the same weights in float32: only the arithmetic differs
    with torch.no_grad():
        velocity = half(**inputs)
        assert velocity.dtype == torch.float32
        assert relative_error(velocity, rounded(**inputs)) <= 4e-3
        assert not torch.equal(half(**inputs | {"timestep": inputs["timestep"] * 1.001}), velocity)


def test_with_bf16_weights_matrices_are_bf16_and_time_residual_and_head_are_float32():
    model, inputs, _ = make_case("i2v-clip")
    model, dtypes, linears, attended = model.bfloat16(), {}, [], []
    linear, attention = F.linear, F.scaled_dot_product_attention

    def watch(name):
        def hook(module, args, out):
            if args and torch.is_tensor(out):
                dtypes[name] = (args[0].dtype, out.dtype)
        return hook

    def watched_linear(x, weight, bias):
        linears.append((x.dtype, x.shape[-1], len(weight)))
        return linear(x, weight, bias)

    def watched_attention(*args):
        attended.append({arg.dtype for arg in args})
        return attention(*args)
    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", watched_linear)
        patch.setattr(F, "scaled_dot_product_attention", watched_attention)
        model(**inputs)
    full, half = torch.float32, torch.bfloat16
    for name in ("time_embedding", "time_embedding.0", "time_embedding.2", "time_projection.1", "blocks.0", "blocks.1",
                 "blocks.0.norm1", "blocks.0.norm2", "blocks.0.norm3", "head", "head.norm"):
        assert dtypes[name] == (full, full), name
    for name in ("text_embedding", "img_emb", "blocks.0.self_attn.q", "blocks.0.self_attn.o", "blocks.0.cross_attn.q",
                 "blocks.0.self_attn.norm_q", "blocks.0.cross_attn.norm_q", "blocks.0.cross_attn.o",
                 "blocks.0.cross_attn.k_img", "blocks.0.ffn"):
        assert dtypes[name] == (half, half), name
    wide = [shape for dtype, *shape in linears if dtype == full]               # [in, out]
    assert wide == [[256, 128], [128, 128], [128, 6 * 128], [128, 4 * 4]]      # time embedding and projection, head
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == len(layers) + 1                                     # and the patch embedding
    assert attended == [{half}] * 6                                            # self, text and image in two blocks


def test_rms_norm_computes_in_float32_on_bf16():
    x = 1 + 2 ** -7 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    norm = SelfAttention(dataclasses.replace(CONFIGS["tiny"], dim=512)).norm_q.bfloat16()
    x = x.bfloat16()
    exact = x.double() / (x.double() ** 2).mean(-1, keepdim=True).add(1e-6).sqrt()
    # one rounding; statistics in bf16 would be off by 1e-3
    assert relative_error(norm(x), exact.to(torch.bfloat16)) < 1e-4


def test_a_float64_model_stays_in_float64():
    model, inputs, grad = make_case("flf2v")
    single = velocity_and_gradients(model, inputs, grad)
    inputs = {name: value.double() for name, value in inputs.items()}
    double = velocity_and_gradients(model.double(), inputs, grad.double())
    for key in double:
        assert double[key].dtype == torch.float64 and relative_error(single[key], double[key]) < 3e-6, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_frozen_model_is_the_same_function_to_the_last_bit(name, dtype):
    model, inputs, _ = make_case(name)
    velocity = model.to(dtype)(**inputs)
    assert velocity.requires_grad and torch.equal(model.requires_grad_(False)(**inputs), velocity)


# ----------------------------------------------------------------------------------------------------------------------
# presets and initialisation

def test_presets_have_the_public_number_of_parameters_heads_and_type():
    counts = {"wan2.1-t2v-1.3b": 1_418_996_800, "wan2.1-t2v-14b": 14_288_491_584, "wan2.1-i2v-14b": 16_394_878_784,
              "wan2.1-flf2v-14b": 16_395_536_704, "wan2.2-ti2v-5b": 4_999_787_712, "wan2.2-t2v-a14b": 14_288_491_584,
              "wan2.2-i2v-a14b": 14_288_901_184, "tiny": 1_243_312}
    types = dict(zip(counts, ("t2v", "t2v", "i2v", "flf2v", "ti2v", "t2v", "i2v", "t2v")))
    vaes = {"tiny": "embedded", "wan2.2-ti2v-5b": "wan2.2"}                    # A14B uses Wan2.1's, too
    assert CONFIGS.keys() == counts.keys()
    for preset, config in CONFIGS.items():
        assert sum(math.prod(shape) for shape in expected_shapes(config).values()) == counts[preset], preset
        assert config.dim // config.num_heads == (32 if preset == "tiny" else 128) and config.eps == 1e-6
        assert config.model_type == types[preset] and config.vae == vaes.get(preset, "wan2.1")
    assert dataclasses.replace(CONFIGS["tiny"], in_dim=5, out_dim=5).vae == "unknown"


def check_spread(name, parameter, std):
    tolerance = 4 / math.sqrt(parameter.numel())
    assert parameter.std().item() == pytest.approx(std, rel=tolerance), name
    assert abs(parameter.mean().item()) < std * tolerance, name


def test_initial_weights_have_the_official_statistics_and_the_first_velocity_is_zero():
    torch.manual_seed(0)
    model = WanModel(dataclasses.replace(CONFIGS["tiny"], in_dim=16, image_dim=64, image_pos_len=514))
    for name, parameter in model.named_parameters():
        is_zero = name in ("head.head.weight", "img_emb.emb_pos") or name.endswith("bias")
        if name == "patch_embedding.bias":
            assert 0 < parameter.abs().max() <= 1 / math.sqrt(16 * 4)          # PyTorch's default
        elif is_zero:
            assert (parameter == 0).all(), name
        elif "norm" in name or name in ("img_emb.proj.0.weight", "img_emb.proj.4.weight"):
            assert (parameter == 1).all(), name
        elif "modulation" in name or name.startswith(("text_", "time_embedding")):
            check_spread(name, parameter, std=128 ** -0.5)                     # normal; 0.02 from width 1024 on
            assert parameter.abs().max() > 2 * 128 ** -0.5, name
        else:                                                                  # Xavier, uniform
            std = math.sqrt(2 / sum(parameter.flatten(1).shape))
            check_spread(name, parameter, std)
            assert parameter.abs().max() <= math.sqrt(3) * std, name
    x, context, y = torch.randn(1, 12, 1, 4, 4), torch.randn(1, 3, 32), torch.randn(1, 4, 1, 4, 4)
    velocity = model(x, torch.tensor([500.0]), context, y, torch.randn(1, 514, 64))
    assert (velocity == 0).all()
    wide = WanModel(WanConfig(dim=1024, ffn_dim=8, num_heads=8, num_layers=0, in_dim=4, out_dim=4, text_dim=64))
    for layer in (wide.text_embedding[0], wide.text_embedding[2], wide.time_embedding[0], wide.time_embedding[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# what a user can get wrong

BAD_INPUTS = {                      # case, changes to its inputs, message
    "x with other channels": (
        "t2v", dict(x=torch.zeros(2, 5, 3, 6, 10)),
        r"x is \(2, 5, 3, 6, 10\); expected \(B, 4, F, H, W\)"),
    "x that is not cut by the patches": ("t2v", dict(x=torch.zeros(2, 4, 3, 6, 9)), r"multiples of \(1, 2, 2\)"),
    "x without batch": ("t2v", dict(x=torch.zeros(4, 3, 6, 10)), r"x is \(4, 3, 6, 10\)"),
    "one timestep for two videos": (
        "t2v", dict(timestep=torch.zeros(1)),
        r"timestep is \(1,\) torch.float32; expected \(2,\) or one per token, \(2, 45\)"),
    "timestep per frame": ("ti2v", dict(timestep=torch.zeros(2, 3)), r"timestep is \(2, 3\)"),
    "timestep in bf16": (
        "t2v", dict(timestep=torch.zeros(2, dtype=torch.bfloat16)),
        r"timestep is \(2,\) torch.bfloat16; .* float32"),
    "too long a context": (
        "t2v", dict(context=torch.zeros(2, 13, 20)),
        r"context is \(2, 13, 20\); expected \(2, at most 12, 20\)"),
    "context of another encoder": ("t2v", dict(context=torch.zeros(2, 9, 21)), r"context is \(2, 9, 21\)"),
    "context without batch": ("t2v", dict(context=torch.zeros(9, 20)), r"context is \(9, 20\)"),
    "no condition": (
        "i2v-a14b", dict(y=None),
        r"condition y is None; this i2v model with x \(2, 4, 3, 6, 10\) takes \(2, 5, 3, 6, 10\)"),
    "condition of another size": ("i2v-a14b", dict(y=torch.zeros(2, 5, 1, 6, 10)), r"y is \(2, 5, 1, 6, 10\)"),
    "condition for a text model": (
        "t2v", dict(y=torch.zeros(2, 5, 3, 6, 10)),
        r"y is \(2, 5, 3, 6, 10\); this t2v .* takes None"),
    "no CLIP features": (
        "i2v-clip", dict(clip_features=None),
        r"condition clip_features is None; this i2v model with x .* takes \(2, 257, 40\)"),
    "CLIP features of one image for two": (
        "flf2v", dict(clip_features=torch.zeros(2, 257, 40)),
        r"this flf2v model with x .* takes \(2, 514, 40\)"),
    "CLIP features for Wan2.2": (
        "i2v-a14b", dict(clip_features=torch.zeros(2, 257, 40)),
        r"clip_features is \(2, 257, 40\); .* takes None"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(name):
    case, changes, message = BAD_INPUTS[name]
    model, inputs, _ = make_case(case)
    with pytest.raises(ValueError, match=message):
        model(**inputs | changes)
