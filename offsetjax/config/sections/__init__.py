"""The declarations of all fields, by subject; `schema.py` puts them together."""
