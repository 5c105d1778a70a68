"""What all folders use: errors, safe files, devices, progress bars, versions, and the bases of modalities.

Nothing here imports from another folder of openimp.
"""
