"""The network: stems, the shared encoder, Mixture-of-Experts, and heads.

It sees tokens only; what a picture or a sound is, is known to modalities/.
"""
