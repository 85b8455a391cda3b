import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from msmri.errors import InputError
from msmri.model.adm import (
    COLOUR_128,
    COMPLEX_256,
    ADMConfig,
    ADMUNet,
    export_state_dict,
    import_state_dict,
    infer_config,
    pad_to_multiple,
)

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="reference files are not here")

TINY = ADMConfig(32, 2, 2, 32, 1, (1, 2, 2), (16, 8), head_channels=16)
FAMILY = {
    "scale and shift, residual resampling": TINY,
    "shift only": replace(TINY, scale_shift_norm=False),
    "plain resampling": replace(TINY, resblock_updown=False),
    "neither, deeper": ADMConfig(64, 3, 3, 32, 2, (1, 1, 2, 3), (8,), 32, None, False, False),
    "attention everywhere": replace(TINY, attention_resolutions=(32, 16, 8), head_channels=32),
    "attention in the middle only": replace(TINY, attention_resolutions=(), resblock_updown=False),
    "attention at the top only": replace(TINY, attention_resolutions=(32,)),
    "number of heads": replace(TINY, n_heads=4, blocks_per_level=2),
    "one head": replace(TINY, n_heads=1, resblock_updown=False),
    "falling widths": replace(TINY, channel_mult=(2, 1, 3), in_channels=1, out_channels=1),
    "fractional width": replace(TINY, channels=64, channel_mult=(0.5, 1.5), image_size=16, attention_resolutions=(8,)),
    "learned variance": replace(TINY, out_channels=4),
    "one level": replace(TINY, channel_mult=(1,), image_size=8, attention_resolutions=(8,), head_channels=32),
}


def weights(shapes, seed):
    """Weights as a function of their names: the recipe of the reference file."""
    rng, state = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        w = rng.standard_normal(shapes[name]).astype(np.float32)
        w = w / math.sqrt(np.prod(w.shape[1:])) if w.ndim > 1 else 0.1 * w + float(name.endswith("weight"))
        state[name] = torch.from_numpy(w.astype(np.float32))
    return state


def published(config, seed=0):
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in export_state_dict(ADMUNet(config)).items()}
    return weights(shapes, seed)


def load(state, **options):
    config, renamed = import_state_dict(state, **options)
    network = ADMUNet(config)
    network.load_state_dict(renamed)
    return network.eval()


