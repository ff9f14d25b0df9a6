"""The convolutional encoder and decoder of VQGAN, as VAR's tokenizer uses them.

Design choices
- Group norm (published: 32 groups) with eps 1e-6, SiLU, residual blocks of two 3×3 convolutions.
- Self-attention (one head) after every block of the lowest resolution and in the middle.
- Downsampling is a strided convolution padded on the right and below only; upsampling is
  nearest-neighbour followed by a convolution.
- Module names are those of the published checkpoint, so that its state dict loads unchanged.

Shapes: B batch, C channels, H and W side lengths, N = H·W positions.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from scaling.config import TokenizerConfig


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 shortcut when the channels change."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels_in, groups), _conv3(channels_in, channels_out)
        self.norm2, self.conv2 = _norm(channels_out, groups), _conv3(channels_out, channels_out)
        self.nin_shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        out_BCHW: Tensor = self.nin_shortcut(x_BCHW) + h_BCHW
        return out_BCHW


class Attention(nn.Module):
    """Single-head self-attention over all positions, scaled by 1/√C, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        q_BNC, k_BNC, v_BNC = self.qkv(self.norm(x_BCHW)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        h_BNC = F.scaled_dot_product_attention(q_BNC, k_BNC, v_BNC)
        projected_BCHW: Tensor = self.proj_out(h_BNC.transpose(1, 2).reshape(B, C, H, W))
        return x_BCHW + projected_BCHW


class Downsample(nn.Module):
    """Halve the sides: a 3×3 convolution of stride 2, padded by one at the right and the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return out_BCHW


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out_BCHW


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention at the lowest one, then the resizing."""

    def __init__(
        self, channels: list[int], groups: int, attention: bool, resize: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        outputs = channels[1:]
        pairs = zip(channels, outputs, strict=False)
        self.block = nn.ModuleList(ResidualBlock(before, after, groups) for before, after in pairs)
        self.attn = nn.ModuleList(Attention(c, groups) for c in outputs if attention)
        self._resize = resize[0] if resize else None
        if resize:
            self.add_module(*resize)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h_BCHW = block(h_BCHW)
            if len(self.attn):
                h_BCHW = self.attn[i](h_BCHW)
        return self.get_submodule(self._resize)(h_BCHW) if self._resize else h_BCHW


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.block_2(self.attn_1(self.block_1(h_BCHW)))
        return out_BCHW


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, z_width, H/f, W/f), f = config.downsampling."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * m for m in config.multipliers], config.norm_groups
        last = len(widths) - 1
        self.conv_in = _conv3(3, config.channels)
        self.down = nn.ModuleList()
        channels = config.channels
        for i, width in enumerate(widths):
            resize = ("downsample", Downsample(width)) if i < last else None
            self.down.append(Level([channels] + [width] * config.res_blocks, groups, i == last, resize))
            channels = width
        self.mid = Middle(channels, groups)
        self.norm_out, self.conv_out = _norm(channels, groups), _conv3(channels, config.z_width)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        h_BCHW = self.conv_in(images_B3HW)
        for level in self.down:
            h_BCHW = level(h_BCHW)
        out_BCHW: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h_BCHW))))
        return out_BCHW


class Decoder(nn.Module):
    """Features (B, z_width, H, W) to images (B, 3, H·f, W·f); the mirror of ``Encoder``."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * m for m in config.multipliers], config.norm_groups
        last = len(widths) - 1
        channels = widths[-1]
        self.conv_in = _conv3(config.z_width, channels)
        self.mid = Middle(channels, groups)
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            resize = ("upsample", Upsample(width)) if i > 0 else None
            # up.0 is the finest resolution in the published keys, though it runs last.
            self.up.insert(
                0, Level([channels] + [width] * (config.res_blocks + 1), groups, i == last, resize)
            )
            channels = width
        self.norm_out, self.conv_out = _norm(channels, groups), _conv3(channels, 3)

    def forward(self, f_BCHW: Tensor) -> Tensor:
        h_BCHW = self.mid(self.conv_in(f_BCHW))
        for i in reversed(range(len(self.up))):
            h_BCHW = self.up[i](h_BCHW)
        out_B3HW: Tensor = self.conv_out(F.silu(self.norm_out(h_BCHW)))
        return out_B3HW
