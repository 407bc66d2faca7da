"""Measuring any server of the v2 protocol by its URL, and a null server of known law to measure the harness with."""
