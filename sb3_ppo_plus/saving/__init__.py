"""Models and normalisers in files, with trust and without."""
