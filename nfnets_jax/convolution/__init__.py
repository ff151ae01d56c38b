"""Convolution in the form that is fastest on the platform at hand."""

from nfnets_jax.convolution.conv import Padding, conv2d

__all__ = ['Padding', 'conv2d']
