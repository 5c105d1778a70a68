"""Raw values to tokens: image, video, audio and text, the only code that knows what these are.

One from outside the package imports its bases from here (docs/modalities.md).
"""

from openimp.common.modality import BadMedia, Modality, StemSpec, Tokens

__all__ = ["BadMedia", "Modality", "StemSpec", "Tokens"]
