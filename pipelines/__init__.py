"""Imported as `mmalign.pipelines`; the folder stands at the top level of the repository."""

if __name__ == "pipelines":  # the repository root is on sys.path: a second copy of every class would appear
    raise ImportError("import mmalign.pipelines, not pipelines: run from outside the repository root or install mmalign")
