"""
Small Wan models of every variant, and the velocities and gradients that diffusers computes with them:
`python tests/make_golden.py` (needs diffusers) writes these to golden_wan.safetensors.

Weights and inputs come from numpy's RandomState, whose numbers never change, so they are not in the file.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CONFIGS, WanConfig, WanModel
from weights import public_config, rename, ORIGINAL_NAMES

GOLDEN = Path(__file__).parent / "golden_wan.safetensors"
SMALL = dict(ffn_dim=96, num_layers=2, out_dim=4, text_dim=20)
CASES = {             # heads of 24, 32, 64 and 128; diffusers finds the image tokens by a text length of 512
    "tiny": CONFIGS["tiny"],
    "t2v": WanConfig(**SMALL, dim=72, num_heads=3, in_dim=4, text_len=12, freq_dim=64),
    "ti2v": WanConfig(**SMALL, dim=128, num_heads=2, in_dim=4, text_len=12),              # a timestep per token
    "i2v-clip": WanConfig(**SMALL, dim=128, num_heads=2, in_dim=9, image_dim=40),
    "flf2v": WanConfig(**SMALL, dim=48, num_heads=2, in_dim=9, image_dim=40, image_pos_len=514),
    "i2v-a14b": WanConfig(**SMALL, dim=256, num_heads=2, in_dim=9, text_len=12),
    "tiny-activations": WanConfig(**SMALL, dim=48, num_heads=2, in_dim=9, image_dim=40),  # so that every epsilon counts
}


def make_case(name):
    """
    A small model with weights away from 0 and 1, inputs for two videos of 3 x 3 x 5 tokens, and a gradient of the
    velocity; all float32.
    """
    config, numbers = CASES[name], np.random.RandomState(7)

    def randn(*shape, scale=1.0):
        return torch.from_numpy((scale * numbers.standard_normal(shape)).astype(np.float32))

    model = WanModel(config)
    for key, parameter in sorted(model.named_parameters()):
        scale = 0.3 if parameter.ndim != 2 else 1.5 / parameter.shape[1] ** 0.5
        is_norm = "norm" in key or key.startswith(("img_emb.proj.0.", "img_emb.proj.4."))
        center = 1.0 if is_norm and key.endswith("weight") else 0.0
        parameter.data = center + randn(*parameter.shape, scale=scale)

    channels, frames, tokens = config.out_dim, 3, 45
    timestep = torch.tensor([937.3, 41.5])
    if name == "ti2v":                                       # the first frame is given: its tokens have timestep 0
        timestep = timestep[:, None] * (torch.arange(tokens) >= tokens // frames)
    inputs = {"x": randn(2, channels, frames, 6, 10), "timestep": timestep, "context": randn(2, 9, config.text_dim)}
    if config.in_dim > config.out_dim:
        inputs["y"] = randn(2, config.in_dim - config.out_dim, frames, 6, 10)
    if config.image_dim:
        inputs["clip_features"] = randn(2, config.image_pos_len or 257, config.image_dim)

    if name == "tiny-activations":
        inputs["clip_features"] *= 3e-3
        for key, parameter in model.named_parameters():
            shrink = (".q.", ".k.", ".k_img.", ".o.", "ffn.2", "patch_embedding", "img_emb.proj.3")
            if any(part in "." + key for part in shrink):
                parameter.data *= 5e-4
    return model, inputs, randn(2, channels, frames, 6, 10)


def velocity_and_gradients(forward, inputs, grad):
    """forward(**inputs) and the gradients of <grad, velocity> with respect to every input but the timestep, by name."""
    inputs = {name: value.clone().requires_grad_(name != "timestep") for name, value in inputs.items()}
    velocity = forward(**inputs)
    names = [name for name in inputs if name != "timestep"]
    grads = torch.autograd.grad((velocity * grad).sum(), [inputs[name] for name in names])
    return {"velocity": velocity.detach(), **{f"d_{name}": value for name, value in zip(names, grads)}}


def diffusers_twin(model):
    """A function of our inputs that runs diffusers' model with our weights."""
    from diffusers import WanTransformer3DModel
    config = model.config
    settings = public_config(config, "diffusers")
    settings.pop("_class_name")
    settings.pop("text_len", None)
    twin = WanTransformer3DModel(**settings)
    state = model.state_dict()
    twin.load_state_dict({name: state[rename(name, ORIGINAL_NAMES)] for name in twin.state_dict()}, strict=True)

    def forward(x, timestep, context, y=None, clip_features=None):
        x = x if y is None else torch.cat([x, y], dim=1)
        context = torch.nn.functional.pad(context, (0, 0, 0, config.text_len - context.shape[1]))
        if config.image_pos_len:
            tokens = config.image_pos_len // 2
            clip_features = clip_features.reshape(-1, tokens, config.image_dim)           # first, last, first, last
        return twin(x, timestep, context, encoder_hidden_states_image=clip_features, return_dict=False)[0]
    return forward


if __name__ == "__main__":
    golden = {}
    for name in CASES:
        model, inputs, grad = make_case(name)
        results = velocity_and_gradients(diffusers_twin(model), inputs, grad)
        golden |= {f"{name}.{key}": results[key].contiguous() for key in ("velocity", "d_x")}
    save_file(golden, GOLDEN)
    print(f"{GOLDEN}: {len(golden)} tensors, {GOLDEN.stat().st_size / 1000:.0f} kB")