class Reference:
    """The network, run straight from published names, layer by layer: shares nothing with diffusers or the name map."""

    def __init__(self, state, config):
        self.w, self.config = state, config

    def layer(self, name):
        return self.w[f"{name}.weight"], self.w[f"{name}.bias"]

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.layer(name), eps=1e-5)

    def residual(self, name, x, resize=None):
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resize == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if resize == "up":
            h, x = (a.repeat_interleave(2, -1).repeat_interleave(2, -2) for a in (h, x))
        h = F.conv2d(h, *self.layer(f"{name}.in_layers.2"), padding=1)
        e = F.linear(F.silu(self.embedding), *self.layer(f"{name}.emb_layers.1"))[:, :, None, None]
        if self.config.scale_shift_norm:
            scale, shift = e.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = F.conv2d(F.silu(h), *self.layer(f"{name}.out_layers.3"), padding=1)
        if f"{name}.skip_connection.weight" in self.w:
            x = F.conv2d(x, *self.layer(f"{name}.skip_connection"))
        return x + h

    def attend(self, name, x):
        c = x.shape[1]
        heads = self.config.n_heads or c // self.config.head_channels
        qkv = F.conv1d(self.norm(f"{name}.norm", x).flatten(2), *self.layer(f"{name}.qkv"))
        out = []
        for head in qkv.chunk(heads, 1):
            q, k, v = head.chunk(3, 1)
            weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(c // heads), -1)
            out.append(torch.einsum("bqk,bck->bcq", weight, v))
        return x + F.conv1d(torch.cat(out, 1), *self.layer(f"{name}.proj_out")).reshape(x.shape)

    def stage(self, name, x, resize=None):
        """Run what the names of one numbered block say is in it, in order."""
        for i in range(3):
            if f"{name}.{i}.in_layers.0.weight" in self.w:
                x = self.residual(f"{name}.{i}", x, resize=resize if i or resize == "down" else None)
            elif f"{name}.{i}.qkv.weight" in self.w:
                x = self.attend(f"{name}.{i}", x)
            elif f"{name}.{i}.op.weight" in self.w:
                x = F.conv2d(x, *self.layer(f"{name}.{i}.op"), stride=2, padding=1)
            elif f"{name}.{i}.conv.weight" in self.w:
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
                x = F.conv2d(x, *self.layer(f"{name}.{i}.conv"), padding=1)
        return x

    def __call__(self, x, t):
        per_level, channels = self.config.blocks_per_level + 1, self.config.channels
        frequency = torch.exp(-math.log(10000) * torch.arange(channels // 2) / (channels // 2))
        angle = t[:, None] * frequency
        e = F.linear(torch.cat([angle.cos(), angle.sin()], 1), *self.layer("time_embed.0"))
        self.embedding = F.linear(F.silu(e), *self.layer("time_embed.2"))
        x = F.conv2d(x, *self.layer("input_blocks.0.0"), padding=1)
        kept = [x]
        for block in range(1, per_level * len(self.config.channel_mult)):
            x = self.stage(f"input_blocks.{block}", x, "down" if block % per_level == 0 else None)
            kept.append(x)
        x = self.residual("middle_block.0", x)
        x = self.residual("middle_block.2", self.attend("middle_block.1", x))
        for block in range(per_level * len(self.config.channel_mult)):
            x = self.stage(f"output_blocks.{block}", torch.cat([x, kept.pop()], 1), "up")
        return F.conv2d(F.silu(self.norm("out.0", x)), *self.layer("out.2"), padding=1)


@needs_reference
def test_golden_network():
    golden = np.load(REFERENCE / "adm_unet_golden.npz")
    options = json.loads(str(golden["config"]))
    state = weights(json.loads(str(golden["shapes"])), int(golden["seed"]))
    network = load(state, head_channels=options["num_head_channels"])
    assert network.config == ADMConfig.from_published(options)
    x, t, y = (torch.from_numpy(golden[name]) for name in "xty")
    with torch.no_grad():
        assert (network(x, t) - y).abs().max() < 2e-5
        assert (Reference(state, network.config)(x, t) - y).abs().max() < 2e-5


@needs_reference
@pytest.mark.parametrize(
    ("file", "config", "n"),
    [("fastmri256", COMPLEX_256, 138_284_162), ("ffhq128", COLOUR_128, 105_195_139)],
)
def test_full_key_lists_are_accepted(file, config, n):
    shapes = json.loads((REFERENCE / f"published_checkpoint_{file}_keys.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    inferred, renamed = import_state_dict(state)
    assert inferred == config
    assert sum(w.numel() for w in renamed.values()) == n
    for name in list(state)[:: len(state) // 12]:
        with pytest.raises(InputError, match="lack"):
            import_state_dict({k: v for k, v in state.items() if k != name})


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_every_member_of_the_family(config):
    state = published(config)
    network = load(state, head_channels=config.head_channels, n_heads=config.n_heads, image_size=config.image_size)
    assert network.config == config
    x = torch.randn(2, config.in_channels, 16, 24, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3.0, 720.5])
    with torch.no_grad():
        out, expected = network(x, t), Reference(state, config)(x, t)
    assert out.shape == x.shape
    torch.testing.assert_close(out, expected[:, : config.in_channels], rtol=0, atol=2e-5)
    back = export_state_dict(network)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_head_width_matters_and_must_be_told():
    state, x = published(TINY), torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100.0])
    with torch.no_grad():
        out = [load(state, head_channels=16)(x, t), load(state)(x, t), load(state, n_heads=4)(x, t)]
    assert (out[0] - out[1]).abs().max() > 1e-3
    torch.testing.assert_close(out[0], out[2])  # levels with attention are 64 wide: 4 heads of 16
    with pytest.raises(InputError, match=r"64 channels cannot be split into heads of 24.*give head_channels"):
        import_state_dict(state, head_channels=24)


def test_number_of_heads_holds_for_every_way_of_attending():
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    network, x = load(published(TINY), n_heads=4), torch.ones(1, 2, 8, 8).cumsum(-1)
    out = []
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        for module in network.unet.modules():
            if isinstance(module, Attention):
                module.set_processor(processor)
        with torch.no_grad():
            out.append(network(x, torch.tensor([9.0])))
    torch.testing.assert_close(*out, rtol=0, atol=2e-5)


def test_a_new_network_predicts_zero_as_the_family_starts():
    network = ADMUNet(TINY)
    with torch.no_grad():
        assert network(torch.ones(1, 2, 8, 8), torch.zeros(1)).abs().max() == 0
        for name, parameter in network.named_parameters():
            if not name.endswith("bias"):
                last = name.endswith(("conv2.weight", "to_out.0.weight", "conv_out.weight"))
                assert bool(parameter.any()) != last, name


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (6, 10), (3, 5), (1, 1), (9, 64)])
def test_any_size_is_padded_by_reflection_and_cropped_back(size):
    network = load(published(TINY), head_channels=16)
    y, x = size
    image = torch.randn(2, 2, y, x, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = network(image, torch.tensor([50.0]))
    assert out.shape == image.shape and bool(torch.isfinite(out).all())
    pad = [(-n % 4 // 2, -n % 4 - -n % 4 // 2) for n in size]
    mode = ["reflect" if after < n else "edge" for (_, after), n in zip(pad, size)]
    whole = image.numpy()
    for axis in (0, 1):
        whole = np.pad(whole, [(0, 0), (0, 0), *[p if i == axis else (0, 0) for i, p in enumerate(pad)]], mode[axis])
    with torch.no_grad():
        unet = network.unet(torch.from_numpy(whole), torch.tensor([50.0, 50.0])).sample
    (top, _), (left, _) = pad
    torch.testing.assert_close(out, unet[..., top : top + y, left : left + x])


def test_padding_does_nothing_where_nothing_is_missing():
    image = torch.arange(12.0).reshape(1, 1, 2, 6)
    assert pad_to_multiple(image, 2) is image
    assert pad_to_multiple(image, 4)[0, 0, :, 1:-1].tolist() == [[6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5]] * 2


def test_what_the_network_is_not_made_for_is_refused():
    network = ADMUNet(TINY)
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(2, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="real images"):
            network(wrong, torch.zeros(1))


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "middle_block.1.qkv.bias"), r"lack tensor middle_block\.1\.qkv\.bias; give"),
        (lambda s: without(s, "time_embed.0.weight"), r"lack tensor time_embed\.0\.weight"),
        (lambda s: without(s, "output_blocks.0.0.out_layers.3.weight"), "lack tensor output_blocks.0.0"),
        (lambda s: {**s, "label_emb.weight": torch.zeros(10, 128)}, r"unknown tensor label_emb\.weight"),
        (
            lambda s: {**s, "middle_block.0.skip_connection.weight": torch.zeros(1)},
            "unknown tensor middle_block.0.skip",
        ),
        (lambda s: {**s, "middle_block.0.norm.weight": torch.zeros(1)}, "unknown tensor middle_block.0.norm"),
        (lambda s: {**s, "out.0.bias": torch.zeros(31)}, r"tensor out\.0\.bias has shape \(31,\), .* has \(32,\)"),
        (lambda s: {**s, "middle_block.1.qkv.weight": torch.zeros(191, 64, 1)}, "does not pack three"),
        (lambda s: {**s, "middle_block.1.qkv.weight": torch.zeros(())}, "does not pack three"),
        (
            lambda s: {**s, "middle_block.1.qkv.weight": torch.zeros(3, 64, 1)},
            r"has shape \(1, 64\), .* has \(64, 64\)",
        ),
        (lambda s: {**s, "out.2.weight": torch.zeros(3, 32, 3, 3)}, "out_channels must be"),
        (lambda s: {**s, "input_blocks.0.0.weight": torch.zeros(32)}, "wrong rank"),
        (lambda s: {**s, "out.2.weight": torch.zeros(())}, "wrong rank"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("output_blocks.5")}, "5 output blocks, 2 of them"),
        (lambda s: {}, "0 output blocks"),
        (lambda s: {"conv.weight": torch.zeros(3)}, "0 output blocks"),
    ],
)
def test_other_weights_are_refused_with_a_reason(change, message):
    with pytest.raises(InputError, match=message) as caught:
        import_state_dict(change(published(TINY)), head_channels=16)
    assert "\n" not in str(caught.value)


def test_half_and_meta_weights_keep_their_kind():
    state = {name: w.half() for name, w in published(TINY).items()}
    assert {w.dtype for w in import_state_dict(state, head_channels=16)[1].values()} == {torch.float16}
    assert infer_config(state, head_channels=16) == TINY


def test_published_options_are_read():
    options = {"image_size": 512, "in_channels": 3, "num_channels": 256, "num_res_blocks": 2, "num_heads": 4}
    options |= {"channel_mult": "0.5,1,1,2,2,4,4", "attention_resolutions": "32,16", "learn_sigma": True}
    options |= {"use_scale_shift_norm": False}
    config = ADMConfig.from_published(options)
    assert config.widths == (128, 256, 256, 512, 512, 1024, 1024) and config.out_channels == 6
    assert config.attention == (False, False, False, False, True, True, False)
    assert (config.n_heads, config.heads(512), config.scale_shift_norm, config.resblock_updown) == (4, 4, False, False)
    assert ADMConfig.from_published({**options, "num_head_channels": 64}).heads(512) == 8


@pytest.mark.parametrize("wrong", [{"out_channels": 3}, {"channels": 48}, {"head_channels": 48}, {"n_heads": 5}])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|cannot be split"):
        replace(TINY, **wrong)
