"""Figures of the book: each function draws one table and returns a closed figure."""
