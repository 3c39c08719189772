"""A report on runs: one HTML file that works offline.

It contains its data, its style and Plotly, and its content security policy forbids all requests. The tables are plain
HTML; scripts sort and filter them, and draw the charts from the same data.
"""

from rsb_cluster.results.report.page import default_output, report
from rsb_cluster.results.report.publish import publish

__all__ = ["default_output", "publish", "report"]
