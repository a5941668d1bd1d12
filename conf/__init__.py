"""The shipped configurations: they name classes and hold numbers, no logic.

A package, so that the wheel carries the YAML files beside the code that reads them.
"""
