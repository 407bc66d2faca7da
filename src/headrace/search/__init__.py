"""Searches made of many runs: the highest rate that holds a latency bound, and the options that hold the most."""
