# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the manual: ``sphinx -W -b html docs OUTPUT``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import optree

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
import manual.reference

project = "optree"
author = "the optree developers"
copyright = author
release = version = optree.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

globals().update(manual.settings(project, release))
setup = manual.reference.setup

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the texts say it shorter than expanded unions of trees
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = True

# The pages of the integrations can be built without the libraries.
autodoc_mock_imports = [
    name for name in ("attrs", "jax", "numpy", "torch") if importlib.util.find_spec(name) is None
]
