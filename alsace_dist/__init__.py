"""Narrow the gap between languages inside one multilingual model, without labels (ALSACE), at scale."""

__version__ = "0.2.0"
