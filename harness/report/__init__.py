"""What is written of a run, and drawn from what was written. Imports no tables and no commands.

In git, under results/, lie one folder for each machine and profile with its CSV files and their
`provenance.json`, the index `results/README.md`, and the pictures that README.md and docs/ show.

- A command writes CSV and provenance (report.py), then draws its folder's page (pages.py) into
  `FOLDER/pages/`, which git ignores, and refreshes the index (index.py). The diff of a new run is
  that of its rows.
- `python -m harness draw` draws all pages again; nothing but the CSV is needed.
- `python -m harness draw --figures` renews the pictures that documents show. The links in those
  documents are the only list of them (figures.py): run it after a run that such a picture is of,
  or after adding a link, and commit the pictures.
- A new kind of table needs a note in `notes/`, its columns in pages.py, and, if it has a picture,
  a function in plots.py.
"""
