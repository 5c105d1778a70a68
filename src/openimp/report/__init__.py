"""A run or a model as one HTML page without scripts.

The Python modules compute what the page shows. The Jinja2 templates in `templates/` turn it into HTML and SVG.
"""
