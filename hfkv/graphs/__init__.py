"""Decode steps as CUDA graphs: the model (`decode`), a step (`step`, `stand_in`), what it asks (`trace`), `device`."""

from hfkv.graphs.decode import DecodeReport, compile_decode, decode_report

__all__ = ["DecodeReport", "compile_decode", "decode_report"]
