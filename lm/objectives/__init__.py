"""Objectives: how a batch becomes a loss."""
