"""Site of the documents by Sphinx: sphinx-build -c docs . site, in the root of the checkout."""

project = "PermLLM"
author = "The PermLLM framework's contributors"
html_theme = "furo"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "experiments/**.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Anchors and formulas as the web page of the repository has them.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
