"""The notebooks of the course in reading order; those that are written know their minutes from their lesson."""

# Number, short title, a learner's minutes (None: not written yet). A test holds the minutes equal to the lessons'.
NOTEBOOKS: tuple[tuple[str, str, int | None], ...] = (
    ("00", "start here", 15),
    ("01", "dense FFN", 60),
    ("02", "router", 60),
    ("03", "top-k MoE", 60),
    ("04", "dispatch", 60),
    ("05", "load balancing", 60),
    ("06", "shared experts", 60),
    ("07", "expert parallelism", 60),
    ("08", "Triton grouped GEMM", 70),
    ("09", "arithmetic of MoE", 90),
    ("10", "training", None),
    ("11", "serving", None),
    ("12", "distil, upcycle", None),
    ("13", "real checkpoints", None),
    ("14", "the bug museum", None),
)
