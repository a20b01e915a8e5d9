"""What is written of a run, and drawn from what was written. Imports no tables and no commands.

In git, under results/, lie one folder for each machine and profile with its CSV files and their
`provenance.json`, the index `results/README.md`, the page `results/index.html`, and the pictures
that README.md and docs/ show.

- A command writes CSV and provenance (report.py), then refreshes the index (index.py) and the page
  (page/).
- `python -m harness report` builds both again; nothing but what lies under results/ is needed.
- `python -m harness report --pictures` also renews the pictures that documents show. The links in
  those documents are the only list of them (pictures.py): run it after a run that such a picture
  is of, or after adding a link, and commit the pictures.
- A new kind of table needs a note in `notes/`, its columns in page/columns.py, its title in
  page/figures.py and, if it has a chart, a function in charts/.
"""
