"""Attention over chunks: one seam, several backends."""
