"""Losses of tokenizer training. Each is called as `loss(x_BCHW, reconstruction)` and returns a weighted scalar.

A loss has one name: its key in the configuration, in the logs and in the sum. Dropping its line drops the loss.
"""
