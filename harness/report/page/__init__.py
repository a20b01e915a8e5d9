"""The one page of all results, results/index.html.

speeds      rows of speed tables that may be compared
advice      what to run on which machine, in words
behind      where FlashMoE is not first
verdicts    both as tables
figures     every table with its charts, rows, provenance and CSV
datapoints  what users measured
columns     names and units that people read
filters     machine, model and memory, by which a reader filters
build       the page itself, of page.html, macros.html, style.css, page.js,
            licences.txt and sortable/
"""
