"""Data shipped with fm_fast; the text file beside each archive names its source and licence."""
