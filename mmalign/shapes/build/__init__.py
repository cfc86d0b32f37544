"""How the models of Shapes world are trained; only `pipelines/build_shapes.py` needs it."""
