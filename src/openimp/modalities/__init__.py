"""Image, video, audio and text: conversion of raw values to tokens. No other code depends on what a modality is.

A modality from outside the package imports its base classes from here (docs/modalities.md).
"""

from openimp.common.modality import BadMedia, Modality, StemSpec, Tokens

__all__ = ["BadMedia", "Modality", "StemSpec", "Tokens"]
