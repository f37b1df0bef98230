"""The commands of all cases, as they are typed where a `model` is, quick on a tiny one."""

QUICK = "--bits 3 --keep *.ff.*"
QUANTIZE = {  # all of these without --output
    "kmeans": f"quantize model --recipe kmeans {QUICK}",
    "best": f"quantize model --recipe best --tokens 640 {QUICK}",
    "paper": f"quantize model --recipe paper --steps 6 --trajectories 1 {QUICK}",
}
COMPARE = "compare model kmeans --labels cat,dog --steps 1"
SAMPLE = "sample kmeans --labels cat --steps 1"
INSPECT = "inspect model --recipe kmeans"
