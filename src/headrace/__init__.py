"""Headrace: serve PyTorch models from Python at the speed of the GPU, and measure it so that it can be believed."""

__version__ = "0.1.0"
