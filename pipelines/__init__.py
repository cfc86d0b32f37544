"""Imported as `mmalign.pipelines`; the folder stands at the top level of the repository."""

if __name__ == "pipelines":  # the repository root is on sys.path: classes would exist twice
    raise ImportError(
        "import mmalign.pipelines, not pipelines: run from outside the repository root or install"
    )
