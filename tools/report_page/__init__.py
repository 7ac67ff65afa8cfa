"""The report's parts: what is collected (stages, teacher, tokens, collect), how it is drawn (plots) and shown (page).

The page itself lies beside them as plain page.html, style.css and .js files, inlined by page.py. The script is
tools/report.py.
"""
