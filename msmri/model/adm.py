"""The ADM U-Net of the published weights, built from diffusers, and the map between both sets of names."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from msmri.errors import InputError

MEND = "give the unchanged state dict of a guided-diffusion U-Net without class labels"
GROUPS = 32  # of every group normalisation in this family


@dataclass(frozen=True)
class ADMConfig:
    """The shape of a guided-diffusion (ADM) U-Net. Dhariwal and Nichol 2021, section 3; as published for 256 x 256."""

    image_size: int = 256  # pixels a side in training; only says where ``attention_resolutions`` are, any size runs
    in_channels: int = 2  # real channels
    out_channels: int = 2  # at most ``in_channels``, or twice that with a learned variance, which is dropped
    channels: int = 128  # base width; the time embedding is four times as wide
    blocks_per_level: int = 2  # residual blocks a level going down; one more going up
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)  # width of each level over ``channels``
    attention_resolutions: tuple[int, ...] = (32, 16, 8)  # image sizes that have self-attention
    head_channels: int = 64  # width of an attention head
    n_heads: int | None = None  # the same number of heads everywhere, instead of the same width
    scale_shift_norm: bool = True  # the time embedding scales and shifts (FiLM) instead of only shifting
    resblock_updown: bool = True  # resample in residual blocks instead of plain convolutions

    def __post_init__(self) -> None:
        if not (1 <= self.out_channels <= self.in_channels or self.out_channels == 2 * self.in_channels):
            raise ValueError(f"out_channels must be in_channels, twice that, or fewer, got {self}")
        if any(width % GROUPS or width < GROUPS for width in self.widths):
            raise ValueError(f"every level must be a multiple of {GROUPS} channels wide, got {self.widths}")
        for width in {self.widths[-1], *(w for w, has in zip(self.widths, self.attention) if has)}:
            if width % (self.n_heads or self.head_channels):
                raise ValueError(
                    f"{width} channels cannot be split into heads "
                    + (f"({self.n_heads} of them)" if self.n_heads else f"of {self.head_channels} channels")
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of channels of each level."""
        return tuple(round(self.channels * factor) for factor in self.channel_mult)

    @property
    def attention(self) -> tuple[bool, ...]:
        """Whether each level has self-attention."""
        factors = {self.image_size // size for size in self.attention_resolutions}
        return tuple(2**level in factors for level in range(len(self.channel_mult)))

    def heads(self, width: int) -> int:
        """Give the number of attention heads of a level so many channels wide."""
        return self.n_heads or width // self.head_channels

    @classmethod
    def from_published(cls, options: Mapping[str, Any]) -> "ADMConfig":
        """Read the options under their published names (``num_channels``, ``attention_resolutions: "16,8"``, ...)."""

        def numbers(value: str | list | tuple) -> list[float]:
            return [float(v) for v in (value.split(",") if isinstance(value, str) else value)]

        in_channels, width = int(options["in_channels"]), int(options.get("num_head_channels", -1))
        return cls(
            image_size=int(options["image_size"]),
            in_channels=in_channels,
            out_channels=in_channels * (2 if options.get("learn_sigma") else 1),
            channels=int(options["num_channels"]),
            blocks_per_level=int(options["num_res_blocks"]),
            channel_mult=tuple(numbers(options["channel_mult"])),
            attention_resolutions=tuple(int(size) for size in numbers(options["attention_resolutions"])),
            head_channels=width if width > 0 else 64,
            n_heads=None if width > 0 else int(options.get("num_heads", 4)),
            scale_shift_norm=bool(options.get("use_scale_shift_norm", True)),
            resblock_updown=bool(options.get("resblock_updown", False)),
        )


COMPLEX_256 = ADMConfig()  # this and the next: the networks that Park et al. 2025 published
COLOUR_128 = ADMConfig(image_size=128, in_channels=3, out_channels=3, channel_mult=(1, 1, 2, 3, 4))


class ADMUNet(nn.Module):
    """The ADM U-Net on images of any size: it pads by reflection to what its levels divide, and crops back.

    Parameters
    ----------
    config
        The shape of the network.
    """

    def __init__(self, config: ADMConfig = COMPLEX_256) -> None:
        super().__init__()
        self.config = config
        self.unet = _build(config)

    def forward(self, image: Tensor, t: Tensor) -> Tensor:
        """Apply the network to real images (b, in_channels, y, x) at times t (b,) or (b, 1): 0 .. 999 as published.

        The result has as many channels, or ``out_channels`` if they are fewer.

        Raises
        ------
        ValueError
            If the image is not real with ``in_channels`` channels.
        """
        if image.is_complex() or image.ndim != 4 or image.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the network takes real images (batch, {self.config.in_channels}, y, x), "
                f"got {image.dtype} {tuple(image.shape)}"
            )
        y, x = image.shape[-2:]
        padded = pad_to_multiple(image, 2 ** (len(self.config.channel_mult) - 1))
        out = self.unet(padded, t.flatten().expand(image.shape[0])).sample
        return remove_padding(out[:, : self.config.in_channels], (y, x))


