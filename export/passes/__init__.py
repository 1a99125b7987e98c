"""Graph passes, one a file, each with numbered rules: what it does and when it must not fire.

They subclass `onnx_ir.passes.InPlacePass` and are composed in :mod:`quest_deploy.export.graph`.
"""
