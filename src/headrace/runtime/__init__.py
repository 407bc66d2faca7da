"""Devices, and what will run on them."""
