"""The beginnings that the demo model continues, one for each kind of text."""

PROMPTS = {
    "bible": "And it came to pass in those days, that",
    "dictionary": 'Harbor \\Har"bor\\, n.',
    "french-manual": "Cette option permet de",
    "german-manual": "Diese Option gibt an, dass",
    "kernel-docs": "The driver must call this function before",
    "python": "def main(argv=None):\n    parser = argparse.",
}
