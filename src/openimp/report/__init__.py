"""A run or a model as one HTML page without scripts.

Charts are SVG inside the page.
"""
