"""Encoders and decoders: each file holds a pair that can stand in for another pair."""

from torch import nn


class Backbone(nn.Module):
    """What the tokenizer asks of an encoder or a decoder."""

    downsample: int  # f: picture side / grid side
    latent_dim: int  # D: channels of the latent

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the last layer: adversarial losses are balanced by the gradients that reach it."""
        raise NotImplementedError
