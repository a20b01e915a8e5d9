from flashmoe.cli import entry

entry()
