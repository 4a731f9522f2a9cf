"""Kept for tools that still look for setup.py; all settings are in pyproject.toml."""

from setuptools import setup

setup()
