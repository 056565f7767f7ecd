"""``python -m fastprompt.families``: the table of what is served, as Markdown."""

from fastprompt.families.table import markdown

print(markdown())
