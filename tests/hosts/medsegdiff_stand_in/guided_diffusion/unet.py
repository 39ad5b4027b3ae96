import torch
from torch import nn


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    def __init__(self, channels, emb_channels, dropout, out_channels=None):
        super().__init__()
        self.out_channels = out_channels or channels
        self.in_layers = nn.Conv2d(channels, self.out_channels, 3, padding=1)
        self.emb_layers = nn.Linear(emb_channels, self.out_channels)
        self.skip_connection = nn.Conv2d(channels, self.out_channels, 1)

    def forward(self, x, emb):
        return self.skip_connection(x) + torch.relu(self.in_layers(x) + self.emb_layers(emb)[:, :, None, None])


class Generic_UNet(nn.Module):
    """The highway network: a second mask, and something added to the bottleneck."""

    def __init__(self, input_channels, channels):
        super().__init__()
        self.mask = nn.Conv2d(input_channels, 1, 3, padding=1)
        self.emb = nn.Conv2d(input_channels, channels, 3, stride=2, padding=1)

    def forward(self, x, hs):
        return self.emb(x), torch.sigmoid(self.mask(x))


class UNetModel(nn.Module):
    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        high_way=True,
    ):
        super().__init__()
        width = model_channels
        self.time_embed = nn.Linear(1, 4 * width)
        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv2d(in_channels, width, 3, padding=1)),
                TimestepEmbedSequential(ResBlock(width, 4 * width, dropout), nn.Conv2d(width, width, 3, stride=2, padding=1)),
            ]
        )
        self.middle_block = TimestepEmbedSequential(ResBlock(width, 4 * width, dropout))
        self.output_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(ResBlock(2 * width, 4 * width, dropout, width), nn.Upsample(scale_factor=2)),
                TimestepEmbedSequential(ResBlock(2 * width, 4 * width, dropout, width)),
            ]
        )
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)
        self.hwm = Generic_UNet(in_channels - 1, width)

    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(timesteps[:, None].float() / 1000)
        h, hs = x, []
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        more, cal = self.hwm(x[:, :-1], hs)
        h = self.middle_block(h + more, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h), cal
