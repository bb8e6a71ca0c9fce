"""Adapters in folders and on the Hub: the card beside them, and loading them for use."""
