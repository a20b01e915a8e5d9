"""Engines of other people: any command that speaks the protocol of docs/engines.md."""
