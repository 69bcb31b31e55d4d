"""`pgtable map`: what tables map, drawn: one HTML page without a network, or one SVG.

Rules of this folder:
- Python decides what is true (rows, walks, layouts, areas) and hands it over as JSON; the page only draws it. Bit
  numbers and meanings come from pgtable/descriptors.py through layouts.py, none are written in JavaScript.
- scale.py and map.js place ranges by the same rule; a test compares them.
- Everything from outside goes through JSON or an escape, and the page sets text only, never markup.
"""
