"""What the commands of vq and lm share. It knows neither pixels nor tokens.

Importing it loads nothing heavy: no torch, no hydra.
"""

__version__ = "0.1.0"
