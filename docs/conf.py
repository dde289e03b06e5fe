"""Sphinx: python -m sphinx -W docs docs/_build/html

Without the gallery's execution, in half a minute: python -m sphinx -W -D plot_gallery=0 docs docs/_build/html. Nothing is fetched
unless PROXOPT_DOCS_ONLINE=1 is set, which adds links into the documentation of other projects.
"""

from __future__ import annotations

import configparser
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions"), str(ROOT / "examples"), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib  # noqa: E402

import proxopt  # noqa: E402

matplotlib.use("Agg")
warnings.filterwarnings("ignore", message=".*non-interactive.*")

metadata = configparser.ConfigParser()
metadata.read(ROOT / "setup.cfg", encoding="utf-8")
urls = dict(line.split(" = ") for line in metadata["metadata"]["project_urls"].strip().splitlines())
repository_url = urls["Source"]

project = "proxopt"
author = metadata["metadata"]["author"]
copyright = author
release = version = proxopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "results",
    "repository_links",
]
exclude_patterns = ["_build", "gallery", "extensions", "Thumbs.db"]
templates_path = ["_templates"]

if os.environ.get("PROXOPT_DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "scipy": ("https://docs.scipy.org/doc/scipy", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "jax": ("https://docs.jax.dev/en/latest", None),
    "optax": ("https://optax.readthedocs.io/en/latest", None),
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist", "substitution"]
myst_heading_anchors = 4
myst_substitutions = {"version": release}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = True
autosummary_ignore_module_all = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# The tests run all examples of the docstrings; `-b doctest` runs them once more from the pages.
doctest_global_setup = """
from proxopt import *
from proxopt import schedules, solvers, sparsity, testing, updates
from proxopt.schedules import *
from proxopt.solvers import *
from proxopt.sparsity import *
from proxopt.testing import *
from proxopt.updates import *
"""

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "backreferences_dir": "api/backreferences",
    "doc_module": ("proxopt", "proxopt_torch", "proxopt_jax"),
    "download_all_examples": False,
    "remove_config_comments": True,
    "matplotlib_animations": False,
    "show_memory": False,
    "min_reported_time": 1,
    "image_srcset": ["2x"],
    "plot_gallery": "True",
}

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"proxopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Formulas are MathML, which browsers draw without it. With the network MathJax draws them, with fonts made for formulas.
html_js_files = [("https://cdn.jsdelivr.net/npm/mathjax@4/mml-chtml.js", {"async": "async"})]
html_theme_options = {
    "source_repository": repository_url,
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"color-brand-primary": "#2b5d8a", "color-brand-content": "#2b5d8a"},
    "dark_css_variables": {"color-brand-primary": "#8ab8e0", "color-brand-content": "#8ab8e0"},
}
html_show_sourcelink = False

linkcheck_anchors = False
linkcheck_timeout = 20
linkcheck_ignore = [r"https://github\.com/proxopt/.*"]
