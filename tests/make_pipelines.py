"""
Tiny random Wan pipelines of diffusers, one of every kind, with a text encoder, a VAE and a CLIP of their own.

Needs diffusers and transformers: test files skip themselves before they import this one.
"""
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

PROMPTS = ["A red ball rolls over the grass.", "two   dogs &amp; a cat"]
NEGATIVE = "blurred, grey"
I2V = dict(channels=16, y_channels=20)
# The transformer; flow_shift, guidance (high-noise expert first), boundary in public use; pictures; height and width.
CASES = {
    "t2v": (dict(), 5.0, [5.0], None, 0, (32, 64)),
    # Square, since diffusers crops what CLIP sees and Wan squashes it.
    "i2v": (I2V | dict(image=True), 3.0, [5.0], None, 1, (32, 32)),
    "flf2v": (I2V | dict(image=True, flf2v=True), 16.0, [5.0], None, 2, (32, 32)),
    "t2v a14b": (dict(), 12.0, [4.0, 3.0], 0.875, 0, (32, 64)),
    "i2v a14b": (I2V, 5.0, [3.5, 3.5], 0.9, 1, (32, 64)),
    "ti2v": (dict(channels=48), 5.0, [5.0], None, 0, (64, 32)),
    "ti2v with an image": (dict(channels=48), 5.0, [5.0], None, 1, (64, 32)),
}


def make_tokenizer():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(PROMPTS + [NEGATIVE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_vae(large):
    """A narrow VAE of Wan2.1, or of Wan2.2 if `large`."""
    torch.manual_seed(5)
    if not large:
        return AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    return AutoencoderKLWan(base_dim=8, decoder_base_dim=8, z_dim=48, num_res_blocks=1, in_channels=12, out_channels=12,
                            patch_size=2, is_residual=True, scale_factor_spatial=16,
                            latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(),
                            latents_std=torch.linspace(0.4, 1.2, 48).tolist())


def make_transformer(seed, channels=16, y_channels=0, image=False, flf2v=False):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=24, in_channels=channels + y_channels,
                                  out_channels=channels, text_dim=20, freq_dim=32, ffn_dim=64, num_layers=2,
                                  image_dim=32 if image else None, added_kv_proj_dim=48 if image else None,
                                  pos_embed_seq_len=514 if flf2v else None).eval()
    if flf2v:                                                # zero at first: the order of the images would not show
        torch.nn.init.normal_(model.condition_embedder.image_embedder.pos_embed)
    return model


def make_text_encoder():
    torch.manual_seed(6)
    config = UMT5Config(vocab_size=64, d_model=20, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                        feed_forward_proj="gated-gelu")
    return UMT5EncoderModel(config).eval()


def make_clip():
    torch.manual_seed(7)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                              image_size=32, patch_size=2, hidden_act="gelu")
    return CLIPVisionModel(config).eval()


def make_pipeline(case):
    """The pipeline of one of CASES, random but the same in every call."""
    build, flow_shift, _, boundary, pictures, _ = CASES[case]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    parts = dict(tokenizer=make_tokenizer(), text_encoder=make_text_encoder(), vae=make_vae("ti2v" in case),
                 scheduler=scheduler, transformer=make_transformer(1, **build),
                 transformer_2=make_transformer(2, **build) if boundary else None, boundary_ratio=boundary,
                 expand_timesteps="ti2v" in case)
    if not pictures:
        return WanPipeline(**parts)
    if build.get("image"):
        image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        parts |= dict(image_encoder=make_clip(), image_processor=image_processor)
    return WanImageToVideoPipeline(**parts)
