"""Readers of files that are not trusted. None of them runs code, and each has limits."""
