"""The network: stems, the shared encoder, Mixture-of-Experts and heads.

It works on tokens only. `modalities/` turns pictures, clips, sounds and texts into tokens.
"""
