"""Quantization: types, codecs, importance of the columns, and the writer that goes on where it was cut off."""
