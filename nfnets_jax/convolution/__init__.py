"""Convolution by the fastest implementation on each platform."""

from nfnets_jax.convolution.conv import Padding, conv2d

__all__ = ['Padding', 'conv2d']
