"""Encoders and decoders: each file holds a pair that can stand in for another pair."""
