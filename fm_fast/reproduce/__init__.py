"""The paper's comparisons at a size that a laptop computes: `fm-fast reproduce table1 | checkerboard | figures`.

Numbers and drawing are apart: each comparison returns frozen values and writes them as JSON, and drawing.py makes pictures of them.
"""
