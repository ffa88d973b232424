"""Sphinx: MyST pages that execute, docstrings read where they stand, warnings as errors, nothing fetched."""

import doctest
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ["HF_HUB_OFFLINE"] = "1"

from executed_pages import folder_of_outputs
from jupyter_client.manager import KernelManager

import fkernel

# Quiet kernels: encrypted where jupyter_client can, or they warn once a page; and no line for each page that starts.
if "transport_encryption" in KernelManager.class_trait_names():
    KernelManager.class_traits()["transport_encryption"].default_value = "auto"
logging.getLogger("traitlets").setLevel(logging.WARNING)

project = "fkernel"
author = "The fkernel authors"
project_copyright = author
version = release = fkernel.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "plain_docstrings",
    "coverage_check",
    "executed_pages",
    "plan_keys",
]
exclude_patterns = ["_build", "_ext", "examples", "jupyter_execute"]
default_role = "py:obj"

# The rooms whose every public name must be documented; a new room is added here and in index.md (see CONTRIBUTING.md).
coverage_rooms = ["fkernel", "fkernel.analysis", "fkernel.func", "fkernel.precond", "fkernel.tree", "fkernel.errors"]
coverage_rooms += ["fkernel.func.objectives", "fkernel.precond.updates", "fkernel.io", "fkernel.distributed"]
coverage_rooms += ["fkernel.checkpoint", "fkernel.rollout", "fkernel.record", "fkernel.study", "fkernel.report"]

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(folder_of_outputs())  # a new one for every state of what pages execute
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"  # notices of dependencies (progress bars, deprecations) are not what a page is about

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
_aliases = ("Apply", "Handle", "Handles", "Function", "Grads", "Preconditioner", "Tensor", "Tree", "Unseen")
autodoc_type_aliases = {name: name for name in _aliases}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

doctest_global_setup = "import torch; torch.manual_seed(0)"
doctest_default_flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

html_theme = "furo"
html_title = "fkernel"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["fkernel.css"]
