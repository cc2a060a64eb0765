"""Sphinx configuration."""

from __future__ import annotations

import os
import tempfile

# autodoc imports operators, and with them Airflow, which would read or create a home.
os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-mlops-docs-")

project = "airflow-mlops"
author = "airflow-mlops contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest"]
html_theme = "furo"
html_title = "airflow-mlops"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
