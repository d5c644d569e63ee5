"""Quantised weight formats: the table of types, the dequantising reference, the quantisers and the mixes."""
