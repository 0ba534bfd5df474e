"""The site: written pages, one generated page per method, and a gallery that is executed when built."""

import sys
from pathlib import Path

import steep

sys.path.insert(0, str(Path(__file__).parent))
import pages

project = "steep"
author = "The steep developers"
release = steep.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "examples", "gallery/*.ipynb", "gallery/*.py"]
html_theme = "furo"
html_title = "steep"
html_static_path = ["_static"]
html_css_files = ["steep.css"]
autodoc_typehints = "none"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
}
nitpicky = False


def write_pages(app):
    pages.write_pages(Path(app.srcdir) / "methods")


def setup(app):
    app.connect("builder-inited", write_pages)
