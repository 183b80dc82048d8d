"""Configs to start from."""