def pad_to_multiple(image: Tensor, factor: int) -> Tensor:
    """Pad (b, c, y, x) on all sides to multiples of ``factor`` by reflection, or by the edge pixel if too small."""
    y, x = image.shape[-2:]
    missing_y, missing_x = -y % factor, -x % factor
    for missing, size, axis in ((missing_x, x, 0), (missing_y, y, 1)):
        if missing:
            sides = (missing // 2, missing - missing // 2)
            pad = (*sides, 0, 0) if axis == 0 else (0, 0, *sides)
            image = functional.pad(image, pad, mode="reflect" if sides[1] < size else "replicate")
    return image


def remove_padding(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Take the ``shape`` (y, x) that :func:`pad_to_multiple` was given out of what it made."""
    top, left = ((padded - n) // 2 for padded, n in zip(image.shape[-2:], shape))
    return image[..., top : top + shape[0], left : left + shape[1]]


def _build(config: ADMConfig) -> nn.Module:
    """Build the network from diffusers, with the zero-initialised last layers of the family."""
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps
    from diffusers.models.resnet import ResnetBlock2D

    kind = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    down = ["AttnDownBlock2D" if has else kind[0] for has in config.attention]
    up = ["AttnUpBlock2D" if has else kind[1] for has in reversed(config.attention)]
    unet: Any = UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        time_embedding_dim=4 * config.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=config.widths,
        layers_per_block=config.blocks_per_level,
        downsample_type="resnet" if config.resblock_updown else "conv",
        upsample_type="resnet" if config.resblock_updown else "conv",
        attention_head_dim=1 if config.n_heads else config.head_channels,
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
    )
    if config.widths[0] != config.channels:  # diffusers ties the time embedding to the first level
        unet.time_proj = Timesteps(config.channels, True, 0)
        unet.time_embedding = TimestepEmbedding(config.channels, 4 * config.channels)
    for module in unet.modules():
        if isinstance(module, Attention):
            if config.n_heads:
                module.heads, module.scale = config.n_heads, (module.inner_dim / config.n_heads) ** -0.5
            _zero(module.to_out[0])
        elif isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
    _zero(unet.conv_out)
    return unet


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


# one layer's published name -> the name here; three names where one packed tensor is split
Layers = Mapping[str, str | tuple[str, ...]]
RESIDUAL: Layers = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION: Layers = {"norm": "group_norm", "qkv": ("to_q", "to_k", "to_v"), "proj_out": "to_out.0"}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _modules(config: ADMConfig) -> Iterator[tuple[str, str, Layers]]:
    """List the building blocks: published prefix, prefix here, names of the layers inside."""
    levels, n = len(config.channel_mult), config.blocks_per_level
    resample_down: Layers = RESIDUAL if config.resblock_updown else {"op": "conv"}
    resample_up: Layers = RESIDUAL if config.resblock_updown else {"conv": "conv"}
    block = 1
    for level, attends in enumerate(config.attention):
        here = f"down_blocks.{level}"
        for i in range(n):
            yield f"input_blocks.{block}.0", f"{here}.resnets.{i}", RESIDUAL
            if attends:
                yield f"input_blocks.{block}.1", f"{here}.attentions.{i}", ATTENTION
            block += 1
        if level < levels - 1:
            yield f"input_blocks.{block}.0", f"{here}.downsamplers.0", resample_down
            block += 1
    yield "middle_block.0", "mid_block.resnets.0", RESIDUAL
    yield "middle_block.1", "mid_block.attentions.0", ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", RESIDUAL
    for step, attends in enumerate(reversed(config.attention)):
        here = f"up_blocks.{step}"
        for i in range(n + 1):
            block = step * (n + 1) + i
            yield f"output_blocks.{block}.0", f"{here}.resnets.{i}", RESIDUAL
            if attends:
                yield f"output_blocks.{block}.1", f"{here}.attentions.{i}", ATTENTION
        if step < levels - 1:
            yield f"output_blocks.{block}.{1 + attends}", f"{here}.upsamplers.0", resample_up


def _names(config: ADMConfig) -> dict[str, tuple[str, ...]]:
    """Map the published name of each layer to its names in ``ADMUNet``."""
    names: dict[str, tuple[str, ...]] = {theirs: (f"unet.{ours}",) for theirs, ours in ENDS.items()}
    for prefix, here, layers in _modules(config):
        for theirs, ours in layers.items():
            parts = (ours,) if isinstance(ours, str) else ours
            names[f"{prefix}.{theirs}"] = tuple(f"unet.{here}.{part}" for part in parts)
    return names


def import_state_dict(
    state: Mapping[str, Tensor],
    *,
    head_channels: int = 64,
    n_heads: int | None = None,
    image_size: int | None = None,
) -> tuple[ADMConfig, dict[str, Tensor]]:
    """Infer the network from a published flat state dict, and rename its tensors for ``ADMUNet``.

    Every tensor is used and none is missing, or the import is refused. The packed projection of an attention layer is
    (head, q k v, head width) along its first axis.

    Parameters
    ----------
    state
        Tensors by published name, such as ``input_blocks.1.0.in_layers.2.weight``.
    head_channels, n_heads
        Width of an attention head, or their number: no shape depends on it, so it has to be known (64 as published).
    image_size
        Pixels a side in training, kept in the configuration; without it, the coarsest level is taken to be 8 x 8, as
        in all published networks. Where attention sits is read from the names.

    Raises
    ------
    InputError
        If the tensors are not those of one network of this family.
    """
    config = infer_config(state, head_channels=head_channels, n_heads=n_heads, image_size=image_size)
    names = _names(config)
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        layer, _, parameter = name.rpartition(".")
        ours = names.get(layer)
        if ours is None:
            unknown.append(name)
            continue
        if len(ours) == 1:
            parts: tuple[Tensor, ...] = (tensor,)
        else:
            width = tensor.shape[0] // 3 if tensor.ndim else 0
            heads = config.heads(width) or 1
            if width == 0 or tensor.shape[0] != 3 * heads * (width // heads):
                raise InputError(
                    f"tensor {name} of shape {tuple(tensor.shape)} does not pack three projections", mend=MEND
                )
            packed = tensor.reshape(heads, 3, width // heads, *tensor.shape[1:])
            parts = tuple(packed[:, i].flatten(0, 1) for i in range(3))
        for target, part in zip(ours, parts):
            attention = ".attentions." in target and part.ndim == 3 and part.shape[-1] == 1
            renamed[f"{target}.{parameter}"] = part[..., 0] if attention else part
    _check(config, renamed, unknown)
    return config, renamed


def _check(config: ADMConfig, renamed: Mapping[str, Tensor], unknown: list[str]) -> None:
    """Refuse tensors that are not exactly those of the network."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in ADMUNet(config).state_dict().items()}
    published = {ours: theirs for theirs, names in _names(config).items() for ours in names}

    def original(name: str) -> str:
        layer, _, parameter = name.rpartition(".")
        return f"{published[layer]}.{parameter}"

    missing = sorted({original(name) for name in expected.keys() - renamed.keys()})
    unknown = unknown + sorted({original(name) for name in renamed.keys() - expected.keys()})
    wrong = [name for name in expected.keys() & renamed.keys() if renamed[name].shape != expected[name]]
    for problem, names in (("lack", missing), ("have the unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"the weights {problem} tensor {names[0]}{more}", mend=MEND)
    if wrong:
        name = min(wrong, key=original)
        raise InputError(
            f"tensor {original(name)} has shape {tuple(renamed[name].shape)}, the network has {tuple(expected[name])}",
            mend=MEND,
        )


def infer_config(
    state: Mapping[str, Tensor], *, head_channels: int = 64, n_heads: int | None = None, image_size: int | None = None
) -> ADMConfig:
    """Read the configuration of a published state dict from its names and shapes; see ``import_state_dict``."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise InputError(f"the weights lack tensor {name}", mend=MEND)
        return tuple(state[name].shape)

    ups = sorted(
        int(match[1])
        for name in state
        if (match := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.2)\.weight", name))
    )
    outputs = len({match[1] for name in state if (match := re.match(r"output_blocks\.(\d+)\.", name))})
    levels = len(ups) + 1
    per_level, rest = divmod(outputs, levels)
    if rest or per_level < 2 or ups != [per_level * (i + 1) - 1 for i in range(levels - 1)]:
        raise InputError(f"the weights have {outputs} output blocks, {levels - 1} of them upsampling", mend=MEND)
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    widths = [shape(f"{first}.0.in_layers.2.weight")[0] for first in firsts]
    channels = shape("time_embed.0.weight")[1]
    coarsest = 2 ** (levels - 1)
    size = image_size if image_size is not None else 8 * coarsest
    if size % coarsest:
        raise InputError(f"image size {size} cannot be halved {levels - 1} times", mend="give the size in training")
    factors = [width / channels for width in widths]
    try:
        return ADMConfig(
            image_size=size,
            in_channels=shape("input_blocks.0.0.weight")[1],
            out_channels=shape("out.2.weight")[0],
            channels=channels,
            blocks_per_level=per_level - 1,
            channel_mult=tuple(int(factor) if factor.is_integer() else factor for factor in factors),
            attention_resolutions=tuple(
                size >> level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state
            ),
            head_channels=head_channels,
            n_heads=n_heads,
            scale_shift_norm=shape(f"{firsts[0]}.0.emb_layers.1.weight")[0] == 2 * widths[0],
            resblock_updown=not any(name.endswith(".op.weight") for name in state),
        )
    except IndexError:
        raise InputError("the weights have a first or last layer of the wrong rank", mend=MEND) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        mend = "give head_channels or n_heads as in training" if "heads" in str(error) else MEND
        raise InputError(str(error), mend=mend) from None


def export_state_dict(model: ADMUNet) -> dict[str, Tensor]:
    """Give the weights under their published names: the inverse of ``import_state_dict``."""
    state, out = model.state_dict(), {}
    for theirs, ours in _names(model.config).items():
        for parameter in ("weight", "bias"):
            parts = [state[name] for layer in ours if (name := f"{layer}.{parameter}") in state]
            if not parts:
                continue
            if len(ours) > 1:
                heads = model.config.heads(parts[0].shape[0])
                parts = [torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)]
            projection = parameter == "weight" and ".attentions." in ours[0] and parts[0].ndim == 2
            out[f"{theirs}.{parameter}"] = parts[0][..., None] if projection else parts[0]
    return out
