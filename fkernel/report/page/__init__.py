"""The page: one HTML file with everything that finished results hold, which needs no server and no network.

Data is made here; tables and charts are drawn by libraries in `libraries/`, and `app/` binds them to the data.
"""

from fkernel.report.page.account import account_page
from fkernel.report.page.document import page_html
from fkernel.report.page.study import study_page
from fkernel.report.page.writing import load_results, write_page

__all__ = ["account_page", "load_results", "page_html", "study_page", "write_page"]
